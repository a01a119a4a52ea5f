#!/usr/bin/env bash
# Makes and boots a machine; what it is, lib.sh says.
#
#   machine.sh make SUITE                           Debian's SUITE gives the kernel; does nothing if it is made
#   machine.sh boot SUITE FOLDER [QEMU ARGUMENT...] boots it on FOLDER, which has `run` and `mounts`; its console is standard
#                                                   output. FOLDER.img is made, and stays
set -euo pipefail
# shellcheck source=deploy/vm/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[[ $# -ge 2 ]] || die "usage: machine.sh make SUITE | machine.sh boot SUITE FOLDER [QEMU ARGUMENT...]"
verb=$1 suite=$2
shift 2
case $verb in
make)
    require_root
    install_vm_tools
    mkdir -p "$VM_CACHE"
    exec 9>"$VM_CACHE/lock"
    flock -w 600 9 || die "another machine.sh holds $VM_CACHE/lock for 10 minutes"
    make_machine "$suite"
    ;;
boot)
    folder=$1
    shift
    make_disk "$folder" "$folder.img" 256
    boot_machine "$suite" "$folder.img" "$@"
    ;;
*) die "machine.sh does not know $verb" ;;
esac
