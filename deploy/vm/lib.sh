# shellcheck shell=bash
# Virtual machines with Debian's kernels, under emulation: how they are made and booted. Sourced, never run.
#
# A machine has two disks: a root filesystem of Debian's packages with the modules of the kernel, made once, and a payload
# with what is run, made each time. Nothing is installed on the host but qemu; what a machine writes is forgotten.

# shellcheck source=deploy/setup/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../setup/lib.sh"

readonly VM_FILES=$PODFERRY_ROOT/deploy/vm
readonly VM_CACHE=$PODFERRY_STATE/cache/vm
# Raise it when what is made below changes: older ones are then made anew.
readonly VM_LAYOUT=1

# What runs in a machine: as new as any host that the binaries were built on.
readonly USERLAND_SUITE=sid
readonly USERLAND=(base-files bash busybox-static coreutils findutils grep gzip iproute2 iptables kmod mount nftables
    procps python3 sed util-linux)

install_vm_tools() {
    local missing=() pair
    for pair in qemu-system-x86_64:qemu-system-x86 mke2fs:e2fsprogs cpio:cpio; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    log "apt installs ${missing[*]}"
    {
        apt-get -qq update || log "warning: apt-get update failed in part; going on with what there is"
        DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends \
            "${missing[@]}"
    } >&2 </dev/null || die "apt could not install: ${missing[*]}"
}

# make_machine SUITE: leaves root.img, vmlinuz and initrd of SUITE's kernel in $VM_CACHE/SUITE, unless they are there.
make_machine() {
    local suite=$1 made=$VM_CACHE/$1 new=$VM_CACHE/$1.new wanted
    wanted="$VM_LAYOUT ${USERLAND[*]} $(cat "$VM_FILES/guest.sh" "$VM_FILES/initrd.sh" | sha256sum)"
    [[ ! -f $made/stamp || $(<"$made/stamp") != "$wanted" ]] || return 0
    rm -rf "$new" "$made"
    mkdir -p "$new"
    unpack_debian "$USERLAND_SUITE" "$new/root" "${USERLAND[@]}" || die "no Debian mirror gave the machines' packages"
    unpack_debian "$suite" "$new/kernel" linux-image-cloud-amd64 || die "no Debian mirror gave a kernel of $suite"
    local version
    version=$(basename "$new"/kernel/boot/vmlinuz-*)
    version=${version#vmlinuz-}
    finish_root "$new/root" "$new/kernel" "$version"
    make_initrd "$new/root" "$new/initrd" "$version"
    make_disk "$new/root" "$new/root.img" 128
    mv "$new/kernel/boot/vmlinuz-$version" "$new/vmlinuz"
    rm -rf "$new/root" "$new/kernel"
    printf '%s\n' "$wanted" >"$new/stamp"
    mv "$new" "$made"
    log "$made: Linux $version"
}

# finish_root ROOT KERNEL VERSION: what packages' scripts would have done, and the kernel's modules.
finish_root() {
    local root=$1 kernel=$2 version=$3 name
    mkdir -p "$root/usr/lib/modules" "$root"/{proc,sys,dev,run,tmp,boot,payload}
    mv "$(find "$kernel" -type d -path "*/modules/$version")" "$root/usr/lib/modules/"
    cp "$kernel/boot/config-$version" "$root/boot/"
    chroot "$root" /usr/sbin/depmod "$version"
    for name in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
        ln -sf xtables-nft-multi "$root/usr/sbin/$name"
    done
    [[ -e $root/usr/bin/sh ]] || ln -s bash "$root/usr/bin/sh"
    printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n' >"$root/etc/passwd"
    printf 'root:x:0:\nnogroup:x:65534:\n' >"$root/etc/group"
    printf '127.0.0.1 localhost\n' >"$root/etc/hosts"
    install -m 0755 "$VM_FILES/guest.sh" "$root/usr/sbin/podferry-guest"
}

# make_initrd ROOT FILE VERSION: finds the root filesystem, which takes modules.
make_initrd() {
    local root=$1 file=$2 version=$3 module
    local tree=$file.tree
    mkdir -p "$tree"/{bin,modules,dev,proc,root}
    install -m 0755 "$(find "$root" -path '*/bin/busybox' -type f | head -n 1)" "$tree/bin/busybox"
    install -m 0755 "$VM_FILES/initrd.sh" "$tree/init"
    while read -r module; do
        case $module in
        *.xz) xz --decompress --stdout "$root$module" >"$tree/modules/$(basename "$module" .xz)" ;;
        *) cp "$root$module" "$tree/modules/" ;;
        esac
        basename "$module" .xz >>"$tree/modules/order"
    done < <(chroot "$root" /usr/sbin/modprobe --set-version "$version" --show-depends --all virtio_pci virtio_blk |
        awk '$1 == "insmod" && !seen[$2]++ { print $2 }')
    (cd "$tree" && find . | cpio --quiet --create --format=newc | gzip -1) >"$file"
    rm -rf "$tree"
}

# make_disk FOLDER FILE SPARE: an ext4 image of FOLDER with SPARE MiB of room.
make_disk() {
    local mib
    # Blocks and inodes take more than the bytes do.
    mib=$(($(du -sm --apparent-size "$1" | cut -f 1) * 12 / 10 + 16 + $3))
    rm -f "$2"
    mke2fs -q -t ext4 -O ^has_journal -m 0 -d "$1" "$2" "${mib}M" || die "cannot make an image of $1"
}

# boot_machine SUITE PAYLOAD [QEMU ARGUMENT...]: becomes the machine, whose console is standard output. Ends when it is off.
boot_machine() {
    local made=$VM_CACHE/$1 payload=$2
    shift 2
    # No console but the serial one, no devices but what is asked for, nothing written to the disks' files.
    exec qemu-system-x86_64 -M q35 -accel "${PODFERRY_VM_ACCEL:-tcg,thread=multi}" -cpu max -smp 2 -m 2048 \
        -nographic -nodefaults -no-reboot -serial stdio \
        -kernel "$made/vmlinuz" -initrd "$made/initrd" \
        -append "console=ttyS0 quiet panic=-1 loglevel=4 mitigations=off no_timer_check" \
        -drive "file=$made/root.img,format=raw,if=virtio,snapshot=on" \
        -drive "file=$payload,format=raw,if=virtio,snapshot=on" "$@" </dev/null
}
