package volume

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"
)

// reader reads a device of which nothing is cached, and has what is read ahead
// at once.
type reader struct {
	ahead   *readahead
	present map[int64]bool
	fetched int64 // blocks, by reads and ahead of them
	misses  int
}

func newReader(most int64) *reader {
	return &reader{ahead: newReadahead(blockSize, most*blockSize), present: make(map[int64]bool)}
}

// read reads n blocks and returns how many are then read ahead.
func (r *reader) read(first, n int64) int64 {
	missed := false
	for b := first; b < first+n; b++ {
		if !r.present[b] {
			missed = true
			r.present[b] = true
			r.fetched++
		}
	}
	if missed {
		r.misses++
	}
	from, count := r.ahead.follow(first, first+n-1, missed)
	for b := from; b < from+count; b++ {
		if !r.present[b] {
			r.present[b] = true
			r.fetched++
		}
	}
	return count
}

func TestSequentialReaderSoonMissesNothing(t *testing.T) {
	const most = 128
	for _, size := range []int64{1, 2, 3, 16} {
		r := newReader(most)
		furthest := int64(0)
		for b := int64(100); b < 4000; b += size {
			before := r.misses
			furthest = max(furthest, r.read(b, size))
			if b >= 100+aheadAfter*size && r.misses > before {
				t.Fatalf("reads of %d: block %d was missed", size, b)
			}
		}
		if furthest != most {
			t.Errorf("reads of %d: %d blocks were read ahead at most, want %d", size, furthest, most)
		}
		if r.fetched > 3900+2*most+size {
			t.Errorf("reads of %d: %d blocks fetched", size, r.fetched)
		}
	}
}

func TestPartsOfBlocksMakeAStreamToo(t *testing.T) {
	r := newReader(64)
	for i := int64(0); i < 8*1000; i++ {
		r.read(i/8, 1)
	}
	if r.misses > aheadAfter {
		t.Errorf("%d misses", r.misses)
	}
}

func TestRandomReadsFetchWhatTheyTouch(t *testing.T) {
	for seed := range uint64(20) {
		r := newReader(128)
		rng := rand.New(rand.NewPCG(seed, 1))
		for range 300 {
			r.read(2*rng.Int64N(100_000), 2) // as reads of 1 MiB do
		}
		if r.fetched > 600 {
			t.Errorf("seed %d: %d blocks fetched for 600", seed, r.fetched)
		}
	}
}

func TestReadAheadGrowsWithWhatWasRead(t *testing.T) {
	for n := int64(1); n < 200; n++ {
		r := newReader(1 << 20)
		for b := range n {
			r.read(b, 1)
		}
		if ahead := r.fetched - n; ahead > 4*n+4*r.ahead.first {
			t.Errorf("%d blocks read, %d more fetched", n, ahead)
		}
	}
}

func TestStreamsDoNotDisturbEachOther(t *testing.T) {
	r := newReader(64)
	rng := rand.New(rand.NewPCG(1, 1))
	for b := range int64(1000) {
		for s := range int64(aheadStreams - 1) {
			r.read(s*1_000_000+b, 1)
		}
		if b%8 == 7 { // and there are other reads
			r.read(50_000_000+rng.Int64N(1_000_000), 1)
		}
	}
	if most := (aheadStreams-1)*aheadAfter + 1000/8; r.misses > most {
		t.Errorf("%d misses, want %d at most", r.misses, most)
	}
}

// Requests of one reader that come at once are answered in any order.
func TestStreamIsFoundAmongRequestsOutOfOrder(t *testing.T) {
	for seed := range uint64(50) {
		r := newReader(64)
		rng := rand.New(rand.NewPCG(seed, 1))
		for b := int64(0); b < 4000; b += 8 {
			for _, i := range rng.Perm(4) {
				r.read(b+2*int64(i), 2)
			}
		}
		if r.misses > 200 { // of 2000
			t.Errorf("seed %d: %d misses", seed, r.misses)
		}
	}
}

func TestStreamThatEndedIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReader(64)
		for b := range int64(40) {
			r.read(b, 1)
		}
		time.Sleep(aheadPatience + time.Second)
		fetched := r.fetched
		for b := range int64(64) { // what it would have read is there
			if r.read(b, 1) > 0 && r.fetched > fetched {
				t.Fatalf("block %d, read again, made a stream that had ended go on", b)
			}
			if !r.present[b+1] {
				break
			}
		}
	})
}

