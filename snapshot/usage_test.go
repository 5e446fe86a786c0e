package snapshot_test

import (
	"errors"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// The promise that names numbers: states of 10, then 4 changed, then 2 added
// units store 16 in all, and deleting the first frees the 4 that changed.
func TestTenThenFourChangedThenTwoAdded(t *testing.T) {
	plainAndSealed(t, testTenThenFourChangedThenTwoAdded)
}

func testTenThenFourChangedThenTwoAdded(t *testing.T, newWorld func(testing.TB) *world) {
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
	w.wantNone("data/")
}

// UniqueBytes is what a delete and a reclaim free, to the byte: for the first,
// a middle and the last snapshot of a chain, for branches, and for what was
// rewritten before.
func TestUniqueBytesIsWhatDeletingFrees(t *testing.T) {
	plainAndSealed(t, testUniqueBytesIsWhatDeletingFrees)
}

func testUniqueBytesIsWhatDeletingFrees(t *testing.T, newWorld func(testing.TB) *world) {
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
	w.wantNone("data/")
}

func TestUniqueBytesOfWhatIsNotCommitted(t *testing.T) {
	plainAndSealed(t, testUniqueBytesOfWhatIsNotCommitted)
}

func testUniqueBytesOfWhatIsNotCommitted(t *testing.T, newWorld func(testing.TB) *world) {
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
