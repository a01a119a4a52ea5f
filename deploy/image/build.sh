#!/usr/bin/env bash
# Builds deploy/image/Dockerfile without Docker, a registry or a build daemon: programs from this tree, and a Debian base made
# of Debian's packages. The image ends as an archive that `docker load`, `ctr images import` and `testcluster load` take.
#
#   build.sh [NAME:TAG] [ARCHIVE]
#
# Where Docker and a registry are at hand, `docker build -f deploy/image/Dockerfile .` needs none of this.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

readonly SUITE=bookworm
OUT=${CARGO_TARGET_DIR:-$PODFERRY_ROOT/target}/image

# chroot isolation and the vfs driver need neither namespaces of users nor overlay mounts.
image_tool() { buildah --root "$OUT/storage" --runroot "$OUT/run" --storage-driver vfs "$@"; }

install_missing() {
    local missing=() pair
    for pair in buildah:buildah mmdebstrap:mmdebstrap patchelf:patchelf strip:binutils; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    log "apt installs ${missing[*]}"
    apt-get -qq -o Acquire::Retries=3 update >&2 || log 'warning: apt-get update failed in part'
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}" \
        >&2 </dev/null || die "apt could not install: ${missing[*]}"
}

# The smallest Debian that has a shell, mount and nsenter. Made once.
make_base() {
    local base=$OUT/base-$SUITE.tar mirror
    if [[ ! -s $base ]]; then
        while read -r mirror; do
            log "makes a Debian base from $mirror $SUITE"
            mmdebstrap --quiet --variant=essential --mode=root --keyring="$DEBIAN_KEYRING" \
                --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
                --dpkgopt='path-exclude=/usr/share/doc/*' "$SUITE" "$base.new.tar" "$mirror" >&2 && break
            rm -f "$base.new.tar"
        done < <(debian_mirrors | awk '!seen[$0]++')
        [[ -s $base.new.tar ]] || die "no Debian mirror gave a base; set PODFERRY_DEBIAN_MIRROR to one that can be reached"
        mv "$base.new.tar" "$base"
    fi
    printf 'FROM scratch\nADD %s /\nCMD ["/bin/sh"]\n' "${base##*/}" |
        image_tool build --quiet --isolation chroot --tag localhost/podferry-base:$SUITE -f - "$OUT" >/dev/null
}

main() {
    local name=${1:-podferry.dev/podferry:$(sed -nE '/^\[workspace.package\]/,/^$/s/^version = "(.*)"$/\1/p' "$PODFERRY_ROOT/Cargo.toml")}
    local archive=${2:-$OUT/podferry.tar}
    require_root
    mkdir -p "$OUT"
    exec 9>"$OUT/lock"
    flock -w 1800 9 || die "another build.sh holds $OUT/lock for 30 minutes"
    install_missing
    "$PODFERRY_ROOT/deploy/setup/run.sh" "$PODFERRY_ROOT/deploy/image/stage.sh" "$OUT/stage"
    make_base
    image_tool build --quiet --isolation chroot --build-arg BASE=localhost/podferry-base:$SUITE \
        --build-arg PROGRAMS=prebuilt --ignorefile "$PODFERRY_ROOT/deploy/image/Dockerfile.dockerignore" \
        --tag "$name" -f "$PODFERRY_ROOT/deploy/image/Dockerfile" "$PODFERRY_ROOT" >/dev/null
    rm -f "$archive"
    image_tool push --quiet "$name" "docker-archive:$archive:$name"
    # With the vfs driver each layer is a whole copy.
    rm -rf "$OUT/storage" "$OUT/run"
    log "$name: $archive, $(du -sh "$archive" | cut -f 1)"
}

main "$@"
