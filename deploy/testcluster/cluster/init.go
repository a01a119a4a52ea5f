package main

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// Where a machine's init listens. Seen from the host it is below /proc/PID/root.
const controlSocket = "/run/testcluster.sock"

// runInit is process 1 of a machine, in namespaces of its own, started by `spawn`.
func runInit(c *cluster, m machine) error {
	if os.Getpid() != 1 {
		return fmt.Errorf("init is started by `up`, in a process namespace of its own")
	}
	if err := c.leaveUnifiedRoot(); err != nil {
		return err
	}
	if err := c.makeRoot(m.Name); err != nil {
		return err
	}
	_ = os.WriteFile("/proc/self/comm", []byte("testcluster"), 0) // what ps shows
	if err := syscall.Sethostname([]byte(m.Name)); err != nil {
		return fmt.Errorf("hostname %s: %w", m.Name, err)
	}
	if m.Index == 0 {
		if err := forwardAPI(); err != nil {
			return err
		}
	}
	s := &supervisor{services: map[string]*service{}, logs: machineLogs}
	s.changed = sync.NewCond(&s.mu)
	go s.reap()
	return s.serve()
}

// leaveUnifiedRoot moves init out of the root of its cgroup namespace where there is only the unified hierarchy, and gives
// what the kubelet will make there all controllers.
func (c *cluster) leaveUnifiedRoot() error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if !h.Unified || !h.alone() {
			continue
		}
		own, err := ownUnifiedCgroup()
		if err != nil {
			return err
		}
		leaf := filepath.Join(own, unifiedLeaf)
		if err := os.MkdirAll(leaf, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte("1"), 0); err != nil {
			return fmt.Errorf("cannot move into the cgroup %s: %w", leaf, err)
		}
		// `spawn` leaves the cgroup as it ends, and until then nothing can be delegated.
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if err = delegate(own); err == nil || time.Now().After(end) {
				return err
			}
		}
	}
	return nil
}

// ownUnifiedCgroup is where the cluster's cgroups are that hold this process, seen through the host's mount.
func ownUnifiedCgroup() (string, error) {
	name := os.Getenv(spawnCgroup)
	if name == "" {
		return "", fmt.Errorf("init needs the environment variable %s: it is started by `up`", spawnCgroup)
	}
	return filepath.Join(cgroupRoot, name), nil
}
