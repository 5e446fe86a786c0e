package snapshot_test

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A reclaim that has nothing to do changes nothing, and of packs that have been
// rewritten it reads at most the slot table.
func TestReclaimWithNothingToDo(t *testing.T) { plainAndSealed(t, testReclaimWithNothingToDo) }

func testReclaimWithNothingToDo(t *testing.T, newWorld func(testing.TB) *world) {
	for name, c := range map[string]struct {
		changed []int64
		reads   int // of packs
	}{
		"the pack's last slot is live": {[]int64{1, 5, 9, 100}, 0},
		"the pack's last slot is dead": {[]int64{1, 5, 9, 100, 199}, 2},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			base := newDevice(leafBytes).random(1, span(0, 10)...).tiny(1, span(10, 200)...)
			one := w.create(nil, nil, base)
			second := base.tiny(2, c.changed...)
			two := w.create(one, base, second)
			w.delete(one.ID())
			if r := w.reclaim(); r.Bytes == 0 || r.Rewritten != 1 {
				t.Fatalf("the first reclaim did %+v", r)
			}
			before := w.objects("")
			w.faults.Reset()
			if r := w.reclaim(); r.Bytes != 0 || r.Objects != 0 || r.Rewritten != 0 || r.Roots != 1 || r.Dead != 1 {
				t.Errorf("the second reclaim did %+v", r)
			}
			reads := 0
			for _, c := range w.faults.Calls() {
				pack := strings.Contains(c.Keys[0], "/packs/")
				if c.Op == blockstoretest.OpPut || c.Op == blockstoretest.OpDelete || c.Op == blockstoretest.OpGet && pack {
					t.Errorf("the second reclaim did %v", c)
				}
				if pack {
					reads++
				}
			}
			if reads != c.reads {
				t.Errorf("the second reclaim read packs %d times", reads)
			}
			if diff := cmp.Diff(before, w.objects("")); diff != "" {
				t.Errorf("the second reclaim changed (-before +after):\n%s", diff)
			}
			w.mustHold(two, second)
		})
	}
}

// What ended attempts left goes with the next reclaim: progress that was sent
// late, a pin on an aborted snapshot, tags of a deleted one, and objects that
// arrived after the abort.
func TestReclaimTidies(t *testing.T) { plainAndSealed(t, testReclaimTidies) }

func testReclaimTidies(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	img := w.create(nil, nil, d)
	gone := w.create(nil, nil, d)
	if err := w.store.SetTags(w.ctx, gone.ID(), map[string]string{"a": "b"}, nil); err != nil {
		t.Fatal(err)
	}
	if err := w.store.SetTags(w.ctx, img.ID(), map[string]string{"a": "b"}, nil); err != nil {
		t.Fatal(err)
	}
	w.delete(gone.ID())

	plan := w.plan(nil, d)
	plan.Holder = snapshot.Holder{ID: "vol-1", Host: "a"}
	a := w.begin(plan, nil, d)
	if committed, _, err := w.store.Resolve(w.ctx, a.ID(), plan.Nonce, "test"); committed || err != nil {
		t.Fatal(committed, err)
	}
	if _, err := a.Commit(w.ctx); !errors.Is(err, snapshot.ErrAborted) { // leaves its pin
		t.Fatalf("commit: %v", err)
	}
	w.put(manifest.ProgressKey(a.ID()), manifest.Progress{Version: 1, Snapshot: a.ID(), Heartbeat: time.Now()})
	w.put(manifest.ProgressKey(img.ID()), manifest.Progress{Version: 1, Snapshot: img.ID(), Heartbeat: time.Now()})
	if len(w.objects(manifest.PinPrefix(a.ID()))) != 1 || len(w.objects(manifest.DataPrefix(a.ID()))) != 3 {
		t.Fatal("the late commit left nothing")
	}

	r := w.reclaim()
	if len(r.Pins) != 0 {
		t.Errorf("pins %+v", r.Pins)
	}
	w.wantNone("pins/", "progress/", manifest.DataPrefix(a.ID()), manifest.DataPrefix(gone.ID()), manifest.MetaKey(gone.ID()))
	if len(w.objects(manifest.MetaKey(img.ID()))) == 0 {
		t.Error("the tags of a live snapshot are gone")
	}
	w.mustHold(img, d)
}

