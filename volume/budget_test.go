package volume

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// process returns a world of the same store and host in which another process runs.
// It has the state directory under the same name, or on fsys under another one.
func (w *world) process() *world {
	w.Helper()
	other := *w
	other.start()
	return &other
}

// mountAs is mount for a session of that name.
func (w *world) mountAs(session string, id manifest.SnapshotID) *Device {
	w.Helper()
	img, err := w.host.Store.Open(w.ctx, id, snapshot.Holder{ID: session, Host: "host"})
	w.must(err)
	d, err := w.host.OpenSnapshot(w.ctx, img)
	w.must(err)
	w.lived = append(w.lived, d)
	return d
}

// source returns a snapshot of n blocks, of which this host has nothing, and its
// content.
func (w *world) source(n int, seed uint64) (manifest.SnapshotID, []byte) {
	w.Helper()
	data := noise(n*blockSize, seed)
	v := w.openNew(nil, int64(len(data)))
	w.write(v, data, 0)
	id := w.snapshot(v)
	w.must(v.Close())
	w.must(w.host.Delete(w.ctx, v.record.ID))
	return id, data
}

// read reads blocks, waits until they are kept or not, and compares.
func (w *world) read(d *Device, data []byte, blocks ...int) {
	w.Helper()
	for _, b := range blocks {
		p := make([]byte, blockSize)
		if _, err := d.ReadAt(w.ctx, p, int64(b)*blockSize); err != nil {
			w.Fatalf("read block %d: %v", b, err)
		}
		if !bytes.Equal(p, data[b*blockSize:][:blockSize]) {
			w.Fatalf("block %d has wrong bytes", b)
		}
		w.eventually("the read's requests end", func() bool { return d.DemandInFlight() == 0 })
	}
}

// cached returns the blocks that a layer has.
func (w *world) cached(c *cache.Clean) []int64 {
	w.Helper()
	blocks := []int64{}
	for b, err := range c.Present() {
		w.must(err)
		blocks = append(blocks, b)
	}
	return blocks
}

func (w *world) wantCached(what string, c *cache.Clean, want ...int64) {
	w.Helper()
	if got := w.cached(c); !slices.Equal(got, append([]int64{}, want...)) {
		w.Errorf("%s: blocks %v are cached, want %v", what, got, want)
	}
}

// limitBlocks sets a limit of n blocks, the maps and headers of so many layers
// included.
func (w *world) limitBlocks(n, layers int) { w.setLimit(int64(n)*blockSize + int64(layers)*3*pageSize) }

// used measures the clean bytes of the host.
func (w *world) used() int64 {
	w.Helper()
	n, err := w.host.Budget.cleanBytes()
	w.must(err)
	return n
}

func TestReadsAtTheLimitEvictWhatWasUsedLeastRecently(t *testing.T) {
	for _, blank := range []bool{false, true} { // all in the base, or in the volume's own layer
		t.Run(fmt.Sprintf("own=%t", blank), func(t *testing.T) {
			w := newWorld(t, 1)
			id, data := w.source(64, 1)
			var d *Device
			var layer *cache.Clean
			if blank {
				v := w.openNew(&id, 0)
				w.write(v, noise(len(data), 2), 0)
				data = noise(len(data), 2)
				w.limitBlocks(0, 2)
				w.snapshot(v)
				d, layer = v.Device, v.writes.clean
			} else {
				d = w.mountAs("mnt-1", id)
				layer = d.base.Clean
			}
			w.limitBlocks(16, 2)
			hot := []int{3, 17, 40}
			for b := range 64 {
				w.read(d, data, b)
				w.read(d, data, hot...)
				if n := w.host.Budget.pending; n != 0 {
					t.Fatalf("%d bytes are under way for ever", n)
				}
				if used := w.used(); used > w.limit {
					t.Fatalf("after block %d: %d bytes, the limit is %d", b, used, w.limit)
				}
			}
			w.store.Reset()
			w.read(d, data, hot...)
			if n := w.packGets(); n != 0 {
				t.Errorf("blocks read all the time were evicted by a scan: %d requests", n)
			}
			if n := len(w.cached(layer)); n < 12 {
				t.Errorf("%d blocks are left of 16 that there is room for", n)
			}
			w.abandon()
		})
	}
}

