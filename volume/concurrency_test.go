package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A scribe writes numbers, one after the other, into places of its own, each in
// one page: number n to place n modulo the number of places. Whoever sees number
// n must see all numbers before.
type scribe struct {
	base   int64 // offset of the first place
	stride int64
	places int
	length int // of what is written: whole pages, or a part of one
}

func (s scribe) write(w *world, v *Volume, n uint64) error {
	p := make([]byte, s.length)
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], n)
	}
	_, err := v.WriteAt(w.ctx, p, s.base+int64(n%uint64(s.places))*s.stride)
	return err
}

// check returns the last number of an image, and an error unless all before
// are in it.
func (s scribe) check(image []byte) (uint64, error) {
	last := uint64(0)
	found := make([]uint64, s.places)
	for i := range found {
		place := image[s.base+int64(i)*s.stride:][:s.length]
		found[i] = binary.LittleEndian.Uint64(place)
		for j := 0; j+8 <= len(place); j += 8 {
			if binary.LittleEndian.Uint64(place[j:]) != found[i] {
				return 0, fmt.Errorf("place %d of the scribe at %d is torn", i, s.base)
			}
		}
		last = max(last, found[i])
	}
	for i, n := range found {
		want := last - (last-uint64(i))%uint64(s.places)
		if last < uint64(i) {
			want = 0
		}
		if n != want {
			return 0, fmt.Errorf("the scribe at %d wrote %d, and place %d has %d, want %d", s.base, last, i, n, want)
		}
	}
	return last, nil
}

// TestSnapshotsHoldAPrefixOfTheWrites makes snapshots while writers write and
// readers read, a hydrator hydrates, and blocks are evicted.
func TestSnapshotsHoldAPrefixOfTheWrites(t *testing.T) {
	w := newRealWorld(t)
	const blocks = 16
	v, _ := newRestored(w, blocks)
	w.must(v.Zero(w.ctx, 0, blocks*blockSize)) // scribes begin with zeros
	scribes := []scribe{
		{base: 0, stride: pageSize, places: 40, length: pageSize},
		{base: 4 * blockSize, stride: 3 * pageSize / 2, places: 40, length: pageSize / 2},
		{base: 8 * blockSize, stride: 2 * pageSize, places: 30, length: pageSize},
		{base: 14 * blockSize, stride: 512, places: 128, length: 512},
	}
	v0 := w.snapshot(v)
	ctx, stop := context.WithCancel(w.ctx)
	var running sync.WaitGroup
	var slowest atomic.Int64
	for _, s := range scribes {
		running.Go(func() {
			for n := uint64(1); ctx.Err() == nil; n++ {
				begin := time.Now()
				if err := s.write(w, v, n); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				for took := int64(time.Since(begin)); ; {
					if max := slowest.Load(); took <= max || slowest.CompareAndSwap(max, took) {
						break
					}
				}
				if n%64 == 0 {
					time.Sleep(time.Millisecond)
				}
			}
		})
		running.Go(func() { // what was read once is not undone
			last := uint64(0)
			for p := make([]byte, 8); ctx.Err() == nil; time.Sleep(100 * time.Microsecond) {
				if _, err := v.ReadAt(w.ctx, p, s.base); err != nil {
					t.Errorf("read: %v", err)
					return
				}
				n := binary.LittleEndian.Uint64(p)
				if n < last {
					t.Errorf("read %d after %d", n, last)
					return
				}
				last = n
			}
		})
	}
	running.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			if err := w.hydrate(v.Device); err != nil {
				t.Errorf("hydrate: %v", err)
				return
			}
			if err := v.writes.clean.Evict(int64(i % blocks)); err != nil {
				t.Errorf("evict: %v", err)
				return
			}
			v.Stats()
		}
	})
	running.Go(func() {
		for ; ctx.Err() == nil; time.Sleep(time.Millisecond) {
			if err := v.Sync(w.ctx); err != nil {
				t.Errorf("sync: %v", err)
				return
			}
		}
	})
	ids := []manifest.SnapshotID{v0}
	for i := range 12 {
		if i%4 == 3 { // one that fails, and is merged back
			fails := blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "data/", Times: 1}
			w.store.Inject(fails, blockstoretest.Fault{Err: errInjected})
			if _, err := v.Snapshot(w.ctx, SnapshotOptions{}); !errors.Is(err, errInjected) {
				t.Errorf("snapshot with a failing pack: %v", err)
			}
			w.store.Heal()
			continue
		}
		ids = append(ids, w.snapshot(v))
	}
	stop()
	running.Wait()
	t.Logf("the slowest write took %v", time.Duration(slowest.Load()))

	last := make([]uint64, len(scribes))
	check := func(what string, d *Device) {
		image := make([]byte, d.Size())
		if _, err := d.ReadAt(w.ctx, image, 0); err != nil {
			t.Fatal(err)
		}
		for i, s := range scribes {
			n, err := s.check(image)
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
			if n < last[i] {
				t.Errorf("%s: the scribe at %d had written %d before, and now %d", what, s.base, last[i], n)
			}
			last[i] = n
		}
	}
	for _, id := range ids {
		d, closeIt := w.mount(id)
		check(id.String(), d)
		closeIt()
	}
	check("volume", v.Device)
	w.must(v.Close())
}

