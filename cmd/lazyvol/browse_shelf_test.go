package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// A fakeLibrary opens images, each of which takes its time to open and to close.
type fakeLibrary struct {
	t     *testing.T
	fails atomic.Pointer[error]

	mu     sync.Mutex // guards the fields below
	opens  map[manifest.SnapshotID]int
	open   int // now
	peak   int
	pinned int
}

const fakeDelay = 50 * time.Millisecond

func (l *fakeLibrary) fetch(ctx context.Context, id manifest.SnapshotID, _ int) (openedImage, error) {
	l.mu.Lock()
	l.opens[id]++
	l.open++
	l.peak = max(l.peak, l.open)
	l.mu.Unlock()
	err := error(nil)
	select {
	case <-time.After(fakeDelay):
		if p := l.fails.Load(); p != nil {
			err = *p
		}
	case <-ctx.Done():
		err = ctx.Err()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.open--
		return nil, err
	}
	l.pinned++
	return &fakeImage{library: l}, nil
}

type fakeImage struct {
	library *fakeLibrary
	closed  atomic.Bool
}

func (i *fakeImage) ReadAt(_ context.Context, p []byte, _ int64) (int, error) {
	if i.closed.Load() {
		i.library.t.Error("an image was read after it was closed")
	}
	return len(p), nil
}

func (i *fakeImage) NextData(context.Context, int64) (int64, error) { return 0, io.EOF }
func (i *fakeImage) NextHole(context.Context, int64) (int64, error) { return 0, nil }
func (i *fakeImage) Stats() volume.Stats                            { return volume.Stats{FetchedBytes: 10} }

func (i *fakeImage) Close() error {
	time.Sleep(fakeDelay)
	if i.closed.Swap(true) {
		i.library.t.Error("an image was closed twice")
	}
	i.library.mu.Lock()
	defer i.library.mu.Unlock()
	i.library.open--
	return nil
}

func (i *fakeImage) Unpin(context.Context) error {
	i.library.mu.Lock()
	defer i.library.mu.Unlock()
	i.library.pinned--
	return nil
}

// count returns how often an image was opened, and how many are open.
func (l *fakeLibrary) count(b *browsed) (opens, open int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.opens[b.id], l.open
}

// onShelf calls test with a shelf of n images, in a world where time passes when all
// wait; in the end nothing may be left.
func onShelf(t *testing.T, n, most int, test func(t *testing.T, s *shelf, images []*browsed, l *fakeLibrary)) {
	synctest.Test(t, func(t *testing.T) {
		l := &fakeLibrary{t: t, opens: make(map[manifest.SnapshotID]int)}
		s := newShelf(t.Context())
		s.open, s.most, s.patience, s.log = l.fetch, most, time.Minute, slog.New(slog.DiscardHandler)
		s.gone = func() {}
		images := make([]*browsed, n)
		for i := range images {
			images[i] = s.image(snapshot.Description{ID: manifest.SnapshotID{Lineage: 1, Serial: uint64(i + 1)}, Geometry: manifest.Geometry{Size: 1 << 20, BlockSize: 1 << 19}})
		}
		s.know(images)
		test(t, s, images, l)
		s.closeAll()
		if l.open != 0 || l.pinned != 0 || s.taken != 0 {
			t.Errorf("%d images are open, %d pinned, and %d places taken in the end", l.open, l.pinned, s.taken)
		}
		if l.peak > most {
			t.Errorf("%d images were open at once, %d may be", l.peak, most)
		}
	})
}

