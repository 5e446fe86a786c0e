package snapshot_test

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A commit whose parent was deleted after it began stands, whole.
func TestParentDeletedDuringACommit(t *testing.T) {
	w := newWorld(t)
	first := newDevice(20*testBlock).random(1, span(0, 20)...)
	second := first.random(2, 3, 4)
	one := w.create(nil, nil, first)
	a := w.begin(w.plan(one, second), first, second)
	w.delete(one.ID())
	w.reclaim() // the pending one keeps it
	if _, err := a.Commit(w.ctx); err != nil {
		t.Fatal(err)
	}
	w.reclaim()
	w.mustHold(w.open(a.ID()), second)
	w.mustVerify(a.ID())
}

// Nothing is inherited from a parent that was deleted before, and nothing is
// left of the attempt but that it was aborted.
func TestParentDeletedBeforeBegin(t *testing.T) {
	w := newWorld(t)
	first := newDevice(20*testBlock).random(1, span(0, 20)...)
	one := w.create(nil, nil, first)
	w.delete(one.ID())
	plan := w.plan(one, first)
	plan.Holder = snapshot.Holder{ID: "vol-1"}
	if _, err := w.store.Begin(w.ctx, plan); !errors.Is(err, snapshot.ErrParentGone) {
		t.Fatalf("begin: %v", err)
	}
	described, err := w.store.Describe(w.ctx, plan.ID)
	if err != nil || described.State != snapshot.Aborted || described.Parent != one.ID() || described.Percent != 0 {
		t.Errorf("it is %+v, %v", described, err)
	}
	// As does Create, and it says so.
	if _, err := w.store.Create(w.ctx, w.plan(one, first), first.since(first), nil); !errors.Is(err, snapshot.ErrParentGone) {
		t.Errorf("create: %v", err)
	}
}

// A volume's own pin on a deleted parent lets it inherit. Another's does not.
func TestOwnPinLetsInheritFromADeletedParent(t *testing.T) {
	plainAndSealed(t, testOwnPinLetsInheritFromADeletedParent)
}

func testOwnPinLetsInheritFromADeletedParent(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	first := newDevice(20*testBlock).random(1, span(0, 20)...)
	one := w.create(nil, nil, first)
	own, other := snapshot.Holder{ID: "vol-1"}, snapshot.Holder{ID: "vol-2"}
	if err := w.store.Pin(w.ctx, one.ID(), own); err != nil {
		t.Fatal(err)
	}
	w.delete(one.ID())
	w.reclaim()
	plan := w.plan(one, first)
	plan.Holder = other
	if _, err := w.store.Begin(w.ctx, plan); !errors.Is(err, snapshot.ErrParentGone) {
		t.Fatalf("begin with another's pin: %v", err)
	}
	second := first.random(2, 4)
	plan = w.plan(one, second)
	plan.Holder = own
	a := w.begin(plan, first, second)
	if err := w.store.Unpin(w.ctx, one.ID(), own.ID); err != nil { // a zombie's; the intent keeps it
		t.Fatal(err)
	}
	w.reclaim()
	if _, err := a.Commit(w.ctx); err != nil {
		t.Fatal(err)
	}
	if err := w.store.KeepPinned(w.ctx, a.ID(), own); err != nil {
		t.Errorf("the new snapshot: %v", err)
	}
	w.reclaim()
	w.mustHold(w.open(a.ID()), second)
}

// A commit and an abort of the same attempt: the store picks one, and both
// sides agree on which.
func TestCommitAndAbortHaveOneOutcome(t *testing.T) {
	d := newDevice(testBlock).tiny(1, 0)
	commits, aborts := 0, 0
	for range 100 {
		w := newWorld(t)
		a := w.begin(w.plan(nil, d), nil, d)
		var commitErr, deleteErr error
		done := make(chan struct{})
		go func() {
			defer close(done)
			_, commitErr = a.Commit(w.ctx)
		}()
		deleteErr = w.reopen().Delete(w.ctx, a.ID())
		<-done
		if deleteErr != nil {
			t.Fatal(deleteErr)
		}
		// Deleted it is in any case: aborted before, or by a tombstone after.
		if _, err := w.store.Open(w.ctx, a.ID(), snapshot.Holder{}); err == nil {
			t.Fatal("it is there")
		}
		switch {
		case commitErr == nil && len(w.objects("tombstones/")) == 1:
			commits++
		case errors.Is(commitErr, snapshot.ErrAborted) && len(w.objects("tombstones/")) == 0:
			aborts++
		default:
			t.Fatalf("commit: %v, tombstones %v", commitErr, w.objects("tombstones/"))
		}
		w.reclaim()
		w.wantNone("data/")
	}
	t.Logf("%d commits and %d aborts", commits, aborts)
}

