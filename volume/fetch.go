package volume

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// Bounds of one ranged GET: unwanted bytes in between that cost less than
// another request, and the whole.
const (
	maxRunGap  = 256 << 10
	maxRunSpan = 16 << 20
)

// A piece is the part of a read that one missing block has to answer.
type piece struct {
	block  int64
	p      []byte
	within int // offset of p in the block
}

// A flight is one block on its way from the store. data and err are set
// before done is closed; no data and no error is a hole.
type flight struct {
	done chan struct{}
	data []byte
	err  error
}

// flightKey tells flights apart: a block may be fetched through two roots at
// once, while a commit replaces one by the other.
type flightKey struct {
	image *snapshot.Image
	block int64
}

// flights are the fetches of reads. There is one for a block however many
// readers ask, and it lives on the device's own context: a reader that gives
// up takes nothing from the others.
type flights struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	ended  sync.WaitGroup
	count  atomic.Int64 // in flight

	mu    sync.Mutex // guards table and closed
	table map[flightKey]*flight
	shut  bool

	buffers sync.Pool // of blocks, for the hydrator and for snapshots
}

func (f *flights) init() {
	f.ctx, f.cancel = context.WithCancelCause(context.Background())
	f.table = make(map[flightKey]*flight)
	f.buffers.New = func() any { b := make([]byte, manifest.MaxBlockSize); return &b }
}

// stop ends all fetches and waits for them.
func (f *flights) stop() {
	f.mu.Lock()
	f.shut = true
	f.mu.Unlock()
	f.cancel(errClosed)
	f.ended.Wait()
}

// readMissing fills pieces from the store. Blocks of one pack come in one
// request.
func (d *Device) readMissing(ctx context.Context, v *view, pieces []piece) error {
	if err := d.trusted(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, d.host.ReadDeadline, errDeadline)
	defer cancel()
	waiting, err := d.fetch(ctx, v, pieces)
	if err != nil {
		return d.failed(ctx, err)
	}
	for i, f := range waiting {
		select {
		case <-f.done:
		case <-ctx.Done():
			return d.failed(ctx, context.Cause(ctx))
		}
		if f.err != nil {
			return d.failed(ctx, f.err)
		}
		p := pieces[i].p
		if f.data == nil {
			clear(p)
		} else {
			copy(p, f.data[pieces[i].within:])
		}
	}
	return nil
}

// errDeadline is the cause of reads given up after Host.ReadDeadline.
var errDeadline = errors.New("the store did not answer within the read deadline")

// failed notes why a read failed, for status, and makes it an EIO; a reader
// that gave up itself is told so instead.
func (d *Device) failed(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), context.Canceled) {
		return err
	}
	d.stats.note(err)
	return fmt.Errorf("%w: %w", syscall.EIO, err)
}

// fetch returns the flight of each piece's block, starting those that are not
// on their way.
func (d *Device) fetch(ctx context.Context, v *view, pieces []piece) ([]*flight, error) {
	refs := make([]manifest.Ref, len(pieces))
	for i, piece := range pieces {
		var err error
		if refs[i], err = d.ref(ctx, v.image, piece.block); err != nil {
			return nil, err
		}
	}
	all := make([]*flight, len(pieces))
	var started []int64
	var startedRefs []manifest.Ref
	own := make(map[int64]*flight)

	d.flights.mu.Lock()
	defer d.flights.mu.Unlock()
	if d.flights.shut {
		return nil, errClosed
	}
	for i, piece := range pieces {
		key := flightKey{v.image, piece.block}
		f := d.flights.table[key]
		if f == nil {
			f = &flight{done: make(chan struct{})}
			if refs[i].IsHole() {
				close(f.done)
			} else {
				d.flights.table[key] = f
				own[piece.block] = f
				started, startedRefs = append(started, piece.block), append(startedRefs, refs[i])
			}
		}
		all[i] = f
	}
	for _, run := range manifest.GroupRuns(started, startedRefs, maxRunGap, maxRunSpan) {
		// The flight keeps the view, so that what it reads stays pinned.
		v.refs.Add(1)
		d.flights.count.Add(1)
		d.flights.ended.Go(func() {
			defer v.release()
			defer d.flights.count.Add(-1)
			d.fly(v, run, own)
		})
	}
	return all, nil
}

// fly fetches the blocks of one run, hands each to its readers as soon as it
// is verified, and keeps it.
func (d *Device) fly(v *view, run manifest.Run, own map[int64]*flight) {
	ctx, cancel := context.WithTimeoutCause(d.flights.ctx, d.host.ReadDeadline, errDeadline)
	defer cancel()
	_, n := run.Span()
	d.stats.demandFetches.Add(1)
	d.stats.fetchedBytes.Add(n)

	buffers := make([][]byte, len(run.Blocks))
	landed := make([]bool, len(run.Blocks))
	err := d.demand.ReadRun(ctx, run.Refs,
		func(i int) []byte {
			if buffers[i] == nil {
				buffers[i] = make([]byte, d.geometry.BlockSize)
			}
			return buffers[i]
		},
		func(i int, err error) {
			landed[i] = true
			d.land(v, run.Blocks[i], own[run.Blocks[i]], buffers[i], err)
		})
	for i, block := range run.Blocks {
		if !landed[i] {
			d.land(v, block, own[block], nil, errors.Join(err, context.Cause(ctx)))
		}
	}
}

// land ends a flight: readers first, then the cache. The flight stays in the
// table until the block is in the cache, so that no reader falls between the
// two and fetches again.
func (d *Device) land(v *view, block int64, f *flight, data []byte, err error) {
	if err != nil {
		f.err = fmt.Errorf("fetch block %d: %w", block, err)
	} else {
		f.data = data
	}
	close(f.done)
	if err == nil {
		d.keepOrLog(v, block, data)
		d.stats.heal()
	}
	d.flights.mu.Lock()
	defer d.flights.mu.Unlock()
	delete(d.flights.table, flightKey{v.image, block})
}

// DemandInFlight returns how many requests of reads are under way.
func (d *Device) DemandInFlight() int { return int(d.flights.count.Load()) }
