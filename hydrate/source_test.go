package hydrate_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errCorrupt = errors.New("block is corrupt")

const (
	blocksPerRun = 4
	runTime      = time.Second // of a Warm
	planTime     = 100 * time.Millisecond
)

// source is a volume in memory: leaves of runs, where a run is four blocks. It
// fails the test when a block is asked for twice at once.
type source struct {
	t      fataler
	leaves []int         // runs in each
	stored uint32        // bytes of a block
	linger time.Duration // of a Warm whose context has ended

	// Faults to inject; nil never fails. They are called with the number of the
	// call and before anything happens.
	planFault   func(call int, leaf int64) error
	warmFault   func(call int, block int64) error
	blocksFault func(first int64) error // of PlanBlocks

	mu          sync.Mutex // guards what follows
	present     map[int64]bool
	fetching    map[int64]bool
	inflight    int
	maxInflight int
	plans       []int64
	started     []int64 // first block of each run
	startedAt   []time.Time
}

type fataler interface{ Errorf(string, ...any) }

func newSource(t fataler, leaves ...int) *source {
	return &source{t: t, leaves: leaves, stored: 1 << 18, present: map[int64]bool{}, fetching: map[int64]bool{}}
}

// run returns what is missing of run i of a leaf.
func (s *source) run(leaf int64, i int) (run manifest.Run) {
	for slot := range blocksPerRun {
		block := leaf*manifest.LeafBlocks + int64(i*blocksPerRun+slot)
		if s.present[block] {
			continue
		}
		run.Blocks = append(run.Blocks, block)
		run.Refs = append(run.Refs, manifest.Ref{Offset: uint32(slot) * s.stored, Length: s.stored})
	}
	return run
}

func (s *source) Plan(ctx context.Context, leaf int64) ([]manifest.Run, int64, error) {
	s.mu.Lock()
	call := len(s.plans)
	s.plans = append(s.plans, leaf)
	s.mu.Unlock()
	for leaf < int64(len(s.leaves)) && s.leaves[leaf] == 0 {
		leaf++
	}
	if s.planFault != nil {
		if err := s.planFault(call, leaf); err != nil {
			return nil, leaf + 1, err
		}
	}
	if leaf >= int64(len(s.leaves)) {
		return nil, 0, io.EOF
	}
	if err := sleep(ctx, planTime); err != nil {
		return nil, leaf + 1, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var runs []manifest.Run
	for i := range s.leaves[leaf] {
		if run := s.run(leaf, i); len(run.Blocks) > 0 {
			runs = append(runs, run)
		}
	}
	return runs, leaf + 1, nil
}

// PlanBlocks returns a run for each block that exists and is missing.
func (s *source) PlanBlocks(ctx context.Context, blocks []int64) ([]manifest.Run, error) {
	if s.blocksFault != nil {
		if err := s.blocksFault(blocks[0]); err != nil {
			return nil, err
		}
	}
	if err := sleep(ctx, planTime); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var runs []manifest.Run
	for _, block := range blocks {
		leaf, at := block/manifest.LeafBlocks, int(block%manifest.LeafBlocks)
		if leaf < int64(len(s.leaves)) && at < s.leaves[leaf]*blocksPerRun && !s.present[block] {
			runs = append(runs, manifest.Run{Blocks: []int64{block}, Refs: []manifest.Ref{{Length: s.stored}}})
		}
	}
	return runs, nil
}

func (s *source) Warm(ctx context.Context, run manifest.Run) error {
	call, done := s.begin(run)
	defer done()
	if s.warmFault != nil {
		if err := s.warmFault(call, run.Blocks[0]); err != nil {
			return err
		}
	}
	if err := sleep(ctx, runTime); err != nil {
		time.Sleep(s.linger)
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, block := range run.Blocks {
		s.present[block] = true
	}
	return nil
}

func (s *source) begin(run manifest.Run) (call int, done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	call = len(s.started)
	s.started = append(s.started, run.Blocks[0])
	s.startedAt = append(s.startedAt, time.Now())
	s.inflight++
	s.maxInflight = max(s.maxInflight, s.inflight)
	for _, block := range run.Blocks {
		if s.fetching[block] {
			s.t.Errorf("block %d is fetched twice at once", block)
		}
		s.fetching[block] = true
	}
	return call, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.inflight--
		for _, block := range run.Blocks {
			delete(s.fetching, block)
		}
	}
}

// blocks returns how many blocks the source has.
func (s *source) blocks() (n int) {
	for _, runs := range s.leaves {
		n += runs * blocksPerRun
	}
	return n
}

func (s *source) warmBlocks() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.present)
}

func (s *source) inFlight() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.inflight
}

func (s *source) startedRuns() []int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.started)
}

func (s *source) plannedLeaves() []int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.plans)
}

func (s *source) resetPeak() (was int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	was, s.maxInflight = s.maxInflight, s.inflight
	return was
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// start runs h until the test ends and returns where its result arrives.
func start(t *testing.T, h *hydrate.Hydrator) <-chan error {
	done := make(chan error, 1)
	go func() { done <- h.Run(t.Context()) }()
	return done
}

// finish runs h to its end and returns how long that took.
func finish(t *testing.T, s *source, h *hydrate.Hydrator) time.Duration {
	t.Helper()
	begin := time.Now()
	if err := h.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, want := s.warmBlocks(), s.blocks(); got != want {
		t.Errorf("%d blocks are in the cache, want %d", got, want)
	}
	if p := h.Progress(); p.State != hydrate.Done || p.LastError != nil {
		t.Errorf("after Run: state %v, last error %v", p.State, p.LastError)
	}
	return time.Since(begin)
}

func wantState(t *testing.T, h *hydrate.Hydrator, want hydrate.State) hydrate.Progress {
	t.Helper()
	p := h.Progress()
	if p.State != want {
		t.Errorf("state is %v, want %v (last error: %v)", p.State, want, p.LastError)
	}
	return p
}
