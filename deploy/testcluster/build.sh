#!/usr/bin/env bash
# Makes all that a test cluster is started from, in .podferry/testcluster: the nodes' root from Debian's packages, Kubernetes
# and our own programs from source, and the images. Idempotent; quick when nothing has changed. The host gets nothing.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"
# shellcheck source=deploy/testcluster/versions.env
. "$PODFERRY_ROOT/deploy/testcluster/versions.env"

readonly SOURCE=$PODFERRY_ROOT/deploy/testcluster
readonly OUT=$PODFERRY_STATE/testcluster
# go itself takes the version that go.mod names, from the module proxy, if it is at least this one.
readonly GO_MINIMUM=1.21
# Raise it when the root is to be made anew.
readonly ROOT_LAYOUT=2
readonly ROOT_PACKAGES=(containerd containernetworking-plugins criu etcd-server runc
    base-files base-passwd bash ca-certificates conntrack coreutils curl dash findutils gawk grep gzip hostname
    iproute2 iptables iputils-ping jq kmod libc-bin mount netbase nftables procps sed tar util-linux)

check_go() {
    local version
    command -v go >/dev/null || die "no Go here: install one of at least $GO_MINIMUM (Debian: golang-go)"
    version=$(go env GOVERSION)
    version_at_least "${version#go}" "$GO_MINIMUM" || die "Go ${version#go} is too old: at least $GO_MINIMUM is needed"
}

# root_version PROGRAM: what a program of the root in $1 says its version is.
root_version() {
    local root=$1 name=$2
    chroot "$root" "/usr/bin/env" PATH=/usr/sbin:/usr/bin "$name" --version 2>/dev/null |
        sed -nE 's/.*([^0-9.]|^)([0-9]+\.[0-9]+(\.[0-9]+)?).*/\2/p' | head -n 1
}

check_root() {
    local root=$1 pair name minimum have
    for pair in "containerd:$CONTAINERD_MINIMUM" "etcd:$ETCD_MINIMUM" "runc:$RUNC_MINIMUM" "criu:$CRIU_MINIMUM"; do
        name=${pair%%:*} minimum=${pair##*:}
        have=$(root_version "$root" "$name")
        version_at_least "$have" "$minimum" ||
            die "Debian $DEBIAN_SUITE gave $name '$have', at least $minimum is needed: set DEBIAN_SUITE in $SOURCE/versions.env"
        printf '%s %s\n' "$name" "$have"
    done
}

# What the packages' scripts would have done and a node needs; none of them is run.
finish_root() {
    local root=$1 name
    install -m 0644 "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
    install -m 0644 "$root/usr/share/base-passwd/group.master" "$root/etc/group"
    for name in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
        ln -sf xtables-nft-multi "$root/usr/sbin/$name"
    done
    ln -sf gawk "$root/usr/bin/awk"
    ln -sf dash "$root/usr/bin/sh"
    mkdir -p "$root"/{.proc,etc/kubernetes,usr/local/bin,usr/share/testcluster/images,var/log/testcluster,var/tmp}
    for name in kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl; do
        ln -sf kubernetes "$root/usr/local/bin/$name"
    done
    : >"$root/usr/local/bin/kubernetes" # bound over
}

make_root() {
    local new=$OUT/root.new want="$ROOT_LAYOUT $DEBIAN_SUITE ${ROOT_PACKAGES[*]}" versions
    [[ -f $OUT/root.stamp && $(head -n 1 "$OUT/root.stamp") == "$want" && -d $OUT/root ]] && return
    no_clusters "the nodes' root is out of date"
    unpack_debian "$DEBIAN_SUITE" "$new" "${ROOT_PACKAGES[@]}" ||
        die "no Debian mirror gave $DEBIAN_SUITE; set PODFERRY_DEBIAN_MIRROR to one that can be reached"
    finish_root "$new"
    versions=$(check_root "$new")
    rm -rf "$OUT/root.stamp" "$OUT/root"
    mv "$new" "$OUT/root"
    printf '%s\n%s\n' "$want" "$versions" >"$OUT/root.stamp"
    log "$OUT/root: $(du -sh "$OUT/root" | cut -f 1), ${versions//$'\n'/, }"
}

# An overlay's lower folder must not change under it.
no_clusters() {
    local clusters
    clusters=$(find "$OUT/clusters" -mindepth 1 -maxdepth 1 -printf '%f ' 2>/dev/null || true)
    [[ -z $clusters ]] || die "$1, and is used by: ${clusters}take them away first ($OUT/bin/testcluster --name NAME down)"
}

# go_build FOLDER PACKAGE OUTPUT [ARGUMENT...]
go_build() {
    local folder=$1 package=$2 output=$3
    shift 3
    (cd "$folder" && CGO_ENABLED=0 GOFLAGS="-trimpath -buildvcs=false" nice -n 10 \
        go build -p "${PODFERRY_BUILD_JOBS:-$(nproc)}" -o "$output" "$@" "$package") </dev/null
}

build_kubernetes() {
    local version minor flags begun=$SECONDS base=k8s.io/component-base/version client=k8s.io/client-go/pkg/version
    version=$(cd "$SOURCE/kubernetes" && go list -m -f '{{.Version}}' k8s.io/kubernetes)
    minor=${version#v*.}
    flags="-s -w -X $base.gitVersion=$version -X $base.gitMajor=1 -X $base.gitMinor=${minor%%.*} -X $client.gitVersion=$version"
    go_build "$SOURCE/kubernetes" . "$OUT/bin/kubernetes" -ldflags "$flags"
    log "Kubernetes $version: $(du -h "$OUT/bin/kubernetes" | cut -f 1), $((SECONDS - begun)) s"
}

build_own() {
    go_build "$SOURCE" ./cluster "$OUT/bin/testcluster" -ldflags '-s -w'
    go_build "$SOURCE" ./guest "$OUT/bin/guest" -ldflags '-s -w'
}

# make_image NAME ENTRYPOINT...: packs $OUT/rootfs/NAME/rootfs.
make_image() {
    local name=$1
    shift
    "$OUT/bin/testcluster" image "podferry.test/$name:1" "$OUT/rootfs/$name/rootfs" "$OUT/images/$name.tar" "$@"
}

make_images() {
    local pause=$OUT/rootfs/pause/rootfs guest=$OUT/rootfs/guest applet
    rm -rf "$OUT/rootfs"
    mkdir -p "$pause" "$guest" "$OUT/images"
    install -m 0755 "$OUT/bin/guest" "$pause/pause"
    make_image pause /pause
    "$PODFERRY_ROOT/deploy/setup/image.sh" guest "$guest" -- "$OUT/bin/guest"
    for applet in grep head hostname sed tail tar wget; do
        ln -s busybox "$guest/rootfs/usr/bin/$applet"
    done
    make_image guest /usr/bin/guest serve
    rm -rf "$OUT/rootfs"
}

main() {
    require_root
    check_go
    [[ -x $TOOLS_DIR/libexec/busybox ]] || die "no tools in $TOOLS_DIR: run deploy/setup/setup.sh --tools"
    mkdir -p "$OUT/bin"
    exec 9>"$OUT/lock"
    flock -w 3600 9 || die "another build.sh holds $OUT/lock for an hour"
    make_root 9>&-
    build_own 9>&-
    make_images 9>&-
    build_kubernetes 9>&-
}

main "$@"
