package vfs

import (
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"syscall"
)

// A file is the content of a crashNode that is no folder. A sector that is not in
// the map is a hole. Sectors are replaced, never changed.
type file struct {
	now, disk         map[int64]*[crashSector]byte
	perPage           map[int64]int // how many sectors of a page are in now; none: not in the map
	nowSize, diskSize int64
	dirty             map[int64]struct{} // sectors of which a sync would write the state now
	sizeDirty         bool
	bad               map[int64]struct{} // sectors that cannot be read
}

func newFile() file {
	return file{
		now:     make(map[int64]*[crashSector]byte),
		disk:    make(map[int64]*[crashSector]byte),
		perPage: make(map[int64]int),
		dirty:   make(map[int64]struct{}),
	}
}

func (f *file) read(p []byte, off int64) (n int, err error) {
	if off >= f.nowSize {
		return 0, io.EOF
	}
	if rest := f.nowSize - off; int64(len(p)) > rest {
		p, err = p[:rest], io.EOF
	}
	for n < len(p) {
		at := off + int64(n)
		within := at % crashSector
		k := min(len(p)-n, int(crashSector-within))
		if s := f.now[at/crashSector]; s != nil {
			copy(p[n:n+k], s[within:])
		} else {
			clear(p[n : n+k])
		}
		n += k
	}
	return n, err
}

func (f *file) write(p []byte, off int64) {
	if len(p) == 0 {
		return
	}
	if end := off + int64(len(p)); end > f.nowSize {
		f.nowSize = end
		f.sizeDirty = true
	}
	for len(p) > 0 {
		i, within := off/crashSector, off%crashSector
		s := new([crashSector]byte)
		if old := f.now[i]; old != nil {
			*s = *old
		}
		n := copy(s[within:], p)
		f.put(i, s)
		f.dirty[i] = struct{}{}
		p = p[n:]
		off += int64(n)
	}
}

func (f *file) truncate(size int64) {
	if size < f.nowSize {
		f.zero(size, (f.nowSize+crashSector-1)/crashSector*crashSector)
	}
	f.nowSize = size
	f.sizeDirty = true
}

// zero makes [off, end) zeros, whole sectors of it holes.
func (f *file) zero(off, end int64) {
	if head := min(end, (off+crashSector-1)/crashSector*crashSector); off < head && f.now[off/crashSector] != nil {
		f.write(make([]byte, head-off), off)
	}
	if tail := max(off, end/crashSector*crashSector); tail < end && f.now[tail/crashSector] != nil {
		f.write(make([]byte, end-tail), tail)
	}
	first, last := (off+crashSector-1)/crashSector, end/crashSector
	for i := range f.now {
		if first <= i && i < last {
			f.put(i, nil)
			f.dirty[i] = struct{}{}
		}
	}
}

// writeBack brings a sector to the disk.
func (f *file) writeBack(i int64) {
	if s := f.now[i]; s != nil {
		f.disk[i] = s
	} else {
		delete(f.disk, i)
	}
	delete(f.dirty, i)
}

// writeBackSome brings half of the dirty sectors to the disk, and the size perhaps.
func (f *file) writeBackSome(rng *rand.Rand) {
	for _, i := range slices.Sorted(maps.Keys(f.dirty)) {
		if rng.IntN(2) == 0 {
			f.writeBack(i)
		}
	}
	if f.sizeDirty && rng.IntN(2) == 0 {
		f.diskSize, f.sizeDirty = f.nowSize, false
	}
}

func (f *file) sync() {
	for i := range f.dirty {
		f.writeBack(i)
	}
	f.diskSize, f.sizeDirty = f.nowSize, false
}

// failSync writes some of what is dirty and forgets that the rest is.
func (f *file) failSync(rng *rand.Rand) {
	f.writeBackSome(rng)
	clear(f.dirty)
	f.sizeDirty = false
}

// powerCut writes some of what is dirty and leaves what the disk has then.
func (f *file) powerCut(rng *rand.Rand) {
	f.writeBackSome(rng)
	f.now = maps.Clone(f.disk)
	f.recount()
	f.nowSize = 1 << 62 // past all sectors
	f.truncate(f.diskSize)
	f.sync()
}

