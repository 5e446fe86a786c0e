package main

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/lazyvol/lazyvol/blockstore"
)

// requestBounds are the upper bounds, in seconds, of the buckets of requests: from a
// folder on this disk to the limit on one request.
var requestBounds = [...]float64{0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60}

// storeMeter counts the requests of this process to its stores, each attempt by
// itself. All methods are safe for concurrent use.
type storeMeter struct {
	mu       sync.Mutex // guards what follows
	requests map[blockstore.Operation]*requestCounts
	sent     int64
	received int64
	retries  int64
	answered time.Time // when the store last gave an answer; zero: never
	failing  time.Time // since when it gives none; zero: its last one was one
	refused  bool      // the last request was denied
}

type requestCounts struct {
	results map[blockstore.Result]int64
	buckets [len(requestBounds) + 1]uint64 // the last: longer than all bounds
	sum     time.Duration
}

func newStoreMeter() *storeMeter {
	m := &storeMeter{requests: make(map[blockstore.Operation]*requestCounts)}
	for _, op := range blockstore.Operations() {
		m.requests[op] = &requestCounts{results: make(map[blockstore.Result]int64)}
	}
	return m
}

// seen counts a request that ended.
func (m *storeMeter) seen(r blockstore.Request) {
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.requests[r.Operation]
	c.results[r.Result]++
	c.sum += r.Took
	i := 0
	for i < len(requestBounds) && r.Took.Seconds() > requestBounds[i] {
		i++
	}
	c.buckets[i]++
	m.sent += r.Sent
	m.received += r.Received
	switch r.Result {
	case blockstore.ResultOK:
		m.answered, m.failing, m.refused = now, time.Time{}, false
	case blockstore.ResultUnavailable, blockstore.ResultThrottled, blockstore.ResultDenied, blockstore.ResultError:
		m.refused = r.Result == blockstore.ResultDenied
		if m.failing.IsZero() {
			m.failing = now
		}
	}
}

// retried counts an attempt that repeats another.
func (m *storeMeter) retried() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.retries++
}

// contact returns when the store last gave an answer, and since when it gives none;
// each may be zero. refused: what it said last was that access is denied.
func (m *storeMeter) contact() (answered, failing time.Time, refused bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.answered, m.failing, m.refused
}

// collect hands out what was counted.
func (m *storeMeter) collect(f *families, ch chan<- prometheus.Metric) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, op := range blockstore.Operations() {
		c := m.requests[op]
		for _, result := range blockstore.Results() {
			ch <- f.counter(storeRequests, float64(c.results[result]), string(op), string(result))
		}
		ch <- f.histogram(storeRequestSeconds, requestBounds[:], c.buckets[:], c.sum.Seconds(), string(op))
	}
	ch <- f.counter(storeRetries, float64(m.retries))
	ch <- f.counter(storeSent, float64(m.sent))
	ch <- f.counter(storeReceived, float64(m.received))
	if !m.answered.IsZero() {
		ch <- f.gauge(storeAnswered, unixSeconds(m.answered))
	}
}
