package snapshot_test

import (
	"context"
	"errors"
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

func TestOpenAndDeleteInEachState(t *testing.T) { plainAndSealed(t, testOpenAndDeleteInEachState) }

func testOpenAndDeleteInEachState(t *testing.T, newWorld func(testing.TB) *world) {
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
	w.wantNone("pins/")
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
func TestReadOnlyCredentials(t *testing.T) { plainAndSealed(t, testReadOnlyCredentials) }

func testReadOnlyCredentials(t *testing.T, newWorld func(testing.TB) *world) {
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
func TestFailedOpenLeavesNoPin(t *testing.T) { plainAndSealed(t, testFailedOpenLeavesNoPin) }

func testFailedOpenLeavesNoPin(t *testing.T, newWorld func(testing.TB) *world) {
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
					w.wantNone("pins/")
				})
			})
		}
	}
}

func TestPinKeepsADeletedSnapshotWhole(t *testing.T) {
	plainAndSealed(t, testPinKeepsADeletedSnapshotWhole)
}

func testPinKeepsADeletedSnapshotWhole(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	first := newDevice(20*testBlock).random(1, span(0, 20)...)
	second := first.random(2, span(0, 10)...)
	one := w.create(nil, nil, first)
	two := w.create(one, first, second)
	h := snapshot.Holder{ID: "mount-1", Host: "a"}
	img, err := w.store.Open(w.ctx, one.ID(), h)
	if err != nil || !img.Pinned {
		t.Fatalf("pinned %v, %v", img.Pinned, err)
	}
	w.delete(one.ID())
	r := w.reclaim()
	if r.Bytes != 0 || len(r.Pins) != 1 || r.Pins[0].Holder != h.ID || r.Pins[0].Host != h.Host || !r.Pins[0].Deleted || r.Pins[0].Snapshot != one.ID() {
		t.Errorf("reclaim with a pin did %+v", r)
	}
	w.mustHold(img, first)
	if err := w.store.KeepPinned(w.ctx, one.ID(), h); err != nil {
		t.Errorf("a pin that stands: %v", err)
	}
	if err := w.store.Unpin(w.ctx, one.ID(), h.ID); err != nil {
		t.Fatal(err)
	}
	if err := w.store.KeepPinned(w.ctx, one.ID(), h); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("a pin that is gone, of a deleted snapshot: %v", err)
	}
	w.wantNone("pins/")
	if r := w.reclaim(); r.Bytes == 0 {
		t.Error("nothing freed after the pin")
	}
	w.mustHold(two, second)
}

// The pins of a holder that is lost are removed, and no others.
func TestForget(t *testing.T) { plainAndSealed(t, testForget) }

func testForget(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	one, two := w.create(nil, nil, d).ID(), w.create(nil, nil, d).ID()
	for _, pin := range []struct {
		id     manifest.SnapshotID
		holder string
	}{{one, "vol-1"}, {two, "vol-1"}, {one, "vol-10"}, {two, "vol-2"}} {
		if err := w.store.Pin(w.ctx, pin.id, snapshot.Holder{ID: pin.holder}); err != nil {
			t.Fatal(err)
		}
	}
	forgotten, err := w.store.Forget(w.ctx, "vol-1")
	if err != nil || len(forgotten) != 2 {
		t.Errorf("forgot %v, %v", forgotten, err)
	}
	want := map[string]bool{manifest.PinKey(one, "vol-10"): true, manifest.PinKey(two, "vol-2"): true}
	for key := range w.objects("pins/") {
		if !want[key] {
			t.Errorf("left: %s", key)
		}
		delete(want, key)
	}
	if len(want) > 0 {
		t.Errorf("removed: %v", want)
	}
	if forgotten, err := w.store.Forget(w.ctx, "vol-1"); err != nil || len(forgotten) != 0 {
		t.Errorf("again: forgot %v, %v", forgotten, err)
	}
}
