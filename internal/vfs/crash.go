package vfs

import (
	"errors"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
)

// ErrStopped is returned by the calls of a [Crash] whose process or host has
// stopped.
var ErrStopped = errors.New("simulated process has stopped")

// A Crash is a filesystem in memory on which processes are killed, the power fails
// and calls go wrong, all by chance but repeatable by a seed.
//
// It is as unkind as POSIX allows. When the power fails, each 512-byte sector of a
// file and its size, and each change of a folder's names, that was not synced is on
// disk or not, independently of all others; a rename is one change. Before that, any
// of them may have reached the disk at any time, so that a sector can also come back
// with a content between its synced and its last one. A sync that fails has written
// some sectors and forgets about the others: like Linux, a later one does not try
// them again.
//
// The disk has room for as many bytes as SetCapacity says. Files take it by the page
// of 4096 bytes, and each file and folder takes one page besides; space is free again
// once a hole is punched, or a file has neither a name nor a user.
//
// Renames across folders are not simulated. Paths are relative to a root that
// exists, whether or not they begin with a slash.
type Crash struct {
	// mu guards everything here and in all nodes and files.
	mu      sync.Mutex
	rng     *rand.Rand
	root    *crashNode
	process int // handles of earlier ones are dead
	locks   map[*crashNode]int
	stopped bool

	capacity int64 // in bytes; 0: without bounds
	open     map[*crashFile]struct{}

	calls   int
	fault   int // calls until it happens; noFault or less: none
	faulted bool
	faultOf error // nil: the process stops
}

// A crashNode is a file or a folder. Each exists twice: as processes see it and as
// it is on the disk.
type crashNode struct {
	dir *crashDir
	file
}

type crashDir struct {
	now, disk map[string]*crashNode
	changes   []dirChange // that the disk does not have, in their order
}

// A dirChange gives a name to a node, or removes it if there is none, and removes
// the name it had.
type dirChange struct {
	name, was string
	node      *crashNode
}

func (c dirChange) apply(names map[string]*crashNode) {
	delete(names, c.was)
	if c.node == nil {
		delete(names, c.name)
	} else {
		names[c.name] = c.node
	}
}

const (
	crashSector    = 512
	crashPage      = 4096 // granularity of holes
	noFault        = -1
	lockedAlone    = -1 // in Crash.locks; positive: number of sharers
	writeBackEvery = 8  // changes bring some unsynced ones to the disk, about one in so many
)

// NewCrash returns an empty filesystem.
func NewCrash(seed uint64) *Crash {
	return &Crash{
		rng:   rand.New(rand.NewPCG(seed, 0)),
		root:  newCrashDir(),
		locks: make(map[*crashNode]int),
		open:  make(map[*crashFile]struct{}),
		fault: noFault,
	}
}

func newCrashDir() *crashNode {
	return &crashNode{dir: &crashDir{now: make(map[string]*crashNode), disk: make(map[string]*crashNode)}}
}

// Calls returns the number of calls so far, of the filesystem and its files, other
// than Close.
func (c *Crash) Calls() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.calls
}

// FailCall makes the n-th call from now, 0 being the next, fail with err, which is
// not nil. A write or a sync may have happened in part; nothing else happens.
func (c *Crash) FailCall(n int, err error) { c.setFault(n, err) }

// StopCall makes the process stop in the n-th call from now: the call may happen, or
// a write in part, and it and all calls after it fail with ErrStopped, until Kill or
// PowerCut.
func (c *Crash) StopCall(n int) { c.setFault(n, nil) }

func (c *Crash) setFault(n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault, c.faultOf, c.faulted = n, err, false
}

// ClearFault cancels a fault that has not happened.
func (c *Crash) ClearFault() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault = noFault
}

// Faulted reports whether the fault set last has happened.
func (c *Crash) Faulted() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.faulted
}

// Stopped reports whether the process has stopped.
func (c *Crash) Stopped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopped
}

// Kill ends the process: its open files and locks are gone, and a new one sees all
// that the old one did.
func (c *Crash) Kill() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.restart()
}

// PowerCut ends the process and leaves only what the disk has.
func (c *Crash) PowerCut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.restart()
	c.root.powerCut(c.rng)
}

func (c *Crash) restart() {
	c.process++
	c.stopped = false
	c.fault = noFault
	clear(c.locks)
	clear(c.open)
}

func (n *crashNode) powerCut(rng *rand.Rand) {
	if n.dir == nil {
		n.file.powerCut(rng)
		return
	}
	d := n.dir
	for _, change := range d.changes {
		if rng.IntN(2) == 0 {
			change.apply(d.disk)
		}
	}
	d.changes = nil
	d.now = maps.Clone(d.disk)
	for _, name := range slices.Sorted(maps.Keys(d.now)) {
		d.now[name].powerCut(rng)
	}
}

// A fate is what becomes of a call.
type fate int

const (
	happens fate = iota
	fails        // a write or sync in part, others not at all
	ignored      // the process has stopped before
)

// begin counts a call and decides on it. A call that happens may have an error, if
// the process stops before it hears of it.
func (c *Crash) begin() (fate, error) {
	if c.stopped {
		return ignored, ErrStopped
	}
	c.calls++
	c.fault--
	if c.fault != noFault {
		return happens, nil
	}
	c.faulted = true
	if c.faultOf != nil {
		return fails, c.faultOf
	}
	c.stopped = true
	return fate(c.rng.IntN(int(fails) + 1)), ErrStopped
}

// call runs fn as one call.
func (c *Crash) call(op, name string, fn func() error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	fate, err := c.begin()
	if fate == happens {
		if fnErr := fn(); err == nil {
			err = fnErr
		}
	}
	if err != nil {
		return &fs.PathError{Op: op, Path: name, Err: err}
	}
	return nil
}
