package hydrate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/manifest"
)

// maxFaultsInRow is how many runs may fail one after the other, seemingly each
// for a reason of its own, before a common one (a broken disk, say) is assumed
// and tries are spaced out like those of a store in trouble.
const maxFaultsInRow = 8

// longOutage is how many tries in a row must fail before the log tells of it:
// that takes some five seconds, more than throttling usually does.
const longOutage = 4

// A job is a run to warm and the leaf to plan again if that fails.
type job struct {
	leaf int64
	run  manifest.Run
}

type warmed struct {
	job
	err error
}

type planned struct {
	leaf, next int64
	blocks     []int64 // instead of a leaf
	runs       []manifest.Run
	err        error
}

// batchBlocks is how many blocks of a trace are planned at once: enough to find
// neighbours that one request can fetch, and few enough to keep their order.
const batchBlocks = 64

// A schedule decides what to start when. One goroutine, that of Hydrator.Run,
// owns it; each call of the source has a goroutine of its own, which only sends
// the result.
type schedule struct {
	h        *Hydrator
	calls    sync.WaitGroup
	warmed   chan warmed  // has room for every run in flight
	planned  chan planned // has room for the one leaf being planned
	inflight int          // runs being warmed
	planning bool

	blocks []int64 // of the trace, to plan before any leaf
	due    agenda  // leaves to plan in this pass
	left   agenda  // leaves to plan in the next
	queue  []job   // planned and not started: few, or what one leaf has
	faults int     // runs and leaves left behind in this pass

	window      window
	state       State     // Hydrating, or the trouble the last calls had
	holdUntil   time.Time // nothing starts before
	outages     int       // tries that failed since the store last worked
	faultsInRow int       // since a run last succeeded
}

func newSchedule(h *Hydrator) *schedule {
	return &schedule{
		h:       h,
		blocks:  h.options.Blocks,
		window:  newWindow(h.options.Workers),
		warmed:  make(chan warmed, h.options.Workers),
		planned: make(chan planned, 1),
	}
}

// pass plans the leaves of due and warms their runs. It returns the leaves to
// look at again, or ctx.Err(); either way no call of the source is under way.
func (s *schedule) pass(ctx context.Context, due agenda) (left agenda, err error) {
	defer s.calls.Wait()
	s.due, s.left, s.faults = due, noLeaf(), 0
	for ctx.Err() == nil {
		var later <-chan time.Time
		if wait := s.start(ctx); wait > 0 {
			later = time.After(wait)
		}
		if s.inflight == 0 && !s.planning && len(s.queue) == 0 && len(s.blocks) == 0 && s.due.empty() {
			return s.left, nil
		}
		select {
		case r := <-s.warmed:
			s.inflight--
			if ctx.Err() == nil { // else being stopped may be its only fault
				s.settleRun(r)
			}
		case p := <-s.planned:
			s.planning = false
			if ctx.Err() == nil {
				s.settlePlan(p)
			}
		case <-s.h.wake:
		case <-later:
		case <-ctx.Done():
		}
	}
	return agenda{}, ctx.Err()
}

// start starts all that may start now. It returns for how long time alone
// forbids more, or 0 when a result or a wake-up comes first.
func (s *schedule) start(ctx context.Context) time.Duration {
	for !s.h.paused.Load() {
		now := time.Now()
		if wait := s.holdUntil.Sub(now); wait > 0 {
			return wait
		}
		if s.state != Hydrating && (s.inflight > 0 || s.planning) {
			return 0 // one try at a time
		}
		if !s.planning && len(s.queue) < 4*s.h.options.Workers {
			if len(s.blocks) > 0 {
				s.planBlocks(ctx)
				continue
			}
			if !s.due.empty() {
				s.plan(ctx)
				continue
			}
		}
		if len(s.queue) == 0 || !s.window.admits(s.inflight) || s.inflight > 0 && s.h.options.Busy() > 0 {
			return 0
		}
		if wait := s.h.pace.wait(now); wait > 0 {
			return wait
		}
		s.warm(ctx, now)
	}
	return 0
}

func (s *schedule) plan(ctx context.Context) {
	s.planning = true
	leaf := s.due.first()
	s.calls.Go(func() {
		runs, next, err := s.h.source.Plan(ctx, leaf)
		s.planned <- planned{leaf: leaf, next: max(next, leaf+1), runs: runs, err: err}
	})
}

func (s *schedule) planBlocks(ctx context.Context) {
	s.planning = true
	blocks := s.blocks[:min(len(s.blocks), batchBlocks)]
	s.calls.Go(func() {
		runs, err := s.h.source.PlanBlocks(ctx, blocks)
		s.planned <- planned{blocks: blocks, runs: runs, err: err}
	})
}

func (s *schedule) warm(ctx context.Context, now time.Time) {
	s.inflight++
	j := s.queue[0]
	s.queue = s.queue[1:]
	_, stored := j.run.Span()
	s.h.pace.take(now, stored)
	s.calls.Go(func() {
		s.warmed <- warmed{j, s.h.source.Warm(ctx, j.run)}
	})
}

