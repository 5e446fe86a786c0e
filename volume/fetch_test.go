package volume

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
)

// newRestored returns a volume of a snapshot of n blocks, none of which is on
// this host, and its content.
func newRestored(w *world, n int) (*Volume, []byte) {
	w.Helper()
	data := noise(n*blockSize, 1)
	source := w.openNew(nil, int64(len(data)))
	w.write(source, data, 0)
	id := w.snapshot(source)
	w.must(source.Close())
	w.must(w.host.Delete(w.ctx, source.record.ID))
	return w.openNew(&id, 0), data
}

// result is what a read in the background returned.
type result struct {
	p   []byte
	err error
}

func (w *world) readInBackground(ctx context.Context, d *Device, n int, off int64) <-chan result {
	done := make(chan result, 1)
	go func() {
		p := make([]byte, n)
		_, err := d.ReadAt(ctx, p, off)
		done <- result{p, err}
	}()
	return done
}

func (w *world) wantRead(r result, want []byte) {
	w.Helper()
	if r.err != nil {
		w.Fatalf("read: %v", r.err)
	}
	if i := firstDifference(r.p, want); i >= 0 {
		w.Fatalf("read: wrong at %d", i)
	}
}

func TestReadersOfOneBlockShareOneRequest(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 2)
	w.store.Reset()
	waiting, letGo := w.hold()
	impatient, giveUp := context.WithCancel(w.ctx)
	first := w.readInBackground(impatient, v.Device, pageSize, 0)
	w.eventually("the first reader's request", func() bool { return waiting.Load() == 1 })
	var others []<-chan result
	for i := range 10 {
		others = append(others, w.readInBackground(w.ctx, v.Device, pageSize, int64(i*pageSize)))
	}
	giveUp()
	if r := <-first; !errors.Is(r.err, context.Canceled) || errors.Is(r.err, syscall.EIO) {
		t.Errorf("the reader that gave up got %v, want context.Canceled and no errno", r.err)
	}
	letGo()
	for i, other := range others {
		w.wantRead(<-other, data[i*pageSize:][:pageSize])
	}
	if n := w.packGets(); n != 1 {
		t.Errorf("%d requests for one block", n)
	}
	if stats := v.Stats(); len(stats.Errors) > 0 || stats.DemandFetches != 1 {
		t.Errorf("stats %+v", stats)
	}
	w.must(v.Close())
}

// TestBlockThatLandedIsNotFetchedAgain by a reader that had looked into the
// cache before.
func TestBlockThatLandedIsNotFetchedAgain(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 1)
	w.equal(v.Device, data, "volume")
	w.eventually("the block is cached", func() bool { return v.Stats().HydratedBytes == blockSize })
	w.store.Reset()
	now := v.view.acquire()
	defer now.release()
	p := make([]byte, 100)
	w.must(v.readMissing(w.ctx, now, []piece{{block: 0, p: p, within: 50}}))
	w.wantRead(result{p: p}, data[50:150])
	if n := w.packGets(); n != 0 {
		t.Errorf("%d requests for a block that is there", n)
	}
	w.must(v.Close())
}

// TestHolesAreReadWithTheStoreDown also after a snapshot, which writes a leaf
// that nobody has read yet.
func TestHolesAreReadWithTheStoreDown(t *testing.T) {
	w := newWorld(t, 1)
	defer func() { w.end() }()
	v := w.openNew(nil, 8*blockSize)
	w.write(v, noise(pageSize, 1), 0)
	w.snapshot(v)
	leaf, ok := v.view.view.nextLeaf(0)
	if !ok {
		t.Fatal("the snapshot has no leaf")
	}
	w.eventually("the leaf is on this host", func() bool { _, ok := v.localLeaf(leaf); return ok })
	w.kill()
	v = w.open(v.record.ID)
	w.store.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
	w.equal(v.Device, append(noise(pageSize, 1), make([]byte, 8*blockSize-pageSize)...), "volume")
	w.must(v.Close())
}

func TestNeighbouringBlocksComeInOneRequest(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 8)
	w.store.Reset()
	w.equal(v.Device, data, "cold volume")
	if n := w.packGets(); n != 1 {
		t.Errorf("%d requests for a run of blocks", n)
	}
	w.store.Reset()
	w.equal(v.Device, data, "warm volume")
	if n := len(w.store.Calls()); n != 0 {
		t.Errorf("%d requests for what is cached", n)
	}
	w.must(v.Close())
}

// TestScatteredPagesOfABlockComeInOneRequest also when the block cannot be
// cached, and every other page of it was written.
func TestScatteredPagesOfABlockComeInOneRequest(t *testing.T) {
	w := newWorld(t, 1)
	defer func() { w.end() }()
	v, data := newRestored(w, 1)
	for page := 0; page < blockSize/pageSize; page += 2 {
		w.overwrite(v, data, pageSize, int64(page*pageSize), 2)
	}
	w.store.Reset()
	w.equal(v.Device, data, "volume")
	if n := w.packGets(); n != 1 {
		t.Errorf("%d requests for one block", n)
	}
	w.must(v.Close())
}

