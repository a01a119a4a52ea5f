#!/usr/bin/env bash
# Builds what is released, from the commit that is checked out: an archive of static programs, the SBOM, a note on what it was built with, and the sums
# of all. They come into target/dist, or the folder that PODFERRY_DIST names. What is printed is SHA256SUMS.
#
#   build.sh                        programs alone
#   build.sh --registry REGISTRY    the image of the same programs and the chart that names it, too: REGISTRY/podferry, say ghcr.io/owner/podferry
#   build.sh --without-sbom ...     without the SBOM, which needs its tool built first
#
# Needs root and what deploy/setup/setup.sh installs. `make release` is this behind run.sh.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"
# shellcheck source=deploy/release/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# The folder that cargo builds into, and that of what is to be packed.
readonly BUILT=$DIST/.build
readonly STAGE=$DIST/.stage

require_tools() {
    local pair missing=()
    for pair in patchelf:patchelf strip:binutils gzip:gzip cc:build-essential; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    [[ ${#missing[@]} -eq 0 ]] || die "these are missing: apt-get install ${missing[*]}"
}

# The programs, laid out as in the image.
build_programs() {
    export PODFERRY_IMAGE_TARGET=$BUILT
    if [[ -z $registry ]]; then
        "$PODFERRY_ROOT/deploy/image/stage.sh" "$STAGE"
        return
    fi
    "$PODFERRY_ROOT/deploy/image/build.sh" "$registry/podferry:$version" "$DIST/podferry-$version-image-$(uname -m).tar"
    rm -rf "$STAGE"
    cp -a "${CARGO_TARGET_DIR:-$PODFERRY_ROOT/target}/image/stage" "$STAGE"
}

# No path of this machine may be left in a program: what has one cannot be the same elsewhere.
check_paths() {
    local program path found
    for program in "$STAGE"/bin/* "$STAGE"/bundle/bin/*; do
        for path in "$PODFERRY_ROOT/" "$BUILT/" "${CARGO_HOME:-$HOME/.cargo}/"; do
            found=$(grep -aoF -m 1 -- "$path" "$program" | head -n 1 || true)
            [[ -z $found ]] || die "$program has the folder $path of this machine in it: a path is not mapped (build_environment in deploy/release/lib.sh)"
        done
    done
}

# build_note FOLDER: what somebody needs to build the same again, and the sum of each file. CRIU and busybox are Debian's, as setup.sh found them that day, and are not built here.
build_note() {
    cat <<NOTE
version: $version
commit: $(git -C "$PODFERRY_ROOT" rev-parse HEAD)
SOURCE_DATE_EPOCH: $SOURCE_DATE_EPOCH
$(rustc -vV | sed -n 's/^\(release\|commit-hash\|host\|LLVM version\): /rustc \1: /p')
cc: $(cc --version | head -n 1)
ld: $(ld --version | head -n 1)
libc: $(getconf GNU_LIBC_VERSION)
system: $(sed -n 's/^PRETTY_NAME="\(.*\)"$/\1/p' /etc/os-release)
criu: $("$TOOLS_DIR/bin/criu" --version | sed -n 's/^Version: //p')
criu's libc: $(grep -aom 1 'GNU C Library [^,]*' "$1/bundle/tools/lib/criu/libc.so.6")
NOTE
    (cd "$1" && find . -type f -printf '%P\n' | LC_ALL=C sort | xargs sha256sum --)
}

main() {
    local version registry='' sbom=yes name
    while [[ $# -gt 0 ]]; do
        case $1 in
            --registry) registry=${2:?usage: build.sh [--without-sbom] [--registry REGISTRY]} && shift 2 ;;
            --without-sbom) sbom='' && shift ;;
            *) die 'usage: build.sh [--without-sbom] [--registry REGISTRY]' ;;
        esac
    done
    require_tools
    require_clean
    version=$("$PODFERRY_ROOT/deploy/release/versions.sh")
    name=podferry-$version-linux-$(uname -m)
    rm -rf "$STAGE"
    mkdir -p "$DIST"
    find "$DIST" -maxdepth 1 -type f -delete
    build_environment "$BUILT"
    build_programs
    check_paths
    cp "$PODFERRY_ROOT/README.md" "$PODFERRY_ROOT/CHANGELOG.md" "$STAGE/"
    cp -r "$PODFERRY_ROOT/deploy/crds" "$STAGE/crds"
    rm -rf "${DIST:?}/$name"
    mv "$STAGE" "$DIST/$name"
    build_note "$DIST/$name" >"$DIST/$name.build.txt"
    pack "$DIST/$name" "$DIST/$name.tar.gz"
    [[ -z $sbom ]] || "$PODFERRY_ROOT/deploy/release/sbom.sh" "$DIST" "$DIST/$name"
    rm -rf "${DIST:?}/$name"
    [[ -z $registry ]] || "$PODFERRY_ROOT/deploy/release/chart.sh" "$registry/podferry" "$DIST"
    sums "$DIST" | tee "$DIST/SHA256SUMS"
}

# So that single functions can be looked at.
[[ ${BASH_SOURCE[0]} != "$0" ]] || main "$@"
