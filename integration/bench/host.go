package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// touchMost bounds how much memory touchMemory touches: more than the page caches
// of all files of a round.
const touchMost = 10 << 30

// touchMemory touches free memory once, up to touchMost and to two thirds of it.
// In a virtual machine the host gives a page only when it is first used, which
// takes several times as long as copying into it: whichever system happened to grow
// the page cache first would pay for all the others.
func touchMemory(ctx context.Context) error {
	const step = 64 << 20
	free, err := freeMemory()
	if err != nil {
		return err
	}
	n := int(min(free/3*2, touchMost) / step * step)
	if n == 0 {
		return nil
	}
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("touch memory: %w", err)
	}
	for at := 0; at < n && ctx.Err() == nil; at += step {
		for i := at; i < at+step; i += os.Getpagesize() {
			p[i] = 1
		}
	}
	return unix.Munmap(p)
}

// freeMemory returns how many bytes of memory nothing uses.
func freeMemory() (int64, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		var kb int64
		if n, _ := fmt.Sscanf(line, "MemFree: %d kB", &kb); n == 1 {
			return kb << 10, nil
		}
	}
	return 0, fmt.Errorf("/proc/meminfo does not say how much memory is free")
}
