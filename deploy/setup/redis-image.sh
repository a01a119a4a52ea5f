#!/usr/bin/env bash
# Makes .podferry/images/redis/rootfs with Debian stable's redis-server and redis-cli. The host gets no Redis.
# Idempotent, safe to run twice at once.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Named, not "stable": the numbers in docs/performance.md are this Redis's.
readonly SUITE=bookworm
readonly IMAGE=$PODFERRY_STATE/images/redis
readonly LAYOUT=1

unpack_root() { unpack_debian "$SUITE" "$1" redis-server redis-tools; }

main() {
    local root=$PODFERRY_STATE/cache/redis-root
    require_root
    mkdir -p "$IMAGE" "$PODFERRY_STATE/cache"
    exec 9>"$IMAGE/lock"
    flock -w 600 9 || die "another redis-image.sh holds $IMAGE/lock for 10 minutes"
    [[ -f $IMAGE/stamp && $(<"$IMAGE/stamp") == "$LAYOUT" && -x $IMAGE/rootfs/usr/bin/redis-server ]] && return

    rm -f "$IMAGE/stamp"
    unpack_root "$root" || die "no Debian mirror gave Redis; set PODFERRY_DEBIAN_MIRROR to one that can be reached"
    # redis-server is a link to redis-check-rdb in Debian's package: take what the name leads to.
    mkdir -p "$root/podferry"
    cp -L "$root/usr/bin/redis-server" "$root/usr/bin/redis-cli" "$root/podferry/"
    "$PODFERRY_ROOT/deploy/setup/image.sh" --library-path "$(library_dirs "$root")" redis "$IMAGE" \
        -- "$root/podferry/redis-server" "$root/podferry/redis-cli" 9>&-
    chroot "$IMAGE/rootfs" /bin/redis-server --version >&2 9>&-
    rm -rf "$root"
    printf '%s\n' "$LAYOUT" >"$IMAGE/stamp"
}

main "$@"
