package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"
)

// The file descriptor at which the control plane's init gets the API server's socket of the host's network namespace.
const apiDescriptor = 3

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
