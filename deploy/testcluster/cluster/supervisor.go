package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

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
