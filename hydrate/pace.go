package hydrate

import (
	"math/rand/v2"
	"time"

	"golang.org/x/time/rate"
)

// A window is how many runs may be in flight: additive increase, multiplicative
// decrease, between 1 and its limit.
type window struct {
	size, limit float64
}

func newWindow(limit int) window { return window{size: float64(limit), limit: float64(limit)} }

// grow is called for every finished run, hence the fraction.
func (w *window) grow() { w.size = min(w.size+1/w.size, w.limit) }

func (w *window) shrink() { w.size = max(w.size/2, 1) }

func (w *window) admits(inflight int) bool { return inflight < int(w.size) }

// The burst is what a second allows, within these bounds.
const (
	minBurst = 1 << 20
	maxBurst = 1 << 30
)

// A pace is a token bucket of stored bytes that a run may take more from than is
// in it; the next one waits until the bucket is no longer overdrawn. Safe for
// concurrent use.
type pace struct {
	bucket *rate.Limiter
}

func newPace(bytesPerSecond int64) pace {
	p := pace{rate.NewLimiter(rate.Inf, minBurst)}
	p.set(bytesPerSecond)
	return p
}

func (p pace) set(bytesPerSecond int64) {
	if bytesPerSecond <= 0 {
		p.bucket.SetLimit(rate.Inf)
		return
	}
	p.bucket.SetLimit(rate.Limit(bytesPerSecond))
	p.bucket.SetBurst(int(min(max(bytesPerSecond, minBurst), maxBurst)))
}

// wait returns how long no run may start.
func (p pace) wait(now time.Time) time.Duration {
	limit := p.bucket.Limit()
	if limit == rate.Inf {
		return 0
	}
	return time.Duration(max(0, -p.bucket.TokensAt(now)/float64(limit)*float64(time.Second)))
}

// take overdraws the bucket where it must, in parts because a [rate.Limiter]
// reserves no more than its burst at once.
func (p pace) take(now time.Time, bytes int64) {
	if p.bucket.Limit() == rate.Inf {
		return
	}
	for part := int64(p.bucket.Burst()); bytes > 0; bytes -= part {
		p.bucket.ReserveN(now, int(min(bytes, part)))
	}
}

// How long to wait before the next try.
const (
	storeRetryMin = 500 * time.Millisecond // after an outage began; doubles with each failed try
	storeRetryMax = 30 * time.Second       // so long after it ended at most does hydration go on
	fullRetry     = 5 * time.Second        // while the cache is full: a look costs some system calls
	passRetryMin  = 1 * time.Second        // after the first pass that left something behind; doubles
	passRetryMax  = 10 * time.Minute       // each costs a few requests per run left behind
)

// backoff returns the wait after try n, counted from 0: low doubled n times, at
// most high, and of that a random half to all, so that hosts which failed
// together do not come back together.
func backoff(n int, low, high time.Duration) time.Duration {
	d := min(low<<min(n, 16), high)
	return d/2 + rand.N(d/2+1)
}
