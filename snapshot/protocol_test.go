package snapshot_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// What a snapshot costs in requests, exactly: these are the promise.
func TestRequestsOfASnapshot(t *testing.T) {
	w := newWorld(t)
	d := newDevice(20*testBlock).random(1, span(0, 20)...)

	w.faults.Reset()
	outcome, err := w.store.Create(w.ctx, w.plan(nil, d), d.since(nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	made := w.calls()
	slices.Sort(made[1:3]) // packs and leaves go together
	first := []string{"intents", "data/leaves/00000000", "data/packs/00000000", "data/root", "outcomes"}
	if diff := cmp.Diff(calls("put", first...), made); diff != "" {
		t.Errorf("a first snapshot (-want +got):\n%s", diff)
	}
	parent := w.open(outcome.Snapshot)

	second := d.random(2, 3, 4, 9)
	plan := w.plan(parent, second)
	plan.Holder = snapshot.Holder{ID: "vol-1"}
	w.faults.Reset()
	if _, err := w.store.Create(w.ctx, plan, second.since(d), nil); err != nil {
		t.Fatal(err)
	}
	want := append(calls("put", "intents"), calls("get", "tombstones")...)
	want = append(want, calls("read", "data/leaves/00000000", "data/leaves/00000000")...) // a leaf and a section
	want = append(want, calls("put", "data/packs/00000000", "data/leaves/00000000", "data/root", "pins/vol-1", "outcomes")...)
	if diff := cmp.Diff(slices.Sorted(slices.Values(want)), slices.Sorted(slices.Values(w.calls()))); diff != "" {
		t.Errorf("an increment (-want +got):\n%s", diff)
	}
}

// calls names calls of one kind.
func calls(op string, keys ...string) []string {
	var names []string
	for _, key := range keys {
		names = append(names, op+" "+key)
	}
	return names
}

// Whatever the size of the image, it is open after two round trips.
func TestOpenTakesTwoRoundTrips(t *testing.T) {
	t.Parallel()
	outside := newWorld(t)
	small := newDevice(testBlock).tiny(1, 0)
	large := sparse(345) // a root of more than 16 KiB, which is not in the outcome
	for name, d := range map[string]*device{"small": small, "large": large} {
		id := outside.create(nil, nil, d).ID()
		for _, h := range []snapshot.Holder{{}, {ID: "mount-1"}} {
			t.Run(name+h.ID, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := outside.in(t)
					w.faults.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Delay: time.Second})
					w.faults.Reset()
					start := time.Now()
					img, err := w.reopen().Open(w.ctx, id, h)
					if err != nil {
						t.Fatal(err)
					}
					if took := time.Since(start); took > 2*time.Second {
						t.Errorf("took %v with a second for each request", took)
					}
					if n := len(w.faults.Calls()); n > 6 {
						t.Errorf("%d requests: %v", n, w.faults.Calls())
					}
					w.faults.Heal()
					w.mustHold(img, d)
				})
			})
		}
	}
}

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
		if left := w.objects("data/"); len(left) > 0 {
			t.Fatalf("left: %v", left)
		}
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
	if left := w.objects(manifest.DataPrefix(b.ID())); len(left) > 0 {
		t.Errorf("left of the aborted one: %v", left)
	}
}

