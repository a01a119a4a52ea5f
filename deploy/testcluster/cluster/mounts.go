package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

const (
	// The machine's own folder inside its root, and the log files of its services.
	machineConfig = "/etc/kubernetes"
	machineLogs   = "/var/log/testcluster"
)

// What the kubelet would set for the whole host: each machine gets a file of its own in its place.
var hostTunables = map[string]string{
	"vm/overcommit_memory":     "1",
	"vm/panic_on_oom":          "0",
	"kernel/panic":             "10",
	"kernel/panic_on_oops":     "1",
	"kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
}

// mounter collects the first error, so that a list of mounts reads as a list.
type mounter struct {
	root string
	err  error
}

func (m *mounter) in(path string) string { return filepath.Join(m.root, path) }

func (m *mounter) do(what string, act func() error) {
	if m.err == nil {
		if err := act(); err != nil {
			m.err = fmt.Errorf("%s: %w", what, err)
		}
	}
}

func (m *mounter) mount(kind, path string, flags uintptr, data string) {
	m.do("mounting "+kind+" on "+path, func() error {
		if err := os.MkdirAll(m.in(path), 0o755); err != nil {
			return err
		}
		return syscall.Mount(kind, m.in(path), kind, flags, data)
	})
}

// bind makes a file or folder of the host visible at path.
func (m *mounter) bind(host, path string) {
	m.do("binding "+host+" to "+path, func() error {
		info, err := os.Stat(host)
		if err != nil {
			return err
		}
		if err := makeTarget(m.in(path), info.IsDir()); err != nil {
			return err
		}
		return syscall.Mount(host, m.in(path), "", syscall.MS_BIND|syscall.MS_REC, "")
	})
}

func makeTarget(path string, folder bool) error {
	if folder {
		return os.MkdirAll(path, 0o755)
	}
	if exists(path) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, nil, 0o644)
}

// makeRoot builds a machine's root out of the unpacked Debian, read only to it, and its own folder, and moves into it.
func (c *cluster) makeRoot(name string) error {
	own := func(part string) string { return c.path(name, part) }
	m := &mounter{root: own("root")}
	m.do("making the mounts private", func() error {
		return syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")
	})
	m.mount("overlay", "/", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s",
		filepath.Join(c.Build, "root"), own("upper"), own("work")))
	m.mount("proc", "/proc", 0, "")
	// Pods with user namespaces may mount proc only where a fully visible one exists, and /proc gets files bound over it.
	m.mount("proc", "/.proc", 0, "")
	m.mount("sysfs", "/sys", 0, "")
	m.cgroups()
	m.mount("tmpfs", "/run", 0, "mode=755")
	m.mount("tmpfs", "/tmp", 0, "mode=1777")
	m.devices()
	// Overlayfs does not stack on overlayfs: what containers are made of is on the host's file system.
	m.bind(own("containerd"), "/var/lib/containerd")
	m.bind(own("kubelet"), "/var/lib/kubelet")
	m.bind(own("config"), machineConfig)
	m.bind(own("log"), machineLogs)
	m.bind(filepath.Join(c.Build, "bin", "kubernetes"), "/usr/local/bin/kubernetes")
	m.bind(filepath.Join(c.Build, "images"), "/usr/share/testcluster/images")
	for _, b := range c.Binds {
		m.bind(b.Host, b.Node)
	}
	for path, value := range hostTunables {
		file := own(filepath.Join("tunables", strings.ReplaceAll(path, "/", "_")))
		m.do("writing "+file, func() error { return os.WriteFile(file, []byte(value+"\n"), 0o644) })
		m.bind(file, "/proc/sys/"+path)
	}
	m.enter()
	return m.err
}

// cgroups mounts the host's hierarchies again: in this cgroup namespace they begin at the machine's own cgroups.
func (m *mounter) cgroups() {
	all, err := hierarchies()
	m.do("reading the host's cgroup hierarchies", func() error { return err })
	if len(all) > 0 && !all[0].alone() {
		m.mount("tmpfs", cgroupRoot, 0, "mode=755")
	}
	for _, h := range all {
		if h.Unified {
			m.mount("cgroup2", h.Mount, 0, "")
		} else {
			m.mount("cgroup", h.Mount, 0, h.Options)
		}
		for part := range strings.SplitSeq(filepath.Base(h.Mount), ",") {
			link := filepath.Join(cgroupRoot, part)
			if h.Unified || exists(m.in(link)) {
				continue
			}
			m.do("linking "+link, func() error { return os.Symlink(filepath.Base(h.Mount), m.in(link)) })
		}
	}
}

func (m *mounter) devices() {
	m.mount("tmpfs", "/dev", 0, "mode=755")
	for name, number := range map[string][2]int{
		"null": {1, 3}, "zero": {1, 5}, "full": {1, 7}, "random": {1, 8}, "urandom": {1, 9}, "kmsg": {1, 11}, "tty": {5, 0},
		"net/tun": {10, 200}, "fuse": {10, 229},
	} {
		m.do("making /dev/"+name, func() error {
			path := m.in("/dev/" + name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return err
			}
			if err := syscall.Mknod(path, syscall.S_IFCHR|0o666, number[0]<<8|number[1]); err != nil {
				return err
			}
			return os.Chmod(path, 0o666)
		})
	}
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx",
	} {
		m.do("linking /dev/"+name, func() error { return os.Symlink(target, m.in("/dev/"+name)) })
	}
	m.mount("devpts", "/dev/pts", 0, "newinstance,ptmxmode=0666,mode=620,gid=5")
	m.mount("tmpfs", "/dev/shm", 0, "mode=1777")
	m.mount("mqueue", "/dev/mqueue", 0, "")
}

// enter makes root the root of the mount namespace; nothing of the host stays mounted but what was bound.
func (m *mounter) enter() {
	m.do("moving into "+m.root, func() error {
		old := m.in("/.host")
		if err := os.MkdirAll(old, 0o700); err != nil {
			return err
		}
		if err := syscall.PivotRoot(m.root, old); err != nil {
			return err
		}
		if err := os.Chdir("/"); err != nil {
			return err
		}
		if err := syscall.Unmount("/.host", syscall.MNT_DETACH); err != nil {
			return err
		}
		return os.Remove("/.host")
	})
	// What the kubelet mounts must be seen by containers, as on a host that systemd has set up.
	m.do("sharing the mounts", func() error {
		return syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_SHARED, "")
	})
}
