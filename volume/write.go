package volume

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

const (
	// stripes is how many locks the blocks of a volume share.
	stripes = 256

	// zeroStep bounds how many bytes are discarded in one go, while all
	// writers wait: some milliseconds, however fragmented the file.
	zeroStep = 1 << 30
)

// writes is what makes a device writable.
type writes struct {
	dir      string       // of all these
	clean    *cache.Clean // this volume's own clean blocks
	leaves   *cache.IndexFile
	diverged *cache.Diverged

	// cut stops writers while the write layers are replaced: they hold it
	// shared for each write, and never while they wait for the store.
	cut sync.RWMutex

	// blocks orders the writers of one block: writers of whole pages hold
	// its stripe shared, everything else (parts of pages, discards, merging
	// back) exclusively. Taken after cut.
	blocks [stripes]sync.RWMutex
}

func openWrites(h *Host, dir string, id manifest.VolumeID, g manifest.Geometry, key *crypt.Key) (*writes, error) {
	clean := cleanDir(dir)
	if err := h.mustKeep().MkdirAll(clean, 0o700); err != nil {
		return nil, err
	}
	h.noteOpened(clean)
	w := &writes{dir: clean}
	err := cache.GrowClean(h.mustKeep(), clean, g.Size)
	if err != nil {
		return nil, err
	}
	if w.clean, err = h.openClean(clean, g, ownPages(key, id)); err != nil {
		return nil, err
	}
	// Rule: the names are durable before anything is written to the layer. An
	// evictor may have removed an older layer under these names, and a power cut
	// must not bring that back over what is written from now on.
	if err := h.FS.SyncDir(clean); err != nil {
		return nil, errors.Join(err, w.clean.Close())
	}
	if w.leaves, err = cache.OpenIndexFile(h.mustKeep(), indexPath(clean), g, key); err != nil {
		return nil, errors.Join(err, w.clean.Close())
	}
	if w.diverged, err = cache.LoadDiverged(h.mustKeep(), filepath.Join(clean, "diverged"), g.Blocks()); err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return w, nil
}

func (w *writes) Close() error {
	err := w.clean.Close()
	if w.leaves != nil {
		err = errors.Join(err, w.leaves.Close())
	}
	return err
}

// WriteAt implements io.WriterAt. The bytes are in the write layer on return:
// they survive the daemon, and with a following Sync the host. Whole pages are
// written without a look at the store; the rest of a page written in part may
// have to be fetched first, for which ctx bounds the wait.
func (d *Device) WriteAt(ctx context.Context, p []byte, off int64) (int, error) {
	if err := d.checkWrite(off, int64(len(p))); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		rest, at := p[done:], off+int64(done)
		n := int(d.wholePages(at, d.inBlock(at, int64(len(rest)))))
		var err error
		if n > 0 {
			if err = d.writePages(rest[:n], at); err == errGrown {
				continue
			}
		} else {
			n = int(min(int64(len(rest)), manifest.PageSize-at%manifest.PageSize))
			err = d.writePart(ctx, rest[:n], at)
		}
		if err != nil {
			return done, fmt.Errorf("write %s at %d+%d: %w", d.name, off, len(p), err)
		}
		done += n
	}
	return done, nil
}

func (d *Device) checkWrite(off, n int64) error {
	switch {
	case d.writes == nil:
		return fmt.Errorf("write %s: it is a snapshot: %w", d.name, syscall.EROFS)
	case off < 0 || n < 0:
		return fmt.Errorf("write %s at %d+%d: %w", d.name, off, n, syscall.EINVAL)
	case off > d.geometry.Size() || n > d.geometry.Size()-off:
		return fmt.Errorf("write %s at %d+%d, beyond its end at %d: %w", d.name, off, n, d.geometry.Size(), syscall.ENOSPC)
	}
	return nil
}

// wholePages returns how many of n bytes at off are whole pages, from the first
// on. The device's last page is whole when the range goes to its end.
func (d *Device) wholePages(off, n int64) int64 {
	if off%manifest.PageSize != 0 {
		return 0
	}
	if off+n == d.geometry.Size() {
		return n
	}
	return n - n%manifest.PageSize
}

// inBlock returns how many of n bytes at off lie in the block of the first.
func (d *Device) inBlock(off, n int64) int64 {
	blockSize := int64(d.geometry.BlockSize)
	return min(n, blockSize-off%blockSize)
}

// stripe returns the lock of the block at off.
func (d *Device) stripe(off int64) *sync.RWMutex {
	return &d.writes.blocks[off/int64(d.geometry.BlockSize)%stripes]
}

// writePages writes whole pages of one block. errGrown: one is no longer whole.
func (d *Device) writePages(p []byte, off int64) error {
	d.writes.cut.RLock()
	defer d.writes.cut.RUnlock()
	stripe := d.stripe(off)
	stripe.RLock()
	defer stripe.RUnlock()
	if d.wholePages(off, int64(len(p))) != int64(len(p)) {
		return errGrown
	}
	v := d.view.acquire()
	defer v.release()
	return v.open.WriteAt(p, off)
}