// Foreign objects are not lazyvol's to remove.
func TestReclaimLeavesForeignObjects(t *testing.T) {
	plainAndSealed(t, testReclaimLeavesForeignObjects)
}

func testReclaimLeavesForeignObjects(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	img := w.create(nil, nil, newDevice(testBlock).tiny(1, 0))
	foreign := manifest.DataPrefix(img.ID()) + "packs/README"
	if _, err := w.faults.Put(w.ctx, foreign, []byte("mine"), blockstore.IfAbsent); err != nil {
		t.Fatal(err)
	}
	w.delete(img.ID())
	w.reclaim()
	if left := w.objects("data/"); len(left) != 1 || left[foreign] != 4 {
		t.Errorf("left: %v", left)
	}
}

// What a root refers to and cannot be read stops the reclaim: it is never
// taken as nothing.
func TestReclaimStopsAtAFooterItCannotRead(t *testing.T) {
	plainAndSealed(t, testReclaimStopsAtAFooterItCannotRead)
}

func testReclaimStopsAtAFooterItCannotRead(t *testing.T, newWorld func(testing.TB) *world) {
	first := newDevice(20*testBlock).random(1, span(0, 20)...)
	second := first.random(2, span(0, 10)...)
	for _, damage := range []struct {
		name  string
		fault blockstoretest.Fault
		want  error
	}{
		{"gone", blockstoretest.Fault{Err: blockstore.ErrNotExist}, nil},
		{"short", blockstoretest.Fault{Truncate: true}, nil},
		{"corrupt", blockstoretest.Fault{Flip: true}, manifest.ErrCorrupt},
		{"unreachable", blockstoretest.Fault{Err: blockstore.ErrUnavailable}, blockstore.ErrUnavailable},
	} {
		t.Run(damage.name, func(t *testing.T) {
			w := newWorld(t)
			one := w.create(nil, nil, first)
			two := w.create(one, first, second)
			w.delete(one.ID())
			before := w.objects("data/")
			w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpReadRange, Prefix: manifest.LeavesKey(two.ID(), 0)}, damage.fault)
			if _, err := w.store.Reclaim(w.ctx, w.lineage); err == nil || damage.want != nil && !errors.Is(err, damage.want) {
				t.Errorf("reclaim: %v", err)
			}
			if diff := cmp.Diff(before, w.objects("data/")); diff != "" {
				t.Errorf("it removed (-before +after):\n%s", diff)
			}
			w.faults.Heal()
			w.reclaim()
			w.mustHold(two, second)
		})
	}
}

// A footer that is gone for a moment only, because another host got further
// with a reclaim of it, is a reason to begin again.
func TestReclaimBeginsAgainWhenTheWorldMoved(t *testing.T) {
	plainAndSealed(t, testReclaimBeginsAgainWhenTheWorldMoved)
}

func testReclaimBeginsAgainWhenTheWorldMoved(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	first := newDevice(20*testBlock).random(1, span(0, 20)...)
	second := first.random(2, span(0, 10)...)
	one := w.create(nil, nil, first)
	two := w.create(one, first, second)
	w.delete(one.ID())
	w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpReadRange, Prefix: "data/", Times: 3}, blockstoretest.Fault{Err: blockstore.ErrNotExist})
	if r := w.reclaim(); r.Bytes == 0 {
		t.Error("nothing freed")
	}
	w.mustHold(two, second)
}

// A damaged pack stands in the way of its own rewrite only.
func TestReclaimKeepsADamagedPackAndGoesOn(t *testing.T) {
	plainAndSealed(t, testReclaimKeepsADamagedPackAndGoesOn)
}

func testReclaimKeepsADamagedPackAndGoesOn(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	first := newDevice(20*testBlock).random(1, span(0, 20)...)
	second := first.random(2, span(0, 9)...) // not what lies in the middle of the pack
	third := second.random(3, 1, 11)
	one := w.create(nil, nil, first)
	two := w.create(one, first, second)
	three := w.create(two, second, third)
	w.delete(one.ID(), two.ID())
	w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpGet, Prefix: manifest.PackKey(one.ID(), 0)}, blockstoretest.Fault{Flip: true})
	r, err := w.store.Reclaim(w.ctx, w.lineage)
	if !errors.Is(err, manifest.ErrCorrupt) || !strings.Contains(err.Error(), one.ID().String()) {
		t.Errorf("reclaim: %v", err)
	}
	if r.Rewritten != 1 || r.Dead != 2 {
		t.Errorf("reclaim did %+v", r)
	}
	w.faults.Heal()
	w.mustHold(three, third)
	if r := w.reclaim(); r.Rewritten != 1 {
		t.Errorf("the next reclaim did %+v", r)
	}
	w.mustHold(three, third)
}

