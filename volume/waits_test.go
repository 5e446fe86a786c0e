package volume

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
)

// slowStore makes a store's requests for data take so long, on the clock of a
// synctest bubble.
func (w *world) slowStore(takes time.Duration) {
	w.store.Inject(packReads(), blockstoretest.Fault{Before: func(ctx context.Context, _ blockstoretest.Call) {
		select {
		case <-time.After(takes):
		case <-ctx.Done():
		}
	}})
}

func wantWaits(t *testing.T, what string, d *Device, union, sum time.Duration, count int64) {
	t.Helper()
	if s := d.Stats(); s.DemandWait != union || s.DemandWaitSum != sum || s.DemandWaits != count {
		t.Errorf("%s: waited %s (%s in all), %d times; want %s (%s), %d", what, s.DemandWait, s.DemandWaitSum, s.DemandWaits, union, sum, count)
	}
}

// TestWaitsForTheStoreAreTimed by the clock for all that wait at once, and each by
// itself; reads of what is here are none.
func TestWaitsForTheStoreAreTimed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		defer w.end()
		const blocks = 4
		v, data := newRestored(w, blocks)
		wantWaits(t, "new", v.Device, 0, 0, 0)
		w.slowStore(5 * time.Second)

		// Two wait for one block, the second from the third second on, and a third reader
		// for another block: from second 0 to 9 there is one at least.
		first := w.readInBackground(w.ctx, v.Device, pageSize, 0)
		time.Sleep(3 * time.Second)
		second := w.readInBackground(w.ctx, v.Device, pageSize, 8*pageSize)
		time.Sleep(time.Second)
		third := w.readInBackground(w.ctx, v.Device, pageSize, 2*blockSize)
		synctest.Wait()
		wantWaits(t, "while all wait", v.Device, 4*time.Second, 0, 0)
		w.wantRead(<-first, data[:pageSize])
		w.wantRead(<-second, data[8*pageSize:][:pageSize])
		synctest.Wait()
		wantWaits(t, "while one waits", v.Device, 5*time.Second, 7*time.Second, 2)
		w.wantRead(<-third, data[2*blockSize:][:pageSize])
		synctest.Wait()
		wantWaits(t, "all have read", v.Device, 9*time.Second, 12*time.Second, 3)

		time.Sleep(time.Hour)
		w.wantRead(<-w.readInBackground(w.ctx, v.Device, pageSize, 0), data[:pageSize])
		w.write(v, noise(pageSize, 2), blockSize) // whole pages need nothing
		wantWaits(t, "what is here", v.Device, 9*time.Second, 12*time.Second, 3)
		w.write(v, noise(100, 3), blockSize+pageSize) // and parts the rest of theirs
		wantWaits(t, "a part of a page", v.Device, 14*time.Second, 17*time.Second, 4)
		if p50, p99 := v.Stats().DemandLatency.Quantile(0.5), v.Stats().DemandLatency.Quantile(0.99); p50 <= 2*time.Second || p99 > 5*time.Second {
			t.Errorf("p50 %s, p99 %s of waits of 2 and 5 seconds", p50, p99)
		}
		w.must(v.Close())
	})
}

// TestWaitsThatFailAreTimed too, and those given up.
func TestWaitsThatFailAreTimed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		defer w.end()
		v, _ := newRestored(w, 2)
		w.slowStore(time.Hour)
		ctx, cancel := context.WithTimeout(w.ctx, 2*time.Second)
		defer cancel()
		if r := <-w.readInBackground(ctx, v.Device, 1, 0); r.err == nil {
			t.Error("a read of a store that does not answer succeeded")
		}
		synctest.Wait()
		wantWaits(t, "given up", v.Device, 2*time.Second, 2*time.Second, 1)
		w.store.Heal()
		w.store.Inject(packReads(), blockstoretest.Fault{Err: manifest.ErrCorrupt, Before: func(context.Context, blockstoretest.Call) { time.Sleep(time.Second) }})
		if r := <-w.readInBackground(w.ctx, v.Device, 1, blockSize); r.err == nil {
			t.Error("a read of a corrupt block succeeded")
		}
		synctest.Wait()
		wantWaits(t, "failed", v.Device, 3*time.Second, 3*time.Second, 2)
		w.must(v.Close())
	})
}

// TestLeafOfTheIndexIsWaitedFor once, together with the block that it leads to, and not
// if this host has it, in memory or not.
func TestLeafOfTheIndexIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1)
		defer func() { w.end() }()
		source := w.openNew(nil, 8*blockSize)
		w.write(source, noise(pageSize, 1), 0)
		id := w.snapshot(source)
		w.must(source.Close())
		w.must(w.host.Delete(w.ctx, source.record.ID))
		w.kill() // the leaf was in memory
		read := func(v *Volume, off int64) {
			t.Helper()
			if r := <-w.readInBackground(w.ctx, v.Device, 1, off); r.err != nil {
				t.Error(r.err)
			}
			synctest.Wait()
		}
		v, other := w.openNew(&id, 0), w.create(&id, 0)
		w.store.Inject(blockstoretest.Rule{Op: blockstoretest.OpReadRange}, blockstoretest.Fault{Before: func(context.Context, blockstoretest.Call) { time.Sleep(time.Second) }})
		read(v, 0)
		wantWaits(t, "a block, and a leaf before it", v.Device, 2*time.Second, 2*time.Second, 1)
		time.Sleep(time.Hour)
		read(v, 5*blockSize)
		wantWaits(t, "a known hole", v.Device, 2*time.Second, 2*time.Second, 1)

		w.kill()
		v = w.open(other)
		read(v, 5*blockSize)
		wantWaits(t, "a hole of a leaf in the local index", v.Device, 0, 0, 0)
		w.must(v.Close())
	})
}

func TestQuantilesOfWaits(t *testing.T) {
	var l DemandLatencies
	if q := l.Quantile(0.99); q != 0 {
		t.Errorf("nobody waited, and p99 is %s", q)
	}
	if bounds := DemandBounds(); len(bounds) != len(l)-1 || !slices.IsSorted(bounds) {
		t.Errorf("bounds %v of %d buckets", bounds, len(l))
	}
	l[4], l[6] = 98, 2 // 10 to 20 ms, 50 to 100 ms
	for q, want := range map[float64]time.Duration{
		0: 10 * time.Millisecond, 0.49: 15 * time.Millisecond, 0.98: 20 * time.Millisecond, 0.99: 75 * time.Millisecond, 1: 100 * time.Millisecond,
	} {
		if got := l.Quantile(q); got != want {
			t.Errorf("quantile %g is %s, want %s", q, got, want)
		}
	}
	l[len(l)-1] = 100
	if got := l.Quantile(1); got != time.Minute {
		t.Errorf("the longest wait is %s, want the last bound", got)
	}
}