// Two attempts that drew the same id: the second never begins, and settling it
// takes nothing from the first.
func TestSameIDDrawnTwice(t *testing.T) {
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

func TestOpenAndDeleteInEachState(t *testing.T) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	plan := w.plan(nil, d)
	pending := w.begin(plan, nil, d)
	aborted := w.begin(w.plan(nil, d), nil, d)
	if err := aborted.Abort(w.ctx, "reason"); err != nil {
		t.Fatal(err)
	}
	deleted := w.create(nil, nil, d).ID()
	w.delete(deleted)
	committed := w.create(nil, nil, d).ID()
	elsewhere := manifest.NewSnapshotID(w.lineage + 1)

	for name, c := range map[string]struct {
		id   manifest.SnapshotID
		open error
	}{
		"pending":         {pending.ID(), snapshot.ErrPending},
		"aborted":         {aborted.ID(), snapshot.ErrAborted},
		"deleted":         {deleted, snapshot.ErrNotFound},
		"unknown":         {manifest.NewSnapshotID(w.lineage), snapshot.ErrNotFound},
		"unknown lineage": {elsewhere, snapshot.ErrNotFound},
	} {
		for _, h := range []snapshot.Holder{{}, {ID: "mount-1"}} {
			if _, err := w.reopen().Open(w.ctx, c.id, h); !errors.Is(err, c.open) {
				t.Errorf("open %s: %v", name, err)
			}
		}
		if _, err := w.store.Verify(w.ctx, c.id, nil); !errors.Is(err, c.open) {
			t.Errorf("verify %s: %v", name, err)
		}
		if c.open != snapshot.ErrNotFound {
			continue
		}
		if err := w.store.Delete(w.ctx, c.id); !errors.Is(err, snapshot.ErrNotFound) {
			t.Errorf("delete %s: %v", name, err)
		}
		if _, err := w.store.Describe(w.ctx, c.id); !errors.Is(err, snapshot.ErrNotFound) {
			t.Errorf("describe %s: %v", name, err)
		}
		if err := w.store.Pin(w.ctx, deleted, snapshot.Holder{ID: "vol-1"}); !errors.Is(err, snapshot.ErrNotFound) {
			t.Errorf("pin a deleted one: %v", err)
		}
	}
	if pins := w.objects("pins/"); len(pins) > 0 {
		t.Errorf("pins leaked: %v", pins)
	}
	if err := w.store.Delete(w.ctx, aborted.ID()); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("delete an aborted one: %v", err)
	}
	if err := w.store.Delete(w.ctx, pending.ID()); err != nil {
		t.Errorf("delete a pending one: %v", err)
	}
	if _, err := pending.Commit(w.ctx); !errors.Is(err, snapshot.ErrAborted) {
		t.Errorf("commit of a deleted one: %v", err)
	}
	states := make(map[manifest.SnapshotID]snapshot.State)
	list := func(all bool) {
		t.Helper()
		clear(states)
		found, err := w.store.List(w.ctx, all)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range found {
			states[d.ID] = d.State
		}
	}
	list(false)
	if diff := cmp.Diff(map[manifest.SnapshotID]snapshot.State{committed: snapshot.Completed}, states); diff != "" {
		t.Errorf("list (-want +got):\n%s", diff)
	}
	list(true)
	want := map[manifest.SnapshotID]snapshot.State{committed: snapshot.Completed, aborted.ID(): snapshot.Aborted, pending.ID(): snapshot.Aborted}
	if diff := cmp.Diff(want, states); diff != "" {
		t.Errorf("list --all (-want +got):\n%s", diff)
	}
	w.reclaim()
	for key := range w.objects("data/") {
		if !strings.Contains(key, committed.String()) {
			t.Errorf("left: %s", key)
		}
	}
}

// Credentials that may only read open an image without a pin, and nothing else
// works with them.
func TestReadOnlyCredentials(t *testing.T) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	id := w.create(nil, nil, d).ID()
	gone := w.create(nil, nil, d).ID()
	w.delete(gone)
	for _, op := range []blockstoretest.Op{blockstoretest.OpPut, blockstoretest.OpDelete} {
		w.faults.Inject(blockstoretest.Rule{Op: op}, blockstoretest.Fault{Err: blockstore.ErrDenied})
	}
	img, err := w.reopen().Open(w.ctx, id, snapshot.Holder{ID: "mount-1"})
	if err != nil {
		t.Fatal(err)
	}
	if img.Pinned {
		t.Error("it is said to be pinned")
	}
	w.mustHold(img, d)
	w.mustVerify(id)
	if _, err := w.reopen().Open(w.ctx, gone, snapshot.Holder{ID: "mount-1"}); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("open a deleted one: %v", err)
	}
	for what, err := range map[string]error{
		"delete": w.store.Delete(w.ctx, id),
		"pin":    w.store.Pin(w.ctx, id, snapshot.Holder{ID: "vol-1"}),
		"create": func() error {
			_, err := w.store.Create(w.ctx, w.plan(img, d), d.since(d), nil)
			return err
		}(),
	} {
		if !errors.Is(err, blockstore.ErrDenied) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := snapshot.Init(w.ctx, w.faults); err != nil {
		t.Errorf("init of a store that exists: %v", err)
	}
}

// A pin that a failed Open made is gone, also when the context has ended.
func TestFailedOpenLeavesNoPin(t *testing.T) {
	t.Parallel()
	outside := newWorld(t)
	id := outside.create(nil, nil, sparse(345)).ID() // a root that is not in the outcome
	for _, prefix := range []string{"tombstones/", "outcomes/", "data/", "lineages/", "store.json", "pins/"} {
		for name, fault := range map[string]blockstoretest.Fault{
			"unreachable": {Err: blockstore.ErrUnavailable},
			"corrupt":     {Flip: true},
			"lost reply":  {LoseReply: true},
			"ctx":         {Hang: true},
		} {
			t.Run(prefix+" "+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := outside.in(t)
					w.faults.Inject(blockstoretest.Rule{Prefix: prefix, Times: 1}, fault)
					ctx, cancel := context.WithTimeout(w.ctx, time.Minute)
					defer cancel()
					img, err := w.reopen().Open(ctx, id, snapshot.Holder{ID: "mount-1"})
					if err == nil { // a flipped bit in what is absent
						if !img.Pinned || len(w.objects("pins/")) != 1 {
							t.Error("opened without a pin")
						}
						if err := w.store.Unpin(w.ctx, id, "mount-1"); err != nil {
							t.Error(err)
						}
					}
					if pins := w.objects("pins/"); len(pins) > 0 {
						t.Errorf("pins leaked: %v", pins)
					}
				})
			})
		}
	}
}

