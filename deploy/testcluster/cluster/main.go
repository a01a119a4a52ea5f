// Command testcluster makes a Kubernetes cluster out of namespaces of this machine, and takes it away again.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const usage = `testcluster [--build DIR] [--name NAME] COMMAND

  up [--runtime PATH] [--bind HOST:NODE]...   make the cluster and wait until both nodes are Ready
       --runtime  the binary of the runtime handler podferry, as the nodes see it (default: runc)
       --bind     make a file or folder of this machine visible on the nodes; may be repeated
  down                                        take it away, also one that came up only in part
  status                                      what there is, as JSON
  kubeconfig                                  print the path of the administrator's kubeconfig
  kubectl ARGUMENT...                         kubectl as administrator
  exec MACHINE -- COMMAND...                  run a command on control, node-a or node-b, in all its namespaces
  load ARCHIVE...                             import images (docker save, OCI archives) on both nodes
  image NAME:TAG ROOTFS ARCHIVE               pack a root filesystem as an image; needs no cluster
  stop MACHINE SERVICE [--signal N]           end a daemon (SIGTERM) and leave it ended
  start MACHINE SERVICE                       start it again as it was; containerd and the API server are waited for
  restart MACHINE SERVICE [--signal N]        both

DIR is what deploy/testcluster/build.sh made, by default the folder above this program's; NAME is "main".
`

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "testcluster: error:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	flags := flag.NewFlagSet("testcluster", flag.ContinueOnError)
	flags.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	build := flags.String("build", defaultBuild(), "")
	name := flags.String("name", "main", "")
	if err := flags.Parse(arguments); errors.Is(err, flag.ErrHelp) {
		return nil
	} else if err != nil {
		return err
	}
	if flags.NArg() == 0 {
		return fmt.Errorf("no command\n%s", usage)
	}
	command, rest := flags.Arg(0), flags.Args()[1:]
	if command == "image" {
		return runImage(rest)
	}
	if os.Geteuid() != 0 {
		return errors.New("needs root: it makes namespaces, mounts and cgroups; run it with sudo")
	}
	if command == "up" || command == "down" {
		c, err := newCluster(*build, *name)
		if err != nil {
			return err
		}
		if err := c.lock(30 * time.Second); err != nil {
			return err
		}
		if command == "up" {
			return runUp(c, rest)
		}
		if len(rest) > 0 {
			return fmt.Errorf("down takes no %q: name the cluster before it, with --name", rest)
		}
		return c.down()
	}
	c, err := open(*build, *name)
	if err != nil {
		return err
	}
	return onCluster(c, command, rest)
}

// defaultBuild is DIR where this program is DIR/bin/testcluster.
func defaultBuild() string {
	own, err := os.Executable()
	if err != nil {
		return "."
	}
	return filepath.Dir(filepath.Dir(own))
}

func onCluster(c *cluster, command string, rest []string) error {
	switch command {
	case "status":
		return c.printStatus()
	case "kubeconfig":
		fmt.Println(c.kubeconfig())
		return nil
	case "kubectl":
		return c.becomeKubectl(rest)
	case "load":
		return c.loadAll(rest)
	}
	if len(rest) == 0 {
		return fmt.Errorf("%s needs a machine\n%s", command, usage)
	}
	m, err := findMachine(rest[0])
	if err != nil {
		return err
	}
	switch command {
	case "exec":
		argv := rest[1:]
		if len(argv) > 0 && argv[0] == "--" {
			argv = argv[1:]
		}
		if len(argv) == 0 {
			return errors.New("exec needs a command")
		}
		return c.runOn(m, argv)
	case "start", "stop", "restart":
		return c.service(m, command, rest[1:])
	case "spawn":
		return runSpawn(c, m)
	case "init":
		return runInit(c, m)
	}
	return fmt.Errorf("no command is called %q\n%s", command, usage)
}

type bindFlag struct{ to *[]bind }

func (b bindFlag) String() string { return "" }

func (b bindFlag) Set(value string) error {
	host, node, found := strings.Cut(value, ":")
	if !found || !filepath.IsAbs(host) || !filepath.IsAbs(node) {
		return fmt.Errorf("%q is not HOST:NODE with two absolute paths", value)
	}
	*b.to = append(*b.to, bind{filepath.Clean(host), filepath.Clean(node)})
	return nil
}

func runUp(c *cluster, rest []string) error {
	flags := flag.NewFlagSet("up", flag.ContinueOnError)
	flags.StringVar(&c.Runtime, "runtime", stockRuntime, "the binary of the runtime handler podferry, as the nodes see it")
	flags.Var(bindFlag{&c.Binds}, "bind", "HOST:NODE")
	wait := flags.Duration("wait", upDeadline, "how long it may take")
	if err := flags.Parse(rest); err != nil {
		return err
	}
	begun := time.Now()
	if err := c.up(*wait); err != nil {
		return fmt.Errorf("%w\n`down` takes away what there is", err)
	}
	fmt.Fprintf(os.Stderr, "testcluster: cluster %s is Ready after %.1f s; KUBECONFIG=%s\n",
		c.Name, time.Since(begun).Seconds(), c.kubeconfig())
	return nil
}

func (c *cluster) becomeKubectl(rest []string) error {
	kubernetes := filepath.Join(c.Build, "bin", "kubernetes")
	argv := append([]string{kubernetes, "kubectl", "--kubeconfig=" + c.kubeconfig()}, rest...)
	return fmt.Errorf("%s: %w", kubernetes, syscall.Exec(kubernetes, argv, os.Environ()))
}

// loadAll puts the archives where the nodes see them.
func (c *cluster) loadAll(archives []string) error {
	if len(archives) == 0 {
		return errors.New("load needs an archive")
	}
	for _, archive := range archives {
		for _, m := range nodes() {
			if err := c.loadFrom(m, archive); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *cluster) loadFrom(m machine, archive string) error {
	place, err := os.MkdirTemp(c.path(m.Name, "containerd"), "load-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(place)
	if err := copyFile(archive, filepath.Join(place, "image.tar")); err != nil {
		return err
	}
	return c.load(m, filepath.Join("/var/lib/containerd", filepath.Base(place), "image.tar"))
}

func (c *cluster) service(m machine, command string, rest []string) error {
	if len(rest) == 0 {
		return fmt.Errorf("%s needs a service: see `status`", command)
	}
	name := rest[0]
	flags := flag.NewFlagSet(command, flag.ContinueOnError)
	number := flags.Int("signal", int(syscall.SIGTERM), "the signal that ends it")
	if err := flags.Parse(rest[1:]); err != nil {
		return err
	}
	if command != "start" {
		if _, err := c.ask(m, request{Op: "stop", Service: name, Signal: *number, Wait: 30 * time.Second}); err != nil {
			return err
		}
	}
	if command != "stop" {
		if _, err := c.ask(m, request{Op: "start", Service: name}); err != nil {
			return err
		}
		return c.waitAnswering(m, name, time.Now().Add(upDeadline))
	}
	return nil
}

// machineStatus is what a test needs to know of a machine.
type machineStatus struct {
	Address  string             `json:"address"`
	Init     int                `json:"init"` // its /proc/PID/ns and /proc/PID/root are the machine's
	Logs     string             `json:"logs"`
	Services map[string]service `json:"services"`
	Error    string             `json:"error,omitempty"`
}

func (c *cluster) printStatus() error {
	all := map[string]machineStatus{}
	for _, m := range machines {
		one := machineStatus{Address: m.Address, Logs: c.path(m.Name, "log")}
		if init, err := c.initOf(m); err != nil {
			one.Error = err.Error()
		} else {
			one.Init = init.Pid
		}
		if answer, err := c.ask(m, request{Op: "status"}); err != nil {
			one.Error = err.Error()
		} else {
			one.Services = answer.Services
		}
		all[m.Name] = one
	}
	encoder := json.NewEncoder(os.Stdout)
	encoder.SetIndent("", "  ")
	return encoder.Encode(map[string]any{"cluster": c, "kubeconfig": c.kubeconfig(), "machines": all})
}
