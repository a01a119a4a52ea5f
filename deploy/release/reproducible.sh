#!/usr/bin/env bash
# Builds the commit that is checked out twice, in folders of different length and depth, with another time zone, language and umask, and compares the
# archives. What differs is named. It takes two release builds, 6 GB, and as root what build.sh does. The last line is JSON.
#
#   reproducible.sh
#
# Both take CRIU and busybox from this clone's .podferry: those are Debian's, and not built. Compiler and linker are this machine's both times, so it does
# not show that another machine with other ones builds the same; what a release was built with is in its .build.txt.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"
# shellcheck source=deploy/release/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

readonly WORK=${CARGO_TARGET_DIR:-$PODFERRY_ROOT/target}/reproducible

# build FOLDER: a clone in it, and its release in FOLDER/dist.
build() {
    rm -rf "$1"
    mkdir -p "$1"
    git clone --quiet "$PODFERRY_ROOT" "$1/clone"
    git -C "$1/clone" checkout --quiet --detach "$commit"
    ln -s "$PODFERRY_STATE" "$1/clone/.podferry"
    env -u CARGO_TARGET_DIR PODFERRY_DIST="$1/dist" "$1/clone/deploy/setup/run.sh" "$1/clone/deploy/release/build.sh" --without-sbom >&2
    # What cargo has built is by far the largest part.
    rm -rf "$1/dist/.build" "$1/clone"
}

main() {
    local commit one=$WORK/a two=$WORK/another/and/a/deeper/one
    require_root
    require_clean
    commit=$(git -C "$PODFERRY_ROOT" rev-parse HEAD)
    (umask 022; TZ=UTC LC_ALL=C build "$one")
    (umask 077; TZ=Pacific/Auckland LC_ALL=C.UTF-8 build "$two")
    if ! diff "$one/dist/SHA256SUMS" "$two/dist/SHA256SUMS" >&2; then
        log 'the two differ in:'
        diff <(cat "$one"/dist/*.build.txt) <(cat "$two"/dist/*.build.txt) >&2 || true
        printf '{"reproducible": false, "commit": "%s"}\n' "$commit"
        exit 1
    fi
    printf '{"reproducible": true, "commit": "%s", "sha256": "%s"}\n' "$commit" "$(sed -n 's/ .*tar\.gz$//p' "$one/dist/SHA256SUMS")"
    rm -rf "$WORK"
}

main "$@"
