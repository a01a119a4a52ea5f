#!/bin/bash
# The first process of a machine: mounts what a node needs, runs /payload/run, says on the console how that ended, and
# switches the machine off. A bash, which also reaps: CRIU's restore needs that of the first process.
#
# /payload/mounts has a line for each folder of the payload that has to be seen at another path: FOLDER PATH.
set -uo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root

off() {
    # What the host looks for.
    printf '\npodferry-guest: ended with %s\n' "$1"
    sleep 0.2
    echo o >/proc/sysrq-trigger
    sleep 60
}

mount_all() {
    mount -t proc -o nosuid,nodev,noexec proc /proc &&
        mount -t sysfs -o nosuid,nodev,noexec sysfs /sys &&
        mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 /sys/fs/cgroup &&
        mount -t tmpfs -o nosuid,nodev,mode=755 tmpfs /run &&
        mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs /tmp &&
        mkdir -p /dev/pts /dev/shm /run/lock /run/netns &&
        mount -t devpts -o nosuid,noexec,gid=5,mode=620,ptmxmode=666 devpts /dev/pts &&
        mount -t tmpfs -o nosuid,nodev tmpfs /dev/shm &&
        mount --make-rprivate / &&
        mount -t ext4 /dev/vdb /payload || return
    local folder path
    while read -r folder path; do
        mkdir -p "$path" && mount --bind "/payload/$folder" "$path" || return
    done </payload/mounts
}

mount_all || off 'mounts that failed'
# There is no udev that would load them when they are needed. CRIU wants to have `tun` when it starts.
modprobe --all virtio_net tun overlay
ip link set lo up
/payload/run
off $?
