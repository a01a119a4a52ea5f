#!/usr/bin/env bash
# Gives this machine what podferry builds and runs on: build tools by apt, and a CRIU and a runc that are new enough.
# Where the host's own are too old, private bundles are made from Debian's packages under .podferry/tools: the host's libc
# and toolchain stay as they are. Idempotent, quick when all is there, safe to run twice at once.
#
#   setup.sh            everything, the Redis image too
#   setup.sh --tools    only CRIU and runc
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# 4.1 cannot dump a process with an AF_INET socket on Linux 6.17 and later (SO_PASSCRED), 3.17 does not start there.
readonly CRIU_MINIMUM=4.2.1
# The first with `--manage-cgroups-mode ignore` and pidfd support as the agent uses them.
readonly RUNC_MINIMUM=1.3
readonly CARGO_MINIMUM=1.90
# What is installed where cargo is older, and what the project is developed with.
readonly RUST_VERSION=1.95.0
readonly RUSTUP_URL=https://static.rust-lang.org/rustup/dist
# Raise it when the layout of .podferry/tools changes: older ones are then made anew.
readonly LAYOUT=1

apt_updated=

apt_host() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" >&2 </dev/null
}

apt_install() {
    log "apt installs $*"
    if [[ -z $apt_updated ]]; then
        # One broken third-party source must not stop us: the install itself says what is missing.
        apt_host update || log "warning: apt-get update failed in part; going on with what there is"
        apt_updated=yes
    fi
    apt_host install -y --no-install-recommends "$@" || die "apt could not install: $*"
}

