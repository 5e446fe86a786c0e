package main

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// A count that grows evenly is told as it grows, however often it is looked at.
func TestTrendTellsHowFastACountGrows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		rate := float64(rapid.IntRange(0, 1<<30).Draw(t, "rate"))
		trend := trend{span: 10 * time.Second}
		start := time.Unix(1e9, 0)
		at := start
		for range rapid.IntRange(2, 300).Draw(t, "samples") {
			trend.add(at, rate*at.Sub(start).Seconds())
			at = at.Add(time.Duration(rapid.IntRange(1, 3000).Draw(t, "ms")) * time.Millisecond)
		}
		if got := trend.perSecond(); math.Abs(got-rate) > 1e-6*rate+1e-6 {
			t.Fatalf("%v a second, want %v", got, rate)
		}
		if len(trend.points) > trendPoints+2 {
			t.Fatalf("it remembers %d points", len(trend.points))
		}
	})
}

func TestTrendForgetsWhatIsLongAgoAndBeginsAnewWhenTheCountFalls(t *testing.T) {
	now := time.Unix(1e9, 0)
	trend := trend{span: 10 * time.Second}
	if got := trend.perSecond(); got != 0 {
		t.Errorf("of nothing: %v", got)
	}
	trend.add(now, 5)
	if got := trend.perSecond(); got != 0 {
		t.Errorf("of one look: %v", got)
	}
	for i := range 5 {
		trend.add(now.Add(time.Duration(i)*time.Second), float64(100*i)+5)
	}
	if got := trend.perSecond(); got != 100 {
		t.Errorf("while it grows: %v, want 100", got)
	}
	for i := range 15 {
		trend.add(now.Add(time.Duration(5+i)*time.Second), 405)
	}
	if got := trend.perSecond(); got != 0 {
		t.Errorf("long after it grew: %v", got)
	}
	trend.add(now.Add(20*time.Second), 0)
	trend.add(now.Add(21*time.Second), 7)
	if got := trend.perSecond(); got != 7 {
		t.Errorf("after it fell: %v, want 7", got)
	}
}