// TestWhatNobodyReadIsEvictedFirst: what came in the background, and nobody
// read, goes before it.
func TestWhatNobodyReadIsEvictedFirst(t *testing.T) {
	w := newWorld(t, 1)
	id, data := w.source(16, 1)
	d := w.mountAs("mnt-1", id)
	w.limitBlocks(8, 1)
	if err := w.hydrate(d); !errors.Is(err, ErrFull) {
		t.Fatalf("hydrate: %v", err)
	}
	w.wantCached("hydrated", d.base.Clean, 0, 1, 2, 3, 4, 5, 6, 7)
	w.read(d, data, 1, 2, 6)
	w.read(d, data, 10, 11, 12, 13)
	for _, b := range []int64{1, 2, 6} {
		if has, err := d.base.Has(b); !has || err != nil {
			t.Errorf("block %d, which was read, is gone: %v", b, err)
		}
	}
	w.abandon()
}

func TestHydrationFillsUpToTheLimitAndGoesOnWhenThereIsRoom(t *testing.T) {
	w := newWorld(t, 1)
	id, data := w.source(40, 1)
	d := w.mountAs("mnt-1", id)
	w.limitBlocks(20, 1)
	if err := w.hydrate(d); !errors.Is(err, ErrFull) {
		t.Fatalf("hydrate: %v", err)
	}
	if n := len(w.cached(d.base.Clean)); n < 19 || n > 20 {
		t.Errorf("%d blocks were hydrated, there was room for 20", n)
	}
	// What a read leaves of the room that it made is not for the hydrator.
	left := 0
	for _, block := range []int{39, 36, 33, 30} {
		w.read(d, data, block)
		if w.host.Budget.roomNow() >= blockSize {
			left++
		}
		before := w.cached(d.base.Clean)
		if err := w.hydrate(d); !errors.Is(err, ErrFull) {
			t.Errorf("hydrate at the limit: %v", err)
		}
		w.wantCached(fmt.Sprintf("hydrated at the limit, after a read of block %d", block), d.base.Clean, before...)
	}
	if left == 0 {
		t.Error("no read left the hydrator anything to be kept from")
	}
	w.setLimit(noLimit)
	w.must(w.hydrate(d))
	if n := len(w.cached(d.base.Clean)); n != 40 {
		t.Errorf("%d blocks are there after there was room", n)
	}
	if s := d.Stats(); s.HydratedBytes != s.TotalBytes {
		t.Errorf("the census counts %d bytes of %d", s.HydratedBytes, s.TotalBytes)
	}
	w.abandon()
}

// TestOnlyABackgroundThatFoundNoRoomIsBarred, and only until there are two steps of
// room. What is too much for a read bars nobody, and no read is barred.
func TestOnlyABackgroundThatFoundNoRoomIsBarred(t *testing.T) {
	w := newWorld(t, 1)
	b := w.host.Budget
	const background, read = false, true
	w.setLimit(10 * blockSize) // of which a step is one block
	admit := func(what string, blocks int64, forRead, fits bool) {
		t.Helper()
		if err := b.admit(blocks*blockSize, forRead); errors.Is(err, ErrFull) == fits || err != nil && fits {
			t.Errorf("%s: %v", what, err)
		}
	}
	admit("up to the limit, but for one block", 9, background, true)
	admit("more than fits, for a read", 2, read, false)
	admit("in the background after that", 1, background, true)
	w.setLimit(11 * blockSize)
	admit("more than fits, in the background", 2, background, false)
	admit("what would fit, in the background", 1, background, false)
	admit("what fits, for a read", 1, read, true)
	w.setLimit(13*blockSize - 1)
	admit("with less than two steps of room", 1, background, false)
	w.setLimit(13 * blockSize)
	admit("with two steps of room", 1, background, true)
	admit("with one step of room, and not barred any more", 1, background, true)
	admit("at the limit", 1, background, false)
	b.done(13 * blockSize)
	w.abandon()
}

