package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

const (
	// openGrace is how long an image stays open after its last user has closed it.
	openGrace = 5 * time.Second

	// shelfTick is how often it is looked for images that nobody used for so long.
	shelfTick = time.Second
)

// An openedImage is a snapshot that is open for reading, and pinned.
type openedImage interface {
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	NextData(ctx context.Context, off int64) (int64, error)
	NextHole(ctx context.Context, off int64) (int64, error)
	Stats() volume.Stats

	// Close lets go of everything on this host; no other method but Unpin is called
	// after it.
	Close() error

	// Unpin lets go of the snapshot in the store.
	Unpin(ctx context.Context) error
}

// A shelf has the images of a browse, and opens and closes them: each once, for all who
// read it, when the first one opens it, until a while after the last one has closed it.
// Of those that nobody uses the one that was used least recently makes room for another.
type shelf struct {
	// open opens a snapshot, as one of n that are open.
	open     func(ctx context.Context, id manifest.SnapshotID, n int) (openedImage, error)
	most     int           // images open at once
	patience time.Duration // for opening one
	grace    time.Duration
	gone     func() // called when a snapshot that was to be opened is not there any more
	log      *slog.Logger

	work context.Context // ends with the shelf
	stop context.CancelFunc
	busy sync.WaitGroup

	mu      sync.Mutex // guards the fields below, and those of images that say so
	known   map[manifest.SnapshotID]*browsed
	opened  map[*browsed]struct{} // those that are open
	taken   int                   // by images that are open, being opened or being closed; at most most
	closing int                   // of these, being closed
	freed   *sync.Cond            // one was closed
	past    volume.Stats          // what those counted that are closed, or being closed
}

// newShelf returns an empty shelf, which the caller closes. Its other fields are set
// before its first use.
func newShelf(ctx context.Context) *shelf {
	s := &shelf{grace: openGrace, known: make(map[manifest.SnapshotID]*browsed), opened: make(map[*browsed]struct{})}
	s.freed = sync.NewCond(&s.mu)
	s.work, s.stop = context.WithCancel(context.WithoutCancel(ctx))
	s.busy.Go(s.tidy)
	return s
}

// A browsed is one snapshot's image: an [fs.Device] that is opened when it is needed.
type browsed struct {
	shelf     *shelf
	id        manifest.SnapshotID
	size      int64
	allocated int64
	device    atomic.Pointer[openedImage] // nil unless open; set and cleared with shelf.mu held

	// Guarded by shelf.mu:
	users   int      // handles, and those who wait for one
	opening *opening // nil: nobody is opening it
	unused  time.Time
}

// An opening is one attempt to open an image. err is set before done is closed.
type opening struct {
	done chan struct{}
	err  error
}

// image returns the image of a snapshot: the one it has already, or a new one.
func (s *shelf) image(d snapshot.Description) *browsed {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.known[d.ID]; b != nil {
		return b
	}
	allocated := min(d.Outcome.DataBlocks*int64(d.Geometry.BlockSize), d.Geometry.Size)
	return &browsed{shelf: s, id: d.ID, size: d.Geometry.Size, allocated: allocated}
}

// know keeps these images, and of those known before the ones in use.
func (s *shelf) know(images []*browsed) {
	known := make(map[manifest.SnapshotID]*browsed, len(images))
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, b := range s.known {
		if b.users > 0 || b.opening != nil || b.device.Load() != nil {
			known[id] = b
		}
	}
	for _, b := range images {
		known[b.id] = b
	}
	s.known = known
}

// Size implements [fs.Device].
func (b *browsed) Size() int64 { return b.size }

// Allocated returns how many bytes are not holes.
func (b *browsed) Allocated() int64 { return b.allocated }

// ReadOnly implements [fs.Device].
func (b *browsed) ReadOnly() bool { return true }

// ReadAt implements [fs.Device].
func (b *browsed) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	return (*b.device.Load()).ReadAt(ctx, p, off)
}

// NextData implements [fs.Device].
func (b *browsed) NextData(ctx context.Context, off int64) (int64, error) {
	return (*b.device.Load()).NextData(ctx, off)
}

// NextHole implements [fs.Device].
func (b *browsed) NextHole(ctx context.Context, off int64) (int64, error) {
	return (*b.device.Load()).NextHole(ctx, off)
}

var errReadOnly = errors.New("snapshots do not change")

// WriteAt implements [fs.Device]. It is never called, as Zero and Sync.
func (b *browsed) WriteAt(context.Context, []byte, int64) (int, error) { return 0, errReadOnly }

// Zero implements [fs.Device].
func (b *browsed) Zero(context.Context, int64, int64) error { return errReadOnly }

// Sync implements [fs.Device].
func (b *browsed) Sync(context.Context) error { return nil }

// Open makes the image open, until Close. Whoever waits for the same opening gets the
// same error; who gives up takes nothing from the others.
func (b *browsed) Open(ctx context.Context) error {
	o := b.enter()
	if o == nil {
		return nil
	}
	var err error
	select {
	case <-o.done:
		err = o.err
	case <-ctx.Done():
		err = fmt.Errorf("open %s: %w", b.id, ctx.Err())
	}
	if err != nil {
		b.Close()
	}
	return err
}

