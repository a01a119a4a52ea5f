package main

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// waitAnswering waits for a service that others give up without: no kubelet starts without containerd, and no controller
// without the roles that the API server makes.
func (c *cluster) waitAnswering(m machine, service string, end time.Time) error {
	var try func() error
	switch service {
	case "containerd":
		try = func() error {
			_, err := c.output(m, "ctr", "version")
			return err
		}
	case "kube-apiserver":
		try = func() error {
			_, err := c.kubectl(nil, "get", "--raw=/readyz")
			return err
		}
	default:
		return nil
	}
	for {
		err := try()
		if err == nil {
			return nil
		}
		if ended := c.ended(m, service); ended != "" || time.Now().After(end) {
			return fmt.Errorf("%s on %s does not answer (%s): %w%s", service, m.Name, ended, err, c.tail(m, service))
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// ended says how a service ended, and nothing while it runs.
func (c *cluster) ended(m machine, service string) string {
	answer, err := c.ask(m, request{Op: "status"})
	if err != nil {
		return err.Error()
	}
	one, known := answer.Services[service]
	if !known || one.Pid != 0 {
		return ""
	}
	return one.Ended
}

// kubectl runs kubectl on the host, with the cluster's kubeconfig.
func (c *cluster) kubectl(input []byte, argv ...string) (string, error) {
	command := exec.Command(filepath.Join(c.Build, "bin", "kubernetes"), append([]string{"kubectl", "--kubeconfig=" + c.kubeconfig()}, argv...)...)
	command.Stdin = strings.NewReader(string(input))
	var complaint strings.Builder
	command.Stderr = &complaint
	output, err := command.Output()
	if err != nil {
		return "", fmt.Errorf("kubectl %s: %w: %s", strings.Join(argv, " "), err, strings.TrimSpace(complaint.String()))
	}
	return string(output), nil
}

// waitReady makes the RuntimeClass, and waits for nodes on which pods can be made.
func (c *cluster) waitReady(end time.Time) error {
	if err := c.waitUntil("the RuntimeClass", end, func() error {
		_, err := c.kubectl(runtimeClass(), "apply", "--filename=-")
		return err
	}); err != nil {
		return err
	}
	if err := c.waitUntil("both nodes to be Ready", end, c.nodesReady); err != nil {
		return err
	}
	return c.waitUntil("the service account of namespace default", end, func() error {
		_, err := c.kubectl(nil, "get", "serviceaccount", "default")
		return err
	})
}

// waitUntil repeats try until it succeeds, as long as everything that was started still runs.
func (c *cluster) waitUntil(what string, end time.Time, try func() error) error {
	for {
		err := try()
		if err == nil {
			return nil
		}
		if dead := c.dead(); dead != nil {
			return fmt.Errorf("waiting for %s: %w", what, dead)
		}
		if time.Now().After(end) {
			return fmt.Errorf("waiting for %s took too long: %w: the logs are in %s", what, err, c.path("*", "log"))
		}
		time.Sleep(200 * time.Millisecond)
	}
}

func (c *cluster) nodesReady() error {
	output, err := c.kubectl(nil, "get", "nodes", `--output=jsonpath={range .items[*]}{.metadata.name}={.status.conditions[?(@.type=="Ready")].status} {end}`)
	if err != nil {
		return err
	}
	for _, m := range nodes() {
		if !strings.Contains(output, m.Name+"=True") {
			return fmt.Errorf("the nodes' state is %q", strings.TrimSpace(output))
		}
	}
	return nil
}

// dead is the first service that has ended.
func (c *cluster) dead() error {
	for _, m := range machines {
		answer, err := c.ask(m, request{Op: "status"})
		if err != nil {
			return err
		}
		for name, one := range answer.Services {
			if one.Pid == 0 {
				return fmt.Errorf("%s on %s has ended: %s%s", name, m.Name, one.Ended, c.tail(m, name))
			}
		}
	}
	return nil
}
