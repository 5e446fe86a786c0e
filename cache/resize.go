package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// Extend gives the layer's file room for a device of size bytes, and makes that
// durable. The layer stays as it is: an open layer grows by [WriteLayer.Grow], one
// that is not when it is opened with that size. A filesystem that cannot hold a file
// of that size is syscall.EFBIG.
func (w *WriteLayer) Extend(size int64) error {
	w.syncMu.Lock()
	defer w.syncMu.Unlock()
	if err := checkWriteLayer(size, w.bootID); err != nil {
		return fmt.Errorf("extend write layer %s: %w", w.dir, err)
	}
	have, err := w.data.Size()
	if err == nil && have < size {
		err = sizeFile(w.data, size)
	}
	if err == nil {
		err = w.makeDurable(w.data)
	}
	if err != nil {
		return fmt.Errorf("extend write layer %s: %w", w.dir, err)
	}
	return nil
}

// Grow makes the layer that of a device of size bytes, to which it was extended. The
// new pages are absent, and a last page that was short goes on with zeros if it is
// not. Nothing is written: the caller keeps the size, durably, and before it calls.
// Writes and discards are excluded meanwhile, and reads go on.
func (w *WriteLayer) Grow(size int64) {
	w.markMu.Lock()
	defer w.markMu.Unlock()
	w.pages.Store(w.pages.Load().grown(size))
}

// fit makes the data file of a layer, the bytes of which a map speaks, as large as
// the device. It is larger if the process that extended it did not live, or failed,
// to put the new size on record; and smaller never, since that comes later.
func (w *WriteLayer) fit(size int64) error {
	have, err := w.data.Size()
	switch {
	case err != nil:
		return err
	case have < size:
		return corrupt("%s has %d bytes, the device %d", dataName, have, size)
	case have > size:
		return w.data.Truncate(size)
	}
	return nil
}

// grown returns the map of a larger device, in which the new pages are absent. It
// shares with m what does not change by that, so that m is only read from then on.
func (m *pageMap) grown(size int64) *pageMap {
	g := newPageMap(size)
	g.epoch, g.uniformRegion = m.epoch, m.uniformRegion
	last := int64(len(m.chunks)) - 1
	full := m.uniformChunk // of so many regions only if there is more than one chunk
	if last < 1 {
		full = g.uniformChunk
		for _, s := range []PageState{Data, Zero} {
			for i := range min(chunkRegions, g.regions()) {
				full[s][i].Store(m.uniformRegion[s])
			}
		}
	}
	g.uniformChunk = full
	for i := range last {
		g.chunks[i].Store(m.chunks[i].Load())
	}
	dirty := m.dirty.Load()
	if last >= 0 {
		g.growChunk(m, last)
		if m.state(m.pages-1) != Absent { // the last page is longer, if it was short
			dirty += min(size, m.pages*manifest.PageSize) - m.size
		}
	}
	g.dirty.Store(dirty)
	return g
}

// growChunk takes over the last chunk of a smaller map. What that has behind its last
// page becomes absent, unless the last page is the same.
func (m *pageMap) growChunk(from *pageMap, ci int64) {
	c := from.chunks[ci].Load()
	if c == nil {
		return
	}
	own := new(chunk)
	n := from.regionsIn(ci)
	for i := range n {
		own[i].Store(c[i].Load())
	}
	m.chunks[ci].Store(own)
	r, pages := own[n-1].Load(), from.pages-(ci*chunkRegions+n-1)*regionPages
	if r == nil || pages == regionPages || from.pages == m.pages {
		return
	}
	short := &region{epoch: m.epoch}
	for at := int64(0); at < pages; {
		s := r.state(int(at))
		k := min(int64(r.run(int(at), s)), pages-at)
		if s != Absent {
			short.set(int(at), int(k), s)
		}
		at += k
	}
	if short.marked() == 0 {
		short = nil
	}
	own[n-1].Store(short)
}

// Grow makes the layer that of a device of size bytes, in the same blocks. Nothing of
// what the device gains is there, and neither is a last page that was short, until it
// is written again. Other calls may be under way, but no other Grow. The new size is
// durable on return; after an error the layer is as before, or larger after the next
// opening.
func (c *Clean) Grow(size int64) error {
	g := c.g.Get()
	if g.Size >= size {
		return nil
	}
	g.Size = size
	err := g.Validate()
	// The header is durable before the files are longer than a former one says.
	if err == nil {
		_, err = c.marks.WriteAt(encodeCleanHeader(g, c.sealed), 0)
	}
	if err == nil {
		if err = c.marks.Sync(); err != nil {
			c.failed.CompareAndSwap(nil, &err)
		}
	}
	if err == nil {
		err = growFile(c.data, dataName, size)
	}
	if err == nil {
		err = growFile(c.marks, cleanMapName, c.markOffset(pagesOf(size)))
	}
	if err != nil {
		return fmt.Errorf("grow clean layer: %w", err)
	}
	c.used.grow(g.Blocks())
	c.g.Grow(size)
	return nil
}

// GrowClean is [Clean.Grow] for a layer that nobody has open: the one in the folder
// dir, if there is one whose header can be read. It is for a volume's own layer, when
// the volume has grown and the process ended before the layer did.
func GrowClean(fsys vfs.FS, dir string, size int64) (err error) {
	g, sealed, err := readCleanHeader(fsys, dir)
	if err != nil || g.Size >= size {
		return nil // OpenClean makes what is missing, and judges the rest
	}
	f, err := fsys.OpenFile(filepath.Join(dir, cleanMapName), os.O_RDWR, 0)
	if err == nil {
		g.Size = size
		if _, err = f.WriteAt(encodeCleanHeader(g, sealed), 0); err == nil {
			err = f.Sync()
		}
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("grow clean layer %s: %w", dir, err)
	}
	return nil
}

// grow makes room for more blocks. What is marked at the same time may be forgotten.
func (u *usedBlocks) grow(blocks int64) {
	words := make([]atomic.Uint64, ceilDiv(blocks, wordBits))
	if old := u.words.Load(); old != nil {
		for i := range *old {
			words[i].Store((*old)[i].Load())
		}
	}
	u.words.Store(&words)
}

// Grow makes the file hold the leaves of a device of size bytes. Those it has of
// fewer blocks stay.
func (x *IndexFile) Grow(size int64) { x.g.Grow(size) }

// Grow makes the set one of a device of so many blocks. The new ones are not in it.
func (d *Diverged) Grow(blocks int64) {
	d.addMu.Lock()
	defer d.addMu.Unlock()
	d.blocks = blocks
}