# "file or command : package". runc has CRIU lock the network with iptables-restore; the rest is for building and namespaces.
install_missing() {
    local missing=() pair probe package
    for pair in ip:iproute2 patchelf:patchelf cc:build-essential make:build-essential git:git curl:curl flock:util-linux \
        iptables-restore:iptables nsenter:util-linux ps:procps file:file xz:xz-utils zstd:zstd \
        python3:python3 \
        /etc/ssl/certs/ca-certificates.crt:ca-certificates; do
        probe=${pair%%:*} package=${pair##*:}
        if [[ $probe == /* ]]; then
            [[ -e $probe ]] || missing+=("$package")
        else
            command -v "$probe" >/dev/null || missing+=("$package")
        fi
    done
    [[ ${#missing[@]} -eq 0 ]] || apt_install "${missing[@]}"
}

# CRIU starts its action script by a shell, overlayfs takes commas and colons in its options for its own, and PATH the
# colons: folders that need quoting are refused here, before anything fails in the middle.
check_folders() {
    local folder
    for folder in "$PODFERRY_ROOT" "${CARGO_TARGET_DIR:-}"; do
        if [[ $folder == *[[:space:][:cntrl:]\'\"\\\`:,\;\$\&\|\<\>\(\)\*\?\[\]\{\}\!\#]* ]]; then
            die "the folder '$folder' has blanks or punctuation that a shell, make or overlayfs gives a meaning of its own:" \
                "use one without, for example /opt/podferry"
        fi
    done
}

# Prints nothing, and succeeds, where there is no cargo: under `set -e` and pipefail its 127 would end setup without a word.
cargo_version() { { cargo --version 2>/dev/null || true; } | awk '{ print $2 }'; }

# The parts of a toolchain that `make lint` and `.ci/run` use and that distributions pack apart from cargo.
has_cargo_parts() { cargo fmt --version >/dev/null 2>&1 && cargo clippy --version >/dev/null 2>&1; }

# A Rust of the project's own where the host's is missing, old or incomplete: run.sh finds it, and the host's own stays as
# it is.
ensure_cargo() {
    local lacks=''
    if ! version_at_least "$(cargo_version)" "$CARGO_MINIMUM"; then
        lacks="cargo $CARGO_MINIMUM or newer is needed, found '$(cargo_version)'"
    elif ! has_cargo_parts; then
        lacks="cargo $(cargo_version) has no rustfmt or no clippy"
    else
        return 0
    fi
    log "$lacks: installing Rust $RUST_VERSION into $PODFERRY_RUST"
    if install_rust; then
        use_own_rust
        hash -r
    elif rm -rf "$PODFERRY_RUST" && version_at_least "$(cargo_version)" "$CARGO_MINIMUM"; then
        # Enough to build and to test.
        log "warning: Rust could not be installed from $RUSTUP_URL, and without rustfmt and clippy \`make lint\` fails:" \
            "install them beside $(command -v cargo)"
        return 0
    else
        die "Rust could not be installed from $RUSTUP_URL: install it from https://rustup.rs and run this again"
    fi
    { version_at_least "$(cargo_version)" "$CARGO_MINIMUM" && has_cargo_parts; } ||
        die "the Rust in $PODFERRY_RUST does not run on this machine"
}

install_rust() {
    local target
    target=$(uname -m)-unknown-linux-gnu
    local download=$PODFERRY_STATE/cache/rustup
    mkdir -p "$download"
    curl -fsSL --retry 3 -o "$download/rustup-init" "$RUSTUP_URL/$target/rustup-init" || return 1
    curl -fsSL --retry 3 -o "$download/rustup-init.sha256" "$RUSTUP_URL/$target/rustup-init.sha256" || return 1
    # The published sum names the file by its path in rustup's build: only the sum is taken.
    printf '%s  %s\n' "$(cut -d ' ' -f 1 "$download/rustup-init.sha256")" "$download/rustup-init" |
        sha256sum --check --quiet - >&2 || return 1
    chmod 0755 "$download/rustup-init"
    RUSTUP_HOME=$PODFERRY_RUST/rustup CARGO_HOME=$PODFERRY_RUST/cargo RUSTUP_INIT_SKIP_PATH_CHECK=yes \
        "$download/rustup-init" -y --quiet --no-modify-path --profile minimal --component clippy --component rustfmt \
        --default-toolchain "$RUST_VERSION" >/dev/null </dev/null || return 1
    rm -rf "$PODFERRY_STATE/cache/rustup"
}

criu_version() { "$1" --version 2>/dev/null | sed -nE 's/^Version: *([0-9.]+).*/\1/p'; }
runc_version() { "$1" --version 2>/dev/null | sed -nE 's/^runc version ([0-9.]+).*/\1/p'; }

# good_on_host NAME MINIMUM: prints the host's own NAME if it is new enough.
good_on_host() {
    local found version
    found=$(PATH=$(host_path) command -v "$1") || return 1
    version=$("$1_version" "$found") || return 1
    version_at_least "$version" "$2" && printf '%s\n' "$found"
}

good_tools() {
    local bin=$TOOLS_DIR/bin
    [[ -f $TOOLS_DIR/stamp && $(<"$TOOLS_DIR/stamp") == "$LAYOUT $TOOLS_DIR" ]] &&
        version_at_least "$(criu_version "$bin/criu")" "$CRIU_MINIMUM" &&
        version_at_least "$(runc_version "$bin/runc")" "$RUNC_MINIMUM" &&
        [[ -x $TOOLS_DIR/libexec/busybox ]]
}

# copy_libraries BINARY ROOT DEST: BINARY's libraries and its loader, flat in DEST. Prints the loader's name.
copy_libraries() {
    local binary=$1 dirs library loader
    dirs=$(library_dirs "$2")
    mkdir -p "$3"
    loader=$(patchelf --print-interpreter "$binary")
    loader=${loader##*/}
    while read -r library; do
        install -m 0755 "$library" "$3/${library##*/}"
    done < <(shared_libraries "$binary" "$dirs")
    install -m 0755 "$(find_loader "$dirs" "$loader")" "$3/$loader"
    printf '%s\n' "$loader"
}

# CRIU never executes itself again, so it may run behind its own loader.
bundle_criu() {
    local root=$1 new=$2 loader
    loader=$(copy_libraries "$root/usr/sbin/criu" "$root" "$new/lib/criu")
    install -m 0755 "$root/usr/sbin/criu" "$new/libexec/criu"
    cat >"$new/bin/criu" <<WRAPPER
#!/bin/sh
# Made by deploy/setup/setup.sh: Debian's CRIU with its own libraries and loader.
t='$TOOLS_DIR'
exec "\$t/lib/criu/$loader" --inhibit-cache --library-path "\$t/lib/criu" --argv0 criu "\$t/libexec/criu" "\$@"
WRAPPER
    chmod 0755 "$new/bin/criu"
}

# runc executes /proc/self/exe, which behind a loader would be the loader: its ELF header names the private loader instead.
bundle_runc() {
    local root=$1 new=$2 binary loader
    binary=$(find "$root/usr/sbin/runc" "$root/usr/bin/runc" -type f 2>/dev/null | head -n 1) || true
    [[ -n $binary ]] || die "no runc in $root"
    loader=$(copy_libraries "$binary" "$root" "$new/lib/runc")
    install -m 0755 "$binary" "$new/bin/runc"
    patchelf --set-interpreter "$TOOLS_DIR/lib/runc/$loader" --set-rpath "$TOOLS_DIR/lib/runc" \
        --force-rpath "$new/bin/runc"
}

make_tools() {
    local new=$PODFERRY_STATE/tools.new root=$PODFERRY_STATE/cache/tools-root criu runc suite packages=(busybox-static)
    criu=$(good_on_host criu "$CRIU_MINIMUM") || packages+=(criu)
    runc=$(good_on_host runc "$RUNC_MINIMUM") || packages+=(runc)
    for suite in sid testing ''; do
        [[ -n $suite ]] || die "no Debian mirror gave ${packages[*]}; set PODFERRY_DEBIAN_MIRROR to one that can be reached"
        unpack_debian "$suite" "$root" "${packages[@]}" && break
    done

    rm -rf "$new"
    mkdir -p "$new/bin" "$new/libexec" "$new/lib"
    install -m 0755 "$(find "$root" -path '*/bin/busybox' -type f | head -n 1)" "$new/libexec/busybox"
    if [[ -n $criu ]]; then ln -s "$criu" "$new/bin/criu"; else bundle_criu "$root" "$new"; fi
    if [[ -n $runc ]]; then ln -s "$runc" "$new/bin/runc"; else bundle_runc "$root" "$new"; fi
    printf '%s\n' "$LAYOUT $TOOLS_DIR" >"$new/stamp"

    rm -rf "$TOOLS_DIR"
    mv "$new" "$TOOLS_DIR"
    rm -rf "$root"
    good_tools || die "the tools made in $TOOLS_DIR are not usable: criu '$(criu_version "$TOOLS_DIR/bin/criu")'" \
        "(need $CRIU_MINIMUM), runc '$(runc_version "$TOOLS_DIR/bin/runc")' (need $RUNC_MINIMUM)"
}

verify() {
    local said
    said=$("$TOOLS_DIR/bin/criu" check 2>&1) ||
        die "this kernel ($(uname -r)) lacks what CRIU needs, or the container running this lacks privileges: $said"
    log "criu $(criu_version "$TOOLS_DIR/bin/criu"), runc $(runc_version "$TOOLS_DIR/bin/runc"): criu check says: $said"
}

main() {
    require_root
    check_folders
    mkdir -p "$PODFERRY_STATE/cache"
    exec 9>"$PODFERRY_STATE/setup.lock"
    flock -w 1200 9 || die "another setup.sh holds $PODFERRY_STATE/setup.lock for 20 minutes"
    install_missing 9>&-
    [[ ${1:-} == --tools ]] || ensure_cargo 9>&-
    good_tools 9>&- || make_tools 9>&-
    verify 9>&-
    exec 9>&-
    [[ ${1:-} == --tools ]] || "$PODFERRY_ROOT/deploy/setup/redis-image.sh"
}

# lint.sh looks at single functions.
[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