func TestStoreDown(t *testing.T) {
	for name, fault := range map[string]blockstoretest.Fault{
		"hangs":   {Hang: true},
		"refuses": {Err: blockstore.ErrUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			w := newRealWorld(t)
			w.host.ReadDeadline = 50 * time.Millisecond
			v, data := newRestored(w, 3)
			if _, err := v.ReadAt(w.ctx, make([]byte, blockSize), 0); err != nil {
				t.Fatal(err)
			}
			w.store.Inject(blockstoretest.Rule{}, fault)

			begin := time.Now()
			_, err := v.ReadAt(w.ctx, make([]byte, 10), blockSize)
			if !errors.Is(err, syscall.EIO) || time.Since(begin) > 10*time.Second {
				t.Errorf("a cold read fails after %v with %v, want EIO", time.Since(begin), err)
			}
			if stats := v.Stats(); len(stats.Errors) != 1 {
				t.Errorf("the status has the errors %v", stats.Errors)
			}
			if _, err := v.WriteAt(w.ctx, make([]byte, 10), blockSize); !errors.Is(err, syscall.EIO) {
				t.Errorf("writing a part of a cold page: %v, want EIO", err)
			}
			brief, cancel := context.WithTimeout(w.ctx, 50*time.Millisecond)
			if err := v.Warm(brief, []int64{1}); err == nil {
				t.Error("hydration works without a store")
			}
			cancel()
			w.store.Reset()
			got := make([]byte, blockSize)
			if _, err := v.ReadAt(w.ctx, got, 0); err != nil || !bytes.Equal(got, data[:blockSize]) {
				t.Errorf("a cached read: %v", err)
			}
			w.overwrite(v, data, 2*pageSize, blockSize+pageSize, 3)
			w.must(v.Zero(w.ctx, 2*blockSize, blockSize))
			clear(data[2*blockSize:])
			w.must(v.Sync(w.ctx))
			if n := len(w.store.Calls()); n != 0 {
				t.Errorf("%d requests for what needs none", n)
			}

			w.wantHealed(v, data)
		})
	}
}

// wantHealed heals the store, and closes a volume that is whole then and tells of no
// error any more.
func (w *world) wantHealed(v *Volume, data []byte) {
	w.Helper()
	w.store.Heal()
	w.equal(v.Device, data, "healed")
	if stats := v.Stats(); len(stats.Errors) != 0 {
		w.Errorf("healed, the status tells %v", stats.Errors)
	}
	w.must(v.Close())
}

// A reader with less patience than the device has is told the same, with the block.
func TestImpatientReadersAreToldWhatDidNotCome(t *testing.T) {
	w := newRealWorld(t)
	v, _ := newRestored(w, 3)
	if _, err := v.ReadAt(w.ctx, make([]byte, 1), 0); err != nil { // with the leaf
		t.Fatal(err)
	}
	w.store.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Hang: true})
	ctx, cancel := context.WithTimeout(w.ctx, 50*time.Millisecond)
	defer cancel()
	_, err := v.ReadAt(ctx, make([]byte, 1), 2*blockSize)
	if !errors.Is(err, syscall.EIO) || !errors.Is(err, errDeadline) {
		t.Errorf("the read fails with %v", err)
	}
	if stats := v.Stats(); len(stats.Errors) != 1 || !strings.Contains(stats.Errors[0].Message, "block 2") || !strings.Contains(stats.Errors[0].Message, errDeadline.Error()) {
		t.Errorf("the status tells %v", stats.Errors)
	}
	w.store.Heal()
	w.must(v.Close())
}

// TestLateReaderHasItsWholeDeadline: a request that others began earlier ends
// with their deadline, and not with this reader's.
func TestLateReaderHasItsWholeDeadline(t *testing.T) {
	w := newRealWorld(t)
	w.host.ReadDeadline = 400 * time.Millisecond
	v, data := newRestored(w, 1)
	stuck := packReads()
	stuck.Times = 1
	w.store.Inject(stuck, blockstoretest.Fault{Hang: true})
	early := w.readInBackground(w.ctx, v.Device, pageSize, 0)
	w.eventually("the request of the first", func() bool { return v.DemandInFlight() == 1 })
	time.Sleep(w.host.ReadDeadline / 4)
	late := w.readInBackground(w.ctx, v.Device, pageSize, 0)
	w.wantRead(<-late, data[:pageSize])
	if r := <-early; r.err != nil && !errors.Is(r.err, syscall.EIO) { // nil if its timer was late
		t.Errorf("the first reader got %v, want EIO", r.err)
	}
	w.must(v.Close())
}

