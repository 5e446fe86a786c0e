package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

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
		node, err := c.openNode(name, flag)
		if err != nil {
			return err
		}
		f = &crashFile{fs: c, name: name, node: node, process: c.process}
		c.open[f] = struct{}{}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

func (c *Crash) openNode(name string, flag int) (*crashNode, error) {
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
		if err := c.roomFor(1); err != nil {
			return nil, err
		}
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
				if err := c.roomFor(1); err != nil {
					return err
				}
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

// Link implements [FS].
func (c *Crash) Link(oldName, newName string) error {
	return c.call("link", oldName, func() error {
		node := c.lookup(oldName)
		dir, err := c.lookupDir(filepath.Dir(newName))
		switch base := filepath.Base(newName); {
		case err != nil:
			return err
		case node == nil:
			return fs.ErrNotExist
		case node.dir != nil:
			return syscall.EPERM
		case dir.now[base] != nil:
			return fs.ErrExist
		default:
			c.change(dir, dirChange{name: base, node: node})
		}
		return nil
	})
}

// Links implements [FS].
func (c *Crash) Links(name string) (n int, err error) {
	err = c.call("stat", name, func() error {
		node := c.lookup(name)
		if node == nil {
			return fs.ErrNotExist
		}
		n = c.root.names(node)
		return nil
	})
	return n, err
}

// names counts the names of a node in the tree of n.
func (n *crashNode) names(of *crashNode) int {
	if n.dir == nil {
		return 0
	}
	found := 0
	for _, child := range n.dir.now {
		found += child.names(of)
		if child == of {
			found++
		}
	}
	return found
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
		node, err := c.openNode(name, os.O_CREATE)
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
