package volume

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestStatsFollowWhatHappens(t *testing.T) {
	w := newRealWorld(t)
	v, _ := newRestored(w, 4)
	root := v.Record().Root.String()
	want := func(what string, total, hydrated, dirty, allocated int64) {
		t.Helper()
		s := v.Stats()
		if s.TotalBytes != total || s.HydratedBytes != hydrated || s.DirtyBytes != dirty || v.Allocated() != allocated {
			t.Errorf("%s: total %d, hydrated %d, dirty %d, allocated %d; want %d, %d, %d, %d",
				what, s.TotalBytes, s.HydratedBytes, s.DirtyBytes, v.Allocated(), total, hydrated, dirty, allocated)
		}
	}
	want("new", 4*blockSize, 0, 0, 4*blockSize)
	if _, err := v.ReadAt(w.ctx, make([]byte, 1), blockSize); err != nil {
		t.Fatal(err)
	}
	w.eventually("the block is cached", func() bool { return v.Stats().HydratedBytes == blockSize })
	w.write(v, noise(pageSize, 2), 0)
	w.must(v.Zero(w.ctx, 3*blockSize, blockSize))
	want("written", 4*blockSize, blockSize, blockSize+pageSize, 4*blockSize)
	w.snapshot(v)
	want("snapshotted", 3*blockSize, 2*blockSize, 0, 3*blockSize)
	w.must(w.hydrate(v.Device))
	want("hydrated", 3*blockSize, 3*blockSize, 0, 3*blockSize)
	w.must(v.base.Evict(1))
	w.must(v.writes.clean.Evict(0))
	want("evicted", 3*blockSize, blockSize, 0, 3*blockSize)
	s := v.Stats()
	if s.Root == root || s.Root != v.Record().Root.String() || s.Size != 4*blockSize || s.BlockSize != blockSize {
		t.Errorf("stats %+v", s)
	}
	w.must(v.Close())
	v.Stats() // harmless, with whatever count
}

func TestProblemsAreBoundedAndPass(t *testing.T) {
	var c counters
	for i := range 2 * maxProblems {
		if !c.note(fmt.Errorf("problem %d", i)) {
			t.Errorf("problem %d is not new", i)
		}
	}
	if c.note(fmt.Errorf("problem %d", maxProblems)) {
		t.Error("a problem that is remembered is new")
	}
	if n := len(c.problems); n != maxProblems || c.problems[n-1].Message != fmt.Sprintf("problem %d", maxProblems) {
		t.Errorf("remembered %v", c.problems)
	}
	c.note(fmt.Errorf("store: %w", blockstore.ErrUnavailable))
	c.note(errDeadline)
	c.note(fmt.Errorf("read: %w", &blockError{block: 3, err: blockstore.ErrDenied}))
	c.note(fmt.Errorf("read: %w", &blockError{block: 4, err: manifest.ErrCorrupt}))
	c.note(fmt.Errorf("read: %w", &blockError{block: 5, err: manifest.ErrCorrupt}))
	c.heal(4)
	for _, p := range c.problems {
		if p.passing || p.of != nil && p.of.block == 4 {
			t.Errorf("%q is not over", p.Message)
		}
	}
	if n := len(c.problems); n != maxProblems-4 || c.problems[n-1].of.block != 5 {
		t.Errorf("left: %v", c.problems)
	}
}

func TestFullCacheStopsHydrationAndNothingElse(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 3)
	w.setLimit(1)
	if err := w.hydrate(v.Device); !errors.Is(err, ErrFull) || !errors.Is(err, errNoRoom) {
		t.Errorf("hydrate: %v, want ErrFull", err)
	}
	w.equal(v.Device, data, "volume")
	w.overwrite(v, data, blockSize, 0, 2)
	id := w.snapshot(v)
	if has, err := v.writes.clean.Has(0); has || err != nil {
		t.Errorf("a clean copy without room for it: %t, %v", has, err)
	}
	w.equalSnapshot(id, data, "snapshot")
	w.equal(v.Device, data, "volume after it")
	w.setLimit(noLimit)
	w.must(w.hydrate(v.Device))
	w.must(v.Close())
}

// TestCountingDoesNotHoldUpClose: it goes on in the background only as long as
// the device is open, and not all the time.
func TestCountingDoesNotHoldUpClose(t *testing.T) {
	w := newRealWorld(t)
	v, _ := newRestored(w, 1)
	v.census.due = time.Now().Add(time.Hour) // as if counting took long
	before := v.hydratedBlocks()
	w.must(w.hydrate(v.Device))
	if n := v.hydratedBlocks(); n != before {
		t.Errorf("counted anew: %d after %d", n, before)
	}
	v.Recount()
	if n := v.hydratedBlocks(); n != 1 {
		t.Errorf("counted %d blocks of 1", n)
	}
	w.must(v.Close())
	if done := v.beginCensus(); done != nil {
		t.Error("counting after Close")
	}
}