func TestCorruptPackIsAnErrorAndNeverCached(t *testing.T) {
	for name, fault := range map[string]blockstoretest.Fault{"flipped": {Flip: true}, "truncated": {Truncate: true}} {
		t.Run(name, func(t *testing.T) {
			w := newRealWorld(t)
			v, data := newRestored(w, 2)
			w.store.Inject(packReads(), fault)
			if _, err := v.ReadAt(w.ctx, make([]byte, blockSize), 0); !errors.Is(err, syscall.EIO) || !errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("read: %v, want EIO for ErrCorrupt", err)
			}
			if err := v.Warm(w.ctx, []int64{0}); !errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("hydrate: %v, want ErrCorrupt", err)
			}
			if has, err := v.base.Has(0); has || err != nil {
				t.Errorf("the corrupt block is cached: %t, %v", has, err)
			}
			if stats := v.Stats(); len(stats.Errors) == 0 {
				t.Error("the status tells nothing of it")
			}
			w.wantHealed(v, data)
		})
	}
}

func TestMissingPackIsAnErrorAndNotZeros(t *testing.T) {
	w := newRealWorld(t)
	v, _ := newRestored(w, 1)
	w.must(w.mem.Delete(w.ctx, manifest.PackKey(*v.Record().Root, 0)))
	if _, err := v.ReadAt(w.ctx, make([]byte, pageSize), 0); !errors.Is(err, syscall.EIO) || !errors.Is(err, blockstore.ErrNotExist) {
		t.Errorf("read: %v, want EIO for ErrNotExist", err)
	}
	w.must(v.Close())
}

func TestReadSurvivesADiskThatCannotCache(t *testing.T) {
	for call := range 40 {
		w := newWorld(t, uint64(call))
		v, data := newRestored(w, 2)
		w.crash.FailCall(call, syscall.EIO)
		w.equal(v.Device, data, "volume on a failing disk")
		if !w.crash.Faulted() {
			w.crash.ClearFault()
			call = 40
		}
		w.equal(v.Device, data, "volume after a failing disk")
		w.must(v.Close())
		w.end()
	}
}

func TestReadBeyondTheEnd(t *testing.T) {
	w := newRealWorld(t)
	v := w.openNew(nil, pageSize+512)
	w.write(v, noise(pageSize+512, 1), 0)
	p := make([]byte, pageSize)
	if n, err := v.ReadAt(w.ctx, p, pageSize); n != 512 || err != io.EOF || !bytes.Equal(p[:512], noise(pageSize+512, 1)[pageSize:]) {
		t.Errorf("across the end: %d, %v", n, err)
	}
	if n, err := v.ReadAt(w.ctx, p, pageSize+512); n != 0 || err != io.EOF {
		t.Errorf("at the end: %d, %v", n, err)
	}
	if n, err := v.ReadAt(w.ctx, p, -1); n != 0 || !errors.Is(err, syscall.EINVAL) {
		t.Errorf("before the start: %d, %v", n, err)
	}
	w.must(v.Close())
}

// TestCloseEndsFetches and does not wait for the store.
func TestCloseEndsFetches(t *testing.T) {
	w := newRealWorld(t)
	v, _ := newRestored(w, 1)
	w.store.Inject(packReads(), blockstoretest.Fault{Hang: true})
	ctx, giveUp := context.WithCancel(w.ctx)
	read := w.readInBackground(ctx, v.Device, pageSize, 0)
	w.eventually("the request", func() bool { return v.DemandInFlight() == 1 })
	giveUp()
	<-read
	w.must(v.Close())
	if _, err := v.Snapshot(w.ctx, SnapshotOptions{}); !errors.Is(err, errClosed) {
		t.Errorf("snapshot of a closed volume: %v", err)
	}
	if err := v.Settle(w.ctx); !errors.Is(err, errClosed) {
		t.Errorf("settling a closed volume: %v", err)
	}
	if err := v.Close(); !errors.Is(err, errClosed) {
		t.Errorf("closing a closed volume: %v", err)
	}
}

// TestBackgroundLeavesToReadersWhatTheyFetch and fetches it after all when they
// could not.
func TestBackgroundLeavesToReadersWhatTheyFetch(t *testing.T) {
	for _, fails := range []error{nil, blockstore.ErrUnavailable} {
		w := newRealWorld(t)
		v, data := newRestored(w, 4)
		waiting, letGo := w.holdSome(1, fails)
		read := w.readInBackground(w.ctx, v.Device, pageSize, blockSize)
		w.eventually("the reader's request", func() bool { return waiting.Load() == 1 })
		warmed := make(chan error, 1)
		go func() { warmed <- v.Warm(w.ctx, []int64{1, 2, 3}) }()
		w.eventually("the rest is there", func() bool { return len(w.cached(v.base.Clean)) == 2 })
		select {
		case err := <-warmed:
			t.Fatalf("Warm returned %v without one of its blocks", err)
		default:
		}
		letGo()
		w.must(<-warmed)
		if fails == nil {
			w.wantRead(<-read, data[blockSize:][:pageSize])
			if n := v.stats.fetchedBytes.Load(); n > 3*(blockSize+100) {
				t.Errorf("%d bytes fetched for 3 blocks of %d", n, blockSize)
			}
		} else if r := <-read; !errors.Is(r.err, syscall.EIO) {
			t.Errorf("the reader got %v", r.err)
		}
		w.wantCached("the volume", v.base.Clean, 1, 2, 3)
		w.must(v.Close())
	}
}
