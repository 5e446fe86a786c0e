package volume

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// Bounds of one ranged GET: unwanted bytes in between that cost less than
// another request, and the whole.
const (
	maxRunGap  = 256 << 10
	maxRunSpan = 16 << 20
)

// backgroundDeadline bounds one request of background work and all its retries:
// longer than any policy of those, so that it only ends what hangs.
const backgroundDeadline = 5 * time.Minute

// A piece is a part of a read that one missing block has to answer.
type piece struct {
	block  int64
	p      []byte
	within int // offset of p in the block
}

// A flight is one block on its way from the store to those who read it. data or
// err is set before done is closed. When left is closed too, the flight is out of
// the table, and the block in the cache if it could be kept.
type flight struct {
	done, left chan struct{}
	data       []byte
	err        error
}

// flightKey tells flights apart: a block may be fetched through two roots at
// once, while a commit replaces one by the other.
type flightKey struct {
	image *snapshot.Image
	block int64
}

// flights are the fetches of reads. There is one for a block however many
// readers ask, and it lives on the device's own context: a reader that gives
// up takes nothing from the others. Each ends within the read deadline.
type flights struct {
	count atomic.Int64 // requests under way

	mu    sync.Mutex // guards table and warming
	table map[flightKey]*flight

	// warming are the blocks that background work is fetching. Who wants one at
	// once fetches it as well: it may be the last of a long request.
	warming map[flightKey]struct{}
}

// errDeadline is the cause of reads given up after Host.ReadDeadline.
var errDeadline = fmt.Errorf("the store did not answer within the read deadline: %w", blockstore.ErrUnavailable)

// isKnownHole reports whether a block is a hole of the root, as far as that can be told
// without waiting.
func (d *Device) isKnownHole(img *snapshot.Image, block int64) bool {
	at, ok := img.Root.Find(block / manifest.LeafBlocks)
	if !ok {
		return true
	}
	leaf, ok := d.host.Leaves.Peek(at.Hash)
	i := int(block % manifest.LeafBlocks)
	return ok && (i >= leaf.Len() || leaf.Ref(i).IsHole())
}

// readMissing fills pieces from the store, ascending by block. Blocks of one
// pack come in one request.
func (d *Device) readMissing(ctx context.Context, v *view, pieces []piece) error {
	if len(pieces) == 0 {
		return nil
	}
	if err := d.trusted(); err != nil {
		return d.failed(ctx, err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, d.host.ReadDeadline, errDeadline)
	defer cancel()
	wait := wait{of: &d.stats.waits}
	defer wait.end()
	for {
		err := d.awaitPieces(ctx, v, pieces, &wait)
		if err == nil {
			return nil
		}
		if errors.Is(err, errDeadline) && ctx.Err() == nil {
			continue // the time of a flight that others began ran out, not ours
		}
		return d.failed(ctx, err)
	}
}

// failed notes why a read failed, for status, and makes it an EIO; a reader
// that gave up itself is told so instead.
func (d *Device) failed(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return fmt.Errorf("%w: %w", context.Canceled, err)
	}
	d.stats.note(err)
	return fmt.Errorf("%w: %w", syscall.EIO, err)
}

func (d *Device) awaitPieces(ctx context.Context, v *view, pieces []piece, wait *wait) error {
	pieces, refs, err := d.fillHoles(ctx, v, pieces, wait)
	if err != nil {
		return err
	}
	for i, f := range d.fetch(v, pieces, refs) {
		if f == nil {
			continue
		}
		if err := f.await(ctx, wait); err != nil {
			return &blockError{doing: "fetch", block: pieces[i].block, err: err}
		}
		if f.err != nil {
			return f.err
		}
		copy(pieces[i].p, f.data[pieces[i].within:])
	}
	return nil
}

// await waits until the flight has ended.
func (f *flight) await(ctx context.Context, wait *wait) error {
	select {
	case <-f.done:
		return nil
	default:
	}
	wait.begin()
	select {
	case <-f.done:
		return nil
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.DeadlineExceeded) { // the caller's, which may be shorter
			return errDeadline
		}
		return context.Cause(ctx)
	}
}

// fillHoles fills the pieces of blocks that are holes, and returns the others
// with their refs.
func (d *Device) fillHoles(ctx context.Context, v *view, pieces []piece, wait *wait) (cold []piece, refs []manifest.Ref, err error) {
	for _, piece := range pieces {
		if !d.hasRef(v.image, piece.block) {
			wait.begin()
		}
		ref, err := d.ref(ctx, v.image, piece.block)
		if err != nil {
			return nil, nil, err
		}
		if ref.IsHole() {
			clear(piece.p)
			continue
		}
		cold, refs = append(cold, piece), append(refs, ref)
	}
	return cold, refs, nil
}

// fetch returns the flight of each piece's block, starting those that are not
// on their way; nil for a piece that was filled from the cache after all.
func (d *Device) fetch(v *view, pieces []piece, refs []manifest.Ref) []*flight {
	var (
		all     = make([]*flight, len(pieces))
		blocks  []int64 // to be started, ascending
		ownRefs []manifest.Ref
	)
	d.flights.mu.Lock()
	defer d.flights.mu.Unlock()
	for i, piece := range pieces {
		all[i] = d.flights.table[flightKey{v.image, piece.block}]
		if all[i] != nil || d.landed(v, piece) {
			continue
		}
		all[i] = d.flights.add(v, piece.block)
		blocks, ownRefs = append(blocks, piece.block), append(ownRefs, refs[i])
	}
	for _, run := range manifest.GroupRuns(blocks, ownRefs, maxRunGap, maxRunSpan) {
		d.launch(v, run)
	}
	return all
}

