package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
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

// lookup returns the node of a path, nil if there is none.
func (c *Crash) lookup(path string) *crashNode {
	n := c.root
	for name := range strings.SplitSeq(filepath.Clean("/" + path)[1:], "/") {
		if name == "" {
			continue
		}
		if n == nil || n.dir == nil {
			return nil
		}
		n = n.dir.now[name]
	}
	return n
}

func (c *Crash) lookupDir(path string) (*crashDir, error) {
	n := c.lookup(path)
	switch {
	case n == nil:
		return nil, fs.ErrNotExist
	case n.dir == nil:
		return nil, syscall.ENOTDIR
	}
	return n.dir, nil
}

func (c *Crash) change(d *crashDir, change dirChange) {
	change.apply(d.now)
	d.changes = append(d.changes, change)
	if c.rng.IntN(writeBackEvery) == 0 {
		d.sync()
	}
}

func (d *crashDir) sync() {
	for _, change := range d.changes {
		change.apply(d.disk)
	}
	d.changes = nil
}

// OpenFile implements [FS].
func (c *Crash) OpenFile(name string, flag int, _ fs.FileMode) (File, error) {
	var f *crashFile
	err := c.call("open", name, func() error {
		node, err := c.open(name, flag)
		f = &crashFile{fs: c, name: name, node: node, process: c.process}
		return err
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (c *Crash) open(name string, flag int) (*crashNode, error) {
	dir, err := c.lookupDir(filepath.Dir(name))
	if err != nil {
		return nil, err
	}
	base := filepath.Base(name)
	node := dir.now[base]
	switch {
	case node == nil && flag&os.O_CREATE == 0:
		return nil, fs.ErrNotExist
	case node == nil:
		node = &crashNode{file: newFile()}
		c.change(dir, dirChange{name: base, node: node})
	case node.dir != nil:
		return nil, syscall.EISDIR
	case flag&os.O_EXCL != 0:
		return nil, fs.ErrExist
	case flag&os.O_TRUNC != 0:
		node.truncate(0)
	}
	return node, nil
}

// MkdirAll implements [FS].
func (c *Crash) MkdirAll(name string, _ fs.FileMode) error {
	return c.call("mkdir", name, func() error {
		n := c.root
		for part := range strings.SplitSeq(filepath.Clean("/" + name)[1:], "/") {
			if part == "" {
				continue
			}
			if n.dir == nil {
				return syscall.ENOTDIR
			}
			next := n.dir.now[part]
			if next == nil {
				next = newCrashDir()
				c.change(n.dir, dirChange{name: part, node: next})
			}
			n = next
		}
		if n.dir == nil {
			return syscall.ENOTDIR
		}
		return nil
	})
}

// Rename implements [FS] for names in the same folder.
func (c *Crash) Rename(oldName, newName string) error {
	return c.call("rename", oldName, func() error {
		if filepath.Dir(filepath.Clean(oldName)) != filepath.Dir(filepath.Clean(newName)) {
			return syscall.EXDEV
		}
		dir, err := c.lookupDir(filepath.Dir(oldName))
		if err != nil {
			return err
		}
		was, name := filepath.Base(oldName), filepath.Base(newName)
		node := dir.now[was]
		if node == nil {
			return fs.ErrNotExist
		}
		if target := dir.now[name]; target != nil && (target.dir != nil || node.dir != nil) {
			return fs.ErrExist
		}
		if was != name {
			c.change(dir, dirChange{name: name, was: was, node: node})
		}
		return nil
	})
}

// Remove implements [FS].
func (c *Crash) Remove(name string) error {
	return c.call("remove", name, func() error {
		dir, err := c.lookupDir(filepath.Dir(name))
		if err != nil {
			return err
		}
		node := dir.now[filepath.Base(name)]
		if node == nil {
			return fs.ErrNotExist
		}
		if node.dir != nil && len(node.dir.now) > 0 {
			return syscall.ENOTEMPTY
		}
		c.change(dir, dirChange{name: filepath.Base(name)})
		return nil
	})
}

// RemoveAll implements [FS].
func (c *Crash) RemoveAll(name string) error {
	return c.call("remove", name, func() error {
		dir, err := c.lookupDir(filepath.Dir(name))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		c.removeTree(dir, filepath.Base(name))
		return nil
	})
}

func (c *Crash) removeTree(dir *crashDir, name string) {
	node := dir.now[name]
	if node == nil {
		return
	}
	if node.dir != nil {
		for _, child := range slices.Sorted(maps.Keys(node.dir.now)) {
			c.removeTree(node.dir, child)
		}
	}
	c.change(dir, dirChange{name: name})
}

// ReadDir implements [FS].
func (c *Crash) ReadDir(name string) (names []string, err error) {
	err = c.call("read folder", name, func() error {
		dir, err := c.lookupDir(name)
		if err != nil {
			return err
		}
		names = slices.Sorted(maps.Keys(dir.now))
		return nil
	})
	if err != nil {
		return nil, err
	}
	return names, nil
}

// SyncDir implements [FS].
func (c *Crash) SyncDir(name string) error {
	return c.call("sync folder", name, func() error {
		dir, err := c.lookupDir(name)
		if err != nil {
			return err
		}
		dir.sync()
		return nil
	})
}

// Lock implements [FS].
func (c *Crash) Lock(name string, exclusive bool) (io.Closer, error) {
	var l *crashLock
	err := c.call("lock", name, func() error {
		node, err := c.open(name, os.O_CREATE)
		if err != nil {
			return err
		}
		held := c.locks[node]
		if held == lockedAlone || exclusive && held != 0 {
			return ErrLocked
		}
		if exclusive {
			c.locks[node] = lockedAlone
		} else {
			c.locks[node]++
		}
		l = &crashLock{fs: c, node: node, process: c.process, exclusive: exclusive}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return l, nil
}

type crashLock struct {
	fs        *Crash
	node      *crashNode
	process   int
	exclusive bool
	closed    bool
}

func (l *crashLock) Close() error {
	l.fs.mu.Lock()
	defer l.fs.mu.Unlock()
	switch {
	case l.closed:
		return fmt.Errorf("close lock: %w", fs.ErrClosed)
	case l.process != l.fs.process:
	case l.exclusive:
		delete(l.fs.locks, l.node)
	default:
		l.fs.locks[l.node]--
	}
	l.closed = true
	return nil
}
