package main

import (
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// One for all tests: it collects every child of this process.
var everyones = &supervisor{services: map[string]*service{}}

func TestMain(m *testing.M) {
	logs, err := os.MkdirTemp("", "testcluster-*")
	if err != nil {
		panic(err)
	}
	everyones.logs, everyones.changed = logs, sync.NewCond(&everyones.mu)
	go everyones.reap()
	status := m.Run()
	_ = os.RemoveAll(logs)
	os.Exit(status)
}

func TestAServiceIsStartedStoppedAndStartedAgainAsItWas(t *testing.T) {
	s := everyones
	if err := s.start("sleeper", []string{"/bin/sleep", "60"}); err != nil {
		t.Fatal(err)
	}
	if err := s.start("sleeper", nil); err == nil {
		t.Error("it was started twice")
	}
	if err := s.stop("sleeper", syscall.SIGTERM, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if got := s.status()["sleeper"]; got.Pid != 0 || got.Ended != "signal: terminated" {
		t.Errorf("it is %+v", got)
	}
	if err := s.start("sleeper", nil); err != nil {
		t.Fatal(err)
	}
	if got := s.status()["sleeper"]; got.Pid == 0 || got.Starts < 2 || len(got.Argv) != 2 {
		t.Errorf("it is %+v", got)
	}
	if err := s.stop("sleeper", syscall.SIGKILL, 10*time.Second); err != nil {
		t.Error(err)
	}
}

func TestAServiceThatDoesNotEndIsSaidToRun(t *testing.T) {
	s := everyones
	if err := s.start("deaf", []string{"/bin/sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond) // until it is deaf
	if err := s.stop("deaf", syscall.SIGTERM, 300*time.Millisecond); err == nil {
		t.Error("it was said to have ended")
	}
	if err := s.stop("deaf", syscall.SIGKILL, 10*time.Second); err != nil {
		t.Error(err)
	}
}

func TestAServiceThatCannotBeStartedIsNotThere(t *testing.T) {
	s := everyones
	if err := s.start("none", []string{"/no/such/program"}); err == nil {
		t.Error("it was started")
	}
	if err := s.stop("none", syscall.SIGTERM, time.Second); err == nil {
		t.Error("it was stopped")
	}
}