// seek returns the first offset ≥ off where the file has data, or where it has a
// hole.
func (f *file) seek(off int64, data bool) (int64, error) {
	if off < 0 || off >= f.nowSize {
		return 0, io.EOF
	}
	if data {
		if f.perPage[off/crashPage] > 0 {
			return off, nil
		}
		next := int64(-1)
		for page := range f.perPage {
			if at := page * crashPage; at > off && (next < 0 || at < next) {
				next = at
			}
		}
		if next < 0 {
			return 0, io.EOF
		}
		return next, nil
	}
	for {
		if f.perPage[off/crashPage] == 0 || off >= f.nowSize {
			return min(off, f.nowSize), nil
		}
		off = (off/crashPage + 1) * crashPage
	}
}

// A crashFile is an open file.
type crashFile struct {
	fs      *Crash
	name    string
	node    *crashNode
	process int
	closed  bool
}

// call runs fn as one call on the file. failed runs instead if it is to fail.
func (f *crashFile) call(op string, fn func() error, failed func()) error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if err := f.check(); err != nil {
		return &fs.PathError{Op: op, Path: f.name, Err: err}
	}
	fate, err := f.fs.begin()
	switch fate {
	case happens:
		if fnErr := fn(); err == nil {
			err = fnErr
		}
	case fails:
		failed()
	}
	if err != nil && err != io.EOF {
		return &fs.PathError{Op: op, Path: f.name, Err: err}
	}
	return err
}

func (f *crashFile) check() error {
	if f.process != f.fs.process {
		return ErrStopped
	}
	if f.closed {
		return fs.ErrClosed
	}
	return nil
}

func nothing() {}

// changed writes something back, by chance.
func (f *crashFile) changed() {
	if f.fs.rng.IntN(writeBackEvery) == 0 {
		f.node.writeBackSome(f.fs.rng)
	}
}

func (f *crashFile) ReadAt(p []byte, off int64) (n int, err error) {
	if len(p) == 0 {
		return 0, nil
	}
	err = f.call("read", func() (err error) {
		if err := f.node.readable(off, int64(len(p))); err != nil {
			return err
		}
		n, err = f.node.read(p, off)
		return err
	}, nothing)
	return n, err
}

func (f *crashFile) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.call("write", func() error {
		n = int(f.node.fitting(off, int64(len(p)), f.fs.free()))
		if err := f.node.replace(off, int64(n)); err != nil {
			n = 0
			return err
		}
		f.node.write(p[:n], off)
		f.changed()
		if n < len(p) {
			return syscall.ENOSPC
		}
		return nil
	}, func() {
		// Not all of it. The kernel copies by the page, so no sector is written in
		// part.
		n = f.fs.rng.IntN(max(1, len(p)))
		n = max(0, n-int((off+int64(n))%crashSector))
		n = int(f.node.fitting(off, int64(n), f.fs.free()))
		f.node.write(p[:n], off)
	})
	return n, err
}

func (f *crashFile) Sync() error {
	return f.call("sync", func() error {
		f.node.sync()
		return nil
	}, func() {
		if f.fs.stopped {
			f.node.writeBackSome(f.fs.rng)
		} else {
			f.node.failSync(f.fs.rng)
		}
	})
}

func (f *crashFile) Truncate(size int64) error {
	return f.call("truncate", func() error {
		if size < 0 {
			return syscall.EINVAL
		}
		f.node.truncate(size)
		return nil
	}, nothing)
}

func (f *crashFile) Size() (size int64, err error) {
	err = f.call("stat", func() error {
		size = f.node.nowSize
		return nil
	}, nothing)
	return size, err
}

func (f *crashFile) PunchHole(off, n int64) error {
	return f.call("punch hole", func() error {
		if off < 0 || n <= 0 {
			return syscall.EINVAL
		}
		if err := f.node.replace(off, min(n, f.node.nowSize-off)); err != nil {
			return err
		}
		f.node.zero(off, min(off+n, f.node.nowSize))
		f.changed()
		return nil
	}, nothing)
}

func (f *crashFile) SeekData(off int64) (at int64, err error) {
	err = f.call("seek data", func() (err error) {
		at, err = f.node.seek(off, true)
		return err
	}, nothing)
	return at, err
}

func (f *crashFile) SeekHole(off int64) (at int64, err error) {
	err = f.call("seek hole", func() (err error) {
		at, err = f.node.seek(off, false)
		return err
	}, nothing)
	return at, err
}

// Close implements [File]. It never fails by chance.
func (f *crashFile) Close() error {
	f.fs.mu.Lock()
	defer f.fs.mu.Unlock()
	if f.closed {
		return &fs.PathError{Op: "close", Path: f.name, Err: fs.ErrClosed}
	}
	f.closed = true
	delete(f.fs.open, f)
	return nil
}
