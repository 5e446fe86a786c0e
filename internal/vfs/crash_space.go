package vfs

import (
	"io/fs"
	"math"
	"syscall"
)

// unbounded is the size of a disk without bounds, far from where sums overflow.
const unbounded = math.MaxInt64 / 4

// SetCapacity bounds the disk to so many bytes; 0 takes the bound away. What is there
// stays there, also if that is more.
func (c *Crash) SetCapacity(bytes int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.capacity = bytes
}

// Used returns how many bytes of the disk are taken.
func (c *Crash) Used() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.used()
}

// used counts each node once: those with a name, and files that only have a user.
func (c *Crash) used() int64 {
	named := make(map[*crashNode]struct{})
	pages := int64(0)
	var count func(n *crashNode)
	count = func(n *crashNode) {
		if _, twice := named[n]; twice {
			return
		}
		named[n] = struct{}{}
		pages += 1 + int64(len(n.perPage))
		if n.dir != nil {
			for _, child := range n.dir.now {
				count(child)
			}
		}
	}
	count(c.root)
	for f := range c.open {
		if _, ok := named[f.node]; !ok {
			count(f.node)
		}
	}
	return pages * crashPage
}

// free returns how many more bytes fit.
func (c *Crash) free() int64 {
	if c.capacity == 0 {
		return unbounded
	}
	return max(0, c.capacity-c.used())
}

// roomFor fails if the disk is too full for so many pages more.
func (c *Crash) roomFor(pages int64) error {
	if pages > 0 && c.free() < pages*crashPage {
		return syscall.ENOSPC
	}
	return nil
}

// Space implements [FS].
func (c *Crash) Space(name string) (total, free int64, err error) {
	err = c.call("statfs", name, func() error {
		if c.lookup(name) == nil {
			return fs.ErrNotExist
		}
		total, free = unbounded, c.free()
		if c.capacity != 0 {
			total = c.capacity
		}
		return nil
	})
	return total, free, err
}

// Allocated implements [FS].
func (c *Crash) Allocated(name string) (bytes int64, err error) {
	err = c.call("stat", name, func() error {
		n := c.lookup(name)
		if n == nil {
			return fs.ErrNotExist
		}
		bytes = int64(len(n.perPage)) * crashPage
		return nil
	})
	return bytes, err
}

// put gives a sector a content, nil being a hole.
func (f *file) put(i int64, s *[crashSector]byte) {
	page := i * crashSector / crashPage
	_, had := f.now[i]
	switch {
	case s != nil:
		f.now[i] = s
		if !had {
			f.perPage[page]++
		}
	case had:
		delete(f.now, i)
		if f.perPage[page]--; f.perPage[page] == 0 {
			delete(f.perPage, page)
		}
	}
}

// recount counts the sectors of pages anew.
func (f *file) recount() {
	f.perPage = make(map[int64]int)
	for i := range f.now {
		f.perPage[i*crashSector/crashPage]++
	}
}

// fitting returns how many of n bytes at off can be written into so much free space.
func (f *file) fitting(off, n, free int64) int64 {
	for at := off; at < off+n; {
		page := at / crashPage
		if f.perPage[page] == 0 {
			if free < crashPage {
				return at - off
			}
			free -= crashPage
		}
		at = (page + 1) * crashPage
	}
	return n
}
