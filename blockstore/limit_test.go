package blockstore_test

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

func TestLimitBoundsTheCallsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := blockstore.NewMem()
		mustPut(t, mem, "k", "data")
		slow := blockstoretest.NewFaulty(mem)
		var now, most atomic.Int32
		slow.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Before: func(context.Context, blockstoretest.Call) {
			n := now.Add(1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			time.Sleep(time.Second)
			now.Add(-1)
		}})
		s := blockstore.Limit(slow, 3)
		begin := time.Now()
		var wg sync.WaitGroup
		for range 12 {
			wg.Go(func() {
				if _, _, err := s.Get(t.Context(), "k", 100); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if most.Load() != 3 || time.Since(begin) != 4*time.Second {
			t.Errorf("12 calls of 1 s ran %d at once and took %v, want 3 and 4 s", most.Load(), time.Since(begin))
		}
	})
}

func TestLimitStopsWaitingWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stuck := blockstoretest.NewFaulty(blockstore.NewMem())
		stuck.Inject(blockstoretest.Rule{Times: 1}, blockstoretest.Fault{Hang: true})
		s := blockstore.Limit(stuck, 1)
		ctx, cancel := context.WithCancel(t.Context())
		go s.Delete(ctx, "k") // holds the only turn until the end of the test
		synctest.Wait()
		for call, err := range callAll(timeout(t, time.Second), s) {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s: got error %v, want %v", call, err, context.DeadlineExceeded)
			}
		}
		cancel()
		synctest.Wait()
		if err := s.Delete(t.Context(), "k"); err != nil {
			t.Errorf("after the turn came back: %v", err)
		}
	})
}

func timeout(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestListFunctionMayUseTheOnlyTurn(t *testing.T) {
	s := blockstore.Limit(blockstore.NewMem(), 1)
	mustPut(t, s, "a", "")
	mustPut(t, s, "b", "")
	for range 2 { // that no turn is lost shows the second time
		err := s.List(t.Context(), "", func(info blockstore.Info) error {
			_, _, err := s.Get(t.Context(), info.Key, 1)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestLimitGetsItsTurnBackFromAListingThatStops(t *testing.T) {
	s := blockstore.Limit(blockstore.NewMem(), 1)
	mustPut(t, s, "k", "")
	stop := errors.New("stop")
	for range 3 {
		if err := s.List(t.Context(), "", func(blockstore.Info) error { return stop }); err != stop {
			t.Fatalf("got error %v, want that of the function", err)
		}
	}
	mustPut(t, s, "k", "")
}
