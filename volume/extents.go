package volume

import (
	"context"
	"fmt"
	"io"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
)

// NextData returns the first offset at or after off that may hold data, and
// io.EOF if there is none. It may have to read the index from the store.
func (d *Device) NextData(ctx context.Context, off int64) (int64, error) {
	return d.next(ctx, off, true)
}

// NextHole returns the first offset at or after off that reads as zeros
// without being stored; the end of the device counts as one. An off at or past
// that is io.EOF.
func (d *Device) NextHole(ctx context.Context, off int64) (int64, error) {
	return d.next(ctx, off, false)
}

func (d *Device) next(ctx context.Context, off int64, data bool) (int64, error) {
	size := d.geometry.Size()
	if off < 0 || off >= size {
		return 0, io.EOF
	}
	v := d.view.acquire()
	defer v.release()
	for at := off; at < size; {
		isData, end, err := d.extent(ctx, v, at)
		if err == nil {
			err = ctx.Err() // a large device has many extents
		}
		if err != nil {
			return 0, fmt.Errorf("find data in %s at %d: %w", d.name, off, err)
		}
		if isData == data {
			return at, nil
		}
		at = end
	}
	if data {
		return 0, io.EOF
	}
	return size, nil
}

// extent reports whether the device holds data at off, and up to where that
// goes on at least.
func (d *Device) extent(ctx context.Context, v *view, off int64) (data bool, end int64, err error) {
	size := int64(d.geometry.BlockSize)
	block := off / size
	first, pages := d.pages(block)
	page := off / manifest.PageSize
	state, _, n := v.run(page, first+pages-page)
	end = min((page+n)*manifest.PageSize, (block+1)*size, d.geometry.Size())
	if state != cache.Absent {
		return state == cache.Data, end, nil
	}
	if at, ok := v.nextLeaf(block / manifest.LeafBlocks); ok && at.Leaf == block/manifest.LeafBlocks {
		ref, err := d.ref(ctx, v.image, block)
		return !ref.IsHole(), end, err
	}
	return false, max(end, min(d.idleUntil(v, block)*size, d.geometry.Size())), nil
}

// idleUntil returns the first block at or after block that a write layer or
// the root, which counts in leaves, knows anything of.
func (d *Device) idleUntil(v *view, block int64) int64 {
	next := d.geometry.Blocks()
	if ref, ok := v.nextLeaf(block / manifest.LeafBlocks); ok {
		next = min(next, max(block, ref.Leaf*manifest.LeafBlocks))
	}
	for _, layer := range []*cache.WriteLayer{v.open, v.sealed} {
		if layer == nil {
			continue
		}
		if dirty, ok := layer.NextBlock(block, d.geometry.BlockSize); ok {
			next = min(next, dirty)
		}
	}
	return next
}

// Allocated returns how many bytes of the device are more than holes, between 0
// and Size: those of the root's data blocks, and those that were written since
// or discarded. It blocks for nothing.
func (d *Device) Allocated() int64 {
	v := d.view.acquire()
	defer v.release()
	n := v.dirtyBytes()
	if v.image != nil {
		n += v.image.Root.DataBlocks * int64(d.geometry.BlockSize)
	}
	return min(n, d.geometry.Size())
}

// dirtyBytes returns how many bytes the write layers know anything of; a page
// that both do counts twice.
func (v *view) dirtyBytes() int64 {
	n := int64(0)
	if v.open != nil {
		n += v.open.DirtyBytes()
	}
	if v.sealed != nil {
		n += v.sealed.DirtyBytes()
	}
	return n
}
