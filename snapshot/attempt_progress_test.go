package snapshot_test

import (
	"context"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// What people see of an upload is what is in the store, or need not be put there: the
// rate by which it grows is then that of the store.
func TestProgressCountsWhatIsInTheStore(t *testing.T) {
	w := newWorld(t)
	before := newDevice(100*testBlock).random(1, span(0, 40)...)
	parent := w.create(nil, nil, before)
	d := before.clone().random(2, span(10, 15)...) // 5 blocks differ
	a, err := w.store.Begin(w.ctx, w.plan(parent, d))
	if err != nil {
		t.Fatal(err)
	}
	src := d.whole()
	src.Bytes = snapshot.ExtentBytes(src.Extents, testBlock)
	packs := 0
	w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: manifest.PackKey(a.ID(), 0)}, blockstoretest.Fault{
		Before: func(context.Context, blockstoretest.Call) {
			packs++
			if done, total := a.Progress(); done > 35*testBlock || total != 40*testBlock {
				t.Errorf("before the pack is stored %d bytes of %d are done", done, total)
			}
		},
	})
	if err := a.Upload(w.ctx, src); err != nil {
		t.Fatal(err)
	}
	if done, total := a.Progress(); done != 40*testBlock || total != 40*testBlock || packs != 1 {
		t.Errorf("after %d packs %d bytes of %d are done", packs, done, total)
	}
	if _, err := a.Commit(w.ctx); err != nil {
		t.Fatal(err)
	}
}

// Of a source that does not know how much there is, and of one that is all holes, it is
// the place on the device.
func TestProgressOfASourceThatCannotTell(t *testing.T) {
	for name, d := range map[string]*device{"some data": newDevice(10*testBlock).random(1, 3, 4), "holes": newDevice(10 * testBlock)} {
		w := newWorld(t)
		a, err := w.store.Begin(w.ctx, w.plan(nil, d))
		if err != nil {
			t.Fatal(err)
		}
		src := d.whole()
		if name == "holes" {
			src.Bytes = snapshot.ExtentBytes(src.Extents, testBlock)
		}
		if done, total := a.Progress(); done != 0 || total != 10*testBlock {
			t.Errorf("%s: before it, %d of %d", name, done, total)
		}
		if err := a.Upload(w.ctx, src); err != nil {
			t.Fatal(err)
		}
		if done, total := a.Progress(); done != 10*testBlock || total != 10*testBlock {
			t.Errorf("%s: after it, %d of %d", name, done, total)
		}
		if _, err := a.Commit(w.ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// What a reclaim tells is what it says in the end.
func TestReclaimTellsWhatItFrees(t *testing.T) {
	w := newWorld(t)
	d := newDevice(100*testBlock).random(1, span(0, 40)...)
	img := w.create(nil, nil, d)
	next := w.create(img, d, d.clone().random(2, span(0, 10)...)) // so that a pack is rewritten
	w.delete(img.ID())
	var told int64
	w.store.TellFreed(func(bytes int64) { told += bytes })
	r, err := w.store.Reclaim(w.ctx, next.ID().Lineage)
	if err != nil || r.Rewritten == 0 || told != r.Bytes {
		t.Errorf("%+v, %v; %d bytes were told of", r, err, told)
	}
}