// TestBackgroundAddsNothingWhileADiskThatWasFullLacksItsReserve, for what it would
// add a write could lack. Reads go on, and do not bring it back.
func TestBackgroundAddsNothingWhileADiskThatWasFullLacksItsReserve(t *testing.T) {
	w := newWorld(t, 1)
	b := w.host.Budget
	w.setLimit(noLimit)
	w.must(vfs.WriteFileAtomic(w.crash, filepath.Join(w.host.State, "others"), noise(64*blockSize, 1)))
	w.crash.SetCapacity(w.crash.Used() * 20 / 19) // a twentieth is free
	w.must(b.admit(blockSize, false))
	b.reclaim(b.rounds.Load(), 1, shared) // as a write does that finds the disk full
	for range 2 {
		if err := b.admit(blockSize, false); !errors.Is(err, ErrFull) {
			t.Errorf("in the background on a disk that was full: %v", err)
		}
		w.must(b.admit(blockSize, true))
		w.setLimit(noLimit) // measured anew
	}
	w.crash.SetCapacity(w.crash.Used() * 2)
	w.setLimit(noLimit)
	w.must(b.admit(blockSize, true)) // finds the reserve free
	w.must(b.admit(blockSize, false))
	b.done(5 * blockSize)
	w.abandon()
}

// idleBases leaves bases of n blocks each that nobody has open, opened in the given
// order, and returns their folders in it.
func (w *world) idleBases(n int, order ...uint64) []string {
	w.Helper()
	var dirs []string
	ids := make(map[uint64]manifest.SnapshotID)
	for _, seed := range slices.Sorted(slices.Values(order)) {
		ids[seed], _ = w.source(n, 100+seed)
	}
	for _, seed := range order {
		d := w.mountAs("mnt-idle", ids[seed])
		w.must(w.hydrate(d))
		dirs = append(dirs, d.base.dir)
		w.must(d.Close())
	}
	return dirs
}

func (w *world) exists(dir string) bool {
	w.Helper()
	names, err := w.host.FS.ReadDir(filepath.Dir(dir))
	w.must(err)
	return slices.Contains(names, filepath.Base(dir))
}

func TestUnusedBasesGoFirstThoseOpenedLongestAgoBeforeOthers(t *testing.T) {
	for _, background := range []bool{false, true} {
		t.Run(fmt.Sprintf("background=%t", background), func(t *testing.T) {
			w := newWorld(t, 1)
			idle := w.idleBases(6, 2, 3, 1)
			id, data := w.source(12, 1)
			d := w.mountAs("mnt-1", id)
			w.limitBlocks(20, 4)
			left := [][]string{idle, idle[1:], idle[2:], nil}
			for b := range 12 {
				if background {
					w.must(d.Warm(w.ctx, []int64{int64(b)}))
				} else {
					w.read(d, data, b)
				}
				if n := len(w.cached(d.base.Clean)); n != b+1 {
					t.Errorf("%d blocks of the base in use are left of %d", n, b+1)
				}
				var now []string
				for _, dir := range idle {
					if w.exists(dir) {
						now = append(now, dir)
					}
				}
				if !slices.Equal(now, left[0]) {
					if left = left[1:]; len(left) == 0 || !slices.Equal(now, left[0]) {
						t.Fatalf("after block %d: bases left %v of %v", b, now, idle)
					}
				}
				if used := w.used(); used > w.limit {
					t.Fatalf("after block %d: %d bytes, the limit is %d", b, used, w.limit)
				}
			}
			if len(left[0]) != 1 {
				t.Errorf("%v are left, want the one opened last", left[0])
			}
			w.abandon()
		})
	}
}