// enter counts a user, and returns what it has to wait for; nil: nothing.
func (b *browsed) enter() *opening {
	s := b.shelf
	s.mu.Lock()
	defer s.mu.Unlock()
	b.users++
	if b.device.Load() != nil {
		return nil
	}
	if b.opening == nil {
		o := &opening{done: make(chan struct{})}
		b.opening = o
		s.busy.Go(func() { s.openImage(b, o) })
	}
	return b.opening
}

// Close ends what Open began.
func (b *browsed) Close() {
	b.shelf.mu.Lock()
	defer b.shelf.mu.Unlock()
	b.users--
	b.unused = time.Now()
}

// openImage opens an image for all who wait.
func (s *shelf) openImage(b *browsed, o *opening) {
	device, err := s.openWithin(b.id)
	s.mu.Lock()
	defer s.mu.Unlock()
	defer close(o.done)
	b.opening = nil
	if err != nil {
		o.err = err
		return
	}
	b.device.Store(&device)
	b.unused = time.Now()
	s.opened[b] = struct{}{}
}

// openWithin opens an image within the patience. It takes one of the places.
func (s *shelf) openWithin(id manifest.SnapshotID) (openedImage, error) {
	n, err := s.makeRoom()
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", id, err)
	}
	ctx, cancel := context.WithTimeout(s.work, s.patience)
	defer cancel()
	device, err := s.open(ctx, id, n)
	if err == nil {
		s.log.Info("opened", "id", id)
		return device, nil
	}
	s.mu.Lock()
	s.leave()
	s.mu.Unlock()
	if errors.Is(err, fs.ErrGone) {
		s.gone()
	}
	return nil, err
}

// makeRoom takes a place for an image, if need be that of one that nobody uses, and
// returns how many are taken. fs.ErrTooMany: all are in use.
func (s *shelf) makeRoom() (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.taken == s.most {
		if s.closing == 0 {
			idle := s.leastRecent()
			if idle == nil {
				return 0, fmt.Errorf("%w: all of the %d that --open-images allows are in use", fs.ErrTooMany, s.most)
			}
			s.close(idle)
		}
		s.freed.Wait()
	}
	s.taken++
	return s.taken, nil
}

// leave gives a place back. mu is held.
func (s *shelf) leave() {
	s.taken--
	s.freed.Broadcast()
}

// leastRecent returns the image that is open and has not been used for longest; nil:
// all are in use. mu is held.
func (s *shelf) leastRecent() (found *browsed) {
	for b := range s.opened {
		if b.users == 0 && (found == nil || b.unused.Before(found.unused)) {
			found = b
		}
	}
	return found
}

// close begins to close an image that nobody uses; its place is free once it holds
// nothing on this host any more. mu is held.
func (s *shelf) close(b *browsed) {
	device := *b.device.Swap(nil)
	delete(s.opened, b)
	count(&s.past, device.Stats())
	s.closing++
	s.busy.Go(func() {
		err := device.Close()
		s.mu.Lock()
		s.closing--
		s.leave()
		s.mu.Unlock()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(s.work), commandPatience)
		defer cancel()
		if err = errors.Join(err, device.Unpin(ctx)); err != nil {
			s.log.Warn("could not close an image properly", "id", b.id, "error", err)
			return
		}
		s.log.Info("closed", "id", b.id)
	})
}

// tidy closes images that nobody uses any more.
func (s *shelf) tidy() {
	tick := time.NewTicker(min(shelfTick, s.grace))
	defer tick.Stop()
	for {
		select {
		case <-s.work.Done():
			return
		case <-tick.C:
		}
		s.mu.Lock()
		for b := range s.opened {
			if b.users == 0 && time.Since(b.unused) >= s.grace {
				s.close(b)
			}
		}
		s.mu.Unlock()
	}
}

// closeAll closes all images, and returns when nothing is left of them. Nobody uses
// them any more.
func (s *shelf) closeAll() {
	s.stop()
	s.busy.Wait()
	s.mu.Lock()
	for b := range s.opened {
		s.close(b)
	}
	s.mu.Unlock()
	s.busy.Wait()
}

// count adds what an image has counted to a sum.
func count(sum *volume.Stats, s volume.Stats) {
	sum.DemandFetches += s.DemandFetches
	sum.FetchedBytes += s.FetchedBytes
	sum.DemandWait += s.DemandWait
	sum.DemandWaits += s.DemandWaits
	sum.DemandWaitSum += s.DemandWaitSum
	for i, n := range s.DemandLatency {
		sum.DemandLatency[i] += n
	}
}

// An imageStatus is an image that is open.
type imageStatus struct {
	id    manifest.SnapshotID
	users int
	stats volume.Stats
}

// status returns the images that are open, by id, and what all ever opened have
// counted.
func (s *shelf) status() (open []imageStatus, total volume.Stats) {
	s.mu.Lock()
	defer s.mu.Unlock()
	total = s.past
	for b := range s.opened {
		i := imageStatus{b.id, b.users, (*b.device.Load()).Stats()}
		open = append(open, i)
		count(&total, i.stats)
	}
	slices.SortFunc(open, func(a, b imageStatus) int { return strings.Compare(a.id.String(), b.id.String()) })
	return open, total
}