// The abort that comes first wins, the one that comes late fails.
func TestAbortAfterCommitFails(t *testing.T) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	a := w.begin(w.plan(nil, d), nil, d)
	if _, err := a.Commit(w.ctx); err != nil {
		t.Fatal(err)
	}
	if err := a.Abort(w.ctx, "too late"); err == nil {
		t.Error("aborted a committed snapshot")
	}
	w.mustHold(w.open(a.ID()), d)

	b := w.begin(w.plan(nil, d), nil, d)
	if err := b.Abort(w.ctx, "in time"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Commit(w.ctx); !errors.Is(err, snapshot.ErrAborted) {
		t.Errorf("commit after abort: %v", err)
	}
	if err := b.Abort(w.ctx, "again"); err != nil {
		t.Errorf("a second abort: %v", err)
	}
	w.wantNone(manifest.DataPrefix(b.ID()))
}

// Two attempts that drew the same id: the second never begins, and settling it
// takes nothing from the first.
func TestSameIDDrawnTwice(t *testing.T) { plainAndSealed(t, testSameIDDrawnTwice) }

func testSameIDDrawnTwice(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	d := newDevice(20*testBlock).random(1, span(0, 20)...)
	first := w.plan(nil, d)
	first.Holder = snapshot.Holder{ID: "vol-1"}
	a := w.begin(first, nil, d)

	second := first
	second.Nonce = manifest.NewNonce()
	second.Holder = snapshot.Holder{ID: "vol-2"}
	settle := func() {
		t.Helper()
		if _, err := w.store.Begin(w.ctx, second); !errors.Is(err, blockstore.ErrExists) {
			t.Fatalf("begin: %v", err)
		}
		committed, _, err := w.store.Resolve(w.ctx, second.ID, second.Nonce, "test")
		if committed || err != nil {
			t.Fatalf("resolve: %v, %v", committed, err)
		}
		if err := w.store.Discard(w.ctx, second.ID, second.Holder); err != nil {
			t.Fatal(err)
		}
		if _, err := w.store.Create(w.ctx, second, d.since(nil), nil); !errors.Is(err, blockstore.ErrExists) {
			t.Fatalf("create: %v", err)
		}
	}
	settle()
	if _, err := a.Commit(w.ctx); err != nil {
		t.Fatal(err)
	}
	settle()
	w.mustHold(w.open(a.ID()), d)
	w.mustVerify(a.ID())
	if pins := w.objects("pins/"); len(pins) != 1 {
		t.Errorf("pins: %v", pins)
	}
}

func TestResolveInEachState(t *testing.T) {
	d := newDevice(testBlock).tiny(1, 0)
	resolve := func(w *world, p snapshot.Plan) bool {
		t.Helper()
		for range 2 { // it may be asked again
			committed, outcome, err := w.store.Resolve(w.ctx, p.ID, p.Nonce, "test")
			if err != nil {
				t.Fatal(err)
			}
			if committed != (outcome.State == manifest.StateCommitted) || outcome.Nonce != p.Nonce {
				t.Errorf("committed %v, and the outcome is %+v", committed, outcome)
			}
			if committed {
				return true
			}
		}
		return false
	}
	w := newWorld(t)
	never := w.plan(nil, d)
	if resolve(w, never) {
		t.Error("what was never begun is committed")
	}
	if _, err := w.store.Create(w.ctx, never, d.since(nil), nil); !errors.Is(err, snapshot.ErrAborted) {
		t.Errorf("an intent that was on its way when its attempt was given up: %v", err)
	}

	begun := w.plan(nil, d)
	begun.Description, begun.Tags = "text", map[string]string{"k": "v"}
	if _, err := w.store.Begin(w.ctx, begun); err != nil {
		t.Fatal(err)
	}
	if resolve(w, begun) {
		t.Error("what was only begun is committed")
	}
	described, err := w.store.Describe(w.ctx, begun.ID)
	if err != nil || described.Description != "text" || described.Tags["k"] != "v" || described.Why != "test" || described.Geometry != d.geometry {
		t.Errorf("the aborted one is %+v, %v", described, err)
	}

	done := w.plan(nil, d)
	a := w.begin(done, nil, d)
	if _, err := a.Commit(w.ctx); err != nil {
		t.Fatal(err)
	}
	if !resolve(w, done) {
		t.Error("what was committed is not")
	}
	w.delete(a.ID())
	if !resolve(w, done) {
		t.Error("what was committed and deleted was never committed")
	}
}

// A reply that was lost changes nothing: the request is made again, and what
// was applied is recognised.
func TestLostReplies(t *testing.T) { plainAndSealed(t, testLostReplies) }

