package volume

import (
	"sync"
	"time"
)

// demandBounds are the upper bounds, inclusive, of [Stats.DemandLatency]'s
// buckets: from a store in the same rack to the longest read deadline anybody
// sets.
var demandBounds = [...]time.Duration{
	time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond,
	10 * time.Millisecond, 20 * time.Millisecond, 50 * time.Millisecond,
	100 * time.Millisecond, 200 * time.Millisecond, 500 * time.Millisecond,
	time.Second, 2 * time.Second, 5 * time.Second,
	10 * time.Second, 30 * time.Second, time.Minute,
}

// DemandLatencies counts waits by how long they took: element i those of at most
// DemandBounds()[i] that are longer than the bound before, the last those that
// are longer than all bounds.
type DemandLatencies [len(demandBounds) + 1]int64

// DemandBounds returns the bounds of [DemandLatencies], ascending.
func DemandBounds() []time.Duration { return append([]time.Duration(nil), demandBounds[:]...) }

// Quantile returns how long at most that share of the waits took, q from 0 to 1,
// as far as buckets tell: within one, waits are taken to be spread evenly, and none
// to be longer than the last bound. 0 if nobody waited.
func (l DemandLatencies) Quantile(q float64) time.Duration {
	total := int64(0)
	for _, n := range l {
		total += n
	}
	rank := q * float64(total)
	below := time.Duration(0)
	for i, bound := range demandBounds {
		if n := float64(l[i]); n > 0 && rank <= n {
			return below + time.Duration(max(rank, 0)/n*float64(bound-below))
		}
		rank -= float64(l[i])
		below = bound
	}
	if total == 0 {
		return 0
	}
	return below
}

// waits measure how long reads, and writes of parts of pages, wait for the store.
// What is on this host already never comes here.
type waits struct {
	mu      sync.Mutex // guards what follows
	waiting int        // how many do
	since   time.Time  // at least one has been, if waiting > 0
	union   time.Duration
	sum     time.Duration
	count   int64
	latency DemandLatencies
}

// A wait is that of one read, from when it finds that it must wait.
type wait struct {
	of    *waits
	since time.Time // zero: it has not had to
}

// begin notes that the read waits from now on, unless it does already.
func (w *wait) begin() {
	if !w.since.IsZero() {
		return
	}
	w.of.mu.Lock()
	defer w.of.mu.Unlock()
	w.since = time.Now()
	if w.of.waiting == 0 {
		w.of.since = w.since
	}
	w.of.waiting++
}

// end notes that the read has what it waited for, or gave up.
func (w *wait) end() {
	if w.since.IsZero() {
		return
	}
	a := w.of
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	if a.waiting--; a.waiting == 0 {
		a.union += now.Sub(a.since)
	}
	took := now.Sub(w.since)
	a.sum += took
	a.count++
	i := 0
	for i < len(demandBounds) && took > demandBounds[i] {
		i++
	}
	a.latency[i]++
}

// tell fills in what stats tell of waits.
func (a *waits) tell(s *Stats) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s.DemandWait, s.DemandWaitSum, s.DemandWaits, s.DemandLatency = a.union, a.sum, a.count, a.latency
	if a.waiting > 0 {
		s.DemandWait += time.Since(a.since)
	}
}
