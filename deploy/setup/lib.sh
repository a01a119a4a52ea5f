# shellcheck shell=bash
# What the setup scripts share: paths, messages, versions, and Debian packages unpacked beside the host.
# Sourced, never run.

PODFERRY_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
PODFERRY_STATE=$PODFERRY_ROOT/.podferry
TOOLS_DIR=$PODFERRY_STATE/tools

# Debian's archive keys of bookworm (B8B80B5B623EAB6AD8775C45B7C5D7D6350947F8, until 2031) and trixie
# (04B54C3CDCA79751B16BC6B5225629DF75B188BD, until 2035), which sign sid too. Here because Ubuntu 22.04's package of
# Debian's keys is older than both.
readonly DEBIAN_KEYRING=$PODFERRY_ROOT/deploy/setup/debian-archive.asc

# Where setup.sh puts a Rust of our own, if the host has none that is new enough.
PODFERRY_RUST=$PODFERRY_STATE/rust
use_own_rust() {
    if [[ -x $PODFERRY_RUST/cargo/bin/cargo ]]; then
        PATH=$PODFERRY_RUST/cargo/bin:$PATH
        RUSTUP_HOME=$PODFERRY_RUST/rustup
        export PATH RUSTUP_HOME
    fi
}

# rustup puts cargo here without telling non-interactive shells.
if [[ -d ${CARGO_HOME:-${HOME:-/root}/.cargo}/bin ]]; then
    PATH=$PATH:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin
fi
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH
use_own_rust

log() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

die() {
    log "error: $*"
    exit 1
}

require_root() {
    [[ $EUID -eq 0 ]] || die "needs root: CRIU, runc and network namespaces do too; run it with sudo"
}

# until_true COMMAND...: repeats it until it succeeds, for $PATIENCE seconds. What it said last is in $work/last: no substitution, for it may
# set variables.
until_true() {
    local end=$((SECONDS + PATIENCE))
    until "$@" >"${work:?}/last" 2>&1; do
        if [[ $SECONDS -ge $end ]]; then
            log "not true within $PATIENCE s: $*"
            cat "${work:?}/last" >&2
            return 1
        fi
        sleep 0.2
    done
}

# version_at_least HAVE WANT
version_at_least() {
    [[ -n $1 && $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]
}

# PATH without our own tools, so that a search finds what the host has.
host_path() {
    local part kept=()
    local parts
    IFS=: read -r -a parts <<<"$PATH"
    for part in "${parts[@]}"; do
        [[ $part == "$TOOLS_DIR/bin" ]] || kept+=("$part")
    done
    (IFS=: && printf '%s' "${kept[*]}")
}

# The Debian mirrors to try, best first: the asked-for one, the one this host uses, the public one.
debian_mirrors() {
    [[ -z ${PODFERRY_DEBIAN_MIRROR:-} ]] || printf '%s\n' "$PODFERRY_DEBIAN_MIRROR"
    find /etc/apt/sources.list /etc/apt/sources.list.d \( -name '*.list' -o -name '*.sources' \) \
        -exec sed -nE '/^[[:space:]]*#/d; s#^.*[[:space:]](https?://[^[:space:]]+/debian)/?([[:space:]].*)?$#\1#p' {} + \
        2>/dev/null || true
    printf '%s\n' http://deb.debian.org/debian
}

# private_apt DIR COMMAND...: apt-get on the state in DIR. It keeps the host's Acquire settings (proxies, validity checks)
# and knows nothing of the host's packages, so it resolves a complete closure and never touches the host.
private_apt() {
    local dir=$1
    shift
    apt-get -qq \
        -o Dir::State="$dir" -o Dir::State::lists="$dir/lists" -o Dir::State::status="$dir/status" \
        -o Dir::Cache="$dir" -o Dir::Cache::archives="$dir/archives" \
        -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
        -o APT::Sandbox::User=root -o APT::Update::Error-Mode=any -o Acquire::Retries=3 \
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false \
        -o Acquire::IndexTargets::deb::Translations::DefaultEnabled=false "$@"
}

# unpack_debian SUITE DEST PACKAGE...: unpacks the packages and all they depend on into DEST, running no package script.
unpack_debian() {
    local suite=$1 dest=$2 mirror
    shift 2
    while read -r mirror; do
        log "taking $* from $mirror $suite"
        if unpack_debian_from "$mirror" "$suite" "$dest" "$@"; then
            return 0
        fi
        log "$mirror $suite did not give $*"
    done < <(debian_mirrors | awk '!seen[$0]++')
    return 1
}

unpack_debian_from() {
    local mirror=$1 suite=$2 dest=$3 deb
    shift 3
    local apt=$PODFERRY_STATE/cache/apt-$suite
    rm -rf "$apt" "$dest"
    mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$dest"
    : >"$apt/status"
    printf 'deb [signed-by=%s] %s %s main\n' "$DEBIAN_KEYRING" "$mirror" "$suite" >"$apt/sources.list"
    private_apt "$apt" update >&2 </dev/null || return 1
    private_apt "$apt" install -y --no-install-recommends --download-only "$@" >&2 </dev/null || return 1
    for deb in "$apt"/archives/*.deb; do
        dpkg-deb -x "$deb" "$dest" || return 1
    done
    # The package lists are by far the largest part and are stale tomorrow.
    rm -rf "$apt"
}

# library_dirs ROOT: the library folders of an unpacked root, joined by colons.
library_dirs() {
    local triplet dir found=()
    triplet=$(uname -m)-linux-gnu
    for dir in "$1/lib/$triplet" "$1/usr/lib/$triplet" "$1/lib" "$1/usr/lib" "$1/lib64" "$1/usr/lib64"; do
        [[ -d $dir ]] && found+=("$dir")
    done
    (IFS=: && printf '%s' "${found[*]}")
}

# find_loader DIRS NAME: the program loader NAME in a colon-joined list of folders.
find_loader() {
    local dirs dir
    IFS=: read -r -a dirs <<<"$1"
    for dir in "${dirs[@]}"; do
        if [[ -f $dir/$2 ]]; then
            readlink -f "$dir/$2"
            return 0
        fi
    done
    return 1
}

# shared_libraries BINARY [DIRS]: the files BINARY loads, one a line, its loader not among them. With DIRS it is resolved
# by the loader found there, so a root with a newer libc than the host's is read correctly.
shared_libraries() {
    local binary=$1 library_path=${2:-} interpreter listing
    interpreter=$(patchelf --print-interpreter "$binary" 2>/dev/null) || return 0
    if [[ -n $library_path ]]; then
        local loader
        loader=$(find_loader "$library_path" "${interpreter##*/}") || die "no ${interpreter##*/} in $library_path for $binary"
        listing=$("$loader" --inhibit-cache --library-path "$library_path" --list "$binary") ||
            die "cannot resolve the libraries of $binary: $listing"
    else
        listing=$(ldd "$binary") || die "cannot resolve the libraries of $binary: $listing"
    fi
    if grep -q 'not found' <<<"$listing"; then
        die "libraries of $binary are missing: $(grep 'not found' <<<"$listing")"
    fi
    sed -nE 's#^.* => (/[^ ]+) \(0x.*#\1#p' <<<"$listing" | grep -vF "/${interpreter##*/}" || true
}
