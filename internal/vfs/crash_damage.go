package vfs

import (
	"io/fs"
	"syscall"
)

// BadSector makes the sector of a file at off unreadable: what touches it, a write
// of a part of it included, fails with EIO. A write of the whole sector makes it
// good again, as a disk puts another one in its place; so does a hole.
func (c *Crash) BadSector(name string, off int64) error {
	return c.damage("bad sector", name, off, func(f *file, at int64) {
		if f.bad == nil {
			f.bad = make(map[int64]struct{})
		}
		f.bad[at] = struct{}{}
	})
}

// FlipBit inverts the lowest bit of the byte of a file at off, in memory and on the
// disk, which has what was not synced from then on. In a hole there is no bit.
func (c *Crash) FlipBit(name string, off int64) error {
	return c.damage("flip bit", name, off, func(f *file, at int64) {
		if old := f.now[at]; old != nil {
			s := *old
			s[off%crashSector] ^= 1
			f.put(at, &s)
			f.writeBack(at)
		}
	})
}

func (c *Crash) damage(op, name string, off int64, do func(f *file, sector int64)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	err := error(nil)
	switch n := c.lookup(name); {
	case n == nil:
		err = fs.ErrNotExist
	case n.dir != nil:
		err = syscall.EISDIR
	case off < 0 || off >= n.nowSize:
		err = syscall.EINVAL
	default:
		do(&n.file, off/crashSector)
		return nil
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}

// readable fails if a sector of [off, off+n) is bad.
func (f *file) readable(off, n int64) error {
	if len(f.bad) == 0 {
		return nil
	}
	for i := off / crashSector; i*crashSector < min(off+n, f.nowSize); i++ {
		if _, ok := f.bad[i]; ok {
			return syscall.EIO
		}
	}
	return nil
}

// replace makes bad sectors good that [off, off+n) covers, and fails if a part of one
// would have to be kept.
func (f *file) replace(off, n int64) error {
	if len(f.bad) == 0 || n == 0 {
		return nil
	}
	for _, edge := range []int64{off, off + n} {
		if _, ok := f.bad[edge/crashSector]; ok && edge%crashSector != 0 {
			return syscall.EIO
		}
	}
	for i := (off + crashSector - 1) / crashSector; (i+1)*crashSector <= off+n; i++ {
		delete(f.bad, i)
	}
	return nil
}
