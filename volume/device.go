package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A Device is a block device that reads lazily. Its methods may be called
// concurrently, until Close.
//
// Errors of reads and writes wrap a syscall.Errno where the caller did
// something wrong or the local disk did; anything else is a store that could
// not be read, which the reader sees as EIO.
type Device struct {
	host     *Host
	name     string // of the snapshot or volume, for messages
	geometry manifest.Geometry
	base     *Base   // nil for a blank volume
	writes   *writes // nil if read-only
	view     current

	// Blocks of the lineage, as reads and as background work fetch them.
	demand, background *blockstore.BlockReader

	flights flights
	stats   counters

	// fill orders the filling of clean layers against the switch of views:
	// whoever writes a fetched block holds it shared, a cut or a commit
	// exclusively, and briefly.
	fill sync.RWMutex

	// lost, once set, is why the root can no longer be trusted: its pin is
	// gone and its snapshot deleted. Cold reads fail with it.
	lost atomic.Pointer[error]
}

// OpenSnapshot opens a committed snapshot read-only. The caller has pinned it
// and closes the device before it removes the pin.
func (h *Host) OpenSnapshot(ctx context.Context, img *snapshot.Image) (*Device, error) {
	storeID, err := h.Store.ID(ctx)
	if err != nil {
		return nil, err
	}
	base, err := h.openBase(storeID, img.ID(), img.Geometry())
	if err != nil {
		return nil, err
	}
	d := h.newDevice(img.ID().String(), img.Geometry(), img.ID().Lineage)
	d.base = base
	d.view.view = newView(nil, nil, img)
	d.recount()
	return d, nil
}

func (h *Host) newDevice(name string, g manifest.Geometry, lineage manifest.LineageID) *Device {
	d := &Device{
		host: h, name: name, geometry: g,
		demand:     &blockstore.BlockReader{Store: h.Demand, Lineage: lineage, BlockSize: g.BlockSize},
		background: &blockstore.BlockReader{Store: h.Background, Lineage: lineage, BlockSize: g.BlockSize},
	}
	d.flights.init()
	return d
}

// Close ends fetches in flight and closes the files. Reads and writes must have
// ended.
func (d *Device) Close() error {
	d.flights.stop()
	if d.base == nil {
		return nil
	}
	return d.base.Close()
}

// Size returns the device's size in bytes, a multiple of 512.
func (d *Device) Size() int64 { return d.geometry.Size }

// ReadOnly reports whether the device refuses writes.
func (d *Device) ReadOnly() bool { return d.writes == nil }

// ReadAt implements io.ReaderAt; ctx bounds how long the caller waits for the
// store, besides the read deadline. It may be called at any offset and length.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read at %d: %w", off, syscall.EINVAL)
	}
	if off >= d.geometry.Size {
		return 0, io.EOF
	}
	short := false
	if rest := d.geometry.Size - off; int64(len(p)) > rest {
		p, short = p[:rest], true
	}
	v := d.view.acquire()
	defer v.release()
	if err := d.read(ctx, v, p, off); err != nil {
		return 0, fmt.Errorf("read %s at %d+%d: %w", d.name, off, len(p), err)
	}
	if short {
		return len(p), io.EOF
	}
	return len(p), nil
}

// read fills p as the view has it. The range lies within the device.
func (d *Device) read(ctx context.Context, v *view, p []byte, off int64) error {
	for len(p) > 0 {
		page := off / manifest.PageSize
		pages := (off+int64(len(p))-1)/manifest.PageSize - page + 1
		state, layer, n := v.run(page, pages)
		part := p[:min(int64(len(p)), (page+n)*manifest.PageSize-off)]
		var err error
		switch state {
		case cache.Data:
			err = layer.ReadAt(part, off)
		case cache.Zero:
			clear(part)
		default:
			err = d.readClean(ctx, v, part, off)
		}
		if err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	return nil
}

// NextData returns the first offset at or after off that may hold data, and
// io.EOF if there is none.
func (d *Device) NextData(ctx context.Context, off int64) (int64, error) {
	return d.next(ctx, off, true)
}

// NextHole returns the first offset at or after off that reads as zeros
// without being stored; the end of the device counts as one.
func (d *Device) NextHole(ctx context.Context, off int64) (int64, error) {
	return d.next(ctx, off, false)
}

func (d *Device) next(ctx context.Context, off int64, data bool) (int64, error) {
	if off < 0 || off >= d.geometry.Size {
		return 0, io.EOF
	}
	v := d.view.acquire()
	defer v.release()
	for at := off; at < d.geometry.Size; {
		isData, end, err := d.extent(ctx, v, at)
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
	return d.geometry.Size, nil
}

// extent reports whether the device holds data at off, and up to where that
// goes on at least.
func (d *Device) extent(ctx context.Context, v *view, off int64) (data bool, end int64, err error) {
	blockSize := int64(d.geometry.BlockSize)
	block := off / blockSize
	if idle := d.idleUntil(v, block); idle > block {
		return false, min(idle*blockSize, d.geometry.Size), nil
	}
	blockEnd := min((block+1)*blockSize, d.geometry.Size)
	page := off / manifest.PageSize
	state, _, n := v.run(page, (blockEnd+manifest.PageSize-1)/manifest.PageSize-page)
	end = min((page+n)*manifest.PageSize, blockEnd)
	if state != cache.Absent || block >= v.blocks() {
		return state == cache.Data, end, nil
	}
	ref, err := d.ref(ctx, v.image, block)
	return !ref.IsHole(), end, err
}

// idleUntil returns the first block at or after block that a write layer or
// the root knows anything of.
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

// trusted returns why the root cannot be trusted, or nil.
func (d *Device) trusted() error {
	if err := d.lost.Load(); err != nil {
		return *err
	}
	return nil
}

// errClosed is the cause of fetches that Close ended.
var errClosed = errors.New("the device is being closed")
