package blockstoretest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
)

// An Op is a method of blockstore.Store.
type Op string

// The methods that Faulty counts and can make fail.
const (
	OpGet       Op = "get"
	OpReadRange Op = "read"
	OpPut       Op = "put"
	OpDelete    Op = "delete"
	OpList      Op = "list"
)

// A Call is one call on a Faulty store.
type Call struct {
	Op   Op
	Keys []string // one; for Delete, all of them; for List, the prefix
}

func (c Call) String() string { return string(c.Op) + " " + strings.Join(c.Keys, " ") }

// A Rule names the calls that a fault befalls: of those that match Op, Prefix
// and Match, the first Skip pass and the next Times are hit.
type Rule struct {
	Op     Op              // "" matches all
	Prefix string          // of the call's first key
	Match  func(Call) bool // nil matches all; it must not call the store
	Skip   int
	Times  int // 0: all that follow
}

// A Fault is what befalls a call. Its fields apply in their order.
type Fault struct {
	// Before is called first, without any lock held: it may call the store
	// below, to make something happen just before the call.
	Before func(ctx context.Context, c Call)

	// Delay is waited, or until the call's context is done, which ends it.
	Delay time.Duration

	// Hang waits until the call's context is done, which ends it.
	Hang bool

	// Err is returned instead of making the call.
	Err error

	// LoseReply makes the call, and then fails it as blockstore.ErrUnavailable
	// whatever came of it.
	LoseReply bool

	// Flip inverts one bit in the middle of the data that a Get or ReadRange
	// succeeded with.
	Flip bool

	// Truncate drops the second half of the data that a Get succeeded with, and
	// fails a ReadRange as blockstore.ErrShort after filling half of it.
	Truncate bool
}

// Faulty is a store that misbehaves by rule. Its methods may be called
// concurrently.
type Faulty struct {
	store blockstore.Store

	mu    sync.Mutex // guards the fields below
	rules []*activeRule
	calls []Call
}

type activeRule struct {
	Rule
	Fault
	seen int
}

// NewFaulty returns a store that passes every call on to s until told otherwise.
func NewFaulty(s blockstore.Store) *Faulty { return &Faulty{store: s} }

// Inject adds a rule. Where several hit the same call, the first added does.
func (f *Faulty) Inject(r Rule, fault Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = append(f.rules, &activeRule{Rule: r, Fault: fault})
}

// Heal removes all rules.
func (f *Faulty) Heal() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.rules = nil
}

// Calls returns the calls made since the last Reset, in their order, those that
// were made to fail included.
func (f *Faulty) Calls() []Call {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// Count returns how many calls of one kind were made since the last Reset.
func (f *Faulty) Count(op Op) int {
	n := 0
	for _, c := range f.Calls() {
		if c.Op == op {
			n++
		}
	}
	return n
}

// Reset forgets the calls made so far.
func (f *Faulty) Reset() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = nil
}

// record notes a call and returns what befalls it.
func (f *Faulty) record(c Call) Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, c)
	var hit *activeRule
	for _, r := range f.rules {
		if !r.matches(c) {
			continue
		}
		r.seen++
		if hit == nil && r.seen > r.Skip && (r.Times == 0 || r.seen <= r.Skip+r.Times) {
			hit = r
		}
	}
	if hit == nil {
		return Fault{}
	}
	return hit.Fault
}

func (r *activeRule) matches(c Call) bool {
	if r.Op != "" && r.Op != c.Op {
		return false
	}
	if r.Prefix != "" && (len(c.Keys) == 0 || !strings.HasPrefix(c.Keys[0], r.Prefix)) {
		return false
	}
	return r.Match == nil || r.Match(c)
}

// do makes a call, or what its fault makes of it.
func (f *Faulty) do(ctx context.Context, op Op, keys []string, call func(Fault) error) error {
	c := Call{op, slices.Clone(keys)}
	fault := f.record(c)
	if fault.Before != nil {
		fault.Before(ctx, c)
	}
	if fault.Delay > 0 {
		select {
		case <-time.After(fault.Delay):
		case <-ctx.Done():
			return fmt.Errorf("%v (delayed by a test): %w", c, context.Cause(ctx))
		}
	}
	if fault.Hang {
		<-ctx.Done()
		return fmt.Errorf("%v (hanging for a test): %w", c, context.Cause(ctx))
	}
	if fault.Err != nil {
		return fmt.Errorf("%v (failed by a test): %w", c, fault.Err)
	}
	err := call(fault)
	if fault.LoseReply {
		return fmt.Errorf("%v (its reply lost by a test): %w", c, blockstore.ErrUnavailable)
	}
	return err
}

func (f *Faulty) String() string { return f.store.String() }

// Get implements blockstore.Store.
func (f *Faulty) Get(ctx context.Context, key string, limit int64) (data []byte, etag string, err error) {
	err = f.do(ctx, OpGet, []string{key}, func(fault Fault) error {
		data, etag, err = f.store.Get(ctx, key, limit)
		if fault.Flip {
			flip(data)
		}
		if fault.Truncate {
			data = data[:len(data)/2]
		}
		return err
	})
	if err != nil {
		return nil, "", err
	}
	return data, etag, nil
}

// ReadRange implements blockstore.Store.
func (f *Faulty) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	return f.do(ctx, OpReadRange, []string{key}, func(fault Fault) error {
		if fault.Truncate {
			err := f.store.ReadRange(ctx, key, off, p[:len(p)/2])
			return errors.Join(err, fmt.Errorf("read %q (truncated by a test): %w", key, blockstore.ErrShort))
		}
		err := f.store.ReadRange(ctx, key, off, p)
		if fault.Flip {
			flip(p)
		}
		return err
	})
}

// Put implements blockstore.Store.
func (f *Faulty) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (etag string, err error) {
	err = f.do(ctx, OpPut, []string{key}, func(Fault) error {
		etag, err = f.store.Put(ctx, key, data, c)
		return err
	})
	if err != nil {
		return "", err
	}
	return etag, nil
}

// Delete implements blockstore.Store.
func (f *Faulty) Delete(ctx context.Context, keys ...string) error {
	return f.do(ctx, OpDelete, keys, func(Fault) error { return f.store.Delete(ctx, keys...) })
}

// List implements blockstore.Store. A fault befalls it before its first key,
// except for LoseReply, which fails it after the last.
func (f *Faulty) List(ctx context.Context, prefix string, fn func(blockstore.Info) error) error {
	return f.do(ctx, OpList, []string{prefix}, func(Fault) error { return f.store.List(ctx, prefix, fn) })
}

func flip(data []byte) {
	if len(data) > 0 {
		data[len(data)/2] ^= 0x10
	}
}
