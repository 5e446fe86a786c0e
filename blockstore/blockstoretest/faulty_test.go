package blockstoretest_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// childURLEnv makes a process of this test binary the child of a test.
const childURLEnv = "LAZYVOL_TEST_CHILD_STORE"

func TestMain(m *testing.M) {
	if url := os.Getenv(childURLEnv); url != "" {
		if err := putInChild(url); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

const content = "0123456789"

func newFaulty(t *testing.T) *blockstoretest.Faulty {
	t.Helper()
	mem := blockstore.NewMem()
	for _, key := range []string{"a/1", "a/2", "b"} {
		if _, err := mem.Put(t.Context(), key, []byte(content), blockstore.IfAbsent); err != nil {
			t.Fatal(err)
		}
	}
	return blockstoretest.NewFaulty(mem)
}

func get(ctx context.Context, s blockstore.Store, key string) (string, error) {
	data, _, err := s.Get(ctx, key, 100)
	return string(data), err
}

func TestFaultHitsExactlyTheCallsItsRuleNames(t *testing.T) {
	failure := errors.New("failure")
	for name, test := range map[string]struct {
		rule blockstoretest.Rule
		want []bool // whether the calls below fail
	}{
		"All":    {blockstoretest.Rule{}, []bool{true, true, true, true, true}},
		"Second": {blockstoretest.Rule{Skip: 1, Times: 1}, []bool{false, true, false, false, false}},
		"Op":     {blockstoretest.Rule{Op: blockstoretest.OpGet, Skip: 1}, []bool{false, false, true, false, true}},
		"Prefix": {blockstoretest.Rule{Prefix: "a/"}, []bool{true, true, false, true, false}},
		"Match": {blockstoretest.Rule{Match: func(c blockstoretest.Call) bool { return len(c.Keys) == 2 }},
			[]bool{false, false, false, true, false}},
		"None": {blockstoretest.Rule{Skip: 5}, []bool{false, false, false, false, false}},
	} {
		t.Run(name, func(t *testing.T) {
			s := newFaulty(t)
			s.Inject(test.rule, blockstoretest.Fault{Err: failure})
			var errs [5]error
			_, errs[0] = get(t.Context(), s, "a/1")
			errs[1] = s.List(t.Context(), "a/", func(blockstore.Info) error { return nil })
			_, errs[2] = get(t.Context(), s, "b")
			errs[3] = s.Delete(t.Context(), "a/1", "a/2")
			_, errs[4] = get(t.Context(), s, "b")
			for i, err := range errs {
				if errors.Is(err, failure) != test.want[i] {
					t.Errorf("call %d: got error %v; that it fails should be %v", i, err, test.want[i])
				}
			}
			want := []blockstoretest.Call{
				{Op: blockstoretest.OpGet, Keys: []string{"a/1"}}, {Op: blockstoretest.OpList, Keys: []string{"a/"}},
				{Op: blockstoretest.OpGet, Keys: []string{"b"}}, {Op: blockstoretest.OpDelete, Keys: []string{"a/1", "a/2"}},
				{Op: blockstoretest.OpGet, Keys: []string{"b"}},
			}
			if diff := cmp.Diff(want, s.Calls()); diff != "" {
				t.Errorf("calls (-want +got):\n%s", diff)
			}
			if got := s.Count(blockstoretest.OpGet); got != 3 {
				t.Errorf("counted %d gets, want 3", got)
			}
			s.Reset()
			s.Heal()
			if _, err := get(t.Context(), s, "b"); err != nil || len(s.Calls()) != 1 {
				t.Errorf("after Heal and Reset: %v, %d calls", err, len(s.Calls()))
			}
		})
	}
}

func TestLostReplyWasApplied(t *testing.T) {
	s := newFaulty(t)
	s.Inject(blockstoretest.Rule{Times: 2}, blockstoretest.Fault{LoseReply: true})
	if _, err := s.Put(t.Context(), "b", []byte("new"), blockstore.Condition{}); !errors.Is(err, blockstore.ErrUnavailable) {
		t.Errorf("put: got error %v, want %v", err, blockstore.ErrUnavailable)
	}
	if err := s.Delete(t.Context(), "a/1"); !errors.Is(err, blockstore.ErrUnavailable) {
		t.Errorf("delete: got error %v, want %v", err, blockstore.ErrUnavailable)
	}
	if got, err := get(t.Context(), s, "b"); got != "new" {
		t.Errorf("got %q, %v: the put was not made", got, err)
	}
	if _, err := get(t.Context(), s, "a/1"); !errors.Is(err, blockstore.ErrNotExist) {
		t.Errorf("got error %v: the delete was not made", err)
	}
}

func TestDamagedDataIsDamagedOnceAndOnTheWayOnly(t *testing.T) {
	s := newFaulty(t)
	p := make([]byte, len(content))
	s.Inject(blockstoretest.Rule{Times: 2}, blockstoretest.Fault{Flip: true})
	if got, err := get(t.Context(), s, "b"); err != nil || got == content || len(got) != len(content) {
		t.Errorf("flipped get: %q, %v", got, err)
	}
	if err := s.ReadRange(t.Context(), "b", 0, p); err != nil || string(p) == content {
		t.Errorf("flipped read: %q, %v", p, err)
	}
	s.Inject(blockstoretest.Rule{Skip: 0, Times: 2}, blockstoretest.Fault{Truncate: true})
	if got, err := get(t.Context(), s, "b"); err != nil || got != content[:5] {
		t.Errorf("truncated get: %q, %v", got, err)
	}
	if err := s.ReadRange(t.Context(), "b", 0, p); !errors.Is(err, blockstore.ErrShort) {
		t.Errorf("truncated read: got error %v, want %v", err, blockstore.ErrShort)
	}
	if got, err := get(t.Context(), s, "b"); err != nil || got != content {
		t.Errorf("after all faults: %q, %v", got, err)
	}
}

func TestDelayedAndHangingCallsEndWithTheirContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newFaulty(t)
		s.Inject(blockstoretest.Rule{Times: 1}, blockstoretest.Fault{Delay: time.Second})
		begin := time.Now()
		if _, err := get(t.Context(), s, "b"); err != nil || time.Since(begin) != time.Second {
			t.Errorf("a call delayed by 1 s took %v, %v", time.Since(begin), err)
		}
		for _, fault := range []blockstoretest.Fault{{Delay: time.Hour}, {Hang: true}} {
			s.Heal()
			s.Inject(blockstoretest.Rule{}, fault)
			cause := errors.New("the cause")
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, cause)
			if _, err := get(ctx, s, "b"); !errors.Is(err, cause) {
				t.Errorf("%+v: got error %v, want %v", fault, err, cause)
			}
			cancel()
		}
	})
}

func TestBeforeMayChangeTheStoreUnderACall(t *testing.T) {
	mem := blockstore.NewMem()
	s := blockstoretest.NewFaulty(mem)
	s.Inject(blockstoretest.Rule{Times: 1}, blockstoretest.Fault{Before: func(ctx context.Context, c blockstoretest.Call) {
		if _, err := mem.Put(ctx, c.Keys[0], []byte("first"), blockstore.IfAbsent); err != nil {
			t.Error(err)
		}
	}})
	if _, err := s.Put(t.Context(), "k", []byte("second"), blockstore.IfAbsent); !errors.Is(err, blockstore.ErrExists) {
		t.Errorf("got error %v, want %v", err, blockstore.ErrExists)
	}
}