func TestCleanLayersOfVolumesThatNobodyHasOpenGoNext(t *testing.T) {
	w := newWorld(t, 1)
	idle := w.idleBases(4, 1)
	v, data := newRestored(w, 4)
	w.overwrite(v, data, 3*blockSize, 0, 2)
	w.snapshot(v) // three clean copies
	w.must(v.Close())
	id, content := w.source(8, 5)
	d := w.mountAs("mnt-1", id)
	w.limitBlocks(8, 3)
	w.read(d, content, 0, 1)
	if w.exists(idle[0]) {
		t.Error("the unused base was not evicted first")
	}
	if n, err := cache.CleanAllocated(w.host.FS, cleanDir(v.dir)); n < 3*blockSize || err != nil {
		t.Errorf("%d bytes of the closed volume are left, %v, while an unused base was enough", n, err)
	}
	w.read(d, content, 2, 3, 4, 5, 6, 7)
	if n, err := cache.CleanAllocated(w.host.FS, cleanDir(v.dir)); n != 0 || err != nil {
		t.Errorf("%d bytes of the closed volume are left, %v", n, err)
	}
	if n := len(w.cached(d.base.Clean)); n != 8 {
		t.Errorf("%d blocks in use are left of 8", n)
	}
	w.setLimit(noLimit)
	v = w.open(v.record.ID)
	for block := range int64(3) {
		if !v.writes.diverged.Has(block) {
			t.Errorf("block %d would be looked up in the base again", block)
		}
	}
	w.equal(v.Device, data, "the volume whose clean layer was evicted")
	w.overwrite(v, data, 2*blockSize, blockSize, 3)
	w.equalSnapshot(w.snapshot(v), data, "its next snapshot")
	w.must(v.Close())
	w.abandon()
}

// TestBackgroundNeverEvictsWhatIsInUse, neither by this process nor by another.
func TestBackgroundNeverEvictsWhatIsInUse(t *testing.T) {
	w := newWorld(t, 1)
	other := w.process()
	id, _ := w.source(6, 1)
	theirs, _ := w.source(6, 2)
	o := other.mountAs("mnt-2", theirs)
	w.must(other.hydrate(o))
	v, data := newRestored(w, 4)
	w.overwrite(v, data, 2*blockSize, 0, 2)
	w.snapshot(v)
	d := w.mountAs("mnt-1", id)
	w.must(d.Warm(w.ctx, []int64{0, 1}))
	w.limitBlocks(11, 4)
	if err := d.Warm(w.ctx, []int64{2, 3, 4, 5}); !errors.Is(err, ErrFull) {
		t.Errorf("Warm: %v", err)
	}
	w.wantCached("this mount", d.base.Clean, 0, 1, 2)
	w.wantCached("the other process", o.base.Clean, 0, 1, 2, 3, 4, 5)
	w.wantCached("the open volume", v.writes.clean, 0, 1)
	w.must(v.Close())
	w.abandon()
	other.abandon()
}

// TestReadsOfOneProcessLeaveTheLayersOfOthersAlone: it gets no room, and its reads go
// on without.
func TestReadsOfOneProcessLeaveTheLayersOfOthersAlone(t *testing.T) {
	w := newWorld(t, 1)
	other := w.process()
	id, data := w.source(6, 1)
	theirs, _ := w.source(6, 2)
	o := other.mountAs("mnt-2", theirs)
	w.must(other.hydrate(o))
	d := w.mountAs("mnt-1", id)
	w.limitBlocks(6, 2)
	w.read(d, data, 0, 1, 2, 3, 4, 5)
	w.wantCached("the other process", o.base.Clean, 0, 1, 2, 3, 4, 5)
	if used := w.used(); used > w.limit {
		t.Errorf("%d bytes, the limit is %d", used, w.limit)
	}
	w.abandon()
	other.abandon()
}

