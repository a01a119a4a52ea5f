package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// How long the cluster may take to come up: on two idle cores it is ready in a quarter of it.
const upDeadline = 3 * time.Minute

// up makes the cluster and waits until both nodes are Ready. What a failure leaves is taken away by `down`; it is left for a
// look unless the caller says otherwise.
func (c *cluster) up(wait time.Duration) error {
	end := time.Now().Add(wait)
	if err := c.checkBuild(); err != nil {
		return err
	}
	api, err := c.claim()
	if err != nil {
		return err
	}
	defer api.Close()
	if err := c.writeIdentities(); err != nil {
		return err
	}
	if err := together(machines, func(m machine) error {
		if m.Index == 0 {
			return c.startMachine(m, api)
		}
		return c.startMachine(m, nil)
	}); err != nil {
		return err
	}
	if err := c.connect(); err != nil {
		return err
	}
	// containerd unpacks the images while the control plane starts.
	if err := together(machines, func(m machine) error {
		if m.Index == 0 {
			return c.startControl(end)
		}
		return c.startNode(m, end)
	}); err != nil {
		return err
	}
	return c.waitReady(end)
}

func (c *cluster) checkBuild() error {
	for _, part := range []string{"root/usr/bin/containerd", "bin/kubernetes", "images/pause.tar"} {
		if !exists(filepath.Join(c.Build, part)) {
			return fmt.Errorf("%s has no %s: run deploy/testcluster/build.sh", c.Build, part)
		}
	}
	for _, b := range c.Binds {
		if !exists(b.Host) {
			return fmt.Errorf("there is no %s to bind to %s", b.Host, b.Node)
		}
	}
	return nil
}

// claim makes the cluster's folder, which only one can, and the host's socket for its API server.
func (c *cluster) claim() (*net.TCPListener, error) {
	if err := os.MkdirAll(filepath.Dir(c.State), 0o755); err != nil {
		return nil, err
	}
	if err := os.Mkdir(c.State, 0o755); errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("cluster %s is there already, at least in part (%s): use it, or take it away with `down`", c.Name, c.State)
	} else if err != nil {
		return nil, err
	}
	listener, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	c.APIPort = listener.Addr().(*net.TCPAddr).Port
	return listener, c.save()
}

// together runs act for all at once and returns what went wrong.
func together[T any](all []T, act func(T) error) error {
	failures := make([]error, len(all))
	var group sync.WaitGroup
	for i, one := range all {
		group.Go(func() { failures[i] = act(one) })
	}
	group.Wait()
	return errors.Join(failures...)
}

// connect joins the machines by a bridge in the control plane. The links are made inside their namespaces: the host never
// sees them.
func (c *cluster) connect() error {
	control := machines[0]
	if err := c.script(control, `
ip link set lo up
ip link add br0 type bridge
ip addr add `+control.Address+`/24 dev br0
ip link set br0 up
sysctl -qw net.ipv4.ip_forward=1`); err != nil {
		return err
	}
	controlInit, err := c.initOf(control)
	if err != nil {
		return err
	}
	for _, m := range nodes() {
		init, err := c.initOf(m)
		if err != nil {
			return err
		}
		port := "port-" + m.Name
		output, err := exec.Command("ip", "link", "add", port, "netns", strconv.Itoa(controlInit.Pid), "type", "veth",
			"peer", "name", "eth0", "netns", strconv.Itoa(init.Pid)).CombinedOutput()
		if err != nil {
			return fmt.Errorf("joining %s to the control plane: %w: %s", m.Name, err, output)
		}
		if err := c.script(control, "ip link set "+port+" master br0 up\nip route add "+m.Pods+" via "+m.Address); err != nil {
			return err
		}
		lines := []string{"ip link set lo up", "ip addr add " + m.Address + "/24 dev eth0", "ip link set eth0 up",
			"ip route add default via " + control.Address, "sysctl -qw net.ipv4.ip_forward=1"}
		for _, other := range nodes() {
			if other.Index != m.Index {
				lines = append(lines, "ip route add "+other.Pods+" via "+other.Address)
			}
		}
		if err := c.script(m, strings.Join(lines, "\n")); err != nil {
			return err
		}
	}
	return nil
}

func (c *cluster) script(m machine, lines string) error {
	_, err := c.output(m, "/usr/bin/bash", "-euc", lines)
	return err
}

func (c *cluster) startServices(m machine, services []namedService) error {
	for _, one := range services {
		if _, err := c.ask(m, request{Op: "start", Service: one.name, Argv: one.argv}); err != nil {
			return err
		}
	}
	return nil
}

// startControl starts etcd and the API server, and the others once it has made the roles that they need.
func (c *cluster) startControl(end time.Time) error {
	services := controlServices()
	if err := c.startServices(machines[0], services[:2]); err != nil {
		return err
	}
	if err := c.waitAnswering(machines[0], services[1].name, end); err != nil {
		return err
	}
	return c.startServices(machines[0], services[2:])
}

// startNode starts a node's daemons; the kubelet once the images are there, since nothing is pulled.
func (c *cluster) startNode(m machine, end time.Time) error {
	init, err := c.initOf(m)
	if err != nil {
		return err
	}
	root := filepath.Join("/proc", strconv.Itoa(init.Pid), "root")
	if err := writeFiles(root, 0o644, map[string][]byte{
		"/etc/containerd/config.toml":            containerdConfig(),
		"/etc/containerd/conf.d/podferry.toml":   handlerConfig(c.Runtime),
		"/etc/cni/net.d/10-testcluster.conflist": cniConfig(m),
	}); err != nil {
		return err
	}
	services := nodeServices(m)
	if err := c.startServices(m, services[:1]); err != nil {
		return err
	}
	if err := c.waitAnswering(m, services[0].name, end); err != nil {
		return err
	}
	images, err := filepath.Glob(filepath.Join(c.Build, "images", "*.tar"))
	if err != nil {
		return err
	}
	for _, image := range images {
		if err := c.load(m, "/usr/share/testcluster/images/"+filepath.Base(image)); err != nil {
			return err
		}
	}
	return c.startServices(m, services[1:])
}

// load imports an image, named as the node sees its archive.
func (c *cluster) load(m machine, archive string) error {
	_, err := c.output(m, "ctr", "--namespace=k8s.io", "images", "import", "--local", archive)
	return err
}