// landed fills a piece if its block was cached since the reader looked.
func (d *Device) landed(v *view, p piece) bool {
	hit, err := d.readCached(v, p.block, p.p, p.block*int64(d.geometry.BlockSize)+int64(p.within))
	return hit && err == nil // only a closed layer fails, and then no flight starts
}

// add puts a new flight into the table. f.mu is held.
func (f *flights) add(v *view, block int64) *flight {
	flight := &flight{done: make(chan struct{}), left: make(chan struct{})}
	f.table[flightKey{v.image, block}] = flight
	return flight
}

// claim marks those blocks that no reader is fetching as fetched by the
// background, until the returned function is called, and returns them with their
// refs, and the flights of the others.
func (f *flights) claim(v *view, blocks []int64, refs []manifest.Ref) (own []int64, ownRefs []manifest.Ref, others []*flight, release func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, block := range blocks {
		key := flightKey{v.image, block}
		if flight := f.table[key]; flight != nil {
			others = append(others, flight)
			continue
		}
		f.warming[key] = struct{}{}
		own, ownRefs = append(own, block), append(ownRefs, refs[i])
	}
	return own, ownRefs, others, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, block := range own {
			delete(f.warming, flightKey{v.image, block})
		}
	}
}

// launch starts the flights of one run, which are in the table. d.flights.mu is
// held.
func (d *Device) launch(v *view, run manifest.Run) {
	own := make([]*flight, len(run.Blocks))
	for i, block := range run.Blocks {
		own[i] = d.flights.table[flightKey{v.image, block}]
	}
	v.refs.Add(1) // so that what the flight reads stays pinned
	d.flights.count.Add(1)
	started := d.work.start(func(ctx context.Context) {
		defer v.release()
		defer d.flights.count.Add(-1)
		d.fly(ctx, v, run, own)
	})
	if started {
		return
	}
	v.release()
	d.flights.count.Add(-1)
	for i, block := range run.Blocks {
		own[i].err = errClosed
		close(own[i].done)
		close(own[i].left)
		delete(d.flights.table, flightKey{v.image, block})
	}
}

// fly fetches the blocks of one run, hands each to its readers as soon as it
// is verified, and keeps it.
func (d *Device) fly(ctx context.Context, v *view, run manifest.Run, own []*flight) {
	ctx, cancel := context.WithTimeoutCause(ctx, d.host.ReadDeadline, errDeadline)
	defer cancel()
	_, n := run.Span()
	d.stats.demandFetches.Add(1)
	d.stats.fetchedBytes.Add(n)

	buffers := make([][]byte, len(run.Blocks))
	buffer := func(i int) []byte {
		if buffers[i] == nil {
			buffers[i] = make([]byte, d.geometry.BlockSize)
		}
		return buffers[i]
	}
	// Its own error is the first of those that it reports.
	_ = d.demand.ReadRun(ctx, run.Refs, buffer, func(i int, err error) {
		if err != nil {
			d.abort(v, run.Blocks[i], own[i], err)
		} else {
			d.land(v, run.Blocks[i], own[i], buffers[i])
		}
		own[i], buffers[i] = nil, nil // readers have it; a long run holds no more than it must
	})
}

// land ends a flight that brought its block: readers first, then the cache.
// The flight stays in the table until the block is there, so that no reader
// falls between the two and fetches again.
func (d *Device) land(v *view, block int64, f *flight, data []byte) {
	d.stats.heal(block)
	f.data = data
	close(f.done)
	d.keepOrLog(v, block, data)
	d.flights.mu.Lock()
	defer d.flights.mu.Unlock()
	delete(d.flights.table, flightKey{v.image, block})
	close(f.left)
}

// abort ends a flight that failed. Whoever asks again begins another one.
func (d *Device) abort(v *view, block int64, f *flight, err error) {
	d.flights.mu.Lock()
	delete(d.flights.table, flightKey{v.image, block})
	d.flights.mu.Unlock()
	f.err = &blockError{doing: "fetch", block: block, err: err}
	close(f.done)
	close(f.left)
}

// fetchQuietly fetches blocks of one run, as background work, one after the
// other into dst, and tells done the fate of each.
func (d *Device) fetchQuietly(ctx context.Context, refs []manifest.Ref, dst []byte, done func(i int, err error)) {
	ctx, cancel := context.WithTimeoutCause(ctx, backgroundDeadline, errDeadline)
	defer cancel()
	_, n := manifest.Run{Refs: refs}.Span()
	d.stats.fetchedBytes.Add(n)
	// Its own error is the first of those that done is told.
	_ = d.background.ReadRun(ctx, refs, func(int) []byte { return dst }, done)
}

// DemandInFlight returns how many requests of reads are under way.
func (d *Device) DemandInFlight() int { return int(d.flights.count.Load()) }
