package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const spawnCgroup = "PODFERRY_TESTCLUSTER_CGROUP"

const machineNamespaces = syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS |
	syscall.CLONE_NEWIPC | syscall.CLONE_NEWCGROUP

// process is a process of the host, told from a later one with the same number by when it started.
type process struct {
	Pid     int    `json:"pid"`
	Started string `json:"started"` // clock ticks since boot
}

// startTime reads field 22 of /proc/PID/stat; the name, field 2, may hold blanks and brackets.
func startTime(pid int) (string, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}
	fields := strings.Fields(string(content)[strings.LastIndexByte(string(content), ')')+1:])
	if len(fields) < 20 {
		return "", fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}
	return fields[19], nil
}

func (p process) alive() bool {
	started, err := startTime(p.Pid)
	return err == nil && started == p.Started
}

// startMachine makes a machine's cgroups and namespaces and waits until its init answers.
func (c *cluster) startMachine(m machine, api *net.TCPListener) error {
	for _, dir := range []string{"upper", "work", "root", "containerd", "kubelet", "config", "log", "tunables"} {
		if err := os.MkdirAll(c.path(m.Name, dir), 0o755); err != nil {
			return err
		}
	}
	if err := writeFiles(c.path(m.Name, "upper", "etc"), 0o644, map[string][]byte{
		"hostname": []byte(m.Name + "\n"), "hosts": hostsFile(), "resolv.conf": []byte("nameserver " + dnsAddress + "\n"),
		"machine-id": machineID(),
	}); err != nil {
		return err
	}
	if err := c.makeCgroups(m); err != nil {
		return err
	}
	started, err := c.spawn(m, api)
	if err != nil {
		return fmt.Errorf("machine %s: %w%s", m.Name, err, c.tail(m, "init"))
	}
	content, err := json.Marshal(started)
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.path(m.Name, "init.json"), content, 0o644); err != nil {
		return err
	}
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err = c.ask(m, request{Op: "status"}); err == nil {
			return nil
		}
		if !started.alive() || time.Now().After(end) {
			return fmt.Errorf("machine %s did not come up: %w%s", m.Name, err, c.tail(m, "init"))
		}
	}
}

// machineID makes up what a node's system is known by.
func machineID() []byte {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	return []byte(hex.EncodeToString(id) + "\n")
}