// TestNativelyUsedBaseIsNotPunched: a loop device that reads its file would show
// zeros.
func TestNativelyUsedBaseIsNotPunched(t *testing.T) {
	w := newWorld(t, 1)
	id, data := w.source(6, 1)
	d := w.mountAs("mnt-1", id)
	w.must(w.hydrate(d))
	native, err := w.host.FS.Lock(filepath.Join(d.base.dir, nativeName), false)
	w.must(err)
	w.setLimit(1)
	v := w.openNew(nil, 4*blockSize)
	w.crash.SetCapacity(w.crash.Used() + 8*pageSize)
	if _, err := v.WriteAt(w.ctx, noise(blockSize, 1), 0); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a write with nothing to evict: %v", err)
	}
	w.wantCached("while it is used natively", d.base.Clean, 0, 1, 2, 3, 4, 5)
	w.must(native.Close())
	w.write(v, noise(blockSize, 1), 0)
	if n := len(w.cached(d.base.Clean)); n == 6 {
		t.Error("nothing was evicted for a write, though nobody used the base natively any more")
	}
	w.equal(d, data, "the mount")
	w.abandon()
}

// TestLostRootsLastCopiesAreKept: what is cached of a snapshot that was deleted is
// nowhere else.
func TestLostRootsLastCopiesAreKept(t *testing.T) {
	w := newRealWorld(t)
	v, data := newLost(w, true)
	if err := v.Settle(w.ctx); !errors.Is(err, snapshot.ErrNotFound) {
		t.Fatalf("Settle: %v, want snapshot.ErrNotFound", err)
	}
	id, other := w.source(4, 7)
	d := w.mountAs("mnt-1", id)
	w.setLimit(1)
	w.read(d, other, 0, 1, 2, 3)
	w.equal(v.Device, data[:3*blockSize], "what is cached or written")
	w.must(d.Close())
	w.must(v.Close())
}

// TestCopiesOfASnapshotInTheMakingAreKept: they are the snapshot's to write.
func TestCopiesOfASnapshotInTheMakingAreKept(t *testing.T) {
	w := newWorld(t, 1)
	v, data := newRestored(w, 6)
	w.overwrite(v, data, 2*blockSize, 0, 2)
	w.snapshot(v)
	w.overwrite(v, data, blockSize, 0, 3) // block 0 is sealed below, block 1 is not
	image := bytes.Clone(data)
	outcome, err := v.Snapshot(w.ctx, SnapshotOptions{Cut: func(*snapshot.Attempt) {
		w.setLimit(1)
		w.read(v.Device, data, 2, 3, 4)
		w.wantCached("while it is made", v.writes.clean, 0)
		w.setLimit(noLimit)
	}})
	w.must(err)
	w.equalSnapshot(outcome.Snapshot, image, "the snapshot")
	w.equal(v.Device, data, "the volume")
	w.abandon()
}

// TestEvictorThatFailsOrStopsLosesNothing, at any of its calls: reads go on with the
// right bytes, in this process and the next, and another try evicts.
func TestEvictorThatFailsOrStopsLosesNothing(t *testing.T) {
	for name, fault := range map[string]error{"fails": syscall.EIO, "stops": nil} {
		for _, power := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,power=%t", name, power), func(t *testing.T) {
				t.Parallel()
				for step := 0; evictWithFault(t, step, fault, power); step += *stride {
					if step > 2000 {
						t.Fatal("it has no end")
					}
				}
			})
		}
	}
}

