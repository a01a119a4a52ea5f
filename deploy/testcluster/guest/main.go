// CRIU cannot dump the multipath TCP sockets that Go listens with by default.
//go:debug multipathtcp=0

// Command guest is what runs in the test cluster's own images: the process that holds a pod's namespaces, and a small service.
package main

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	name := filepath.Base(os.Args[0])
	if name == "guest" && len(os.Args) > 1 {
		name = os.Args[1]
	}
	switch name {
	case "pause":
		pause()
	case "serve":
		if err := serve(); err != nil {
			fmt.Fprintln(os.Stderr, "guest: error:", err)
			os.Exit(1)
		}
	default:
		fmt.Fprintf(os.Stderr, "guest: error: no part is called %q: there are pause and serve\n", name)
		os.Exit(2)
	}
}

// pause holds a pod's namespaces and collects its orphans until it is told to end.
func pause() {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGCHLD, syscall.SIGTERM, syscall.SIGINT)
	for received := range signals {
		if received != syscall.SIGCHLD {
			return
		}
		for {
			pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
			if err != nil || pid <= 0 {
				break
			}
		}
	}
}

// answer tells which process of which pod has answered, and how often it has: a process that was moved goes on counting, one
// that was started again has another nonce.
type answer struct {
	Host  string `json:"host"`
	Node  string `json:"node"`
	Nonce string `json:"nonce"`
	Count uint64 `json:"count"`
}

// serve answers on port 8080 (or PORT) and writes a line a second to standard output.
func serve() error {
	nonce := make([]byte, 8)
	if _, err := rand.Read(nonce); err != nil {
		return err
	}
	own := hex.EncodeToString(nonce)
	port := os.Getenv("PORT")
	if port == "" {
		port = "8080"
	}
	var count atomic.Uint64
	http.HandleFunc("GET /", func(w http.ResponseWriter, _ *http.Request) {
		host, _ := os.Hostname()
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Connection", "close")
		_ = json.NewEncoder(w).Encode(answer{host, os.Getenv("NODE"), own, count.Add(1)})
	})
	go func() {
		for second := 1; ; second++ {
			fmt.Printf("nonce=%s second=%d count=%d\n", own, second, count.Load())
			time.Sleep(time.Second)
		}
	}()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-signals
		os.Exit(0)
	}()
	return http.ListenAndServe(":"+port, nil)
}
