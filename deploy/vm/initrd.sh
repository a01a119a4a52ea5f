#!/bin/busybox sh
# shellcheck shell=dash
# The first program of a machine: finds the root filesystem and goes there. Part of the initrd that lib.sh makes.
set -eu
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
while read -r module; do
    /bin/busybox insmod "/modules/$module"
done </modules/order
tries=0
until [ -b /dev/vdb ] || [ "$tries" -ge 100 ]; do
    tries=$((tries + 1))
    /bin/busybox sleep 0.1
done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox umount /proc
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /usr/sbin/podferry-guest