// evictWithFault evicts all there is to evict, with a fault at the call step, and
// reports whether that happened.
func evictWithFault(t *testing.T, step int, fault error, power bool) bool {
	w := newWorld(t, uint64(step))
	w.idleBases(2, 1, 2)
	closed, closedData := newRestored(w, 3)
	w.overwrite(closed, closedData, blockSize, 0, 2)
	w.snapshot(closed)
	w.must(closed.Close())
	v, data := newRestored(w, 3)
	w.overwrite(v, data, blockSize, 0, 3)
	w.snapshot(v)
	w.equal(v.Device, data, "volume")
	w.equal(v.Device, data, "volume") // so that the first round only takes the marks of use
	w.overwrite(v, data, 1000, 2*blockSize+10, 4)
	w.must(v.Sync(w.ctx))

	if fault == nil {
		w.crash.StopCall(step)
	} else {
		w.crash.FailCall(step, fault)
	}
	w.host.Budget.reclaim(w.host.Budget.rounds.Load(), 1<<40, shared)
	happened := w.crash.Faulted()
	w.crash.ClearFault()
	what := fmt.Sprintf("fault at call %d", step)
	if !w.crash.Stopped() {
		w.equal(v.Device, data, what)
		if s := v.Stats(); s.HydratedBytes > s.TotalBytes {
			t.Errorf("%s: the census counts %d bytes of %d", what, s.HydratedBytes, s.TotalBytes)
		}
	}
	if power {
		w.powerCut()
	} else {
		w.kill()
	}
	v = w.open(v.record.ID)
	w.equal(v.Device, data, what+": reopened")
	closed = w.open(closed.record.ID)
	w.equal(closed.Device, closedData, what+": the closed volume")
	w.must(closed.Close())
	for range 3 { // two rounds over what was just used, and one for what comes free by it
		w.host.Budget.reclaim(w.host.Budget.rounds.Load(), 1<<40, shared)
	}
	for _, l := range v.shared {
		w.wantCached(what+": evicted again", l.Clean)
	}
	if left := w.used(); left > 2*3*pageSize {
		t.Errorf("%s: %d bytes can never be evicted", what, left)
	}
	w.equal(v.Device, data, what+": after all was evicted")
	w.equalSnapshot(w.snapshot(v), data, what+": snapshot")
	w.must(v.Close())
	w.end()
	return happened
}

// TestBaseIsOpenedWhileItIsEvicted: who opens it waits, or gets a new one.
func TestBaseIsOpenedWhileItIsEvicted(t *testing.T) {
	w := newRealWorld(t)
	id, data := w.source(2, 1)
	other := w.process()
	defer other.end()
	stop := make(chan struct{})
	evicted := make(chan struct{})
	go func() {
		defer close(evicted)
		for {
			select {
			case <-stop:
				return
			default:
				other.host.Budget.reclaim(other.host.Budget.rounds.Load(), 1<<40, shared)
			}
		}
	}()
	for range 60 {
		d := w.mountAs("mnt-1", id)
		w.equal(d, data, "mount")
		w.must(d.Close())
	}
	close(stop)
	<-evicted
	if other.host.Budget.rounds.Load() == 0 {
		t.Error("nothing was evicted")
	}
}

// TestLimitHoldsAtEveryMoment of a long run in which two processes read, hydrate,
// write and snapshot: but for a step in each.
func TestLimitHoldsAtEveryMoment(t *testing.T) {
	w := newRealWorld(t)
	id, data := w.source(48, 1)
	other := w.process()
	defer other.end()
	w.limitBlocks(16, 3)
	other.setLimit(w.limit)
	v := w.openNew(&id, 0)
	d := other.mountAs("mnt-2", id)
	most, stop, measured := int64(0), make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			n, err := w.host.Budget.cleanBytes()
			most = max(most, n)
			select {
			case <-stop:
				measured <- err
				return
			default:
			}
			if err != nil {
				measured <- err
				return
			}
		}
	}()
	run := func(w *world, d *Device, want []byte, seed uint64) {
		rng := rand.New(rand.NewPCG(seed, 0))
		for range 300 {
			if rng.IntN(8) == 0 {
				if err := d.Warm(w.ctx, []int64{rng.Int64N(48)}); err != nil && !errors.Is(err, ErrFull) {
					t.Errorf("Warm: %v", err)
				}
				continue
			}
			off := rng.IntN(len(want) - 1)
			p := make([]byte, min(len(want)-off, 1+rng.IntN(2*blockSize)))
			if _, err := d.ReadAt(w.ctx, p, int64(off)); err != nil {
				t.Errorf("read: %v", err)
			} else if i := firstDifference(p, want[off:][:len(p)]); i >= 0 {
				t.Errorf("wrong at %d", off+i)
			}
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		run(other, d, data, 1)
	}()
	mine := bytes.Clone(data)
	for i := range uint64(6) {
		w.overwrite(v, mine, blockSize+3000, int64(i)*5*blockSize+700, 10+i)
		w.snapshot(v)
		run(w, v.Device, mine, 20+i)
	}
	<-done
	close(stop)
	w.must(<-measured)
	// Each process: a step, the blocks under way (a read here touches three, a
	// snapshot one), and what they need of maps and indexes besides.
	if slack := int64(2 * (minStep + 5*blockSize)); most > w.limit+slack || most < w.limit/2 {
		t.Errorf("there were up to %d bytes, the limit is %d and the slack %d", most, w.limit, slack)
	}
	w.must(d.Close())
	w.must(v.Close())
}

