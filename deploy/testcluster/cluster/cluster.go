package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"syscall"
	"time"
)

// Addresses. They exist only inside the namespaces of the cluster, so that every cluster has the same.
const (
	machineNetwork = "10.77.0"
	controlAddress = machineNetwork + ".1"
	podNetwork     = "10.78.0.0/16"
	serviceNetwork = "10.79.0.0/16"
	serviceAddress = "10.79.0.1" // the API server as pods know it
	dnsAddress     = "10.79.0.10"
	apiPort        = 6443
)

// machine is the control plane or a node: a set of namespaces with a cgroup and a root of its own.
type machine struct {
	Name    string
	Index   int // 0 is the control plane
	Address string
	Pods    string // the node's part of the pod network
}

var machines = []machine{
	{Name: "control", Address: controlAddress},
	{Name: "node-a", Index: 1, Address: machineNetwork + ".11", Pods: "10.78.1.0/24"},
	{Name: "node-b", Index: 2, Address: machineNetwork + ".12", Pods: "10.78.2.0/24"},
}

func nodes() []machine { return machines[1:] }

func findMachine(name string) (machine, error) {
	for _, m := range machines {
		if m.Name == name {
			return m, nil
		}
	}
	return machine{}, fmt.Errorf("no machine is called %q: there are control, node-a and node-b", name)
}

// bind makes a path of the host visible in every machine of the cluster.
type bind struct {
	Host string `json:"host"`
	Node string `json:"node"`
}

// cluster is where one cluster lies and how it was asked for; it is kept in cluster.json.
type cluster struct {
	Name string `json:"name"`
	// What build.sh made: root, bin and images.
	Build string `json:"build"`
	// The folder that goes when the cluster goes.
	State string `json:"state"`
	// The runtime of the handler podferry, as the nodes see it.
	Runtime string `json:"runtime"`
	Binds   []bind `json:"binds"`
	// Where the API server listens on the host's loopback.
	APIPort int `json:"api_port"`
}

var goodName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?$`)

// newCluster names a cluster below the folder that build.sh made. Nothing is made yet.
func newCluster(build, name string) (*cluster, error) {
	if !goodName.MatchString(name) {
		return nil, fmt.Errorf("cluster name %q: use up to 24 lower case letters, digits and inner hyphens", name)
	}
	build, err := filepath.Abs(build)
	if err != nil {
		return nil, fmt.Errorf("folder %s: %w", build, err)
	}
	return &cluster{Name: name, Build: build, State: filepath.Join(build, "clusters", name), Runtime: stockRuntime}, nil
}

// open reads a cluster that `up` began to make.
func open(build, name string) (*cluster, error) {
	c, err := newCluster(build, name)
	if err != nil {
		return nil, err
	}
	content, err := os.ReadFile(c.path("cluster.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there is no cluster %q in %s: make one with `up`", name, filepath.Dir(c.State))
	} else if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(content, c); err != nil {
		return nil, fmt.Errorf("%s: %w: take the cluster away with `down`", c.path("cluster.json"), err)
	}
	return c, nil
}

func (c *cluster) save() error {
	content, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(c.path("cluster.json"), append(content, '\n'), 0o644)
}

// lock keeps others from making or taking away the same cluster as long as this process lives. It is a name that no file
// stands for, so that it too is gone when the process is.
func (c *cluster) lock(wait time.Duration) error {
	sum := sha256.Sum256([]byte(c.State))
	for end := time.Now().Add(wait); ; time.Sleep(100 * time.Millisecond) {
		held, err := net.Listen("unix", "@podferry-testcluster-"+hex.EncodeToString(sum[:16]))
		if err == nil {
			heldLock = held
			return nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			return fmt.Errorf("locking cluster %s: %w", c.Name, err)
		}
		if time.Now().After(end) {
			return fmt.Errorf("cluster %s is being made or taken away by another `testcluster up` or `down`: wait for it, or end it", c.Name)
		}
	}
}

// heldLock is closed, and so given up, only with the process.
var heldLock net.Listener

// path names something in the cluster's folder.
func (c *cluster) path(parts ...string) string {
	return filepath.Join(append([]string{c.State}, parts...)...)
}

func (c *cluster) kubeconfig() string { return c.path("kubeconfig") }

// cgroup is the cluster's path below the root of each cgroup hierarchy. What is in it is the cluster's, and all that is.
func (c *cluster) cgroup() string { return "podferry-testcluster-" + c.Name }
