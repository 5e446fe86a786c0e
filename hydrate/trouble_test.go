package hydrate_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestOutageIsWaitedOutWithoutLosingThePlace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		fault := func(int, int64) error {
			if down.Load() {
				return fmt.Errorf("get: %w", hydrate.ErrUnavailable)
			}
			return nil
		}
		s := newSource(t, 100, 100)
		s.warmFault, s.planFault = fault, fault
		h := hydrate.New(s, hydrate.Options{Workers: 1})
		down.Store(true)
		done := start(t, h)
		for range 2 { // the first time a plan fails, then a run
			time.Sleep(time.Minute)
			tries := len(s.startedRuns()) + len(s.plannedLeaves())
			time.Sleep(time.Hour)
			if p := wantState(t, h, hydrate.Waiting); !errors.Is(p.LastError, hydrate.ErrUnavailable) || p.Errors == 0 {
				t.Errorf("%d errors, the last %v", p.Errors, p.LastError)
			}
			tries = len(s.startedRuns()) + len(s.plannedLeaves()) - tries
			if tries < 120 || tries > 240 {
				t.Errorf("%d tries in an hour's outage, want one each 15 to 30 seconds", tries)
			}

			down.Store(false)
			time.Sleep(30*time.Second + planTime + runTime)
			if p := wantState(t, h, hydrate.Hydrating); p.LastError != nil {
				t.Errorf("healed with %v", p.LastError)
			}
			down.Store(true)
		}
		down.Store(false)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if s.warmBlocks() != s.blocks() {
			t.Error("Run returned with blocks missing")
		}
		last := int64(0)
		for _, block := range s.started {
			run := block/manifest.LeafBlocks*100 + block%manifest.LeafBlocks/blocksPerRun
			if run < last-1 || run > last+1 {
				t.Errorf("run %d started when %d should have", run, last)
			}
			last = max(last, run)
		}
	})
}

func TestOneObjectOutOfReachHoldsUpNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 50, 50)
		var healed atomic.Bool
		s.warmFault = func(_ int, block int64) error {
			if block == 8 && !healed.Load() {
				return hydrate.ErrUnavailable
			}
			return nil
		}
		h := hydrate.New(s, hydrate.Options{})
		done := start(t, h)
		time.Sleep(200 * runTime)
		if got, want := s.warmBlocks(), s.blocks()-blocksPerRun; got != want {
			t.Errorf("%d blocks in the cache beside a run out of reach, want %d", got, want)
		}
		wantState(t, h, hydrate.Waiting)
		healed.Store(true)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}

func TestThrottlingHalvesTheWindowOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 100)
		s.warmFault = func(call int, _ int64) error {
			if call/8 == 1 { // the second eight in flight fail together
				time.Sleep(runTime)
				return hydrate.ErrUnavailable
			}
			return nil
		}
		h := hydrate.New(s, hydrate.Options{Workers: 8})
		done := start(t, h)
		time.Sleep(planTime + 2*runTime + 3*runTime/4)
		wantState(t, h, hydrate.Waiting)
		if got := s.inFlight(); got != 1 {
			t.Errorf("%d runs in flight to try a store that throttled, want 1", got)
		}
		time.Sleep(runTime)
		if got := s.inFlight(); got != 4 {
			t.Errorf("%d runs in flight soon after throttling, want 4", got)
		}
		time.Sleep(5 * runTime)
		if got := s.inFlight(); got != 8 {
			t.Errorf("%d runs in flight long after throttling, want 8", got)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}

func TestFailuresNowAndThenCostLittleTime(t *testing.T) {
	for _, test := range []struct {
		fault error
		want  time.Duration
	}{
		{hydrate.ErrUnavailable, planTime + 100*runTime + 50*500*time.Millisecond},
		{errCorrupt, planTime + 100*runTime + time.Second + planTime}, // a second pass
	} {
		t.Run(test.fault.Error(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSource(t, 100)
				s.warmFault = func(call int, _ int64) error {
					if call < 100 && call%2 == 0 {
						return test.fault
					}
					return nil
				}
				took := finish(t, s, hydrate.New(s, hydrate.Options{Workers: 1}))
				if took > test.want {
					t.Errorf("took %v, want at most %v", took, test.want)
				}
			})
		})
	}
}

func TestBrokenConnectionIsNotTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 4, 4, 4)
		s.planFault = func(call int, _ int64) error {
			switch call {
			case 0:
				return fmt.Errorf("%w: %w", hydrate.ErrUnavailable, io.EOF)
			case 2:
				return fmt.Errorf("get leaf: %w", io.EOF)
			}
			return nil
		}
		finish(t, s, hydrate.New(s, hydrate.Options{}))
	})
}

func TestLogTellsOfALongOutageOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 100)
		s.warmFault = func(call int, _ int64) error {
			if call == 5 || call >= 20 && call < 40 {
				return hydrate.ErrUnavailable
			}
			return nil
		}
		var log bytes.Buffer
		finish(t, s, hydrate.New(s, hydrate.Options{Log: slog.New(slog.NewTextHandler(&log, nil))}))
		for _, line := range []string{"hydration waits", "hydration goes on"} {
			if got := strings.Count(log.String(), line); got != 1 {
				t.Errorf("the log says %q %d times:\n%s", line, got, &log)
			}
		}
	})
}

