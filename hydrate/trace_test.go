package hydrate_test

import (
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/manifest"
)

// aTrace touches blocks of three leaves, back and forth; some are not there.
func aTrace() (trace, exist []int64) {
	for i := range int64(100) {
		block := i%3*manifest.LeafBlocks + (i*37)%40
		trace = append(trace, block, block+500)
		exist = append(exist, block)
	}
	slices.Sort(exist)
	return trace, slices.Compact(exist)
}

func present(s *source) (blocks []int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for block := range s.present {
		blocks = append(blocks, block)
	}
	slices.Sort(blocks)
	return blocks
}

func TestTraceIsFetchedInItsOrderAndNothingElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 10, 10, 10)
		trace, exist := aTrace()
		h := hydrate.New(s, hydrate.Options{Workers: 1, Blocks: trace})
		if err := h.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := present(s); !slices.Equal(got, exist) {
			t.Errorf("blocks %v are there, want %v", got, exist)
		}
		position := func(block int64) int { return slices.Index(trace, block) }
		if !slices.IsSortedFunc(s.started, func(a, b int64) int { return position(a) - position(b) }) {
			t.Errorf("fetched in the order %v", s.started)
		}
		wantState(t, h, hydrate.Done)
	})
}

func TestEmptyTraceFetchesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 10)
		if err := hydrate.New(s, hydrate.Options{Blocks: []int64{}}).Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if len(s.started) > 0 {
			t.Errorf("%v", s.started)
		}
	})
}

func TestTraceWaitsOutAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 10, 10, 10)
		var calls atomic.Int64
		down := func() error {
			if calls.Add(1)%3 != 0 {
				return hydrate.ErrUnavailable
			}
			return nil
		}
		s.blocksFault = func(int64) error { return down() }
		s.warmFault = func(int, int64) error { return down() }
		trace, exist := aTrace()
		h := hydrate.New(s, hydrate.Options{Workers: 1, Blocks: trace})
		if err := h.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := present(s); !slices.Equal(got, exist) {
			t.Errorf("blocks %v are there, want %v", got, exist)
		}
	})
}

func TestTracePassesOverWhatCannotBeHad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 10, 10, 10)
		trace, exist := aTrace()
		bad := trace[10]
		s.warmFault = func(_ int, block int64) error {
			if block == bad {
				return errCorrupt
			}
			return nil
		}
		s.blocksFault = func(first int64) error {
			if first == trace[64] {
				return errors.New("the leaf is corrupt")
			}
			return nil
		}
		h := hydrate.New(s, hydrate.Options{Blocks: trace})
		start := time.Now()
		if err := h.Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > time.Duration(len(trace))*(runTime+planTime) {
			t.Errorf("took %s", took)
		}
		got := present(s)
		if slices.Contains(got, bad) || len(got) < len(exist)/2 || h.Progress().Errors < 2 {
			t.Errorf("%d of %d blocks are there, %d errors", len(got), len(exist), h.Progress().Errors)
		}
	})
}

func TestTraceEndsWhenTheCacheIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 10, 10, 10)
		s.warmFault = func(call int, _ int64) error {
			if call >= 5 {
				return hydrate.ErrFull
			}
			return nil
		}
		trace, _ := aTrace()
		if err := hydrate.New(s, hydrate.Options{Workers: 1, Blocks: trace}).Run(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := len(s.started); n > 6 {
			t.Errorf("%d runs were tried", n)
		}
	})
}