// A record that is damaged stops the reclaim, and lets itself be deleted.
func TestDamagedRecordsCanBeDeleted(t *testing.T) { plainAndSealed(t, testDamagedRecordsCanBeDeleted) }

func testDamagedRecordsCanBeDeleted(t *testing.T, newWorld func(testing.TB) *world) {
	d := newDevice(testBlock).random(1, 0)
	for name, damage := range map[string]func(w *world) manifest.SnapshotID{
		"outcome of a committed one": func(w *world) manifest.SnapshotID {
			img := w.create(nil, nil, d)
			w.overwrite(manifest.OutcomeKey(img.ID()), "{")
			return img.ID()
		},
		"outcome of an aborted one": func(w *world) manifest.SnapshotID {
			a := w.begin(w.plan(nil, d), nil, d)
			w.overwrite(manifest.OutcomeKey(a.ID()), "{")
			return a.ID()
		},
		"intent of a pending one": func(w *world) manifest.SnapshotID {
			a := w.begin(w.plan(nil, d), nil, d)
			w.overwrite(manifest.IntentKey(a.ID()), "{")
			return a.ID()
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			fine := w.create(nil, nil, d)
			gone := w.create(nil, nil, d)
			id := damage(w)
			w.delete(gone.ID())
			if r, err := w.store.Reclaim(w.ctx, w.lineage); !errors.Is(err, manifest.ErrCorrupt) || r.Bytes != 0 {
				t.Errorf("reclaim did %+v, %v", r, err)
			}
			found, err := w.store.List(w.ctx, true)
			if !errors.Is(err, manifest.ErrCorrupt) || !strings.Contains(err.Error(), id.String()) || len(found) != 1 || found[0].ID != fine.ID() {
				t.Errorf("listed %+v, %v", found, err)
			}
			w.delete(id)
			w.reclaim()
			owners := make([]string, 0)
			for key := range w.objects("data/") {
				owners = append(owners, strings.Split(key, "/")[1])
			}
			slices.Sort(owners)
			if owners = slices.Compact(owners); len(owners) != 1 || owners[0] != fine.ID().String() {
				t.Errorf("objects are left of %v", owners)
			}
			w.mustHold(w.open(fine.ID()), d)
		})
	}
}

// Records of deleted snapshots stay for ever: what a reclaim keeps of each in memory
// is little.
func TestSurveyKeepsNoRootsOfDeletedSnapshots(t *testing.T) {
	plainAndSealed(t, testSurveyKeepsNoRootsOfDeletedSnapshots)
}

func testSurveyKeepsNoRootsOfDeletedSnapshots(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	d := newDevice(2*testBlock).tiny(1, 0)
	live := w.create(nil, nil, d)
	pinned := w.create(nil, nil, d)
	if err := w.store.Pin(w.ctx, pinned.ID(), snapshot.Holder{ID: "vol"}); err != nil {
		t.Fatal(err)
	}
	parent := w.create(nil, nil, d)
	child := d.tiny(2, 1)
	pending := w.begin(w.plan(parent, child), d, child)
	w.delete(pinned.ID(), parent.ID())
	for range 3 {
		w.delete(w.create(nil, nil, d).ID())
	}
	got, err := snapshot.SurveyedRoots(w.ctx, w.store, w.lineage)
	if want := len(live.Outcome.Root) + len(pinned.Outcome.Root); err != nil || got != want {
		t.Errorf("%d bytes of roots in memory (%v), want %d", got, err, want)
	}
	if r := w.reclaim(); r.Roots != 3 || r.Dead != 3 {
		t.Errorf("%+v", r)
	}
	w.mustHold(pinned, d)
	outcome, err := pending.Commit(w.ctx)
	if err != nil {
		t.Fatal(err)
	}
	w.mustHold(w.open(outcome.Snapshot), child)
}
