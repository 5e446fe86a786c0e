package hydrate

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestWindowStaysWithinItsBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.IntRange(1, 64).Draw(t, "limit")
		w := newWindow(limit)
		for _, grow := range rapid.SliceOf(rapid.Bool()).Draw(t, "grow") {
			if grow {
				w.grow()
			} else {
				w.shrink()
			}
			if !w.admits(0) || w.admits(limit) {
				t.Fatalf("window is %v of %d", w.size, limit)
			}
		}
	})
}

func TestWindowGrowsByOneInTheTimeOfItsRuns(t *testing.T) {
	w := newWindow(8)
	w.size = 1
	for inflight := 1; inflight < 8; inflight++ {
		if w.admits(inflight) {
			t.Errorf("window of %v admits %d more", w.size, inflight)
		}
		for range inflight + 1 {
			w.grow()
		}
		if !w.admits(inflight) {
			t.Errorf("window is %v after %d runs", w.size, inflight)
		}
		w.size = float64(inflight + 1)
	}
}

func TestBackoffIsBounded(t *testing.T) {
	for n := range 100 {
		want := min(time.Second<<min(n, 20), time.Minute)
		if d := backoff(n, time.Second, time.Minute); d < want/2 || d > want {
			t.Errorf("backoff %d is %v, want %v to %v", n, d, want/2, want)
		}
	}
	if d := backoff(math.MaxInt, passRetryMin, passRetryMax); d < passRetryMax/2 || d > passRetryMax {
		t.Errorf("last backoff is %v", d)
	}
}

func TestMeterIsRightFromTheFirstByteOn(t *testing.T) {
	now := time.Now()
	var m meter
	m.begin(now)
	for second := range 1000 {
		now = now.Add(time.Second)
		m.add(now, 1000)
		if r := m.rate(now); r < 1000 || r > 1020 {
			t.Fatalf("rate after %d s of 1000 B/s is %d", second+1, r)
		}
	}
}
