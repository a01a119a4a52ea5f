package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const cgroupRoot = "/sys/fs/cgroup"

// On the unified hierarchy a cgroup with children that are given controllers may have no processes of its own: a node's
// daemons are in this child.
const unifiedLeaf = "daemons"

// hierarchy is a mounted cgroup hierarchy of the host.
type hierarchy struct {
	Mount   string
	Unified bool
	Options string // how to mount a v1 hierarchy again: its controllers or its name
}

// alone is the whole of a host without v1 controllers.
func (h hierarchy) alone() bool { return h.Mount == cgroupRoot }

func hierarchies() ([]hierarchy, error) {
	content, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	found := parseHierarchies(string(content))
	if len(found) == 0 {
		return nil, fmt.Errorf("no cgroup hierarchy is mounted below %s: mount one", cgroupRoot)
	}
	return found, nil
}

// parseHierarchies reads mountinfo: "id parent dev root mountpoint options [tags] - type source superoptions".
func parseHierarchies(mountinfo string) []hierarchy {
	var found []hierarchy
	for line := range strings.Lines(mountinfo) {
		front, back, ok := strings.Cut(strings.TrimSpace(line), " - ")
		fields, kind := strings.Fields(front), strings.Fields(back)
		if !ok || len(fields) < 5 || len(kind) < 3 || !strings.HasPrefix(fields[4], cgroupRoot) {
			continue
		}
		// Seen from the cgroup namespace of a machine the root of the host's mount is above it: "/../..".
		if strings.Trim(fields[3], "/.") != "" {
			continue
		}
		switch kind[0] {
		case "cgroup2":
			found = append(found, hierarchy{Mount: fields[4], Unified: true})
		case "cgroup":
			found = append(found, hierarchy{Mount: fields[4], Options: v1Options(kind[2])})
		}
	}
	return found
}

// v1Options leaves only what names the hierarchy: it is already mounted, and cannot be mounted with others.
func v1Options(super string) string {
	var kept []string
	for option := range strings.SplitSeq(super, ",") {
		switch {
		case option == "rw" || option == "ro" || option == "xattr" || option == "clone_children" || option == "noprefix":
		case strings.HasPrefix(option, "release_agent="):
		case strings.HasPrefix(option, "name="):
			kept = append([]string{"none"}, option)
		default:
			kept = append(kept, option)
		}
	}
	return strings.Join(kept, ",")
}

// makeCgroups makes a machine's cgroups and puts nothing into them.
func (c *cluster) makeCgroups(m machine) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		dir := h.Mount
		for _, part := range []string{c.cgroup(), m.Name} {
			if h.Unified && h.alone() {
				if err := delegate(dir); err != nil {
					return err
				}
			}
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return fmt.Errorf("cgroup %s: %w: is this host's root allowed to make cgroups?", dir, err)
			}
			if err := inheritCpuset(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// delegate gives the children of a unified cgroup all the controllers that it has itself.
func delegate(dir string) error {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(string(have)) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+name), 0); err != nil {
			return fmt.Errorf("cgroup %s does not give its children the controller %s: %w", dir, name, err)
		}
	}
	return nil
}

// inheritCpuset copies what a v1 cpuset must have before a process may join it.
func inheritCpuset(dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		own := filepath.Join(dir, name)
		content, err := os.ReadFile(own)
		if err != nil || strings.TrimSpace(string(content)) != "" {
			continue // another controller, or inherited already
		}
		parent, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if err != nil || strings.TrimSpace(string(parent)) == "" {
			continue // the unified hierarchy: an empty one means the parent's
		}
		if err := os.WriteFile(own, parent, 0); err != nil {
			return fmt.Errorf("%s: %w", own, err)
		}
	}
	return nil
}

// joinCgroups puts this process into a machine's cgroups; with daemons beside the machine's daemons, without into the
// cgroups themselves, which are then the roots of a new cgroup namespace.
func (c *cluster) joinCgroups(m machine, daemons bool) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		dir := filepath.Join(h.Mount, c.cgroup(), m.Name)
		if daemons && h.Unified && h.alone() {
			dir = filepath.Join(dir, unifiedLeaf)
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0); err != nil {
			return fmt.Errorf("cannot join the cgroup %s: %w: is the cluster up?", dir, err)
		}
	}
	return nil
}

// removeCgroups ends every process in the cluster's cgroups, wherever it came from, and removes them. It needs no record of
// what `up` has done, so it also clears up after one that failed half-way.
func (c *cluster) removeCgroups(deadline time.Duration) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	end := time.Now().Add(deadline)
	for {
		left := ""
		for _, h := range all {
			top := filepath.Join(h.Mount, c.cgroup())
			if _, err := os.Stat(top); errors.Is(err, fs.ErrNotExist) {
				continue
			}
			killAll(top)
			if err := removeTree(top); err != nil {
				left = err.Error()
			}
		}
		if left == "" {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("cluster %s: after %v there are still processes or cgroups of it: %s", c.Name, deadline, left)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// killAll thaws and kills: a process that the v1 freezer holds dies only when thawed. Only cgroups of the cluster are read.
func killAll(top string) {
	_ = filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() {
			return nil // gone meanwhile
		}
		for _, thaw := range [][2]string{{"freezer.state", "THAWED"}, {"cgroup.freeze", "0"}} {
			if file := filepath.Join(path, thaw[0]); exists(file) {
				_ = os.WriteFile(file, []byte(thaw[1]), 0)
			}
		}
		for _, pid := range cgroupProcesses(path) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		return nil
	})
}

// cgroupProcesses are the processes in the cgroup itself. 0 stands for one that this pid namespace cannot see.
func cgroupProcesses(dir string) []int {
	content, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil
	}
	var pids []int
	for field := range strings.FieldsSeq(string(content)) {
		if pid, err := strconv.Atoi(field); err == nil && pid > 1 && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids
}

// removeTree removes a cgroup and all below it, the deepest first.
func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.IsDir() {
			if err := removeTree(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	if err := syscall.Rmdir(dir); err != nil && !errors.Is(err, syscall.ENOENT) {
		return fmt.Errorf("%s: %w", dir, err)
	}
	return nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
