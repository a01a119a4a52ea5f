package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"
)

// Where a machine's init listens. Seen from the host it is below /proc/PID/root.
const controlSocket = "/run/testcluster.sock"

// The file descriptor at which the control plane's init gets the API server's socket of the host's network namespace.
const apiDescriptor = 3

// request is what init is told, one on a connection, as JSON.
type request struct {
	Op      string        `json:"op"` // start, stop, status
	Service string        `json:"service,omitempty"`
	Argv    []string      `json:"argv,omitempty"`
	Signal  int           `json:"signal,omitempty"`
	Wait    time.Duration `json:"wait,omitempty"`
}

// reply is its answer.
type reply struct {
	Error    string             `json:"error,omitempty"`
	Services map[string]service `json:"services,omitempty"`
}

// service is a program that init has started. Its process id is the one inside the machine.
type service struct {
	Pid    int      `json:"pid"` // 0: it has ended
	Argv   []string `json:"argv"`
	Ended  string   `json:"ended,omitempty"`
	Starts int      `json:"starts"`
}

// supervisor is a machine's process 1. It starts services when it is told to and never by itself, so that a test that kills
// one decides when it comes back.
type supervisor struct {
	mu       sync.Mutex
	services map[string]*service
	changed  *sync.Cond
	logs     string
}

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

// reap collects every process of the machine whose parent is gone, and notes which services ended.
func (s *supervisor) reap() {
	children := make(chan os.Signal, 64)
	signal.Notify(children, syscall.SIGCHLD)
	for {
		select {
		case <-children:
		case <-time.After(time.Second): // signals are merged
		}
		s.mu.Lock()
		for {
			var status syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
			if err != nil || pid <= 0 {
				break
			}
			s.note(pid, status)
		}
		s.mu.Unlock()
	}
}

func (s *supervisor) note(pid int, status syscall.WaitStatus) {
	for _, one := range s.services {
		if one.Pid != pid {
			continue
		}
		one.Pid, one.Ended = 0, fmt.Sprintf("exit status %d", status.ExitStatus())
		if status.Signaled() {
			one.Ended = "signal: " + status.Signal().String()
		}
		s.changed.Broadcast()
	}
}

func (s *supervisor) serve() error {
	listener, err := net.Listen("unix", controlSocket)
	if err != nil {
		return err
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer connection.Close()
			var asked request
			answer := reply{}
			if err := json.NewDecoder(connection).Decode(&asked); err != nil {
				answer.Error = err.Error()
			} else {
				answer = s.handle(asked)
			}
			_ = json.NewEncoder(connection).Encode(answer)
		}()
	}
}

func (s *supervisor) handle(asked request) reply {
	var err error
	switch asked.Op {
	case "start":
		err = s.start(asked.Service, asked.Argv)
	case "stop":
		err = s.stop(asked.Service, syscall.Signal(asked.Signal), asked.Wait)
	case "status":
		return reply{Services: s.status()}
	default:
		err = fmt.Errorf("init knows no %q", asked.Op)
	}
	if err != nil {
		return reply{Error: err.Error()}
	}
	return reply{Services: s.status()}
}

// start starts a service; without arguments one that has ended, as it was.
func (s *supervisor) start(name string, argv []string) error {
	s.mu.Lock() // also keeps reap from a child that has no name yet
	defer s.mu.Unlock()
	known := s.services[name]
	if known != nil && known.Pid != 0 {
		return fmt.Errorf("service %s runs as process %d", name, known.Pid)
	}
	starts := 1
	if known != nil {
		starts = known.Starts + 1
		if len(argv) == 0 {
			argv = known.Argv
		}
	}
	if len(argv) == 0 {
		return fmt.Errorf("service %s has never been started: give its command", name)
	}
	pid, err := launch(filepath.Join(s.logs, name+".log"), argv)
	if err != nil {
		return fmt.Errorf("service %s: %w", name, err)
	}
	s.services[name] = &service{Pid: pid, Argv: argv, Starts: starts}
	return nil
}

var serviceEnvironment = []string{
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "HOME=/root", "LC_ALL=C.UTF-8",
}

func launch(file string, argv []string) (int, error) {
	log, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	return syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{
		Dir: "/", Env: serviceEnvironment, Files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
}

// stop sends the signal to the service, not to what it has started, and waits for it to end.
func (s *supervisor) stop(name string, sig syscall.Signal, wait time.Duration) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	one := s.services[name]
	if one == nil {
		return fmt.Errorf("no service is called %q", name)
	}
	if one.Pid == 0 {
		return nil
	}
	if err := syscall.Kill(one.Pid, sig); err != nil {
		return fmt.Errorf("service %s, process %d: %w", name, one.Pid, err)
	}
	late := false
	timer := time.AfterFunc(wait, func() {
		s.mu.Lock()
		late = true
		s.mu.Unlock()
		s.changed.Broadcast()
	})
	defer timer.Stop()
	for one.Pid != 0 && !late {
		s.changed.Wait()
	}
	if one.Pid != 0 {
		return fmt.Errorf("service %s, process %d, still runs %v after signal %d", name, one.Pid, wait, sig)
	}
	return nil
}

func (s *supervisor) status() map[string]service {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make(map[string]service, len(s.services))
	for name, one := range s.services {
		all[name] = *one
	}
	return all
}

// forwardAPI passes connections to the host's loopback on to the API server. The socket is of the host's network namespace,
// the connections go out in the machine's: the cluster needs neither a route nor an address on the host.
func forwardAPI() error {
	listener, err := net.FileListener(os.NewFile(apiDescriptor, "api"))
	if err != nil {
		return fmt.Errorf("the host's socket for the API server: %w", err)
	}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			go forward(client, net.JoinHostPort(controlAddress, strconv.Itoa(apiPort)))
		}
	}()
	return nil
}

func forward(client net.Conn, to string) {
	defer client.Close()
	server, err := net.DialTimeout("tcp", to, 10*time.Second)
	if err != nil {
		return
	}
	defer server.Close()
	var both sync.WaitGroup
	pass := func(to, from net.Conn) {
		_, _ = io.Copy(to, from)
		if half, ok := to.(*net.TCPConn); ok {
			_ = half.CloseWrite()
		}
	}
	both.Go(func() { pass(server, client) })
	both.Go(func() { pass(client, server) })
	both.Wait()
}
