package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
)

// place returns the layer in which this host keeps a block's clean bytes, and
// the size of that layer: beyond it the block is zeros. A block that diverged
// is never looked up in the base again.
func (d *Device) place(block int64) (layer *cache.Clean, size int64) {
	if d.base != nil && (d.writes == nil || !d.writes.diverged.Has(block)) {
		return d.base.Clean, d.base.size
	}
	return d.writes.clean, d.geometry.Size
}

// readClean fills p from below the write layers: from the clean layers, and
// what they lack from the store.
func (d *Device) readClean(ctx context.Context, v *view, p []byte, off int64) error {
	if d.base != nil && d.writes == nil && off+int64(len(p)) <= d.base.size {
		// The common case of a warm read-only device takes one look.
		if hit, err := d.base.ReadAt(p, off); hit || err != nil {
			return err
		}
	}
	blockSize := int64(d.geometry.BlockSize)
	var missing []piece
	for len(p) > 0 {
		block := off / blockSize
		part := p[:min(int64(len(p)), (block+1)*blockSize-off)]
		hit, err := d.readCached(v, block, part, off)
		if err != nil {
			return err
		}
		if !hit {
			missing = append(missing, piece{block: block, p: part, within: int(off - block*blockSize)})
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	if len(missing) == 0 {
		return nil
	}
	return d.readMissing(ctx, v, missing)
}

// readCached fills p, which lies in one block, if this host has the bytes.
func (d *Device) readCached(v *view, block int64, p []byte, off int64) (hit bool, err error) {
	if block >= v.blocks() {
		clear(p)
		return true, nil
	}
	layer, size := d.place(block)
	held := p
	if off >= size {
		held = nil
	} else if rest := size - off; int64(len(p)) > rest {
		held = p[:rest]
	}
	if len(held) > 0 {
		if hit, err = layer.ReadAt(held, off); err != nil || !hit {
			return false, err
		}
	}
	clear(p[len(held):])
	return true, nil
}

// keep writes a verified block into its clean layer. The bytes came through
// view v's root; if that is no longer what new reads see, or a snapshot is
// being made of this very block, they are not kept: the clean copy of such a
// block is the snapshot's to write.
func (d *Device) keep(v *view, block int64, data []byte) error {
	d.fill.RLock()
	defer d.fill.RUnlock()
	now := d.view.acquire()
	defer now.release()
	if now.image != v.image {
		return nil
	}
	if now.sealed != nil {
		if dirty, ok := now.sealed.NextBlock(block, d.geometry.BlockSize); ok && dirty == block {
			return nil
		}
	}
	layer, _ := d.place(block)
	had, err := layer.Has(block)
	if err != nil {
		return err
	}
	if err := layer.WriteBlock(block, data); err != nil {
		return err
	}
	if !had {
		d.stats.hydrated.Add(int64(d.geometry.BlockSize))
	}
	return nil
}

// keepOrLog is keep for reads, which have their bytes already. A disk that is
// full is no reason to fail them.
func (d *Device) keepOrLog(v *view, block int64, data []byte) {
	err := d.keep(v, block, data)
	if err != nil && !errors.Is(err, syscall.ENOSPC) {
		d.host.Log.Warn("could not cache a block; it will be fetched again", "device", d.name, "block", block, "error", err)
	}
}

// Plan returns the runs of blocks that this host lacks in the first leaf at or
// after the given one in which the root has data, and the leaf to go on with;
// io.EOF when there is none. An
// error in reading the leaf comes with the leaf to go on with, too.
func (d *Device) Plan(ctx context.Context, leaf int64) (runs []manifest.Run, next int64, err error) {
	v := d.view.acquire()
	defer v.release()
	ref, ok := v.nextLeaf(leaf)
	if !ok {
		return nil, 0, io.EOF
	}
	blocks, refs, err := d.missingIn(ctx, v, ref)
	if err != nil {
		return nil, ref.Leaf + 1, err
	}
	return manifest.GroupRuns(blocks, refs, maxRunGap, maxRunSpan), ref.Leaf + 1, nil
}

// missingIn lists the blocks of a leaf that this host lacks.
func (d *Device) missingIn(ctx context.Context, v *view, at manifest.LeafRef) (blocks []int64, refs []manifest.Ref, err error) {
	leaf, err := d.leaf(ctx, v.image, at)
	if err != nil {
		return nil, nil, fmt.Errorf("plan hydration: %w", err)
	}
	for i := range leaf.Len() {
		ref := leaf.Ref(i)
		if ref.IsHole() {
			continue
		}
		block := at.Leaf*manifest.LeafBlocks + int64(i)
		layer, _ := d.place(block)
		has, err := layer.Has(block)
		if err != nil {
			return nil, nil, fmt.Errorf("plan hydration: %w", err)
		}
		if !has {
			blocks, refs = append(blocks, block), append(refs, ref)
		}
	}
	return blocks, refs, nil
}

// ErrFull: this host may cache no more clean bytes.
var ErrFull = errors.New("the cache is full")

// Warm fetches blocks in the background and keeps them. It looks them up anew:
// some may have arrived since they were planned, and a snapshot may have moved
// the root on. ErrFull: there is no room.
func (d *Device) Warm(ctx context.Context, wanted []int64) error {
	if d.host.Room != nil {
		if err := d.host.Room(); err != nil {
			return fmt.Errorf("%w: %w", ErrFull, err)
		}
	}
	v := d.view.acquire()
	defer v.release()
	if v.image == nil {
		return nil
	}
	if err := d.trusted(); err != nil {
		return err
	}
	var blocks []int64
	var refs []manifest.Ref
	for _, block := range wanted {
		layer, _ := d.place(block)
		has, err := layer.Has(block)
		if err != nil {
			return err
		}
		if has {
			continue
		}
		ref, err := d.ref(ctx, v.image, block)
		if err != nil {
			return err
		}
		if !ref.IsHole() {
			blocks, refs = append(blocks, block), append(refs, ref)
		}
	}
	buffer := d.flights.buffers.Get().(*[]byte)
	defer d.flights.buffers.Put(buffer)
	var failed error
	for _, run := range manifest.GroupRuns(blocks, refs, maxRunGap, maxRunSpan) {
		_, n := run.Span()
		d.stats.fetchedBytes.Add(n)
		err := d.background.ReadRun(ctx, run.Refs, func(int) []byte { return (*buffer)[:d.geometry.BlockSize] }, func(i int, err error) {
			if err == nil {
				err = d.keep(v, run.Blocks[i], (*buffer)[:d.geometry.BlockSize])
			}
			if err != nil && failed == nil {
				failed = fmt.Errorf("hydrate block %d: %w", run.Blocks[i], err)
			}
		})
		if failed == nil {
			failed = err
		}
	}
	if errors.Is(failed, syscall.ENOSPC) {
		return fmt.Errorf("%w: %w", ErrFull, failed)
	}
	if failed != nil {
		d.stats.note(failed)
	}
	return failed
}
