package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// onRealStores runs a test on a folder and on an S3 server, whose conditional
// puts are what the protocol stands on.
func onRealStores(t *testing.T, test func(t *testing.T, w *world)) {
	t.Run("folder", func(t *testing.T) {
		t.Parallel()
		objects, err := blockstore.Create(t.Context(), "file://"+t.TempDir()+"/store")
		if err != nil {
			t.Fatal(err)
		}
		test(t, newWorldIn(t, objects))
	})
	t.Run("S3", func(t *testing.T) {
		t.Parallel()
		server := blockstoretest.StartVersitygw(t)
		// It answers 409 and 500 to puts beside deletes.
		policy := blockstore.RetryPolicy{Base: time.Millisecond, Max: 50 * time.Millisecond, Rate: 1000}
		test(t, newWorldIn(t, blockstore.Retry(server.Store(t, server.NewBucket(t), "p"), policy)))
	})
}

// A tape is a store that keeps every put, to be made once more.
type tape struct {
	blockstore.Store
	mu   sync.Mutex // guards puts
	puts []taped
}

type taped struct {
	key       string
	data      []byte
	condition blockstore.Condition
}

func (s *tape) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	s.mu.Lock()
	s.puts = append(s.puts, taped{key, bytes.Clone(data), c})
	s.mu.Unlock()
	return s.Store.Put(ctx, key, data, c)
}

// again makes every put once more, as a network does that delivers one twice.
func (s *tape) again(ctx context.Context) error {
	for _, p := range s.puts {
		_, err := s.Store.Put(ctx, p.key, p.data, p.condition)
		if err != nil && !errors.Is(err, blockstore.ErrExists) {
			return err
		}
	}
	return nil
}

// A put that is delivered a second time, however late, changes nothing that is
// live, brings nothing back, and costs no space for longer than to the next
// reclaim.
func TestPutsDeliveredTwiceChangeNothing(t *testing.T) {
	t.Parallel()
	onRealStores(t, func(t *testing.T, w *world) {
		first := newDevice(20*testBlock).random(1, span(0, 20)...)
		one := w.create(nil, nil, first)
		second := first.random(2, 3).tiny(2, 7).punched(9)
		me := snapshot.Holder{ID: "vol-1"}
		puts := &tape{Store: w.faults}
		store := storeIn(puts)
		plan := w.plan(one, second)
		plan.Holder = me
		if _, err := store.Create(w.ctx, plan, second.since(first), nil); err != nil {
			t.Fatal(err)
		}
		late := func(when string) {
			t.Helper()
			if err := puts.again(w.ctx); err != nil {
				t.Fatalf("%s: %v", when, err)
			}
		}
		late("committed")
		w.mustHold(w.open(plan.ID), second)
		w.mustVerify(plan.ID)

		w.delete(one.ID())
		w.reclaim()
		late("its parent reclaimed")
		w.mustHold(w.open(plan.ID), second)
		w.mustVerify(plan.ID)

		w.delete(plan.ID)
		if err := w.store.Unpin(w.ctx, plan.ID, me.ID); err != nil {
			t.Fatal(err)
		}
		w.reclaim()
		w.wantNone("data/")
		late("deleted")
		if _, err := w.store.Open(w.ctx, plan.ID, snapshot.Holder{}); !errors.Is(err, snapshot.ErrNotFound) {
			t.Errorf("a deleted snapshot whose puts were made again: %v", err)
		}
		// The pin, too, which its holder looks after, or a person.
		if _, err := w.store.Forget(w.ctx, me.ID); err != nil {
			t.Fatal(err)
		}
		w.reclaim()
		w.wantNone("data/", "pins/", "progress/")
	})
}

// An attempt that was aborted stays so, whatever of it arrives later: the puts
// of the owner, who was suspended, and those of the network.
func TestAbortedAttemptNeverCommits(t *testing.T) { plainAndSealed(t, testAbortedAttemptNeverCommits) }