func (s *schedule) settlePlan(p planned) {
	down := errors.Is(p.err, ErrUnavailable)
	if s.state == Waiting && !down { // that the cache has room a plan does not show
		s.heal()
	}
	if p.blocks != nil {
		s.settleBlocks(p)
		return
	}
	switch {
	case p.err == nil:
		s.due.strike(p.next)
		for _, run := range p.runs {
			s.queue = append(s.queue, job{p.leaf, run})
		}
	case p.err == io.EOF: // itself: a broken connection may well wrap one
		s.due.strike(noRest)
	case down:
		s.outage(fmt.Errorf("plan leaf %d: %w", p.leaf, p.err))
	default:
		s.due.strike(p.next)
		s.leaveBehind(p.leaf, fmt.Errorf("plan leaf %d: %w", p.leaf, p.err))
	}
}

// settleBlocks is settlePlan for a part of a trace.
func (s *schedule) settleBlocks(p planned) {
	if errors.Is(p.err, ErrUnavailable) {
		s.outage(fmt.Errorf("plan %d blocks from block %d: %w", len(p.blocks), p.blocks[0], p.err))
		return
	}
	s.blocks = s.blocks[len(p.blocks):]
	if p.err != nil {
		s.fault(fmt.Errorf("plan %d blocks from block %d: %w", len(p.blocks), p.blocks[0], p.err))
		return
	}
	for _, run := range p.runs {
		s.queue = append(s.queue, job{run: run})
	}
}

func (s *schedule) settleRun(r warmed) {
	switch {
	case r.err == nil:
		s.heal()
		s.count(r.run)
	case errors.Is(r.err, ErrFull) && s.h.options.Blocks != nil:
		s.blocks, s.queue = nil, nil // what is touched next would evict what comes first
	case errors.Is(r.err, ErrFull):
		s.queue = slices.Insert(s.queue, 0, r.job)
		s.full()
	case errors.Is(r.err, ErrUnavailable):
		// Behind the next one, lest an object that alone is out of reach holds up
		// all others.
		s.queue = slices.Insert(s.queue, min(1, len(s.queue)), r.job)
		s.outage(r.describe())
	case s.h.options.Blocks != nil:
		s.heal()
		s.fault(r.describe())
	default:
		s.heal()
		s.leaveBehind(r.leaf, r.describe())
	}
}

func (s *schedule) count(run manifest.Run) {
	_, stored := run.Span()
	s.h.note(func(r *record) {
		r.runs++
		r.blocks += int64(len(run.Blocks))
		r.fetched += stored
		r.meter.add(time.Now(), stored)
	})
	s.faultsInRow = 0
	if s.h.options.Busy() > 0 {
		s.window.shrink()
	} else {
		s.window.grow()
	}
}

func (r warmed) describe() error {
	return fmt.Errorf("warm %d blocks from block %d: %w", len(r.run.Blocks), r.run.Blocks[0], r.err)
}

// full waits for room in the cache. Meanwhile demand may evict what this pass has
// been past, so the next one looks at everything again.
func (s *schedule) full() {
	s.left = everyLeaf()
	already := s.state == CacheFull
	if s.hold(CacheFull, nil, fullRetry) && !already {
		s.h.options.Log.Info("cache is full, hydration waits")
	}
}

// outage waits for the store, longer after each failed try.
func (s *schedule) outage(err error) {
	s.h.note(func(r *record) { r.errors++ })
	if s.hold(Waiting, err, backoff(s.outages, storeRetryMin, storeRetryMax)) {
		s.outages++
		s.window.shrink()
		if s.outages == longOutage {
			s.h.options.Log.Warn("store is unavailable, hydration waits", "err", err)
		}
	}
}

// hold starts nothing for a while, because of a trouble that is not one run's.
// It reports whether that is news: calls that were in flight when the trouble
// began fail together and tell of it once.
func (s *schedule) hold(trouble State, outage error, wait time.Duration) bool {
	now := time.Now()
	if now.Before(s.holdUntil) {
		return false
	}
	s.holdUntil = now.Add(wait)
	s.state = trouble
	s.h.note(func(r *record) { r.state, r.outage = trouble, outage })
	return true
}

// heal ends a trouble that a call did not meet. A call that ends during a hold
// began before it and proves nothing.
func (s *schedule) heal() {
	if s.state == Hydrating || time.Now().Before(s.holdUntil) {
		return
	}
	if s.state == CacheFull || s.outages >= longOutage {
		s.h.options.Log.Info("hydration goes on", "after", s.state)
	}
	s.state, s.outages = Hydrating, 0
	s.h.note(func(r *record) { r.state, r.outage = Hydrating, nil })
}

// leaveBehind leaves what failed in leaf for the next pass.
func (s *schedule) leaveBehind(leaf int64, fault error) {
	s.left.add(leaf)
	s.faults++
	if s.faults == 1 {
		s.h.options.Log.Warn("hydration leaves a run behind", "err", fault)
	}
	s.fault(fault)
}

// fault notes what failed for a reason of its own.
func (s *schedule) fault(fault error) {
	s.h.note(func(r *record) { r.errors++; r.fault = fault })
	if s.faultsInRow++; s.faultsInRow >= maxFaultsInRow {
		s.window.shrink()
		s.holdUntil = time.Now().Add(backoff(s.faultsInRow-maxFaultsInRow, storeRetryMin, storeRetryMax))
	}
}