// A reply that was lost changes nothing: the request is made again, and what
// was applied is recognised.
func TestLostReplies(t *testing.T) {
	w := newWorld(t)
	first := newDevice(20*testBlock).random(1, span(0, 20)...)
	second := first.random(2, 3)
	one := w.create(nil, nil, first)
	retry := blockstore.Retry(w.faults, blockstore.RetryPolicy{Base: time.Microsecond, Max: time.Microsecond})
	store := snapshot.New(retry)
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
func TestCommitAgainAfterALostReply(t *testing.T) {
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
	other, err := w.store.CreateLineage(w.ctx, testBlock)
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

func TestTagsChangeTogether(t *testing.T) {
	w := newWorld(t)
	d := newDevice(512)
	plan := w.plan(nil, d)
	plan.Tags = map[string]string{"born": "with", "gone": "soon"}
	outcome, err := w.store.Create(w.ctx, plan, d.since(nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	id := outcome.Snapshot
	names := []string{"a", "b", "c", "d"}
	errs := make(chan error)
	for _, name := range names {
		go func() { errs <- w.reopen().SetTags(w.ctx, id, map[string]string{name: name}, []string{"gone"}) }()
	}
	for range names {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	want := map[string]string{"born": "with", "a": "a", "b": "b", "c": "c", "d": "d"}
	described, err := w.store.Describe(w.ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, described.Tags); diff != "" {
		t.Errorf("described (-want +got):\n%s", diff)
	}
	found, err := w.store.List(w.ctx, false)
	if err != nil || len(found) != 1 {
		t.Fatal(found, err)
	}
	if diff := cmp.Diff(want, found[0].Tags); diff != "" {
		t.Errorf("listed (-want +got):\n%s", diff)
	}
	if err := w.store.SetTags(w.ctx, id, map[string]string{"aws:x": ""}, nil); !errors.Is(err, manifest.ErrTags) {
		t.Errorf("reserved tag: %v", err)
	}
	w.delete(id)
	if err := w.store.SetTags(w.ctx, id, map[string]string{"x": ""}, nil); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("tag a deleted one: %v", err)
	}
}

// A change of tags that another one overtakes is made again on top of it,
// whether it was the first change of them or not.
func TestTagsChangedMeanwhile(t *testing.T) {
	w := newWorld(t)
	d := newDevice(512)
	id := w.create(nil, nil, d).ID()
	for _, name := range []string{"a", "b"} {
		other := map[string]string{"other " + name: ""}
		w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "meta/", Times: 1}, blockstoretest.Fault{
			Before: func(context.Context, blockstoretest.Call) {
				if err := w.reopen().SetTags(w.ctx, id, other, nil); err != nil {
					t.Error(err)
				}
			},
		})
		if err := w.store.SetTags(w.ctx, id, map[string]string{name: ""}, nil); err != nil {
			t.Fatal(err)
		}
	}
	described, err := w.store.Describe(w.ctx, id)
	want := map[string]string{"a": "", "b": "", "other a": "", "other b": ""}
	if diff := cmp.Diff(want, described.Tags); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

func TestInitIsIdempotent(t *testing.T) {
	objects := blockstore.NewMem()
	if _, err := snapshot.New(objects).ID(t.Context()); !errors.Is(err, snapshot.ErrNotStore) {
		t.Errorf("id of nothing: %v", err)
	}
	ids := make(chan string)
	for range 4 {
		go func() {
			s, err := snapshot.Init(t.Context(), objects)
			if err != nil {
				t.Error(err)
			}
			id, err := s.ID(t.Context())
			if err != nil {
				t.Error(err)
			}
			ids <- id
		}()
	}
	first := <-ids
	for range 3 {
		if id := <-ids; id != first || id == "" {
			t.Errorf("ids %q and %q", first, id)
		}
	}
}

func TestNewerStoreIsRefusedByName(t *testing.T) {
	w := newWorld(t)
	w.overwrite(manifest.StoreKey(), `{"version":2,"id":"x"}`)
	if _, err := w.reopen().ID(w.ctx); !errors.Is(err, manifest.ErrVersion) {
		t.Errorf("id: %v", err)
	}
	if _, err := snapshot.Init(w.ctx, w.faults); !errors.Is(err, manifest.ErrVersion) {
		t.Errorf("init: %v", err)
	}
	if _, err := w.reopen().Open(w.ctx, manifest.NewSnapshotID(w.lineage), snapshot.Holder{}); err == nil {
		t.Error("opened a snapshot of a newer store")
	}
}
