package snapshot_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
)

// A decision is to take another option than the first at a point of a schedule.
type decision struct{ point, option int }

// A plan is all decisions of a schedule. As text it is what LAZYVOL_SCHEDULE
// takes, behind the name of the scenario, to run that schedule alone.
type plan []decision

func (p plan) String() string {
	var b strings.Builder
	for _, d := range p {
		fmt.Fprintf(&b, " %d.%d", d.point, d.option)
	}
	return b.String()
}

// planFromEnvironment returns the plan in LAZYVOL_SCHEDULE, if it is one of the
// scenario.
func planFromEnvironment(t *testing.T, scenario string) (plan, bool) {
	text, ok := strings.CutPrefix(os.Getenv("LAZYVOL_SCHEDULE"), scenario+":")
	if !ok {
		return nil, false
	}
	p, err := parsePlan(text)
	if err != nil {
		t.Fatalf("LAZYVOL_SCHEDULE: %v", err)
	}
	return p, true
}

func parsePlan(text string) (plan, error) {
	var p plan
	for field := range strings.FieldsSeq(text) {
		point, option, _ := strings.Cut(field, ".")
		n, err := strconv.Atoi(point)
		m, err2 := strconv.Atoi(option)
		if err := cmp.Or(err, err2); err != nil {
			return nil, err
		}
		p = append(p, decision{n, m})
	}
	return p, nil
}

// take returns what the plan decides at a point, and the rest of it.
func (p plan) take(point int) (option int, rest plan) {
	if len(p) == 0 || p[0].point != point {
		return 0, p
	}
	return p[0].option, p[1:]
}

// An exploration runs a scenario by many schedules.
type exploration struct {
	name  string // of the scenario
	stage *stage
	cast  func() []*host
	eager bool // as in ledger

	seed maphash.Seed
	seen map[uint64]bool // states that schedules were in
	ends map[uint64]bool // in which they ended, and all was as promised
	runs int             // schedules
	cut  int             // of these, those that joined an earlier one
}

func newExploration(name string, st *stage, cast func() []*host) *exploration {
	return &exploration{
		name: name, stage: st, cast: cast, eager: true,
		seed: maphash.MakeSeed(), seen: make(map[uint64]bool), ends: make(map[uint64]bool),
	}
}

// A failure is a schedule by which a promise was broken.
type failure struct {
	scenario string
	plan     plan
	err      error
	log      []string
}

func (f *failure) String() string {
	return fmt.Sprintf("%v\nby LAZYVOL_SCHEDULE='%s:%v':\n\t%s", f.err, f.scenario, f.plan, strings.Join(f.log, "\n\t"))
}

// run runs the scenario once. It returns nil if no promise was broken.
func (e *exploration) run(ctx context.Context, decide func(s *schedule, point int, options []option) int) *failure {
	l, err := newLedger(e.seed, e.stage.stored)
	if err != nil {
		return &failure{scenario: e.name, err: err}
	}
	l.eager = e.eager
	var made plan
	s := start(ctx, l, e.cast())
	s.run(func(point int, options []option) int {
		i := decide(s, point, options)
		if i > 0 {
			made = append(made, decision{point, i})
		}
		return i
	})
	e.runs++
	if s.stopped {
		e.cut++
		return nil
	}
	if err := e.check(ctx, s); err != nil {
		return &failure{e.name, made, err, s.log}
	}
	return nil
}

// check checks what a schedule came to, unless another one came to the same.
func (e *exploration) check(ctx context.Context, s *schedule) error {
	broken := []error{s.broken}
	end := s.digest
	for _, h := range s.hosts {
		if h.err != nil && (h.faults == 0 || errors.Is(h.err, errBroken)) {
			broken = append(broken, fmt.Errorf("%s: %w", h.name, h.err))
		}
		end = maphash.Comparable(e.seed, [2]any{end, fmt.Sprint(h.told, h.keeps)})
	}
	if !e.ends[end] {
		broken = append(broken, e.stage.check(ctx, s))
	}
	err := errors.Join(broken...)
	if err == nil {
		e.ends[end] = true
	}
	return err
}

// A branch is a schedule to be run: that of another one up to a point, where it
// takes another option, and from there on the first ones.
type branch struct {
	from *branch
	decision
	cost cost
}

func (b *branch) plan() plan {
	var p plan
	for ; b.from != nil; b = b.from {
		p = append(p, b.decision)
	}
	slices.Reverse(p)
	return p
}

// all runs all schedules within a limit, the least costly first, until one
// fails. Of those that come to the same state after the same cost, and so go on
// alike, one is run to its end.
func (e *exploration) all(ctx context.Context, limit cost) *failure {
	levels := make([][]*branch, limit.switches+limit.faults+1)
	levels[0] = []*branch{{}}
	for level := range levels {
		for len(levels[level]) > 0 {
			last := len(levels[level]) - 1
			b := levels[level][last]
			levels[level] = levels[level][:last]
			script := b.plan()
			f := e.run(ctx, func(s *schedule, point int, options []option) (i int) {
				if len(script) > 0 {
					i, script = script.take(point)
					return i
				}
				if state := s.state(); e.seen[state] {
					return -1
				} else {
					e.seen[state] = true
				}
				for i, o := range options {
					if c := b.cost.plus(o.cost); i > 0 && c.within(limit) {
						levels[c.switches+c.faults] = append(levels[c.switches+c.faults], &branch{b, decision{point, i}, c})
					}
				}
				return 0
			})
			if f != nil {
				return f
			}
		}
	}
	return nil
}

// random runs one schedule, drawn at random, with some faults.
func (e *exploration) random(ctx context.Context, seed uint64, faults int) *failure {
	rng := rand.New(rand.NewPCG(seed, 0))
	switching := rng.Float64() * rng.Float64()
	return e.run(ctx, func(_ *schedule, _ int, options []option) int {
		i := 0
		if rng.Float64() < switching {
			i = rng.IntN(len(options))
		}
		if options[i].fault != none {
			if faults == 0 || rng.IntN(4) > 0 {
				for options[i].fault != none {
					i--
				}
				return i
			}
			faults--
		}
		return i
	})
}

// replay runs one schedule.
func (e *exploration) replay(ctx context.Context, p plan) *failure {
	return e.run(ctx, func(_ *schedule, point int, _ []option) (i int) {
		i, p = p.take(point)
		return i
	})
}

func (e *exploration) String() string {
	return fmt.Sprintf("%d schedules, %d of them until they joined another, in %d states and %d ends", e.runs, e.cut, len(e.seen), len(e.ends))
}

// bubble runs fn in a synctest bubble.
func bubble(t *testing.T, fn func(ctx context.Context)) {
	synctest.Test(t, func(t *testing.T) { fn(t.Context()) })
}
