package snapshot_test

import (
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// Of two snapshots of hundreds of leaves that differ in a block, a diff reads that
// block's leaf of either, and nothing else.
func TestDiffReadsOnlyLeavesThatDiffer(t *testing.T) {
	w := newWorld(t)
	for _, leaves := range []int64{2, 400} {
		a := sparse(leaves)
		one := w.create(nil, nil, a)
		block := (leaves - 1) * manifest.LeafBlocks
		b := a.tiny(7, block)
		two := w.create(one, a, b)
		w.faults.Reset()
		var got []snapshot.Change
		err := snapshot.Diff(w.ctx, one, two, func(c snapshot.Change) error {
			got = append(got, c)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		want := []snapshot.Change{{Offset: block * testBlock, Length: testBlock, First: true, Second: true}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%d leaves (-want +got)\n%s", leaves, diff)
		}
		if calls := w.faults.Calls(); len(calls) != 2 || w.faults.Count(blockstoretest.OpReadRange) != 2 {
			t.Errorf("%d leaves: asked %v", leaves, calls)
		}
		w.faults.Reset()
		if err := snapshot.Diff(w.ctx, two, two, func(snapshot.Change) error { return errors.New("no block differs") }); err != nil {
			t.Error(err)
		}
		if calls := w.faults.Calls(); len(calls) != 0 {
			t.Errorf("for a snapshot and itself: asked %v", calls)
		}
	}
}

// However much differs, a diff holds a few leaves at once: it reads no further than
// so many ahead of what was taken of it.
func TestDiffReadsABoundedNumberOfLeavesAhead(t *testing.T) {
	const ahead = 16 // twice leafReads
	w := newWorld(t)
	a := sparse(300)
	one := w.create(nil, nil, a)
	var blocks []int64
	for leaf := range int64(300) {
		blocks = append(blocks, leaf*manifest.LeafBlocks)
	}
	two := w.create(one, a, a.tiny(9, blocks...))
	w.faults.Reset()
	taken := 0
	err := snapshot.Diff(w.ctx, one, two, func(snapshot.Change) error {
		taken++
		if read := w.faults.Count(blockstoretest.OpReadRange); read > 2*(taken+ahead) {
			t.Errorf("%d leaves were read when %d changes were taken", read, taken)
		}
		return nil
	})
	if err != nil || taken != 300 {
		t.Errorf("%d changes, %v", taken, err)
	}
}

func TestDiffRefusesAnotherLineage(t *testing.T) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	one := w.create(nil, nil, d)
	other := newWorldIn(t, w.faults)
	two := other.create(nil, nil, d)
	err := snapshot.Diff(w.ctx, one, two, func(snapshot.Change) error { return errors.New("called") })
	if !errors.Is(err, snapshot.ErrUnrelated) {
		t.Errorf("got %v", err)
	}
}
