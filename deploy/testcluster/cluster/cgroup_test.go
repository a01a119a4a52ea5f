package main

import (
	"reflect"
	"testing"
)

func TestHybridHierarchiesAreRead(t *testing.T) {
	got := parseHierarchies(`31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
40 31 0:37 /../.. /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/lib/agent,name=systemd
41 31 0:38 /../.. /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
50 31 0:29 /elsewhere /mnt/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
`)
	want := []hierarchy{
		{Mount: "/sys/fs/cgroup/cpu,cpuacct", Options: "cpu,cpuacct"},
		{Mount: "/sys/fs/cgroup/systemd", Options: "none,name=systemd"},
		{Mount: "/sys/fs/cgroup/unified", Unified: true},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

func TestAHostWithoutVersionOneHasOneHierarchy(t *testing.T) {
	got := parseHierarchies("31 23 0:28 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n")
	if len(got) != 1 || !got[0].Unified || !got[0].alone() {
		t.Errorf("got %+v", got)
	}
}

func TestNamesThatWouldLeaveTheirPlaceAreRefused(t *testing.T) {
	for _, name := range []string{"", "..", "a/b", "A", "-a", "a-", "a b", "abcdefghijklmnopqrstuvwxy"} {
		if _, err := newCluster("/tmp", name); err == nil {
			t.Errorf("%q was accepted", name)
		}
	}
	if _, err := newCluster("/tmp", "main"); err != nil {
		t.Error(err)
	}
}
