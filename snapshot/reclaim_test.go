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

// The promise that names numbers: states of 10, then 4 changed, then 2 added
// units store 16 in all, and deleting the first frees the 4 that changed.
func TestTenThenFourChangedThenTwoAdded(t *testing.T) {
	const unit = 8 // blocks
	w := newWorld(t)
	first := newDevice(10*unit*testBlock).random(1, span(0, 10*unit)...)
	changed := span(0, 0)
	for i := range int64(4 * unit) {
		changed = append(changed, i*2+3) // scattered over the packs
	}
	second := first.random(2, changed...)
	third := second.grown(12*unit*testBlock).random(3, span(10*unit, 12*unit)...)

	about := func(what string, got int64, units int) {
		t.Helper()
		want := int64(units * unit * testBlock)
		if got < want*97/100 || got > want*103/100 {
			t.Errorf("%s: %d bytes, %.2f of what it should be", what, got, float64(got)/float64(want))
		}
	}
	one := w.create(nil, nil, first)
	about("stored after the first", w.stored(), 10)
	two := w.create(one, first, second)
	about("stored after the second", w.stored(), 14)
	three := w.create(two, second, third)
	about("stored after the third", w.stored(), 16)

	unique, err := w.store.UniqueBytes(w.ctx, one.ID())
	if err != nil {
		t.Fatal(err)
	}
	about("unique to the first", unique, 4)
	w.delete(one.ID())
	r := w.reclaim()
	about("freed by deleting the first", r.Bytes, 4)
	if r.Bytes != unique || r.Rewritten == 0 {
		t.Errorf("freed %d with %d rewritten packs, and %d bytes were unique", r.Bytes, r.Rewritten, unique)
	}
	about("left", w.stored(), 12)
	w.mustHold(two, second)
	w.mustHold(three, third)

	// Its packs are now read by way of their slot tables.
	w.mustVerify(two.ID())
	w.mustVerify(three.ID())

	w.delete(two.ID(), three.ID())
	w.reclaim()
	if left := w.objects("data/"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// UniqueBytes is what a delete and a reclaim free, to the byte: for the first,
// a middle and the last snapshot of a chain, for branches, and for what was
// rewritten before.
func TestUniqueBytesIsWhatDeletingFrees(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	base := newDevice(3*leafBytes).random(1, span(0, 20)...).tiny(1, span(1000, 1060)...).tiny(1, span(2100, 2110)...)
	d1 := base.random(2, 3, 4, 5).tiny(2, span(1010, 1020)...)
	d2 := d1.random(3, 4, 15).tiny(3, span(1015, 1025)...).punched(2105)
	d3 := d2.tiny(4, span(1000, 1060)...).punched(span(0, 10)...)
	branch := d1.tiny(5, 4, 1059, 2200)
	s0 := w.create(nil, nil, base)
	s1 := w.create(s0, base, d1)
	s2 := w.create(s1, d1, d2)
	s3 := w.create(s2, d2, d3)
	s4 := w.create(s1, d1, branch)
	live := map[manifest.SnapshotID]*device{s0.ID(): base, s1.ID(): d1, s2.ID(): d2, s3.ID(): d3, s4.ID(): branch}

	for _, img := range []*snapshot.Image{s1, s0, s4, s3, s2} {
		var sum int64
		for id := range live {
			n, err := w.store.UniqueBytes(w.ctx, id)
			if err != nil {
				t.Fatal(err)
			}
			sum += n
		}
		if sum > w.stored() {
			t.Errorf("the snapshots have %d unique bytes together, and the store holds %d", sum, w.stored())
		}
		unique, err := w.store.UniqueBytes(w.ctx, img.ID())
		if err != nil {
			t.Fatal(err)
		}
		before := w.stored()
		w.delete(img.ID())
		delete(live, img.ID())
		r := w.reclaim()
		if freed := before - w.stored(); freed != unique || r.Bytes != freed {
			t.Errorf("deleting %s freed %d bytes; %d were said to be unique, and reclaim says %d", img.ID(), freed, unique, r.Bytes)
		}
		for id, d := range live {
			w.mustHold(w.open(id), d)
			w.mustVerify(id)
		}
	}
	if left := w.objects("data/"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestUniqueBytesOfWhatIsNotCommitted(t *testing.T) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	a := w.begin(w.plan(nil, d), nil, d)
	if _, err := w.store.UniqueBytes(w.ctx, a.ID()); !errors.Is(err, snapshot.ErrPending) {
		t.Errorf("pending: %v", err)
	}
	if err := a.Abort(w.ctx, "test"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.store.UniqueBytes(w.ctx, a.ID()); !errors.Is(err, snapshot.ErrAborted) {
		t.Errorf("aborted: %v", err)
	}
	img := w.create(nil, nil, d)
	w.delete(img.ID())
	for _, id := range []manifest.SnapshotID{img.ID(), manifest.NewSnapshotID(w.lineage)} {
		if _, err := w.store.UniqueBytes(w.ctx, id); !errors.Is(err, snapshot.ErrNotFound) {
			t.Errorf("deleted or unknown: %v", err)
		}
	}
}

// A reclaim that has nothing to do changes nothing, and of packs that have been
// rewritten it reads at most the slot table.
func TestReclaimWithNothingToDo(t *testing.T) {
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

func TestPinKeepsADeletedSnapshotWhole(t *testing.T) {
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
	if pins := w.objects("pins/"); len(pins) > 0 {
		t.Errorf("pins left: %v", pins)
	}
	if r := w.reclaim(); r.Bytes == 0 {
		t.Error("nothing freed after the pin")
	}
	w.mustHold(two, second)
}

// The owner of a pending snapshot that shows no sign is given up, by the
// store's clock; one that does is not, however long it takes.
func TestReclaimAbortsAttemptsWhoseOwnerIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := newDevice(20*testBlock).random(1, span(0, 20)...)
		lost := w.begin(w.plan(nil, d), nil, d)

		// The other one takes four hours to read its third block.
		slow := d.since(nil)
		slow.Read = func(ctx context.Context, block int64, p []byte) error {
			if block == 3 {
				time.Sleep(4 * time.Hour)
			}
			return d.read(ctx, block, p)
		}
		alive, err := w.store.Begin(w.ctx, w.plan(nil, d))
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() { done <- alive.Upload(w.ctx, slow) }()

		time.Sleep(20 * time.Minute)
		if r := w.reclaim(); r.Aborted != 0 || r.Bytes != 0 {
			t.Errorf("after 20 minutes: %+v", r)
		}
		time.Sleep(time.Hour)
		if r := w.reclaim(); r.Aborted != 1 || r.Bytes == 0 {
			t.Errorf("after more than an hour: %+v", r)
		}
		if _, err := lost.Commit(w.ctx); !errors.Is(err, snapshot.ErrAborted) {
			t.Errorf("commit of the lost one: %v", err)
		}
		described, err := w.store.Describe(w.ctx, lost.ID())
		if err != nil || described.State != snapshot.Aborted || !strings.Contains(described.Why, "not been heard of") {
			t.Errorf("the lost one is %+v, %v", described, err)
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if _, err := alive.Commit(w.ctx); err != nil {
			t.Fatal(err)
		}
		w.mustHold(w.open(alive.ID()), d)
		if left := w.objects("progress/"); len(left) > 0 {
			t.Errorf("progress left: %v", left)
		}
	})
}

// Percent is what others see of a pending snapshot's upload.
func TestProgressOfAPendingSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := newDevice(1000*testBlock).tiny(1, span(0, 1000)...)
		src := d.since(nil)
		reached := make(chan struct{})
		src.Read = func(ctx context.Context, block int64, p []byte) error {
			if block == 600 {
				close(reached)
				time.Sleep(time.Minute)
			}
			return d.read(ctx, block, p)
		}
		a, err := w.store.Begin(w.ctx, w.plan(nil, d))
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error)
		go func() { done <- a.Upload(w.ctx, src) }()
		<-reached
		time.Sleep(40 * time.Second)
		described, err := w.reopen().Describe(w.ctx, a.ID())
		if err != nil || described.State != snapshot.Pending || described.Percent != 60 || a.Percent() != 60 {
			t.Errorf("described as %+v, %v; the attempt says %d %%", described, err, a.Percent())
		}
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if a.Percent() != 100 {
			t.Errorf("%d %% after the upload", a.Percent())
		}
		if _, err := a.Commit(w.ctx); err != nil {
			t.Fatal(err)
		}
	})
}

