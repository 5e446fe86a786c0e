package volume

import (
	"io"
	"io/fs"
	"os"

	"github.com/lazyvol/lazyvol/internal/vfs"
)

// reclaimTries bounds how often a call that finds the disk full is tried again. Each
// time twice as much is evicted as the time before.
const reclaimTries = 16

// mustKeep returns the host's filesystem for what is no copy: write layers and
// records. When the disk is full its calls evict clean bytes and try again, and fail
// only when nothing clean is left that this process can evict. Syncs are not tried
// again: they tell of a failure only once.
func (h *Host) mustKeep() vfs.FS {
	if h.Budget == nil {
		return h.FS
	}
	return keepFS{FS: h.FS, budget: h.Budget}
}

type keepFS struct {
	vfs.FS
	budget *Budget
}

func (k keepFS) OpenFile(name string, flag int, perm fs.FileMode) (vfs.File, error) {
	var f vfs.File
	err := k.budget.despiteFull(0, shared, func() (err error) {
		f, err = k.FS.OpenFile(name, flag, perm)
		return err
	})
	if err != nil {
		return nil, err
	}
	return keepFile{f, k.budget}, nil
}

func (k keepFS) MkdirAll(name string, perm fs.FileMode) error {
	return k.budget.despiteFull(0, shared, func() error { return k.FS.MkdirAll(name, perm) })
}

func (k keepFS) Rename(oldName, newName string) error {
	return k.budget.despiteFull(0, shared, func() error { return k.FS.Rename(oldName, newName) })
}

func (k keepFS) Lock(name string, exclusive bool) (lock io.Closer, err error) {
	err = k.budget.despiteFull(0, shared, func() (err error) {
		lock, err = k.FS.Lock(name, exclusive)
		return err
	})
	return lock, err
}

// A keepFile is a file that is written to despite a full disk.
type keepFile struct {
	vfs.File
	budget *Budget
}

func (f keepFile) WriteAt(p []byte, off int64) (int, error) {
	seen := f.budget.rounds.Load()
	n, err := f.File.WriteAt(p, off)
	if !vfs.IsFull(err) {
		return n, err
	}
	err = f.budget.evictAndRetry(seen, int64(len(p)), shared, err, func() (err error) {
		n, err = f.File.WriteAt(p, off)
		return err
	})
	return n, err
}

func (f keepFile) Truncate(size int64) error {
	return f.budget.despiteFull(0, shared, func() error { return f.File.Truncate(size) })
}

func (f keepFile) PunchHole(off, n int64) error {
	return f.budget.despiteFull(0, shared, func() error { return f.File.PunchHole(off, n) })
}

// despiteFull makes a call that needs some space, and if the disk is full evicts and
// makes it again.
func (b *Budget) despiteFull(space int64, how reach, call func() error) error {
	if b == nil {
		return call()
	}
	seen := b.rounds.Load()
	err := call()
	if !vfs.IsFull(err) {
		return err
	}
	return b.evictAndRetry(seen, space, how, err, call)
}

// evictAndRetry evicts and makes a call again that failed with full, as the disk had
// no space. seen is what b.rounds was before.
func (b *Budget) evictAndRetry(seen, space int64, how reach, full error, call func() error) error {
	for try := range reclaimTries {
		want := max(space, b.share()) << try
		if !b.reclaim(seen, want, how) {
			return full
		}
		seen = b.rounds.Load()
		if full = call(); !vfs.IsFull(full) {
			return full
		}
	}
	return full
}

// share is how much to evict at least for what needs space on a full disk: a small
// share of that, so that it need not be done again at once.
func (b *Budget) share() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return min(max(b.total/(16*stepShare), minStep), maxStep)
}

// writeCreate are the flags of a file that is written to, and made when missing.
const writeCreate = os.O_WRONLY | os.O_CREATE