func mustOpen(t *testing.T, b *browsed) {
	t.Helper()
	if err := b.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestImageIsOpenedOnceForAllAndClosedAfterAWhile(t *testing.T) {
	onShelf(t, 2, 4, func(t *testing.T, s *shelf, images []*browsed, l *fakeLibrary) {
		b := images[0]
		var readers sync.WaitGroup
		for range 10 {
			readers.Go(func() {
				mustOpen(t, b)
				if _, err := b.ReadAt(t.Context(), make([]byte, 10), 0); err != nil {
					t.Error(err)
				}
				b.Close()
			})
		}
		readers.Wait()
		time.Sleep(openGrace - time.Second)
		mustOpen(t, b) // again, in time
		time.Sleep(2 * openGrace)
		if opens, open := l.count(b); opens != 1 || open != 1 {
			t.Errorf("it was opened %d times, and %d are open", opens, open)
		}
		b.Close()
		time.Sleep(openGrace + shelfTick + fakeDelay)
		synctest.Wait()
		if _, open := l.count(b); open != 0 {
			t.Error("it is still open")
		}
		mustOpen(t, b)
		b.Close()
		if opens, _ := l.count(b); opens != 2 {
			t.Errorf("it was opened %d times", opens)
		}
		if _, total := s.status(); total.FetchedBytes != 20 {
			t.Errorf("%d bytes fetched in all, want 10 for each opening", total.FetchedBytes)
		}
	})
}

func TestFailureToOpenIsToldToAllWhoWaitAndTriedAgain(t *testing.T) {
	onShelf(t, 1, 1, func(t *testing.T, s *shelf, images []*browsed, l *fakeLibrary) {
		b := images[0]
		failure := fs.ErrGone
		l.fails.Store(&failure)
		told := 0
		s.gone = func() { told++ }
		var readers sync.WaitGroup
		for range 5 {
			readers.Go(func() {
				if err := b.Open(t.Context()); !errors.Is(err, failure) {
					t.Errorf("the error is %v", err)
				}
			})
		}
		readers.Wait()
		if opens, _ := l.count(b); opens != 1 || told != 1 {
			t.Errorf("it was opened %d times, and the tree told %d times", opens, told)
		}
		l.fails.Store(nil)
		mustOpen(t, b)
		b.Close()
	})
}

func TestWhoGivesUpOpeningTakesNothingFromOthers(t *testing.T) {
	onShelf(t, 1, 1, func(t *testing.T, s *shelf, images []*browsed, l *fakeLibrary) {
		b := images[0]
		ctx, cancel := context.WithTimeout(t.Context(), fakeDelay/2)
		defer cancel()
		var other sync.WaitGroup
		other.Go(func() { mustOpen(t, b) })
		if err := b.Open(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the error is %v", err)
		}
		other.Wait()
		b.Close()
	})
}

func TestLeastRecentlyUsedImageMakesRoomAndUsedOnesDoNot(t *testing.T) {
	onShelf(t, 4, 2, func(t *testing.T, s *shelf, images []*browsed, l *fakeLibrary) {
		mustOpen(t, images[0])
		mustOpen(t, images[1])
		if err := images[2].Open(t.Context()); !errors.Is(err, fs.ErrTooMany) {
			t.Errorf("a third one: %v", err)
		}
		images[1].Close()
		time.Sleep(time.Millisecond)
		images[0].Close()
		mustOpen(t, images[2]) // for images[1]
		mustOpen(t, images[0]) // which is still open
		if opens, _ := l.count(images[0]); opens != 1 {
			t.Errorf("the one that was used last was opened %d times", opens)
		}
		if err := images[3].Open(t.Context()); !errors.Is(err, fs.ErrTooMany) {
			t.Errorf("with two in use again: %v", err)
		}
		images[0].Close()
		images[2].Close()
	})
}

func TestOpeningWaitsForTheRoomThatIsBeingMade(t *testing.T) {
	onShelf(t, 2, 1, func(t *testing.T, s *shelf, images []*browsed, _ *fakeLibrary) {
		mustOpen(t, images[0])
		images[0].Close()
		for closing := 0; closing == 0; time.Sleep(fakeDelay / 10) {
			s.mu.Lock()
			closing = s.closing
			s.mu.Unlock()
		}
		mustOpen(t, images[1])
		images[1].Close()
	})
}

// One that was forgotten by the tree, while somebody reads it, is the same when it is
// listed again.
func TestImageInUseOutlivesItsListing(t *testing.T) {
	onShelf(t, 1, 2, func(t *testing.T, s *shelf, images []*browsed, l *fakeLibrary) {
		b := images[0]
		mustOpen(t, b)
		s.know(nil)
		if again := s.image(snapshot.Description{ID: b.id}); again != b {
			t.Error("it is another one")
		}
		b.Close()
		time.Sleep(2 * openGrace)
		s.know(nil)
		if again := s.image(snapshot.Description{ID: b.id}); again == b {
			t.Error("it is kept though nobody uses it")
		}
	})
}

// Whoever opens, reads and closes what, however many at once: none reads what is closed,
// and no more are open than may be.
func TestShelfKeepsItsBoundsUnderAnyUse(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	onShelf(t, 6, 3, func(t *testing.T, s *shelf, images []*browsed, _ *fakeLibrary) {
		var users sync.WaitGroup
		for user := range 8 {
			users.Go(func() {
				r := rand.New(rand.NewPCG(seed, uint64(user)))
				for range 300 {
					b := images[r.IntN(len(images))]
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(r.IntN(200))*time.Millisecond)
					err := b.Open(ctx)
					cancel()
					if err == nil {
						time.Sleep(time.Duration(r.IntN(100)) * time.Millisecond)
						_, err = b.ReadAt(t.Context(), make([]byte, 1), 0)
						b.Close()
					}
					if err != nil && !errors.Is(err, fs.ErrTooMany) && !errors.Is(err, context.DeadlineExceeded) {
						t.Error(err)
					}
					time.Sleep(time.Duration(r.IntN(int(openGrace))) / 10)
				}
			})
		}
		users.Wait()
		time.Sleep(openGrace + 2*shelfTick)
		synctest.Wait()
		if len(s.opened) != 0 || s.taken != 0 {
			t.Errorf("%d are open, and %d places taken, though nobody uses any", len(s.opened), s.taken)
		}
	})
}

// A counter that goes back looks to Prometheus like one that began anew.
func TestWhatWasFetchedNeverBecomesLess(t *testing.T) {
	onShelf(t, 1, 1, func(t *testing.T, s *shelf, images []*browsed, l *fakeLibrary) {
		if err := images[0].Open(t.Context()); err != nil {
			t.Fatal(err)
		}
		images[0].Close()
		for _, open := l.count(images[0]); open > 0; _, open = l.count(images[0]) {
			time.Sleep(fakeDelay / 10)
			if _, total := s.status(); total.FetchedBytes != 10 {
				t.Fatalf("fetched were %d bytes, of 10", total.FetchedBytes)
			}
		}
	})
}