// What ended attempts left goes with the next reclaim: progress that was sent
// late, a pin on an aborted snapshot, tags of a deleted one, and objects that
// arrived after the abort.
func TestReclaimTidies(t *testing.T) {
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
	for _, prefix := range []string{"pins/", "progress/", manifest.DataPrefix(a.ID()), manifest.DataPrefix(gone.ID()), manifest.MetaKey(gone.ID())} {
		if left := w.objects(prefix); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
	if len(w.objects(manifest.MetaKey(img.ID()))) == 0 {
		t.Error("the tags of a live snapshot are gone")
	}
	w.mustHold(img, d)
}

// Foreign objects are not lazyvol's to remove.
func TestReclaimLeavesForeignObjects(t *testing.T) {
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
	t.Parallel()
	w := newWorld(t)
	// Two packs, for their leaves are too many to wait for one.
	first := sparse(300)
	second := first.tiny(2, 0, 299*manifest.LeafBlocks)
	one := w.create(nil, nil, first)
	two := w.create(one, first, second)
	w.delete(one.ID())
	damaged := manifest.PackKey(one.ID(), 1)
	w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpGet, Prefix: damaged}, blockstoretest.Fault{Flip: true})
	r, err := w.store.Reclaim(w.ctx, w.lineage)
	if !errors.Is(err, blockstore.ErrCorrupt) || !strings.Contains(err.Error(), one.ID().String()) {
		t.Errorf("reclaim: %v", err)
	}
	if r.Rewritten != 1 {
		t.Errorf("reclaim did %+v", r)
	}
	w.faults.Heal()
	w.mustHold(two, second)
	w.reclaim()
	w.mustHold(two, second)
}

// A record that is damaged stops the reclaim, and lets itself be deleted.
func TestDamagedRecordsCanBeDeleted(t *testing.T) {
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
