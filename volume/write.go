package volume

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"syscall"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
)

// stripes is how many locks the blocks of a volume share.
const stripes = 256

// writes is what makes a device writable.
type writes struct {
	clean    *cache.Clean // this volume's own clean blocks
	leaves   *cache.IndexFile
	diverged *cache.Diverged

	// cut stops writers while a snapshot seals the open layer: they hold it
	// shared for each write, and never while they wait for the store.
	cut sync.RWMutex

	// blocks orders the writers of one block: writers of whole pages hold
	// its stripe shared, everything else (parts of pages, discards, merging
	// back) exclusively. Taken after cut.
	blocks [stripes]sync.RWMutex
}

func openWrites(h *Host, dir string, g manifest.Geometry) (*writes, error) {
	w := &writes{}
	var err error
	clean := filepath.Join(dir, "clean")
	if err = h.FS.MkdirAll(clean, 0o700); err != nil {
		return nil, err
	}
	if w.clean, err = cache.OpenClean(h.FS, clean, g); err != nil {
		return nil, err
	}
	if w.leaves, err = cache.OpenIndexFile(h.FS, filepath.Join(clean, "index"), g); err != nil {
		return nil, errors.Join(err, w.close())
	}
	if w.diverged, err = cache.LoadDiverged(h.FS, filepath.Join(clean, "diverged"), g.Blocks()); err != nil {
		return nil, errors.Join(err, w.close())
	}
	return w, nil
}

func (w *writes) close() error {
	err := w.clean.Close()
	if w.leaves != nil {
		err = errors.Join(err, w.leaves.Close())
	}
	return err
}

// countDiverged returns how many blocks of the root the clean layer adds to
// those that base has: its own, less those of base that are of no use any more.
func (w *writes) countDiverged(base *Base) (int64, error) {
	n := int64(0)
	for block, err := range w.clean.Present() {
		if err != nil {
			return n, err
		}
		if w.diverged.Has(block) {
			n++
		}
	}
	if base == nil {
		return n, nil
	}
	for block, err := range base.Present() {
		if err != nil {
			return n, err
		}
		if w.diverged.Has(block) {
			n--
		}
	}
	return n, nil
}

// WriteAt implements io.WriterAt. The bytes are in the write layer on return:
// they survive the daemon, and with a following Sync the host. Whole pages are
// written without a look at the store; the rest of a page written in part may
// have to be fetched first.
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
			err = d.writePages(rest[:n], at)
		} else {
			n, err = d.writePart(ctx, rest, at)
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
	case off > d.geometry.Size || n > d.geometry.Size-off:
		return fmt.Errorf("write %s at %d+%d, beyond its end at %d: %w", d.name, off, n, d.geometry.Size, syscall.ENOSPC)
	}
	return nil
}

// wholePages returns how many of n bytes at off are whole pages, from the first
// on. The device's last page is whole when the range goes to its end.
func (d *Device) wholePages(off, n int64) int64 {
	if off%manifest.PageSize != 0 {
		return 0
	}
	if off+n == d.geometry.Size {
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

func (d *Device) writePages(p []byte, off int64) error {
	d.writes.cut.RLock()
	defer d.writes.cut.RUnlock()
	stripe := d.stripe(off)
	stripe.RLock()
	defer stripe.RUnlock()
	v := d.view.acquire()
	defer v.release()
	return v.open.WriteAt(p, off)
}

// writePart writes into one page without replacing it all, and returns how
// much of p that was.
func (d *Device) writePart(ctx context.Context, p []byte, off int64) (int, error) {
	page := off / manifest.PageSize
	start := page * manifest.PageSize
	p = p[:min(int64(len(p)), start+manifest.PageSize-off)]
	content := make([]byte, min(manifest.PageSize, d.geometry.Size-start))
	for {
		// What is below the write layers never changes while the view's image
		// stays the root, so it can be fetched before anything is locked.
		v := d.view.acquire()
		image := v.image
		var err error
		if state, _, _ := v.run(page, 1); state == cache.Absent {
			err = d.readClean(ctx, v, content, start)
		}
		v.release()
		if err != nil {
			return 0, err
		}
		done, err := d.writePartOver(content, start, p, off, func(now *view) bool { return now.image == image })
		if done || err != nil {
			return len(p), err
		}
	}
}

// writePartOver writes p into the page at start. clean is the page's content
// below the write layers, if valid says so of the view; without it, and if it
// is needed, nothing is done.
func (d *Device) writePartOver(clean []byte, start int64, p []byte, off int64, valid func(*view) bool) (done bool, err error) {
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
	content := make([]byte, len(clean))
	switch state, layer, _ := v.run(page, 1); state {
	case cache.Data:
		if err := layer.ReadAt(content, start); err != nil {
			return false, err
		}
	case cache.Absent:
		if !valid(v) {
			return false, nil
		}
		copy(content, clean)
	}
	copy(content[off-start:], p)
	return true, v.open.WriteAt(content, start)
}

// Zero makes a range read as zeros: discard and write-zeroes. Nothing below
// shows through afterwards, and the space is given back.
func (d *Device) Zero(ctx context.Context, off, n int64) error {
	if err := d.checkWrite(off, n); err != nil {
		return err
	}
	zeros := make([]byte, manifest.PageSize)
	for end := off + n; off < end; {
		done := d.wholePages(off, end-off)
		var err error
		if done > 0 {
			err = d.zeroPages(off, done)
		} else {
			done = min(end-off, manifest.PageSize-off%manifest.PageSize)
			_, err = d.WriteAt(ctx, zeros[:done], off)
		}
		if err != nil {
			return fmt.Errorf("zero %s: %w", d.name, err)
		}
		off += done
	}
	return nil
}

// zeroPages zeroes whole pages. A short range locks its blocks one after the
// other; a long one stops all writers instead, which is over as quickly as the
// map of a uniform region is written.
func (d *Device) zeroPages(off, n int64) error {
	blockSize := int64(d.geometry.BlockSize)
	if n > 64*blockSize {
		d.writes.cut.Lock()
		defer d.writes.cut.Unlock()
		v := d.view.acquire()
		defer v.release()
		return v.open.Zero(off, n)
	}
	for end := off + n; off < end; {
		part := d.inBlock(off, end-off)
		if err := d.zeroInBlock(off, part); err != nil {
			return err
		}
		off += part
	}
	return nil
}

func (d *Device) zeroInBlock(off, n int64) error {
	d.writes.cut.RLock()
	defer d.writes.cut.RUnlock()
	stripe := d.stripe(off)
	stripe.Lock()
	defer stripe.Unlock()
	v := d.view.acquire()
	defer v.release()
	return v.open.Zero(off, n)
}

// Sync makes everything written before it durable on this host.
func (d *Device) Sync(context.Context) error {
	if d.writes == nil {
		return nil
	}
	v := d.view.acquire()
	defer v.release()
	err := v.open.Sync()
	if v.sealed != nil {
		err = errors.Join(err, v.sealed.Sync())
	}
	if err != nil {
		return fmt.Errorf("sync %s: %w", d.name, err)
	}
	return nil
}
