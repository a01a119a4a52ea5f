// A service with a heap that changes all the time and is checked, which answers lines on port 7000: `count` with the next
// number, `check` with `ok` or `wrong: N blocks` of what it has come across, `check-all` with the same when it has looked at all.
//
// Go 1.24 and newer listen with MPTCP, which CRIU cannot dump: podferry refuses such a container and names this remedy.

//go:debug multipathtcp=0
package main

import (
	"bufio"
	"fmt"
	"log"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// Blocks of 4 KiB: 256 MiB of live heap.
	blocks = 65536
	words  = 512
	// Blocks that are replaced every 10 ms: an eighth of the heap in a second, which the collector has to find.
	replaced = 80
	tick     = 10 * time.Millisecond
)

type block struct {
	generation uint64
	words      []uint64
}

var (
	mutex   sync.Mutex
	heap    [blocks]*block
	counted atomic.Uint64
	wrong   atomic.Uint64
)

// word is what a place holds: SplitMix64 of where it is and how often that was replaced.
func word(slot int, generation uint64, index int) uint64 {
	mixed := uint64(slot)<<40 ^ generation<<16 ^ uint64(index)
	mixed = (mixed + 0x9e3779b97f4a7c15)
	mixed = (mixed ^ mixed>>30) * 0xbf58476d1ce4e5b9
	mixed = (mixed ^ mixed>>27) * 0x94d049bb133111eb
	return mixed ^ mixed>>31
}

func made(slot int, generation uint64) *block {
	content := make([]uint64, words)
	for index := range content {
		content[index] = word(slot, generation, index)
	}
	return &block{generation, content}
}

func check(slot int) {
	for index, found := range heap[slot].words {
		if found != word(slot, heap[slot].generation, index) {
			wrong.Add(1)
			return
		}
	}
}

func change() {
	slot := 0
	for range time.Tick(tick) {
		mutex.Lock()
		for i := 0; i < replaced; i++ {
			// A stride that is prime to the number of blocks: all of them in turn, far apart.
			slot = (slot + 40503) % blocks
			check(slot)
			heap[slot] = made(slot, heap[slot].generation+1)
		}
		mutex.Unlock()
	}
}

func checkAll() {
	mutex.Lock()
	defer mutex.Unlock()
	for slot := range heap {
		check(slot)
	}
}

func verdict() string {
	if found := wrong.Load(); found > 0 {
		return fmt.Sprintf("wrong: %d blocks", found)
	}
	return "ok"
}

func answer(question string) string {
	switch question {
	case "count":
		return fmt.Sprint(counted.Add(1))
	case "check":
		return verdict()
	case "check-all":
		checkAll()
		return verdict()
	default:
		return "there are count, check and check-all"
	}
}

func converse(connection net.Conn) {
	defer connection.Close()
	lines := bufio.NewScanner(connection)
	for lines.Scan() {
		if _, err := fmt.Fprintln(connection, answer(strings.TrimSpace(lines.Text()))); err != nil {
			return
		}
	}
}

func main() {
	for slot := range heap {
		heap[slot] = made(slot, 0)
	}
	go change()
	listener, err := net.Listen("tcp4", ":7000")
	if err != nil {
		log.Fatal(err)
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go converse(connection)
	}
}
