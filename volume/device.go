package volume

import (
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A Device is a block device that reads lazily. Its methods may be called
// concurrently, until Close.
//
// Errors of reads and writes wrap the syscall.Errno that the caller should see:
// EINVAL, EROFS and ENOSPC for ranges it may not touch, the local disk's own,
// and EIO when the store cannot be read. One that gave up is told
// context.Canceled instead.
type Device struct {
	host     *Host
	name     string     // of the snapshot or volume, for messages
	key      *crypt.Key // of the lineage; nil: not encrypted
	geometry cache.Geometry
	base     *base   // nil for a blank volume
	writes   *writes // nil if read-only
	view     current

	// Blocks of the lineage, as reads and as background work fetch them.
	demand, background *blockstore.BlockReader

	work     *work
	flights  flights
	ahead    *readahead // nil if sequential readers get nothing ahead
	recorder *recorder  // nil if no trace is recorded
	census   census

	// What the host's budget may evict from; opened says that the view is set.
	shared []*evictable
	opened atomic.Bool
	stats  counters

	// buffers of MaxBlockSize, for the hydrator and for merging back.
	buffers sync.Pool

	// fill orders the filling of the volume's clean layer against the switch
	// of views: whoever writes a fetched block holds it shared, a cut or a
	// commit exclusively, and briefly. Taken before writes.cut.
	fill sync.RWMutex

	// lost, once set, is why the root can no longer be trusted: its pin is
	// gone and its snapshot deleted. Cold reads fail with it, until the volume
	// has another root.
	lost atomic.Pointer[error]
}

// OpenSnapshot opens a committed snapshot read-only. The caller has pinned it
// and closes the device before it removes the pin.
func (h *Host) OpenSnapshot(ctx context.Context, img *snapshot.Image) (*Device, error) {
	storeID, err := h.Store.ID(ctx)
	if err != nil {
		return nil, err
	}
	d := h.newDevice(img.ID().String(), img.Geometry(), img.ID().Lineage, img.Key())
	if d.base, err = h.openBase(storeID, img.ID(), img.Geometry(), img.Key()); err != nil {
		return nil, err
	}
	d.view.view = newView(nil, nil, img)
	d.shareBase()
	return d, nil
}

func (h *Host) newDevice(name string, g manifest.Geometry, lineage manifest.LineageID, key *crypt.Key) *Device {
	d := &Device{
		host: h, name: name, key: key,
		demand:     &blockstore.BlockReader{Store: h.Demand, Lineage: lineage, BlockSize: g.BlockSize, Key: key},
		background: &blockstore.BlockReader{Store: h.Background, Lineage: lineage, BlockSize: g.BlockSize, Key: key},
		work:       newWork(),
	}
	d.geometry.Set(g)
	if most := h.Budget.bound(h.ReadAhead); most > 0 {
		d.ahead = newReadahead(g.BlockSize, most)
	}
	d.flights.table = make(map[flightKey]*flight)
	d.flights.warming = make(map[flightKey]struct{})
	d.buffers.New = func() any { b := make([]byte, manifest.MaxBlockSize); return &b }
	return d
}

// Close ends fetches in flight and closes the files. Reads and writes must have
// ended.
func (d *Device) Close() error {
	d.work.stop()
	d.unshare()
	if d.base == nil {
		return nil
	}
	return d.base.Close()
}

// Size returns the device's size in bytes, a multiple of 512. That of a volume may
// grow.
func (d *Device) Size() int64 { return d.geometry.Size() }

// Encrypted reports whether the device's lineage is encrypted.
func (d *Device) Encrypted() bool { return d.key != nil }

// ReadOnly reports whether the device refuses writes.
func (d *Device) ReadOnly() bool { return d.writes == nil }

// ReadAt implements io.ReaderAt, at any offset and length. ctx bounds how long
// the caller waits for the store, besides the read deadline. Bytes that come
// from the store, now or earlier, are verified.
func (d *Device) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read %s at %d: %w", d.name, off, syscall.EINVAL)
	}
	size := d.geometry.Size()
	if off >= size {
		return 0, io.EOF
	}
	short := false
	if rest := size - off; int64(len(p)) > rest {
		p, short = p[:rest], true
	}
	v := d.view.acquire()
	defer v.release()
	d.record(v, off, int64(len(p)))
	if err := d.read(ctx, v, p, off); err != nil {
		return 0, fmt.Errorf("read %s at %d+%d: %w", d.name, off, len(p), err)
	}
	if short {
		return len(p), io.EOF
	}
	return len(p), nil
}

// read fills p as the view has it: first what this host has, and then, in as
// few requests as that takes, the rest. The range lies within the device.
func (d *Device) read(ctx context.Context, v *view, p []byte, off int64) error {
	var missing []piece
	start, length := off, int64(len(p))
	for len(p) > 0 {
		page := off / manifest.PageSize
		pages := (off+int64(len(p))-1)/manifest.PageSize - page + 1
		state, layer, n := v.run(page, pages)
		part := p[:min(int64(len(p)), (page+n)*manifest.PageSize-off)]
		var err error
		switch state {
		case cache.Data:
			if err = layer.ReadAt(part, off); err != nil {
				d.stats.note(err) // which bytes are bad, and where, is of interest
			}
		case cache.Zero:
			clear(part)
		default:
			missing, err = d.readClean(v, part, off, missing)
		}
		if err != nil {
			return err
		}
		p, off = p[len(part):], off+int64(len(part))
	}
	d.readAhead(v, start, length, len(missing) > 0)
	return d.readMissing(ctx, v, missing)
}

// readBelow fills p with what lies below the view's write layers.
func (d *Device) readBelow(ctx context.Context, v *view, p []byte, off int64) error {
	missing, err := d.readClean(v, p, off, nil)
	if err != nil {
		return err
	}
	return d.readMissing(ctx, v, missing)
}

// seals reports whether a snapshot is being made of a block.
func (d *Device) seals(v *view, block int64) bool {
	if v.sealed == nil {
		return false
	}
	first, pages := d.pages(block)
	state, n := v.sealed.Run(first, pages)
	return state != cache.Absent || n < pages
}

// pages returns the first page of a block and how many it has.
func (d *Device) pages(block int64) (first, n int64) {
	return block * int64(d.geometry.BlockSize) / manifest.PageSize, pagesOf(int64(d.geometry.BlockLen(block)))
}

// pagesOf is the number of pages of size bytes, the last perhaps short.
func pagesOf(size int64) int64 {
	return (size + manifest.PageSize - 1) / manifest.PageSize
}

// trusted returns why the root cannot be trusted, or nil.
func (d *Device) trusted() error {
	if err := d.lost.Load(); err != nil {
		return *err
	}
	return nil
}
