package volume

import (
	"errors"
	"fmt"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
)

// place returns the layer in which this host keeps a block's clean bytes, and the
// size of that layer: beyond it, as beyond the root, the block is zeros. A block
// that diverged is never looked up in the base again.
func (d *Device) place(block int64) (layer *cache.Clean, size int64) {
	if d.base != nil && (d.writes == nil || !d.writes.diverged.Has(block)) {
		return d.base.Clean, d.base.size
	}
	return d.writes.clean, d.geometry.Size()
}

// readClean fills p with what lies below the write layers, from the clean
// layers and with the holes that are known, and appends what is left to missing.
func (d *Device) readClean(v *view, p []byte, off int64, missing []piece) ([]piece, error) {
	blockSize := int64(d.geometry.BlockSize)
	if end := off + int64(len(p)); d.writes == nil && end <= d.base.size && off/blockSize != (end-1)/blockSize {
		// Several blocks of a warm read-only device take one look.
		if hit, err := d.base.ReadAt(p, off); hit || err != nil {
			return missing, err
		}
	}
	for len(p) > 0 {
		block := off / blockSize
		part := p[:min(int64(len(p)), (block+1)*blockSize-off)]
		hit, err := d.readCached(v, block, part, off)
		if err != nil {
			return missing, err
		}
		switch {
		case hit:
		case d.isKnownHole(v.image, block):
			clear(part)
		default:
			missing = append(missing, piece{block: block, p: part, within: int(off - block*blockSize)})
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return missing, nil
}

// readCached fills p, which lies in one block, if this host has the bytes.
func (d *Device) readCached(v *view, block int64, p []byte, off int64) (hit bool, err error) {
	if block >= v.blocks() {
		clear(p)
		return true, nil
	}
	layer, size := d.place(block)
	size = min(size, v.image.Geometry().Size) // the volume may have grown since
	held := p[:max(0, min(int64(len(p)), size-off))]
	if len(held) > 0 {
		if hit, err = layer.ReadAt(held, off); err != nil || !hit {
			return false, err
		}
	}
	clear(p[len(held):])
	return true, nil
}

// keep writes a verified block, which came through view v's root, into its
// clean layer.
func (d *Device) keep(v *view, block int64, data []byte) error {
	layer, _ := d.place(block)
	if d.base != nil && layer == d.base.Clean {
		// As no snapshot of the volume has changed this block, all its roots
		// have the base's content, whichever of them v has.
		return layer.WriteBlock(block, data)
	}
	d.fill.RLock()
	defer d.fill.RUnlock()
	now := d.view.acquire()
	defer now.release()
	// Rule: the volume's own clean copy of a block is that of the root which
	// new reads see; and of a block of which a snapshot is being made, the copy
	// is the snapshot's to write.
	if now.image != v.image || d.seals(now, block) {
		return nil
	}
	return layer.WriteBlock(block, data)
}

// keepOrLog is keep for reads, which have their bytes already. It evicts what was
// used less recently to make room. That there is none is no reason to fail them,
// nor news.
func (d *Device) keepOrLog(v *view, block int64, data []byte) {
	n := int64(d.geometry.BlockLen(block))
	err := d.host.Budget.admit(n, true)
	if err == nil {
		defer d.host.Budget.done(n)
		layer, _ := d.place(block)
		_ = layer.Use(block) // there is such a block
		err = d.host.Budget.despiteFull(n, own, func() error { return d.keep(v, block, data) })
	}
	switch {
	case err == nil:
		return
	case d.ahead != nil:
		d.ahead.rest()
	}
	if !errors.Is(err, ErrFull) && !vfs.IsFull(err) {
		err = fmt.Errorf("could not cache block %d, which will be fetched again: %w", block, err)
		if d.stats.note(err) {
			d.host.Log.Warn("caching failed", "device", d.name, "error", err)
		}
	}
}
