package volume

import (
	"context"
	"fmt"
	"iter"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A cut is what a snapshot is made of: the volume as it was when its write
// layer was sealed, without what was written since.
type cut struct {
	*Volume
	view     *view             // of the sealed layer over the root
	geometry manifest.Geometry // at the cut: the volume may have grown since
}

// changes yields the blocks that the sealed layer knows anything of. Those that
// were discarded whole are holes.
func (c *cut) changes() iter.Seq2[snapshot.Extent, error] {
	return func(yield func(snapshot.Extent, error) bool) {
		block, ok := c.view.sealed.NextBlock(0, c.geometry.BlockSize)
		for ok {
			e := snapshot.Extent{First: block, Count: 1}
			if zeroed := c.zeroBlocks(block); zeroed > 0 {
				e.Count, e.Hole = zeroed, true
			}
			if !yield(e, nil) {
				return
			}
			block, ok = c.view.sealed.NextBlock(e.First+e.Count, c.geometry.BlockSize)
		}
	}
}

// zeroBlocks returns how many blocks from the given one on were discarded
// whole. The device's last one has only as many pages as the device.
func (c *cut) zeroBlocks(block int64) int64 {
	page, _ := c.pages(block)
	if c.view.sealed.State(page) != cache.Zero {
		return 0 // without a look at how far something else goes on
	}
	end := pagesOf(c.geometry.Size)
	_, n := c.view.sealed.Run(page, end-page)
	if page+n == end {
		return c.geometry.Blocks() - block
	}
	return n * manifest.PageSize / int64(c.geometry.BlockSize)
}

// everything yields, block by block, all that the sealed layer changes or the
// root has.
func (c *cut) everything(ctx context.Context) iter.Seq2[snapshot.Extent, error] {
	return func(yield func(snapshot.Extent, error) bool) {
		for block := c.idleUntil(c.view, 0); block < c.geometry.Blocks(); block = c.idleUntil(c.view, block+1) {
			known, err := c.seals(c.view, block), error(nil)
			if !known && c.view.image != nil {
				var ref manifest.Ref
				ref, err = c.ref(ctx, c.view.image, block)
				known = !ref.IsHole()
			}
			if !known && err == nil {
				continue
			}
			if !yield(snapshot.Extent{First: block, Count: 1}, err) || err != nil {
				return
			}
		}
	}
}

// readBlock reads a block as it was at the cut, zero-padded beyond the end of
// the device. If it is a changed one it becomes the clean copy of the block, as
// it is what the block will be once the snapshot is committed; until then every
// page in which it differs is covered by a write layer.
func (c *cut) readBlock(ctx context.Context, block int64, p []byte) error {
	if err := c.assemble(ctx, block, p); err != nil {
		return err
	}
	if !c.seals(c.view, block) {
		return nil
	}
	n := int64(c.geometry.BlockLen(block))
	if !manifest.IsZero(p) && c.host.Budget.admit(n, false) == nil {
		defer c.host.Budget.done(n)
		if err := c.writes.clean.WriteBlock(block, p); err == nil {
			return nil
		}
	}
	// Without the new copy there must be no part of an old one either.
	return c.evict(block, 1)
}

// assemble reads a block from this host or, if a part of it is missing here,
// whole from the store, as background work.
func (c *cut) assemble(ctx context.Context, block int64, p []byte) error {
	n := c.geometry.BlockLen(block)
	clear(p[n:])
	complete, err := c.overlay(block, p[:n], true)
	if complete || err != nil {
		return err
	}
	ref, err := c.ref(ctx, c.view.image, block)
	if err != nil {
		return err
	}
	if ref.IsHole() {
		clear(p)
	} else {
		c.fetchQuietly(ctx, []manifest.Ref{ref}, p, func(_ int, fate error) { err = fate })
		if err != nil {
			return fmt.Errorf("fetch block %d: %w", block, err)
		}
	}
	_, err = c.overlay(block, p[:n], false)
	return err
}

// overlay reads into p what the sealed layer has of a block and, if below is
// set, what the clean layers have of the rest. complete says that they had it.
func (c *cut) overlay(block int64, p []byte, below bool) (complete bool, err error) {
	off := block * int64(c.geometry.BlockSize)
	for len(p) > 0 {
		page := off / manifest.PageSize
		state, layer, n := c.view.run(page, pagesOf(int64(len(p))))
		part := p[:min(int64(len(p)), n*manifest.PageSize)]
		hit := true
		switch {
		case state == cache.Data:
			err = layer.ReadAt(part, off)
		case state == cache.Zero:
			clear(part)
		case below:
			hit, err = c.readCached(c.view, block, part, off)
		}
		if err != nil || !hit {
			return false, err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return true, nil
}

// evictHoles removes the clean copies of blocks that were discarded whole,
// which nobody will read to make the snapshot.
func (c *cut) evictHoles() error {
	for e := range c.changes() {
		if !e.Hole {
			continue
		}
		if err := c.evict(e.First, e.Count); err != nil {
			return err
		}
	}
	return nil
}

func (c *cut) evict(first, count int64) error {
	if err := c.writes.clean.EvictRange(first, count); err != nil {
		return fmt.Errorf("remove the stale clean copies of %d blocks from %d: %w", count, first, err)
	}
	return nil
}