func testAbortedAttemptNeverCommits(t *testing.T, newWorld func(testing.TB) *world) {
	t.Parallel()
	onRealStores(t, func(t *testing.T, w *world) {
		d := newDevice(20*testBlock).random(1, span(0, 20)...)
		puts := &tape{Store: w.faults}
		zombie := storeIn(puts)
		plan := w.plan(nil, d)
		plan.Holder = snapshot.Holder{ID: "vol-1"}
		a, err := zombie.Begin(w.ctx, plan)
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Upload(w.ctx, d.since(nil)); err != nil {
			t.Fatal(err)
		}
		w.delete(plan.ID) // as a reaper does
		w.reclaim()
		if _, err := a.Commit(w.ctx); !errors.Is(err, snapshot.ErrAborted) {
			t.Fatalf("commit of what was aborted meanwhile: %v", err)
		}
		if err := puts.again(w.ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Commit(w.ctx); !errors.Is(err, snapshot.ErrAborted) {
			t.Fatalf("commit again: %v", err)
		}
		if _, err := w.store.Open(w.ctx, plan.ID, snapshot.Holder{}); !errors.Is(err, snapshot.ErrAborted) {
			t.Errorf("open: %v", err)
		}
		if err := a.Abort(w.ctx, "as found"); err != nil { // what the owner does
			t.Fatal(err)
		}
		w.reclaim()
		w.wantNone("data/", "pins/", "progress/")
	})
}

// Many that would end an attempt at once: there is one outcome, and everybody is
// told the same.
func TestOutcomeHasOneWriter(t *testing.T) {
	t.Parallel()
	const others, rounds = 7, 8
	onRealStores(t, func(t *testing.T, w *world) {
		d := newDevice(testBlock).tiny(1, 0)
		commits := 0
		for range rounds {
			a := w.begin(w.plan(nil, d), nil, d)
			nonce := mustIntent(w, a.ID()).Nonce
			start := make(chan struct{})
			verdicts, errs := make([]bool, others), make([]error, others)
			var all sync.WaitGroup
			for i := range others {
				store := w.reopen()
				all.Go(func() {
					<-start
					verdicts[i], _, errs[i] = store.Resolve(w.ctx, a.ID(), nonce, "test")
				})
			}
			var commitErr error
			all.Go(func() {
				<-start
				_, commitErr = a.Commit(w.ctx)
			})
			close(start)
			all.Wait()
			if err := errors.Join(errs...); err != nil {
				t.Fatal(err)
			}
			if commitErr != nil && !errors.Is(commitErr, snapshot.ErrAborted) {
				t.Fatal(commitErr)
			}
			for i, committed := range verdicts {
				if committed != (commitErr == nil) {
					t.Errorf("resolver %d was told committed: %t; the committer: %v", i, committed, commitErr)
				}
			}
			if commitErr == nil {
				commits++
				w.mustHold(w.open(a.ID()), d)
			}
		}
		t.Logf("%d of %d were committed", commits, rounds)
	})
}

func mustIntent(w *world, id manifest.SnapshotID) manifest.Intent {
	w.t.Helper()
	data, _, err := w.faults.Get(w.ctx, manifest.IntentKey(id), blockstore.MaxObjectSize)
	if err != nil {
		w.t.Fatal(err)
	}
	intent, err := manifest.DecodeRecord[manifest.Intent](data)
	if err != nil {
		w.t.Fatal(err)
	}
	return intent
}

// The outcome's put was applied and its reply lost: whoever asks, with retries or
// by hand, finds that it is their own.
func TestOutcomeWhoseReplyWasLostIsOnesOwn(t *testing.T) {
	plainAndSealed(t, testOutcomeWhoseReplyWasLostIsOnesOwn)
}

func testOutcomeWhoseReplyWasLostIsOnesOwn(t *testing.T, newWorld func(testing.TB) *world) {
	t.Parallel()
	onRealStores(t, func(t *testing.T, w *world) {
		d := newDevice(4*testBlock).random(1, 1, 2)
		lose := func(times int) {
			w.faults.Heal()
			w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "outcomes/", Times: times}, blockstoretest.Fault{LoseReply: true})
		}
		lose(3)
		retrying := storeIn(blockstore.Retry(w.faults, blockstore.RetryPolicy{Base: time.Microsecond, Max: time.Microsecond}))
		outcome, err := retrying.Create(w.ctx, w.plan(nil, d), d.since(nil), nil)
		if err != nil {
			t.Fatal(err)
		}
		w.mustHold(w.open(outcome.Snapshot), d)

		a := w.begin(w.plan(nil, d), nil, d)
		lose(1)
		if _, err := a.Commit(w.ctx); !errors.Is(err, blockstore.ErrUnavailable) {
			t.Fatalf("commit without retries: %v", err)
		}
		committed, _, err := w.reopen().Resolve(w.ctx, a.ID(), mustIntent(w, a.ID()).Nonce, "in doubt")
		if !committed || err != nil {
			t.Fatalf("resolve: committed %t, %v", committed, err)
		}
		w.mustHold(w.open(a.ID()), d)
	})
}