// writePart writes a part of one page.
func (d *Device) writePart(ctx context.Context, p []byte, off int64) error {
	page := off / manifest.PageSize
	start := page * manifest.PageSize
	for {
		// What lies below the write layers does not change while the root
		// stays: so it can be fetched before anything is locked.
		v := d.view.acquire()
		image := v.image
		var below []byte // nil: it was not needed
		var err error
		if state, _, _ := v.run(page, 1); state == cache.Absent {
			below = make([]byte, d.pageLen(start))
			err = d.readBelow(ctx, v, below, start)
		}
		v.release()
		if err != nil {
			return err
		}
		if done, err := d.writePartOver(image, below, start, p, off); done || err != nil {
			return err
		}
	}
}

// pageLen is how many bytes of the page at start lie inside the device.
func (d *Device) pageLen(start int64) int64 {
	return min(manifest.PageSize, d.geometry.Size()-start)
}

// writePartOver writes p into the page at start, of which below is the content
// under the write layers in image. If that is needed, and there is none or image is
// the root no more, nothing is done.
func (d *Device) writePartOver(image *snapshot.Image, below []byte, start int64, p []byte, off int64) (done bool, err error) {
	d.writes.cut.RLock()
	defer d.writes.cut.RUnlock()
	stripe := d.stripe(off)
	stripe.Lock()
	defer stripe.Unlock()
	v := d.view.acquire()
	defer v.release()

	page := start / manifest.PageSize
	if v.open.State(page) == cache.Data {
		return true, v.open.WriteAt(p, off)
	}
	content := make([]byte, d.pageLen(start))
	switch state, layer, _ := v.run(page, 1); state {
	case cache.Data:
		if err := layer.ReadAt(content, start); err != nil {
			return false, err
		}
	case cache.Absent:
		// Since we looked the page can have come to this only by a commit.
		if below == nil || v.image != image {
			return false, nil
		}
		copy(content, below)
	}
	copy(content[off-start:], p)
	return true, v.open.WriteAt(content, start)
}

// Zero makes a range read as zeros: discard and write-zeroes. Nothing below
// shows through afterwards, and the space of whole pages is given back. A page
// zeroed in part may have to be fetched first, as in WriteAt.
func (d *Device) Zero(ctx context.Context, off, n int64) error {
	if err := d.checkWrite(off, n); err != nil {
		return err
	}
	for end := off + n; off < end; {
		done := d.wholePages(off, end-off)
		var err error
		if done > 0 {
			if err = d.zeroPages(off, done); err == errGrown {
				continue
			}
		} else {
			done = min(end-off, manifest.PageSize-off%manifest.PageSize)
			err = d.writePart(ctx, make([]byte, done), off)
		}
		if err != nil {
			return fmt.Errorf("zero %s at %d: %w", d.name, off, err)
		}
		off += done
	}
	return nil
}

// zeroPages zeroes whole pages. A short range locks its blocks one after the
// other; a long one stops all writers instead, step by step. errGrown: the last
// page is no longer whole.
func (d *Device) zeroPages(off, n int64) error {
	zero, step := d.zeroInBlock, d.inBlock
	if n > stripes*int64(d.geometry.BlockSize) {
		zero, step = d.zeroAlone, func(_, n int64) int64 { return min(n, zeroStep) }
	}
	for end := off + n; off < end; {
		part := step(off, end-off)
		if err := zero(off, part); err != nil {
			return err
		}
		off += part
	}
	return nil
}

// zeroInBlock zeroes whole pages of one block.
func (d *Device) zeroInBlock(off, n int64) error {
	d.writes.cut.RLock()
	defer d.writes.cut.RUnlock()
	stripe := d.stripe(off)
	stripe.Lock()
	defer stripe.Unlock()
	return d.zeroLocked(off, n)
}

// zeroAlone zeroes whole pages while all writers wait.
func (d *Device) zeroAlone(off, n int64) error {
	d.writes.cut.Lock()
	defer d.writes.cut.Unlock()
	return d.zeroLocked(off, n)
}

func (d *Device) zeroLocked(off, n int64) error {
	if d.wholePages(off, n) != n {
		return errGrown
	}
	v := d.view.acquire()
	defer v.release()
	return v.open.Zero(off, n)
}

// Sync makes everything durable on this host that was written or zeroed by
// calls that had returned before. After the disk has failed to, every Sync of
// what was open then fails.
func (d *Device) Sync(context.Context) error {
	if d.writes == nil {
		return nil
	}
	v := d.view.acquire()
	defer v.release()
	if err := errors.Join(v.open.Sync(), v.syncSealed()); err != nil {
		return fmt.Errorf("sync %s: %w", d.name, err)
	}
	return nil
}
