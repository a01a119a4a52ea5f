#!/usr/bin/env bash
# Makes a container's root filesystem that holds the named binaries, all they load, a shell, and nothing else.
#
#   image.sh [--library-path DIRS] NAME OUTDIR -- BINARY...
#
# OUTDIR/rootfs is made anew. The binaries are put in /usr/bin (also seen as /bin, /sbin and /usr/sbin), libraries in
# /usr/lib, busybox as /bin/sh. DIRS, joined by colons, are the library folders of the system the binaries were built for;
# without it they are this host's. NAME is written into /etc/hostname.
set -euo pipefail
# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

# A restored process finds its files by path, so links are the same in every image.
make_skeleton() {
    local root=$1 name=$2 link
    mkdir -p "$root"/{data,dev,etc,proc,root,run,sys,tmp,usr/bin,usr/lib,var/lib,var/log}
    chmod 1777 "$root/tmp"
    chmod 0700 "$root/root"
    for link in bin lib lib64; do
        ln -s "usr/${link%64}" "$root/$link"
    done
    ln -s usr/bin "$root/sbin"
    ln -s bin "$root/usr/sbin"
    ln -s lib "$root/usr/lib64"
    ln -s /run "$root/var/run"
    printf '%s\n' "$name" >"$root/etc/hostname"
    printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n' >"$root/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
    printf '127.0.0.1 localhost %s\n::1 localhost\n' "$name" >"$root/etc/hosts"
    printf 'passwd: files\ngroup: files\nhosts: files dns\n' >"$root/etc/nsswitch.conf"
    : >"$root/etc/resolv.conf"
}

add_shell() {
    local root=$1 applet
    install -m 0755 "$TOOLS_DIR/libexec/busybox" "$root/usr/bin/busybox"
    for applet in sh cat date dd echo env false id ip kill ls mkdir mount mv nc ps rm sleep stat sync true umount; do
        ln -s busybox "$root/usr/bin/$applet"
    done
}

# add_binary ROOT BINARY LIBRARY_PATH
add_binary() {
    local root=$1 binary=$2 library_path=$3 library interpreter
    [[ -f $binary && -x $binary ]] || die "$binary is not an executable file: build it first"
    install -m 0755 "$binary" "$root/usr/bin/${binary##*/}"
    interpreter=$(patchelf --print-interpreter "$binary" 2>/dev/null) || return 0 # static
    local libraries
    libraries=$(shared_libraries "$binary" "$library_path")
    for library in $libraries; do
        [[ -e $root/usr/lib/${library##*/} ]] || install -m 0755 "$library" "$root/usr/lib/${library##*/}"
    done
    # Named as the binary asks for it: /lib64/ld-linux-x86-64.so.2, /lib/ld-linux-aarch64.so.1; both lead to /usr/lib.
    [[ -z $library_path ]] || interpreter=$(find_loader "$library_path" "${interpreter##*/}")
    install -m 0755 "$interpreter" "$root/usr/lib/$(basename "$(patchelf --print-interpreter "$binary")")"
}

main() {
    local library_path='' name out root binary
    if [[ ${1:-} == --library-path ]]; then
        library_path=${2:?--library-path needs a value}
        shift 2
    fi
    [[ $# -ge 4 && $3 == -- ]] || die "usage: image.sh [--library-path DIRS] NAME OUTDIR -- BINARY..."
    name=$1 out=$2
    shift 3
    [[ -x $TOOLS_DIR/libexec/busybox ]] || die "no tools in $TOOLS_DIR: run deploy/setup/setup.sh"

    mkdir -p "$out"
    root=$(mktemp -d "$out/rootfs.XXXXXX")
    # shellcheck disable=SC2064 # the path of now is meant
    trap "rm -rf '$root'" EXIT
    chmod 0755 "$root"
    make_skeleton "$root" "$name"
    add_shell "$root"
    for binary in "$@"; do
        add_binary "$root" "$binary" "$library_path"
    done
    rm -rf "$out/rootfs"
    mv -T "$root" "$out/rootfs"
    trap - EXIT
    log "$out/rootfs: $(du -sh "$out/rootfs" | cut -f 1)"
}

main "$@"