// TestPartialWritesRacingCommits write parts of pages, each writer its own,
// while roots change.
func TestPartialWritesRacingCommits(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 3)
	ctx, stop := context.WithCancel(w.ctx)
	var running sync.WaitGroup
	const writers = 4
	for i := range writers {
		running.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 0))
			for n := uint64(1); ctx.Err() == nil; n++ {
				// Sector i of any page is this writer's.
				off := int64(rng.IntN(len(data)/pageSize))*pageSize + int64(i)*512
				p := noise(512, n<<8|uint64(i))
				if _, err := v.WriteAt(w.ctx, p, off); err != nil {
					t.Errorf("write: %v", err)
					return
				}
				copy(data[off:], p)
				if n%8 == 0 {
					time.Sleep(200 * time.Microsecond)
				}
			}
		})
	}
	for i := range 15 {
		if i%3 == 2 {
			w.must(v.writes.clean.Evict(int64(i) % 3))
		}
		w.snapshot(v)
	}
	stop()
	running.Wait()
	w.equal(v.Device, data, "volume")
	w.equalSnapshot(w.snapshot(v), data, "its snapshot")
	w.must(v.Close())
}

// TestProcessesShareABase: whatever either fetches the other has.
func TestProcessesShareABase(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 6)
	leaves, err := cache.NewLeaves(1 << 20)
	w.must(err)
	defer leaves.Close()
	other := *w.host
	other.Leaves, other.Store = leaves, storeIn(w.store)
	img, err := other.Store.Open(w.ctx, *v.Record().Root, snapshot.Holder{ID: "mnt-1"})
	w.must(err)
	d, err := other.OpenSnapshot(w.ctx, img)
	w.must(err)

	w.store.Reset()
	var running sync.WaitGroup
	running.Go(func() {
		if err := w.hydrate(d); err != nil {
			t.Errorf("hydrate: %v", err)
		}
	})
	for block := range 6 {
		running.Go(func() {
			p := make([]byte, blockSize)
			if _, err := v.ReadAt(w.ctx, p, int64(block)*blockSize); err != nil {
				t.Errorf("read: %v", err)
			} else if i := firstDifference(p[200:], data[block*blockSize:][200:blockSize]); i >= 0 {
				t.Errorf("block %d is wrong at %d", block, i)
			}
		})
	}
	w.write(v, noise(100, 2), 10)
	running.Wait()
	w.store.Reset()
	w.equal(d, data, "the mount")
	copy(data[10:], noise(100, 2))
	w.equal(v.Device, data, "the volume")
	if n := w.packGets(); n != 0 {
		t.Errorf("%d requests for a base that is complete", n)
	}
	for _, d := range []*Device{d, v.Device} {
		if stats := d.Stats(); stats.HydratedBytes != stats.TotalBytes || stats.TotalBytes != 6*blockSize {
			t.Errorf("%d of %d bytes hydrated", stats.HydratedBytes, stats.TotalBytes)
		}
	}
	lock, err := d.LockHydrator()
	w.must(err)
	if _, err := v.LockHydrator(); err == nil {
		t.Error("two hydrate one base")
	}
	w.must(lock.Close())
	w.must(d.Close())
	w.must(v.Close())
}

// TestCloseWaitsForASnapshot whose maker ends it.
func TestCloseWaitsForASnapshot(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 1)
	w.overwrite(v, data, blockSize, 0, 2)
	w.store.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "data/"}, blockstoretest.Fault{Hang: true})
	ctx, giveUp := context.WithCancel(w.ctx)
	begun, failed, closed := make(chan struct{}), make(chan error), make(chan error)
	go func() {
		_, err := v.Snapshot(ctx, SnapshotOptions{Cut: func(*snapshot.Attempt) { close(begun) }})
		failed <- err
	}()
	<-begun
	go func() { closed <- v.Close() }()
	select {
	case err := <-closed:
		t.Fatalf("closed while a snapshot was being made: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	giveUp()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("the snapshot: %v, want context.Canceled", err)
	}
	w.must(<-closed)
	w.store.Heal()
	v = w.open(v.Record().ID)
	w.equal(v.Device, data, "reopened volume")
	if r := v.Record(); len(r.Layers) != 1 || r.Pending != nil {
		t.Errorf("the attempt was not settled: %+v", r)
	}
	w.must(v.Close())
}
