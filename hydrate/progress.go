package hydrate

import (
	"math"
	"time"
)

// A State says what a hydrator is about.
type State uint8

const (
	Hydrating State = iota // fetching, or about to; also between two passes
	Paused                 // asked to; see [Hydrator.Pause]
	CacheFull              // the cache takes no more; asks again every few seconds
	Waiting                // the store cannot be used; asks again at least every half minute
	Done                   // nothing is missing
)

// String returns the state as status.json spells it.
func (s State) String() string {
	switch s {
	case Hydrating:
		return "hydrating"
	case Paused:
		return "paused"
	case CacheFull:
		return "cache-full"
	case Waiting:
		return "waiting-for-store"
	case Done:
		return "hydrated"
	}
	return "unknown"
}

// Progress is how far a hydrator has come, counted since New.
type Progress struct {
	State        State
	FetchedBytes int64 // stored bytes of the runs fetched
	Runs         int64 // runs fetched
	Blocks       int64 // blocks of the runs fetched
	Rate         int64 // stored bytes per second, over about the last half minute

	Errors    int64 // calls of the source that failed; a full cache is no failure
	LastError error // why something is still to be retried; nil when nothing is
}

// ETA estimates how long it takes at the present rate to fetch that many blocks
// more, if they compress like those fetched so far. ok is false while there is
// nothing to estimate from.
func (p Progress) ETA(blocks int64) (eta time.Duration, ok bool) {
	if p.Blocks == 0 || p.Rate == 0 {
		return 0, false
	}
	stored := float64(blocks) * float64(p.FetchedBytes) / float64(p.Blocks)
	seconds := min(stored/float64(p.Rate), maxETA.Seconds())
	return time.Duration(seconds * float64(time.Second)), true
}

// maxETA keeps an estimate within a Duration.
const maxETA = 100 * 365 * 24 * time.Hour

// A record is what a hydrator knows of its progress.
type record struct {
	state   State // any but Paused
	outage  error // why state is Waiting
	fault   error // the last of this pass, or of the one before while this one has none
	fetched int64
	runs    int64
	blocks  int64
	errors  int64
	meter   meter
}

// Progress returns how far the hydrator has come.
func (h *Hydrator) Progress() Progress {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := Progress{
		State:        h.record.state,
		FetchedBytes: h.record.fetched,
		Runs:         h.record.runs,
		Blocks:       h.record.blocks,
		Rate:         h.record.meter.rate(time.Now()),
		Errors:       h.record.errors,
		LastError:    h.record.outage,
	}
	if p.LastError == nil {
		p.LastError = h.record.fault
	}
	if h.paused.Load() && p.State != Done {
		p.State = Paused
	}
	return p
}

// note changes the record.
func (h *Hydrator) note(change func(r *record)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	change(&h.record)
}

// meterSpan is the time after which a byte weighs 1/e of a new one: long enough
// to even out packs of 16 MiB at a rate of 1 MiB/s.
const meterSpan = 30 * time.Second

// A meter is an exponentially weighted average of bytes per second.
type meter struct {
	began, last time.Time
	sum         float64 // of the bytes, each weighted as of last
}

func (m *meter) begin(now time.Time) {
	if m.began.IsZero() {
		m.began, m.last = now, now
	}
}

func (m *meter) add(now time.Time, bytes int64) {
	m.sum = m.sum*weight(now.Sub(m.last)) + float64(bytes)
	m.last = now
}

// rate divides by the weight of all the time that was measured, so that it is
// right from the first byte on.
func (m *meter) rate(now time.Time) int64 {
	if !now.After(m.began) || m.sum == 0 {
		return 0
	}
	measured := meterSpan.Seconds() * (1 - weight(now.Sub(m.began)))
	return int64(m.sum * weight(now.Sub(m.last)) / measured)
}

func weight(age time.Duration) float64 {
	return math.Exp(-age.Seconds() / meterSpan.Seconds())
}
