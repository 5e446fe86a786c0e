package main

import (
	"fmt"
	"os"
	"runtime/debug"

	"github.com/dustin/go-humanize"
)

// Bounds of --memory, in bytes of resident memory.
const (
	defaultMemory = 192 << 20
	leastMemory   = 96 << 20

	// programMemory is what the program itself takes: its code, its stacks and
	// what the runtime keeps to itself.
	programMemory = 32 << 20
)

// boundMemory makes Go's collector work harder as the heap comes near what
// --memory leaves to it: buffers of fetches and uploads come and go by the
// megabyte, and the heap would grow to twice what is in use. GOMEMLIMIT goes
// before the default.
func (a *app) boundMemory() error {
	if a.memory < leastMemory {
		return usageError{fmt.Errorf("--memory must be at least %s", humanize.IBytes(leastMemory))}
	}
	if a.memoryGiven || os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(a.heap())
	}
	return nil
}

// heap is what --memory leaves to buffers and caches, in bytes.
func (a *app) heap() int64 { return int64(a.memory) - programMemory }

// leafCache is how many bytes of leaves are kept decoded.
func (a *app) leafCache() int64 { return min(leafCacheBytes, a.heap()/5) }

// readAhead is how many of n bytes may be read ahead; as much again may be on its
// way.
func (a *app) readAhead(n int64) int64 { return min(n, a.heap()/5) }
