package hydrate

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lazyvol/lazyvol/manifest"
)

// What a [Source] reports, wrapped or not, for the hydrator to wait instead of
// going on with the next run.
var (
	// ErrFull: the cache may take no more clean blocks.
	ErrFull = errors.New("cache is full")

	// ErrUnavailable: the store cannot be used at present, whatever is asked of
	// it: unreachable, throttling, or refusing the credentials.
	ErrUnavailable = errors.New("store is unavailable")
)

// A Source is a volume, or a mounted snapshot. It must be safe for concurrent
// use, and its methods must return soon after their context ends.
type Source interface {
	// Plan returns the runs still to fetch in the first leaf ≥ leaf that has any
	// data, in the order to fetch them, and the leaf to continue with, which is
	// greater than leaf. There may be no runs, but no run is empty. When no leaf ≥
	// leaf has data it returns io.EOF itself, never wrapped. It may read a leaf
	// from the store; an error in doing so comes with the leaf to continue with,
	// too.
	Plan(ctx context.Context, leaf int64) (runs []manifest.Run, next int64, err error)

	// PlanBlocks returns the runs of those of some blocks that are still to fetch,
	// in the order to fetch them. Blocks may be given in any order, twice, and not
	// exist.
	PlanBlocks(ctx context.Context, blocks []int64) ([]manifest.Run, error)

	// Warm fetches a run into the cache. Blocks that are there by then are
	// skipped. It returns ErrFull when there is no room for all, and fetches
	// nothing that there is no room for. When some blocks fail, it still caches
	// the others.
	Warm(ctx context.Context, run manifest.Run) error
}

// Options tune a [Hydrator]. The zero Options are good ones.
type Options struct {
	// Workers bounds the runs in flight. 0 is 4: with packs of 16 MiB that keeps
	// a 10 Gbit/s line to S3 mostly busy, in some 100 MiB of memory.
	Workers int

	// Rate bounds the stored bytes fetched per second; 0 is unlimited.
	// [Hydrator.SetRate] has the details.
	Rate int64

	// Busy returns how many demand fetches are in flight right now. It is called
	// before and after every run, and must not block. nil is never busy.
	Busy func() int

	// Blocks, unless nil, are all that is hydrated, in this order: a trace. What of
	// them cannot be had, or has no room, is passed over.
	Blocks []int64

	// Log receives the changes worth telling a person of; nil discards them.
	Log *slog.Logger
}

// A Hydrator fetches everything a source still misses. Its methods are safe for
// concurrent use.
type Hydrator struct {
	source  Source
	options Options
	pace    pace
	running atomic.Bool
	paused  atomic.Bool
	wake    chan struct{} // holds a token after Resume and SetRate

	mu     sync.Mutex // guards record, held for no call
	record record
}

// New returns a Hydrator of s that does nothing until [Hydrator.Run] is called.
func New(s Source, o Options) *Hydrator {
	if o.Workers <= 0 {
		o.Workers = 4
	}
	if o.Busy == nil {
		o.Busy = func() int { return 0 }
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return &Hydrator{source: s, options: o, pace: newPace(o.Rate), wake: make(chan struct{}, 1)}
}

// Run hydrates the source. It returns nil once every block was seen in the
// cache or put there, or once it has been through [Options.Blocks], and ctx.Err()
// when ctx ends before. It never gives up: it waits out a store in trouble, a full
// cache and a pause, and keeps retrying, ever more rarely, what fails for other
// reasons. When it returns, every call of the source has returned and every
// goroutine has ended.
//
// After it has returned it may be called again, for instance because blocks
// were evicted. Calling it while it runs is an error.
func (h *Hydrator) Run(ctx context.Context) error {
	if !h.running.CompareAndSwap(false, true) {
		return errors.New("hydrate: already running")
	}
	defer h.running.Store(false)
	h.note(func(r *record) {
		r.state, r.outage, r.fault = Hydrating, nil, nil
		r.meter.begin(time.Now())
	})

	s := newSchedule(h)
	due := everyLeaf()
	if h.options.Blocks != nil {
		due = noLeaf()
	}
	for n := 0; ; n++ {
		left, err := s.pass(ctx, due)
		if err != nil {
			return err
		}
		if s.faults > 0 {
			wait := backoff(n, passRetryMin, passRetryMax)
			h.options.Log.Warn("hydration left runs behind", "runs", s.faults, "retryIn", wait)
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return ctx.Err()
			}
		} else {
			h.note(func(r *record) { r.fault = nil })
		}
		if left.empty() {
			h.note(func(r *record) { r.state, r.outage = Done, nil })
			return nil
		}
		due = left
	}
}

// Pause stops the starting of runs; those in flight finish. It also holds
// before Run is called.
func (h *Hydrator) Pause() { h.paused.Store(true) }

// Resume ends a pause.
func (h *Hydrator) Resume() {
	h.paused.Store(false)
	h.rouse()
}

// SetRate bounds the stored bytes fetched per second, from now on; 0 or less is
// unlimited. A run starts when those before it are paid for, and is then owed
// for, so runs may be of any size: in t seconds start at most rate·t bytes, plus
// what one second allows (at least 1 MiB, at most 1 GiB) after a quiet time,
// plus one run.
func (h *Hydrator) SetRate(bytesPerSecond int64) {
	h.pace.set(bytesPerSecond)
	h.rouse()
}

// rouse makes the schedule look again at what may start.
func (h *Hydrator) rouse() {
	select {
	case h.wake <- struct{}{}:
	default: // it has not looked since the last time
	}
}