// TestDefaultLimitLeavesATenthOfTheDiskFree, also when others than us fill it: then
// reads replace what is cached, and add nothing.
func TestDefaultLimitLeavesATenthOfTheDiskFree(t *testing.T) {
	w := newWorld(t, 1)
	id, data := w.source(64, 1)
	d := w.mountAs("mnt-1", id)
	w.setLimit(0)
	w.crash.SetCapacity(w.crash.Used() + 40*blockSize)
	free := func() (total, free int64) {
		total, free, err := w.host.FS.Space(w.host.State)
		w.must(err)
		return total, free
	}
	if err := w.hydrate(d); !errors.Is(err, ErrFull) {
		t.Errorf("hydrate: %v", err)
	}
	if total, left := free(); left < total/10 || left > total/10+2*blockSize {
		t.Errorf("hydration left %d bytes of %d", left, total)
	}
	for b := range 64 {
		w.read(d, data, b)
		if total, left := free(); left < total/10 {
			t.Fatalf("after block %d only %d bytes of %d are free", b, left, total)
		}
	}
	total, left := free()
	w.crash.SetCapacity(total - left/2) // somebody took space
	before := w.used()
	for b := range 64 {
		w.read(d, data, b)
	}
	if after := w.used(); after > before || after < before/8 {
		t.Errorf("%d bytes were cached before the disk got fuller, %d after", before, after)
	}
	w.abandon()
}

// TestNotedTimesAreNoPromise: eviction works with any of them.
func TestNotedTimesAreNoPromise(t *testing.T) {
	w := newWorld(t, 1)
	bases := w.idleBases(1, 1, 2, 3)
	for i, content := range []string{"", "no time\n"} {
		f, err := w.host.FS.OpenFile(filepath.Join(bases[i+1], openedName), writeCreate, 0)
		w.must(err)
		w.must(f.Truncate(0))
		_, err = f.WriteAt([]byte(content), 0)
		w.must(err)
		w.must(f.Close())
	}
	before := time.Now().UnixNano()
	if at := w.host.Budget.opened(bases[0]); at <= 0 || at > before {
		t.Errorf("opened at %d, it is %d", at, before)
	}
	w.host.Budget.reclaim(0, 2*blockSize, idle)
	if !w.exists(bases[0]) || w.exists(bases[1]) || w.exists(bases[2]) {
		t.Error("those without a time did not go first")
	}
	w.abandon()
}

// A removalFS notes what is removed.
type removalFS struct {
	vfs.FS
	removed []string
}

func (r *removalFS) Remove(name string) error {
	r.removed = append(r.removed, filepath.Base(name))
	return r.FS.Remove(name)
}

func (r *removalFS) RemoveAll(name string) error {
	r.removed = append(r.removed, filepath.Base(name))
	return r.FS.RemoveAll(name)
}

// TestLockFileOfABaseGoesLast: who finds none may make the base anew, and must not
// find its files vanish then.
func TestLockFileOfABaseGoesLast(t *testing.T) {
	w := newWorld(t, 1)
	base := w.idleBases(2, 1)[0]
	recorder := &removalFS{FS: w.host.FS}
	b := NewBudget(recorder, w.host.State, 0, w.host.Log)
	b.reclaim(0, 1, idle)
	n := len(recorder.removed)
	if n < 5 || !slices.Equal(recorder.removed[n-2:], []string{lockName, filepath.Base(base)}) || w.exists(base) {
		t.Errorf("removed %v of the base %s", recorder.removed, base)
	}
	w.abandon()
}
