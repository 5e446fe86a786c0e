package main

import "time"

// A trend tells how fast a count grows, from what it was at several moments.
type trend struct {
	span   time.Duration // how far it looks back
	points []trendPoint  // oldest first, at most trendPoints
}

type trendPoint struct {
	at    time.Time
	count float64
}

// trendPoints is how many moments of its span a trend remembers.
const trendPoints = 64

// add tells what the count is at a moment. One that is lower than before begins anew.
func (t *trend) add(at time.Time, count float64) {
	n := len(t.points)
	if n > 0 && count < t.points[n-1].count {
		t.points, n = t.points[:0], 0
	}
	if n > 1 && at.Sub(t.points[n-2].at) < t.span/trendPoints {
		t.points, n = t.points[:n-1], n-1 // the one before it is as good
	}
	t.points = append(t.points, trendPoint{at, count})
	old := 0
	for old < n-1 && at.Sub(t.points[old+1].at) >= t.span {
		old++
	}
	t.points = append(t.points[:0], t.points[old:]...)
}

// perSecond returns by how much the count grows in a second; 0 as long as there is
// nothing to tell it from.
func (t *trend) perSecond() float64 {
	n := len(t.points)
	if n < 2 {
		return 0
	}
	first, last := t.points[0], t.points[n-1]
	seconds := last.at.Sub(first.at).Seconds()
	if seconds <= 0 {
		return 0
	}
	return (last.count - first.count) / seconds
}