// spawn has a child join the machine's cgroups and clone init from there, since a cgroup namespace begins at the cgroups of
// who makes it. init is not our child: it outlives `up`.
func (c *cluster) spawn(m machine, api *net.TCPListener) (process, error) {
	log, err := os.OpenFile(c.path(m.Name, "log", "init.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return process{}, err
	}
	defer log.Close()
	command := c.self("spawn", m.Name)
	command.Stderr = log
	if api != nil {
		socket, err := api.File()
		if err != nil {
			return process{}, err
		}
		defer socket.Close()
		command.ExtraFiles = []*os.File{socket}
	}
	output, err := command.Output()
	if err != nil {
		return process{}, fmt.Errorf("making its namespaces: %w", err)
	}
	var started process
	return started, json.Unmarshal(output, &started)
}

// runSpawn is that child. Its output is init's process id.
func runSpawn(c *cluster, m machine) error {
	if err := c.joinCgroups(m, false); err != nil {
		return err
	}
	command := c.self("init", m.Name)
	command.Stdout, command.Stderr = os.Stderr, os.Stderr
	command.Env = append(os.Environ(), spawnCgroup+"="+filepath.Join(c.cgroup(), m.Name))
	if m.Index == 0 {
		command.ExtraFiles = []*os.File{os.NewFile(apiDescriptor, "api")}
	}
	command.SysProcAttr = &syscall.SysProcAttr{Cloneflags: machineNamespaces, Setsid: true}
	if err := command.Start(); err != nil {
		return fmt.Errorf("init of %s: %w: namespaces need root", m.Name, err)
	}
	started, err := startTime(command.Process.Pid)
	if err != nil {
		return fmt.Errorf("init of %s ended at once: %w", m.Name, err)
	}
	return json.NewEncoder(os.Stdout).Encode(process{Pid: command.Process.Pid, Started: started})
}

// self is another command of this program on the same cluster, also when the program's file has been built anew.
func (c *cluster) self(arguments ...string) *exec.Cmd {
	command := exec.Command("/proc/self/exe", append([]string{"--build", c.Build, "--name", c.Name}, arguments...)...)
	command.Args[0] = "testcluster"
	return command
}

// initOf finds a machine's running init.
func (c *cluster) initOf(m machine) (process, error) {
	var found process
	content, err := os.ReadFile(c.path(m.Name, "init.json"))
	if err != nil {
		return found, fmt.Errorf("machine %s of cluster %s is not there: %w", m.Name, c.Name, err)
	}
	if err := json.Unmarshal(content, &found); err != nil {
		return found, fmt.Errorf("%s: %w", c.path(m.Name, "init.json"), err)
	}
	if !found.alive() {
		return found, fmt.Errorf("machine %s of cluster %s has ended: take the cluster away with `down`", m.Name, c.Name)
	}
	return found, nil
}

// ask tells a machine's init something and returns its answer.
func (c *cluster) ask(m machine, asked request) (reply, error) {
	var answer reply
	init, err := c.initOf(m)
	if err != nil {
		return answer, err
	}
	connection, err := net.DialTimeout("unix", filepath.Join("/proc", strconv.Itoa(init.Pid), "root", controlSocket), 5*time.Second)
	if err != nil {
		return answer, err
	}
	defer connection.Close()
	if err := connection.SetDeadline(time.Now().Add(asked.Wait + 10*time.Second)); err != nil {
		return answer, err
	}
	if err := json.NewEncoder(connection).Encode(asked); err != nil {
		return answer, err
	}
	if err := json.NewDecoder(connection).Decode(&answer); err != nil {
		return answer, err
	}
	if answer.Error != "" {
		return answer, fmt.Errorf("%s: %s", m.Name, answer.Error)
	}
	return answer, nil
}

// tail is the end of a service's log, to be put behind an error.
func (c *cluster) tail(m machine, service string) string {
	file := c.path(m.Name, "log", service+".log")
	content, err := os.ReadFile(file)
	if err != nil || len(content) == 0 {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(content)), "\n")
	if len(lines) > 15 {
		lines = lines[len(lines)-15:]
	}
	return "\nthe end of " + file + ":\n" + strings.Join(lines, "\n")
}

// runOn runs a program on a machine, in all its namespaces and beside its daemons, in place of this process.
func (c *cluster) runOn(m machine, argv []string) error {
	command, err := c.entering(m, argv)
	if err != nil {
		return err
	}
	if err := c.joinCgroups(m, true); err != nil {
		return err
	}
	return fmt.Errorf("%s: %w", command[0], syscall.Exec(command[0], command, serviceEnvironmentWith(os.Getenv("TERM"))))
}

func (c *cluster) entering(m machine, argv []string) ([]string, error) {
	init, err := c.initOf(m)
	if err != nil {
		return nil, err
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return nil, fmt.Errorf("%w: install util-linux", err)
	}
	return append([]string{nsenter, "--target", strconv.Itoa(init.Pid), "--mount", "--uts", "--ipc", "--net", "--pid",
		"--cgroup", "--root", "--wd", "--"}, argv...), nil
}

func serviceEnvironmentWith(term string) []string {
	if term == "" {
		return serviceEnvironment
	}
	return append([]string{"TERM=" + term}, serviceEnvironment...)
}

// output runs a program on a machine and returns what it prints; what it says on standard error is part of the error.
func (c *cluster) output(m machine, argv ...string) (string, error) {
	command := c.self(append([]string{"exec", m.Name, "--"}, argv...)...)
	var complaint strings.Builder
	command.Stderr = &complaint
	output, err := command.Output()
	if err != nil {
		return "", fmt.Errorf("on %s: %s: %w: %s", m.Name, strings.Join(argv, " "), err, strings.TrimSpace(complaint.String()))
	}
	return string(output), nil
}