func TestColdSequentialReadFetchesEachBlockOnce(t *testing.T) {
	w := newRealWorld(t)
	w.host.ReadAhead = 16 * blockSize
	v, data := newRestored(w, 200)
	before := v.stats.fetchedBytes.Load()
	got := make([]byte, len(data))
	for off := 0; off < len(data); off += blockSize / 2 {
		if _, err := v.ReadAt(w.ctx, got[off:off+blockSize/2], int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got, data) {
		t.Error("the bytes are wrong")
	}
	requests, fetched := v.stats.demandFetches.Load(), v.stats.fetchedBytes.Load()-before
	if requests > 150 {
		t.Errorf("%d requests for 200 blocks", requests)
	}
	if limit := int64(len(data)) * 102 / 100; fetched > limit {
		t.Errorf("%d bytes fetched of %d", fetched, len(data))
	}
}

func TestDeviceClosesWithReadAheadUnderWay(t *testing.T) {
	w := newRealWorld(t)
	w.host.ReadAhead = 16 * blockSize
	for range 20 {
		v, _ := newRestored(w, 32)
		p := make([]byte, blockSize)
		for b := range aheadAfter {
			if _, err := v.ReadAt(w.ctx, p, int64(b*blockSize)); err != nil {
				t.Fatal(err)
			}
		}
		w.must(v.Close())
	}
}

func TestReadAheadLeavesToTheBackgroundWhatItFetches(t *testing.T) {
	w := newRealWorld(t)
	w.host.ReadAhead = 16 * blockSize
	v, data := newRestored(w, 64)
	waiting, letGo := w.holdSome(1, nil)
	warmed := make(chan error, 1)
	go func() {
		var blocks []int64
		for b := range int64(48) {
			blocks = append(blocks, 16+b)
		}
		warmed <- v.Warm(w.ctx, blocks)
	}()
	w.eventually("the background's request", func() bool { return waiting.Load() == 1 })
	for b := range 16 {
		w.wantRead(<-w.readInBackground(w.ctx, v.Device, blockSize, int64(b*blockSize)), data[b*blockSize:][:blockSize])
	}
	w.eventually("nothing is read ahead any more", func() bool { return v.DemandInFlight() == 0 })
	letGo()
	w.must(<-warmed)
	if n := v.stats.fetchedBytes.Load(); n > 64*(blockSize+100) {
		t.Errorf("%d bytes fetched for 64 blocks of %d", n, blockSize)
	}
	w.must(v.Close())
}

func TestReadAheadFetchesNothingThatCannotBeKept(t *testing.T) {
	for _, disk := range []bool{false, true} {
		w := newWorld(t, 1)
		w.host.ReadAhead = 64 * blockSize
		const blocks = 400
		id, data := w.source(blocks, 1)
		d := w.mountAs("mnt-1", id)
		w.read(d, data, 399)
		if disk {
			w.crash.SetCapacity(w.crash.Used())
		} else {
			w.host.Budget.limit = 1 // not even one block; it was larger when the device was opened
		}
		for b := range blocks {
			w.read(d, data, b)
		}
		w.eventually("nothing is read ahead any more", func() bool { return d.DemandInFlight() == 0 })
		if n := d.stats.fetchedBytes.Load(); n > blocks*blockSize*11/10 {
			t.Errorf("disk full: %t: %d bytes fetched for %d blocks of %d", disk, n, blocks, blockSize)
		}
		w.abandon()
	}
}

func TestReadAheadStaysWithinASmallCache(t *testing.T) {
	w := newWorld(t, 1)
	w.host.ReadAhead = 1 << 30
	const blocks = 400
	id, data := w.source(blocks, 1)
	w.limitBlocks(24, 1)
	d := w.mountAs("mnt-1", id)
	for b := range blocks {
		w.read(d, data, b)
	}
	w.eventually("nothing is read ahead any more", func() bool { return d.DemandInFlight() == 0 })
	// What is kept late may evict what is not read yet.
	if n := d.stats.fetchedBytes.Load(); n > blocks*blockSize*13/10 {
		t.Errorf("%d bytes fetched for %d blocks of %d", n, blocks, blockSize)
	}
	w.abandon()
}