func TestFullCacheIsPolledSlowly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 10, 10)
		room := atomic.Int64{}
		room.Store(12)
		s.warmFault = func(int, int64) error {
			if room.Add(-1) < 0 {
				return hydrate.ErrFull
			}
			return nil
		}
		h := hydrate.New(s, hydrate.Options{})
		done := start(t, h)
		time.Sleep(time.Minute)
		before := len(s.startedRuns())
		time.Sleep(time.Hour)
		asked := s.startedRuns()[before:]
		if n, different := len(asked), slices.Compact(asked); n != 720 || len(different) != 1 {
			t.Errorf("asked %d times in an hour for runs %v, want the same one 720 times", n, different)
		}
		if p := wantState(t, h, hydrate.CacheFull); p.LastError != nil || p.Errors != 0 {
			t.Errorf("a full cache counts as %d errors, the last %v", p.Errors, p.LastError)
		}

		// Meanwhile demand evicted what was fetched first.
		s.mu.Lock()
		for block := range int64(blocksPerRun) {
			delete(s.present, block)
		}
		s.mu.Unlock()
		room.Store(100)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if s.warmBlocks() != s.blocks() {
			t.Error("Run returned with blocks missing")
		}
	})
}

func TestFullCacheStaysFullWhilePlanningGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, slices.Repeat([]int{1}, 100)...)
		s.warmFault = func(int, int64) error { return hydrate.ErrFull }
		var log bytes.Buffer
		h := hydrate.New(s, hydrate.Options{Log: slog.New(slog.NewTextHandler(&log, nil))})
		start(t, h)
		time.Sleep(time.Hour)
		synctest.Wait()
		wantState(t, h, hydrate.CacheFull)
		if len(s.plannedLeaves()) < 2 {
			t.Error("only one leaf was planned")
		}
		if got := strings.Count(log.String(), "\n"); got != 1 {
			t.Errorf("the log tells of it %d times:\n%s", got, &log)
		}
	})
}

func TestCorruptRunDoesNotStopTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 10, 10, 10)
		var healed atomic.Bool
		var tries atomic.Int64
		s.warmFault = func(_ int, block int64) error {
			if block == 8 && !healed.Load() {
				tries.Add(1)
				return errCorrupt
			}
			return nil
		}
		h := hydrate.New(s, hydrate.Options{})
		done := start(t, h)
		time.Sleep(30 * runTime)
		if got, want := s.warmBlocks(), s.blocks()-blocksPerRun; got != want {
			t.Errorf("%d blocks in the cache beside a corrupt run, want %d", got, want)
		}
		time.Sleep(24 * time.Hour)
		if p := wantState(t, h, hydrate.Hydrating); !errors.Is(p.LastError, errCorrupt) || p.Errors != tries.Load() {
			t.Errorf("%d errors, the last %v", p.Errors, p.LastError)
		}
		if n := tries.Load(); n < 144 || n > 330 {
			t.Errorf("%d tries in a day", n)
		}
		if got := len(s.plannedLeaves()); got > 4+330 {
			t.Errorf("%d leaves planned to retry runs of one", got)
		}
		healed.Store(true)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if p := wantState(t, h, hydrate.Done); p.LastError != nil {
			t.Errorf("done with %v", p.LastError)
		}
	})
}

func TestCorruptLeafDoesNotStopTheOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 3, 0, 3, 3)
		var healed atomic.Bool
		s.planFault = func(_ int, leaf int64) error {
			if leaf == 2 && !healed.Load() {
				return errCorrupt
			}
			return nil
		}
		h := hydrate.New(s, hydrate.Options{})
		done := start(t, h)
		time.Sleep(time.Minute)
		if got, want := s.warmBlocks(), s.blocks()*2/3; got != want {
			t.Errorf("%d blocks in the cache beside a corrupt leaf, want %d", got, want)
		}
		healed.Store(true)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if s.warmBlocks() != s.blocks() {
			t.Error("Run returned with blocks missing")
		}
	})
}

func TestFaultsOfEveryRunAreSpacedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 250, 250, 250, 250)
		s.warmFault = func(int, int64) error { return errors.New("disk is broken") }
		h := hydrate.New(s, hydrate.Options{})
		start(t, h)
		time.Sleep(time.Hour)
		if n := len(s.startedRuns()); n > 400 {
			t.Errorf("%d runs were tried in an hour in which all failed", n)
		}
	})
}

func TestEndOfAnOutageShowsEvenIfTheRestIsCorrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 3)
		s.warmFault = func(call int, _ int64) error {
			if call == 0 {
				return hydrate.ErrUnavailable
			}
			return errCorrupt
		}
		h := hydrate.New(s, hydrate.Options{})
		start(t, h)
		time.Sleep(planTime + 600*time.Millisecond) // before the second pass
		if p := wantState(t, h, hydrate.Hydrating); !errors.Is(p.LastError, errCorrupt) {
			t.Errorf("last error is %v", p.LastError)
		}
	})
}
