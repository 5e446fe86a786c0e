package blockstore_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// brokenStore breaks one promise.
type brokenStore struct {
	blockstore.Store
	broken string
}

const (
	ignoresIfAbsent = "If-None-Match"
	ignoresIfMatch  = "If-Match: it replaced"
	revivesDeleted  = "If-Match: it brought back"
	racyCreate      = "does not create atomically"
	ignoresRange    = "Range"
	staleList       = "listed"
	keepsDeleted    = "still returns"
)

func (s brokenStore) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	_, match := c.Match()
	switch {
	case s.broken == ignoresIfAbsent && c.Absent(), s.broken == ignoresIfMatch && match:
		c = blockstore.Condition{}
	case s.broken == revivesDeleted && match:
		if _, _, err := s.Get(ctx, key, 100); errors.Is(err, blockstore.ErrNotExist) {
			c = blockstore.Condition{}
		}
	case s.broken == racyCreate && c.Absent(): // checks first and writes later
		if _, _, err := s.Get(ctx, key, 100); err == nil {
			return "", blockstore.ErrExists
		}
		time.Sleep(time.Second)
		c = blockstore.Condition{}
	}
	return s.Store.Put(ctx, key, data, c)
}

func (s brokenStore) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	if s.broken == ignoresRange {
		off = 0
	}
	return s.Store.ReadRange(ctx, key, off, p)
}

func (s brokenStore) List(ctx context.Context, prefix string, fn func(blockstore.Info) error) error {
	if s.broken == staleList {
		return nil
	}
	return s.Store.List(ctx, prefix, fn)
}

func (s brokenStore) Delete(ctx context.Context, keys ...string) error {
	if s.broken == keepsDeleted && len(keys) == 1 {
		return nil
	}
	return s.Store.Delete(ctx, keys...)
}

func TestProbeNamesThePromiseThatIsBroken(t *testing.T) {
	for _, broken := range []string{ignoresIfAbsent, ignoresIfMatch, revivesDeleted, racyCreate, ignoresRange, staleList} {
		t.Run(broken, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				mem := blockstore.NewMem()
				err := blockstore.Probe(t.Context(), brokenStore{mem, broken})
				if err == nil || !strings.Contains(err.Error(), broken) {
					t.Errorf("got error %v, want one that says %q", err, broken)
				}
				if got := listKeys(t, mem); len(got) != 0 {
					t.Errorf("the probe left %q", got)
				}
			})
		})
	}
}

func TestProbeNoticesADeleteThatDoesNothing(t *testing.T) {
	err := blockstore.Probe(t.Context(), brokenStore{blockstore.NewMem(), keepsDeleted})
	if err == nil || !strings.Contains(err.Error(), "deleted") {
		t.Errorf("got error %v, want one about a deleted object", err)
	}
}

func TestProbePassesThroughLostReplies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for n := range 20 {
			faulty := blockstoretest.NewFaulty(blockstore.NewMem())
			faulty.Inject(blockstoretest.Rule{Skip: n, Times: 1}, blockstoretest.Fault{LoseReply: true})
			if err := blockstore.Probe(t.Context(), blockstore.Retry(faulty, blockstore.RetryPolicy{})); err != nil {
				t.Errorf("the reply to call %d lost: %v", n, err)
			}
		}
	})
}

func TestProbeReportsEveryFailureAndCleansUp(t *testing.T) {
	failure := errors.New("a failure")
	for n := 0; ; n++ {
		mem := blockstore.NewMem()
		faulty := blockstoretest.NewFaulty(mem)
		faulty.Inject(blockstoretest.Rule{Skip: n, Times: 1}, blockstoretest.Fault{Err: failure})
		err := blockstore.Probe(t.Context(), faulty)
		calls := faulty.Calls()
		if n >= len(calls) { // nothing was left to fail
			if err != nil {
				t.Error(err)
			}
			return
		}
		if !errors.Is(err, failure) {
			t.Errorf("%v failed, and the probe said %v", calls[n], err)
		}
		if got := listKeys(t, mem); len(got) != 0 && n < len(calls)-1 { // the last call is the cleanup
			t.Errorf("%v failed, and the probe left %q", calls[n], got)
		}
	}
}

func TestProbeCleansUpAfterItsContextIsDone(t *testing.T) {
	mem := blockstore.NewMem()
	faulty := blockstoretest.NewFaulty(mem)
	ctx, cancel := context.WithCancel(t.Context())
	faulty.Inject(blockstoretest.Rule{Op: blockstoretest.OpGet, Times: 1}, blockstoretest.Fault{
		Before: func(context.Context, blockstoretest.Call) { cancel() },
	})
	if err := blockstore.Probe(ctx, faulty); !errors.Is(err, context.Canceled) {
		t.Errorf("got error %v, want %v", err, context.Canceled)
	}
	if got := listKeys(t, mem); len(got) != 0 {
		t.Errorf("the probe left %q", got)
	}
}
