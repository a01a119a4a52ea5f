#!/usr/bin/env bash
# Formatting, clippy, shell scripts, one version everywhere, and what the dependency tree may hold (deny.toml). One line of JSON at the end.
#
#   lint.sh             all of it
#   lint.sh --install   only gets cargo-deny ready
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly DENY_VERSION=0.20.2
readonly DENY=$PODFERRY_STATE/cargo/bin/cargo-deny

# cargo-deny from crates.io, built for a short build: it runs for a second.
install_deny() {
    [[ $("$DENY" --version 2>/dev/null) == "cargo-deny $DENY_VERSION" ]] && return
    log "building cargo-deny $DENY_VERSION"
    # A build folder of its own: it must neither wait for nor mix with the workspace's.
    CARGO_TARGET_DIR=$PODFERRY_STATE/cargo/build CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off \
        CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 CARGO_PROFILE_RELEASE_DEBUG=0 \
        cargo install --quiet --locked --root "$PODFERRY_STATE/cargo" --version "$DENY_VERSION" --force cargo-deny </dev/null
    rm -rf "$PODFERRY_STATE/cargo/build"
}

main() {
    cd "$PODFERRY_ROOT"
    mkdir -p "$PODFERRY_STATE/cargo"
    exec 8>"$PODFERRY_STATE/cargo/lock"
    flock -w 900 8 || die "another cargo-deny build holds $PODFERRY_STATE/cargo/lock for 15 minutes"
    install_deny 8>&-
    exec 8>&-
    [[ ${1:-} != --install ]] || return 0

    local check failed=()
    for check in check_format check_clippy check_fuzz check_scripts check_setup check_versions check_deny; do
        log "$check"
        "$check" || failed+=("\"$check\"")
    done
    printf '{"ok": %s, "failed": [%s]}\n' "$([[ ${#failed[@]} -eq 0 ]] && echo true || echo false)" "$(IFS=, && echo "${failed[*]}")"
    [[ ${#failed[@]} -eq 0 ]]
}

check_format() { cargo fmt --all --check; }
check_clippy() { cargo clippy --workspace --all-targets --locked -- -D warnings; }
check_fuzz() { cargo check --manifest-path fuzz/Cargo.toml --locked --target-dir target; }
check_deny() { "$DENY" --locked check bans licenses sources; }

check_scripts() {
    if ! command -v shellcheck >/dev/null; then
        { apt-get -qq update && apt-get -qq install -y --no-install-recommends shellcheck; } >&2 </dev/null || return 1
    fi
    git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck -x
}

check_versions() { deploy/release/versions.sh >/dev/null; }

# A machine without cargo is the one that setup is for.
check_setup() {
    local folder status=0
    folder=$(mktemp -d)
    ln -s "$(command -v awk)" "$folder/awk"
    bash -euo pipefail -c '. deploy/setup/setup.sh; PATH=$1; version=$(cargo_version); [[ -z $version ]]' - "$folder" || status=$?
    rm -rf "$folder"
    return "$status"
}

main "$@"
