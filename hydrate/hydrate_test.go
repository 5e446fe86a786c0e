package hydrate_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestRunsAreFetchedInThePlannedOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 20, 0, 0, 3, 20)
		finish(t, s, hydrate.New(s, hydrate.Options{Workers: 1}))
		if !slices.IsSorted(s.started) || len(s.started) != 43 {
			t.Errorf("%d runs in this order: %v", len(s.started), s.started)
		}
		if want := []int64{0, 1, 4, 5}; !slices.Equal(s.plans, want) {
			t.Errorf("planned leaves %v, want %v", s.plans, want)
		}
	})
}

func TestPlanningCostsNoTimeWhileRunsAreInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 8, 8, 8, 8)
		took := finish(t, s, hydrate.New(s, hydrate.Options{Workers: 4}))
		if want := planTime + 8*runTime; took != want {
			t.Errorf("took %v, want %v", took, want)
		}
		if s.maxInflight != 4 {
			t.Errorf("%d runs were in flight at once, want 4", s.maxInflight)
		}
	})
}

func TestPlannedRunsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leaves := slices.Repeat([]int{10}, 100)
		s := newSource(t, leaves...)
		h := hydrate.New(s, hydrate.Options{Workers: 2, Rate: 1})
		start(t, h)
		time.Sleep(time.Minute)
		if n := len(s.plannedLeaves()); n > 3 {
			t.Errorf("%d leaves were planned while the second run waits", n)
		}
	})
}

func TestWhatTheCacheHoldsIsNotFetched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 4, 4)
		ctx, cancel := context.WithTimeout(t.Context(), 2*runTime)
		defer cancel()
		if err := hydrate.New(s, hydrate.Options{Workers: 2}).Run(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("stopped Run returned %v", err)
		}
		before := s.warmBlocks()
		h := hydrate.New(s, hydrate.Options{}) // as after a restart
		finish(t, s, h)
		if got, want := h.Progress().Runs, int64(s.blocks()-before)/blocksPerRun; before == 0 || got != want {
			t.Errorf("%d blocks were there, %d runs were fetched, want %d", before, got, want)
		}
	})
}

func TestCancelledRunLeavesNothingBehind(t *testing.T) {
	for _, test := range []struct {
		name  string
		state hydrate.State
		fault error
		rate  int64
		pause bool
	}{
		{name: "in flight", state: hydrate.Hydrating},
		{name: "paused", state: hydrate.Paused, pause: true},
		{name: "at its rate", state: hydrate.Hydrating, rate: 1},
		{name: "in an outage", state: hydrate.Waiting, fault: hydrate.ErrUnavailable},
		{name: "with the cache full", state: hydrate.CacheFull, fault: hydrate.ErrFull},
		{name: "between passes", state: hydrate.Hydrating, fault: errCorrupt},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSource(t, 5)
				s.warmFault = func(call int, _ int64) error {
					if call < 2 {
						return nil
					}
					return test.fault
				}
				h := hydrate.New(s, hydrate.Options{Rate: test.rate})
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() { done <- h.Run(ctx) }()
				time.Sleep(planTime + runTime/4)
				if test.pause {
					h.Pause()
				}
				time.Sleep(runTime)
				errs := wantState(t, h, test.state).Errors
				cancel()
				begin := time.Now()
				if err := <-done; !errors.Is(err, context.Canceled) {
					t.Errorf("cancelled Run returned %v", err)
				}
				if took := time.Since(begin); took != 0 {
					t.Errorf("cancelled Run returned after %v", took)
				}
				if s.inFlight() != 0 {
					t.Error("cancelled Run returned with runs in flight")
				}
				if got := wantState(t, h, test.state).Errors; got != errs {
					t.Error("being stopped counts as an error")
				}
			})
		})
	}
}

func TestRunReturnsAfterItsLastCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 10)
		s.linger = 3 * time.Second
		ctx, cancel := context.WithTimeout(t.Context(), planTime+runTime/2)
		defer cancel()
		begin := time.Now()
		err := hydrate.New(s, hydrate.Options{}).Run(ctx)
		if took, want := time.Since(begin), planTime+runTime/2+s.linger; !errors.Is(err, context.DeadlineExceeded) || took != want {
			t.Errorf("Run returned %v after %v, want %v", err, took, want)
		}
		if got := s.inFlight(); got != 0 {
			t.Errorf("Run returned with %d runs in flight", got)
		}
	})
}

