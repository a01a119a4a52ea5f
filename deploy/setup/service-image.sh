#!/usr/bin/env bash
# Makes .podferry/images/NAME/rootfs for a load of `podferry-bench loads` that is a service of another language:
#
#   service-image.sh go|node|jvm|postgresql
#
# Runtimes are those of Debian's packages, unpacked; the host gets none of them. The servers are in bench/workloads/services.
# Idempotent, safe to run twice at once.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# Named, not "stable": the numbers in docs/performance.md are these versions'.
readonly SUITE=bookworm
readonly SERVICES=$PODFERRY_ROOT/bench/workloads/services
# PostgreSQL does not run as root; its data belong to this user.
readonly POSTGRES_UID=70
readonly JAVA_HOME_INSIDE=/usr/lib/jvm/java-17-openjdk-amd64

# unpacked NAME PACKAGE...: Debian's packages and all they depend on, in a folder of this image's own.
unpacked() {
    local name=$1 root=$PODFERRY_STATE/cache/$1-root
    shift
    unpack_debian "$SUITE" "$root" "$@" || die "no Debian mirror gave $*; set PODFERRY_DEBIAN_MIRROR to one that can be reached"
    printf '%s\n' "$root"
}

# base NAME ROOT BINARY: the image with one binary, and everything of ROOT that it may load later.
base() {
    local name=$1 root=$2 binary=$3 image=$PODFERRY_STATE/images/$1 part
    "$PODFERRY_ROOT/deploy/setup/image.sh" --library-path "$(library_dirs "$root")" "$name" "$image" -- "$binary" 9>&-
    rm -rf "$root"/usr/share/{doc,man,locale,lintian}
    for part in lib usr/lib usr/share etc; do
        [[ ! -d $root/$part ]] || cp -a --no-clobber "$root/$part/." "$image/rootfs/${part/#lib/usr/lib}/" 2>/dev/null || true
    done
    mkdir -p "$image/rootfs/srv"
}

# The host's Go if there is one: what is built is one static binary.
make_go() {
    local image=$PODFERRY_STATE/images/go go root='' work
    go=$(command -v go || true)
    if [[ -z $go ]]; then
        root=$(unpacked go golang-go)
        go=$(find "$root/usr/lib" -path '*/bin/go' -type f -print -quit)
        export GOROOT=${go%/bin/go}
    fi
    work=$(mktemp -d)
    CGO_ENABLED=0 GOFLAGS=-mod=mod GOCACHE=$work/cache GOTOOLCHAIN=local \
        "$go" build -o "$work/line-server" "$SERVICES/line-server.go" 9>&-
    "$PODFERRY_ROOT/deploy/setup/image.sh" go "$image" -- "$work/line-server" 9>&-
    rm -rf "$work" "$root"
}

make_node() {
    local root
    root=$(unpacked node nodejs)
    base node "$root" "$root/usr/bin/node"
    cp "$SERVICES/line-server.js" "$PODFERRY_STATE/images/node/rootfs/srv/"
    rm -rf "$root"
}

make_jvm() {
    local root rootfs=$PODFERRY_STATE/images/jvm/rootfs
    root=$(unpacked jvm openjdk-17-jdk-headless)
    base jvm "$root" "$root$JAVA_HOME_INSIDE/bin/java"
    # It finds its libraries by where it lies.
    ln -sf "$JAVA_HOME_INSIDE/bin/java" "$rootfs/usr/bin/java"
    cp "$SERVICES/LineServer.java" "$rootfs/srv/"
    in_image jvm "$JAVA_HOME_INSIDE/bin/javac" -d /srv /srv/LineServer.java
    rm -rf "$root"
}

# With a cluster in /data/pg that has checksums, in which everybody on the network may do everything: it holds nothing of anybody's.
make_postgresql() {
    local root rootfs=$PODFERRY_STATE/images/postgresql/rootfs bin=/usr/lib/postgresql/15/bin
    root=$(unpacked postgresql postgresql-15)
    rm -rf "$root"/usr/lib/llvm-* "$root"/usr/lib/*/libLLVM*
    base postgresql "$root" "$root$bin/postgres"
    printf 'postgres:x:%d:%d:postgres:/data:/bin/sh\n' "$POSTGRES_UID" "$POSTGRES_UID" >>"$rootfs/etc/passwd"
    printf 'postgres:x:%d:\n' "$POSTGRES_UID" >>"$rootfs/etc/group"
    mkdir -p "$rootfs/data/pg" "$rootfs/run/postgresql"
    chown -R "$POSTGRES_UID:$POSTGRES_UID" "$rootfs/data"
    in_image_as "$POSTGRES_UID" postgresql "$bin/initdb" --pgdata /data/pg --username postgres --auth trust --data-checksums \
        --no-locale --encoding UTF8 --no-sync
    printf 'host all all 0.0.0.0/0 trust\n' >>"$rootfs/data/pg/pg_hba.conf"
    rm -rf "$root"
}

# in_image NAME COMMAND...: in a mount namespace of its own, so that the image's /proc goes when the command ends.
in_image() { in_image_as 0 "$@"; }

# in_image_as UID NAME COMMAND...
in_image_as() {
    local user=$1 rootfs=$PODFERRY_STATE/images/$2/rootfs
    shift 2
    # shellcheck disable=SC2016 # expanded by the inner shell
    unshare --mount --pid --fork bash -c 'mount -t proc proc "$0/proc" && mount --bind /dev "$0/dev" && exec chroot --userspec="$1:$1" "$0" "${@:2}"' \
        "$rootfs" "$user" "$@" >&2 9>&-
}

main() {
    local name=${1:-} image stamp
    case $name in
        go | node | jvm | postgresql) ;;
        *) die "usage: service-image.sh go|node|jvm|postgresql" ;;
    esac
    require_root
    image=$PODFERRY_STATE/images/$name
    mkdir -p "$image" "$PODFERRY_STATE/cache"
    # One at a time for all images: they share the folder that packages are fetched to.
    exec 9>"$PODFERRY_STATE/images/services.lock"
    flock -w 900 9 || die "another service-image.sh holds $PODFERRY_STATE/images/services.lock for 15 minutes"
    stamp=$(cat "$SERVICES"/* "${BASH_SOURCE[0]}" | sha256sum)
    [[ -f $image/stamp && $(<"$image/stamp") == "$stamp" ]] && return
    rm -f "$image/stamp"
    "make_$name"
    printf '%s\n' "$stamp" >"$image/stamp"
}

main "$@"