func testLostReplies(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	first := newDevice(20*testBlock).random(1, span(0, 20)...)
	second := first.random(2, 3)
	one := w.create(nil, nil, first)
	retry := blockstore.Retry(w.faults, blockstore.RetryPolicy{Base: time.Microsecond, Max: time.Microsecond})
	store := storeIn(retry)
	for _, prefix := range []string{"intents/", "data/", "pins/", "outcomes/"} {
		t.Run(prefix, func(t *testing.T) {
			plan := w.plan(one, second)
			plan.Holder = snapshot.Holder{ID: "vol-1"}
			w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: prefix, Times: 2}, blockstoretest.Fault{LoseReply: true})
			defer w.faults.Heal()
			outcome, err := store.Create(w.ctx, plan, second.since(first), nil)
			if err != nil {
				t.Fatal(err)
			}
			if outcome.Nonce != plan.Nonce || outcome.State != manifest.StateCommitted {
				t.Errorf("outcome %+v", outcome)
			}
			w.mustHold(w.open(plan.ID), second)
			w.mustVerify(plan.ID)
		})
	}
	w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "tombstones/", Times: 2}, blockstoretest.Fault{LoseReply: true})
	if err := store.Delete(w.ctx, one.ID()); err != nil {
		t.Errorf("delete: %v", err)
	}
}

// Without a retrying store, a lost reply of the outcome leaves the owner in
// doubt, and committing again resolves it.
func TestCommitAgainAfterALostReply(t *testing.T) { plainAndSealed(t, testCommitAgainAfterALostReply) }

func testCommitAgainAfterALostReply(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	a := w.begin(w.plan(nil, d), nil, d)
	w.faults.Inject(blockstoretest.Rule{Prefix: "outcomes/", Times: 1}, blockstoretest.Fault{LoseReply: true})
	if _, err := a.Commit(w.ctx); !errors.Is(err, blockstore.ErrUnavailable) {
		t.Fatalf("commit: %v", err)
	}
	if _, err := a.Commit(w.ctx); err != nil {
		t.Fatal(err)
	}
	// And Create does so by itself.
	w.faults.Inject(blockstoretest.Rule{Prefix: "outcomes/", Times: 1}, blockstoretest.Fault{LoseReply: true})
	outcome, err := w.store.Create(w.ctx, w.plan(nil, d), d.since(nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	w.mustHold(w.open(outcome.Snapshot), d)
}

// What cannot become a snapshot is refused before anything is recorded.
func TestPlansThatAreRefused(t *testing.T) {
	w := newWorld(t)
	d := newDevice(2 * testBlock)
	parent := w.create(nil, nil, d)
	other, err := w.store.CreateLineage(w.ctx, testBlock, "")
	if err != nil {
		t.Fatal(err)
	}
	before := w.objects("")
	for name, change := range map[string]func(*snapshot.Plan){
		"size":             func(p *snapshot.Plan) { p.Geometry.Size = 100 },
		"block size":       func(p *snapshot.Plan) { p.Geometry.BlockSize = 12345 },
		"other block size": func(p *snapshot.Plan) { p.Geometry.BlockSize *= 2 },
		"shrunk":           func(p *snapshot.Plan) { p.Geometry.Size = testBlock },
		"nonce":            func(p *snapshot.Plan) { p.Nonce = "x" },
		"holder":           func(p *snapshot.Plan) { p.Holder.ID = "../x" },
		"tags":             func(p *snapshot.Plan) { p.Tags = map[string]string{"aws:x": ""} },
		"volume":           func(p *snapshot.Plan) { p.Volume = "x" },
		"lineage":          func(p *snapshot.Plan) { p.ID = manifest.NewSnapshotID(other.ID) },
		"itself":           func(p *snapshot.Plan) { p.ID = parent.ID() },
	} {
		plan := w.plan(parent, d)
		change(&plan)
		if _, err := w.store.Begin(w.ctx, plan); err == nil {
			t.Errorf("%s: begun", name)
		}
		if _, err := w.store.Create(w.ctx, plan, d.since(nil), nil); err == nil {
			t.Errorf("%s: created", name)
		} else if name == "lineage" && !errors.Is(err, snapshot.ErrUnrelated) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if diff := cmp.Diff(before, w.objects("")); diff != "" {
		t.Errorf("recorded (-before +after):\n%s", diff)
	}
	if _, err := w.store.Begin(w.ctx, w.plan(nil, d)); err != nil {
		t.Fatal(err)
	}
}

func TestUploadCanBeCalledOnce(t *testing.T) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	a, err := w.store.Begin(w.ctx, w.plan(nil, d))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Commit(w.ctx); err == nil {
		t.Error("committed without an upload")
	}
	w.faults.Inject(blockstoretest.Rule{Prefix: "data/"}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
	if err := a.Upload(w.ctx, d.since(nil)); !errors.Is(err, blockstore.ErrUnavailable) {
		t.Fatalf("upload: %v", err)
	}
	w.faults.Heal()
	if err := a.Upload(w.ctx, d.tiny(2, 0).since(nil)); err == nil {
		t.Error("uploaded twice")
	}
	if _, err := a.Commit(w.ctx); err == nil {
		t.Error("committed a failed upload")
	}
}
