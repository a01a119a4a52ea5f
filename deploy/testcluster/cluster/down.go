package main

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// down takes away all that is the cluster's, however far `up` came: whatever is in its cgroups dies, and with the last
// process its namespaces, mounts and links go; then its folder.
func (c *cluster) down() error {
	if err := c.removeCgroups(30 * time.Second); err != nil {
		return err
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := os.RemoveAll(c.State)
		if err == nil {
			return nil
		}
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(end) {
			return fmt.Errorf("cluster %s: %w: is something of it still mounted on this host?", c.Name, err)
		}
	}
}