func TestRunMayBeCalledAgainButNotTwiceAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 5, 5)
		h := hydrate.New(s, hydrate.Options{})
		done := start(t, h)
		time.Sleep(planTime)
		if err := h.Run(t.Context()); err == nil {
			t.Error("a second Run beside the first one succeeded")
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		delete(s.present, 7)
		finish(t, s, h)
		if got := h.Progress().Runs; got != 11 {
			t.Errorf("%d runs fetched, want 11", got)
		}
	})
}

// Whatever fails, is paused, throttled or full for a while: in the end every
// block is in the cache, and no block was ever fetched twice at once.
func TestEveryBlockIsWarmedInTheEnd(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		leaves := rapid.SliceOfN(rapid.IntRange(0, 12), 0, 12).Draw(t, "leaves")
		kinds := []error{nil, nil, nil, nil, hydrate.ErrUnavailable, hydrate.ErrFull, errCorrupt}
		faults := rapid.SliceOfN(rapid.SampledFrom(kinds), 0, 200).Draw(t, "faults")
		busy := rapid.SliceOfN(rapid.IntRange(0, 1), 1, 20).Draw(t, "busy")
		options := hydrate.Options{
			Workers: rapid.IntRange(0, 6).Draw(t, "workers"),
			Rate:    rapid.SampledFrom([]int64{0, 1 << 10, 1 << 20, 1 << 30}).Draw(t, "rate"),
		}
		steps := rapid.SliceOfN(rapid.IntRange(0, 3), 0, 20).Draw(t, "steps")
		rapid.SyncTest(t, func(t *rapid.T) {
			s := newSource(t, leaves...)
			var call atomic.Int64
			fault := func(int, int64) error {
				if n := int(call.Add(1)) - 1; n < len(faults) {
					return faults[n]
				}
				return nil
			}
			s.warmFault = fault
			s.planFault = func(n int, leaf int64) error {
				if err := fault(n, leaf); err != hydrate.ErrFull {
					return err
				}
				return nil
			}
			var asked atomic.Int64
			options.Busy = func() int { return busy[int(asked.Add(1))%len(busy)] }
			h := hydrate.New(s, options)
			ctx, cancel := context.WithTimeout(context.Background(), 1000*time.Hour)
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- h.Run(ctx) }()
			for _, step := range steps {
				[]func(){h.Pause, h.Resume, func() { h.SetRate(1 << 16) }, func() { h.SetRate(0) }}[step]()
				time.Sleep(time.Duration(step+1) * 700 * time.Millisecond)
			}
			h.Resume()
			if err := <-done; err != nil {
				t.Fatalf("Run: %v; progress %+v", err, h.Progress())
			}
			if got, want := s.warmBlocks(), s.blocks(); got != want {
				t.Errorf("%d blocks are in the cache, want %d", got, want)
			}
			if p := h.Progress(); p.State != hydrate.Done || p.LastError != nil {
				t.Errorf("after Run: %+v", p)
			}
		})
	})
}

// emptySource has runs that take no time.
type emptySource struct {
	runs  []manifest.Run
	left  int
	calls atomic.Int64
}

func (s *emptySource) Plan(_ context.Context, leaf int64) ([]manifest.Run, int64, error) {
	if s.left == 0 {
		return nil, 0, io.EOF
	}
	runs := s.runs[:min(s.left, len(s.runs))]
	s.left -= len(runs)
	return runs, leaf + 1, nil
}

func (s *emptySource) PlanBlocks(context.Context, []int64) ([]manifest.Run, error) { return nil, nil }

func (s *emptySource) Warm(context.Context, manifest.Run) error {
	s.calls.Add(1)
	return nil
}

// What the hydrator itself costs per run; a pack of 16 MiB takes 13 ms at 10 Gbit/s.
func BenchmarkRun(b *testing.B) {
	run := manifest.Run{Blocks: []int64{0}, Refs: []manifest.Ref{{Length: 1}}}
	s := &emptySource{runs: slices.Repeat([]manifest.Run{run}, 32), left: b.N}
	b.ReportAllocs()
	if err := hydrate.New(s, hydrate.Options{Rate: 1 << 50}).Run(b.Context()); err != nil {
		b.Fatal(err)
	}
	if got := s.calls.Load(); got != int64(b.N) {
		b.Fatalf("%d runs, want %d", got, b.N)
	}
}
