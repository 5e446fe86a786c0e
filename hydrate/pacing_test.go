package hydrate_test

import (
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lazyvol/lazyvol/hydrate"
)

func TestDemandLeavesOneRunToTheBackground(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 1000)
		var demand atomic.Int64
		h := hydrate.New(s, hydrate.Options{Workers: 8, Busy: func() int { return int(demand.Load()) }})
		done := start(t, h)
		time.Sleep(10*runTime - runTime/2)
		if got := s.resetPeak(); got != 8 {
			t.Errorf("%d runs in flight without demand, want 8", got)
		}

		demand.Store(3)
		time.Sleep(runTime)
		s.resetPeak()
		before := s.warmBlocks()
		time.Sleep(10 * runTime)
		if got := s.resetPeak(); got != 1 {
			t.Errorf("%d runs in flight beside demand, want 1", got)
		}
		if got := s.warmBlocks() - before; got != 10*blocksPerRun {
			t.Errorf("%d blocks fetched beside demand in 10 run times, want %d", got, 10*blocksPerRun)
		}

		demand.Store(0)
		time.Sleep(2 * runTime)
		if got := s.resetPeak(); got > 3 {
			t.Errorf("%d runs in flight two run times after demand ended, want at most 3", got)
		}
		time.Sleep(20 * runTime)
		if got := s.resetPeak(); got != 8 {
			t.Errorf("%d runs in flight long after demand ended, want 8", got)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}

func TestHydrationEndsHoweverBusyTheVolumeIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 10, 10)
		took := finish(t, s, hydrate.New(s, hydrate.Options{Busy: func() int { return 100 }}))
		if want := planTime + 20*runTime; took != want {
			t.Errorf("took %v, want %v", took, want)
		}
	})
}

func TestPauseStartsNothingUntilResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 20)
		h := hydrate.New(s, hydrate.Options{Workers: 2})
		h.Pause()
		done := start(t, h)
		time.Sleep(time.Hour)
		wantState(t, h, hydrate.Paused)
		if leaves := s.plannedLeaves(); len(leaves) != 0 {
			t.Errorf("planned leaves %v while paused", leaves)
		}

		h.Resume()
		time.Sleep(planTime + 3*runTime/2)
		wantState(t, h, hydrate.Hydrating)
		h.Pause()
		time.Sleep(runTime)
		if got := s.inFlight(); got != 0 {
			t.Errorf("%d runs in flight a run time after Pause", got)
		}
		if got := s.warmBlocks(); got != 4*blocksPerRun {
			t.Errorf("%d blocks after Pause, want those of the 4 runs begun", got)
		}
		time.Sleep(time.Hour)
		if got := len(s.startedRuns()); got != 4 {
			t.Errorf("%d runs started, want 4", got)
		}

		h.Resume()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		h.Pause()
		wantState(t, h, hydrate.Done)
	})
}

func TestRateHoldsExactly(t *testing.T) {
	const mib = 1 << 20
	for _, test := range []struct{ rate, run int64 }{
		{rate: 4 * mib, run: mib},     // four runs may start at once
		{rate: mib / 8, run: mib},     // one run fills the burst
		{rate: mib / 2, run: 5 * mib}, // a run overdraws it
		{rate: 3 * mib, run: 32 * mib},
	} {
		t.Run(fmt.Sprintf("%d by %d", test.rate, test.run), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSource(t, 50)
				s.stored = uint32(test.run / blocksPerRun)
				finish(t, s, hydrate.New(s, hydrate.Options{Workers: 64, Rate: test.rate}))
				burst := float64(max(test.rate, mib))
				free := min(burst, mib+float64(test.rate)*planTime.Seconds()) // it begins with 1 MiB
				for run, at := range s.startedAt {
					owed := max(0, float64(run)*float64(test.run)-free)
					want := time.Duration(owed / float64(test.rate) * float64(time.Second))
					if got := at.Sub(s.startedAt[0]); (got - want).Abs() > time.Microsecond {
						t.Errorf("run %d started after %v, want %v", run, got, want)
					}
				}
			})
		})
	}
}

func TestSetRateHoldsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 100)
		h := hydrate.New(s, hydrate.Options{Workers: 1, Rate: 1})
		done := start(t, h)
		time.Sleep(time.Hour)
		if got := len(s.startedRuns()); got > 2 {
			t.Errorf("%d runs at 1 B/s", got)
		}
		h.SetRate(1 << 19)
		time.Sleep(20 * time.Second)
		if got := len(s.startedRuns()); got < 9 || got > 12 {
			t.Errorf("%d runs of 1 MiB within 20 s at half a MiB/s", got)
		}
		h.SetRate(0)
		time.Sleep(90*runTime + runTime/2)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}

func TestProgressCountsWhatWasFetched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSource(t, 1000)
		h := hydrate.New(s, hydrate.Options{Rate: 1 << 19})
		if p := wantState(t, h, hydrate.Hydrating); p.Rate != 0 {
			t.Errorf("rate is %d before Run", p.Rate)
		}
		done := start(t, h)
		time.Sleep(5 * time.Minute)
		p := wantState(t, h, hydrate.Hydrating)
		if p.FetchedBytes != p.Runs<<20 || p.Blocks != p.Runs*blocksPerRun || int(p.Blocks) != s.warmBlocks() {
			t.Errorf("%d runs, %d bytes, %d blocks for %d in the cache", p.Runs, p.FetchedBytes, p.Blocks, s.warmBlocks())
		}
		if p.Rate < 1<<19*9/10 || p.Rate > 1<<19*11/10 {
			t.Errorf("rate is %d B/s, want about %d", p.Rate, 1<<19)
		}
		if eta, ok := p.ETA(600 * blocksPerRun); !ok || eta < 18*time.Minute || eta > 22*time.Minute {
			t.Errorf("ETA of 600 MiB at half a MiB/s is %v, %v", eta, ok)
		}
		h.Pause()
		time.Sleep(10 * time.Minute)
		p = wantState(t, h, hydrate.Paused)
		if p.Rate != 0 {
			t.Errorf("rate is %d B/s after ten minutes' pause", p.Rate)
		}
		if eta, ok := p.ETA(1); ok {
			t.Errorf("ETA without a rate is %v", eta)
		}
		h.Resume()
		h.SetRate(0)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
}
