package snapshot

import (
	"context"
	"encoding/binary"
	"errors"
	"sync"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A snapshot of more packs than a section describes has several, and what dies
// in each is taken out of it. Packs of one block stand for packs that are full.
func TestFooterOfManyPacks(t *testing.T) {
	const blocks = manifest.SectionPacks + 10
	ctx := t.Context()
	store, err := Init(ctx, blockstore.NewMem())
	if err != nil {
		t.Fatal(err)
	}
	lineage, err := store.CreateLineage(ctx, manifest.MinBlockSize, "")
	if err != nil {
		t.Fatal(err)
	}
	content := func(generation uint32) func(context.Context, int64, []byte) error {
		return func(_ context.Context, block int64, p []byte) error {
			clear(p)
			binary.LittleEndian.PutUint32(p, generation)
			binary.LittleEndian.PutUint64(p[8:], uint64(block))
			return nil
		}
	}
	plan := NewPlan(lineage.ID)
	plan.Geometry = manifest.Geometry{Size: blocks * manifest.MinBlockSize, BlockSize: manifest.MinBlockSize}
	first, err := store.Begin(ctx, plan)
	if err != nil {
		t.Fatal(err)
	}
	// As Upload does, but that each block is a pack.
	crew := newCrew(ctx, make(places, uploads))
	index := newIndexWriter(first, &sender{store.objects, crew})
	err = crew.lead(func(ctx context.Context) (err error) {
		preparer := newPreparer(manifest.MinBlockSize, content(1), 1, 1)
		for block := range int64(blocks) {
			j := &job{first: block, count: 1}
			if err := preparer.prepare(ctx, j); err != nil {
				return err
			}
			if err := errors.Join(index.add(ctx, j), index.finishPack(ctx)); err != nil {
				return err
			}
			preparer.release(j)
		}
		first.uploaded, err = index.finish(ctx)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := putOwn(ctx, store.objects, manifest.RootKey(first.ID()), first.uploaded.root); err != nil {
		t.Fatal(err)
	}
	outcome, err := first.Commit(ctx)
	if err != nil {
		t.Fatal(err)
	}
	parent, err := store.Load(ctx, outcome)
	if err != nil {
		t.Fatal(err)
	}
	if len(parent.Root.Sections) != 2 || outcome.Packs != blocks {
		t.Errorf("%d sections of %d packs", len(parent.Root.Sections), outcome.Packs)
	}

	changed := []int64{0, 5, manifest.SectionPacks - 1, manifest.SectionPacks, blocks - 1}
	second := NewPlan(lineage.ID)
	second.Parent, second.Geometry = parent, plan.Geometry
	_, err = store.Create(ctx, second, Source{
		Extents: func(yield func(Extent, error) bool) {
			for _, block := range changed {
				if !yield(Extent{First: block, Count: 1}, nil) {
					return
				}
			}
		},
		Read: content(2),
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Delete(ctx, first.ID()); err != nil {
		t.Fatal(err)
	}
	r, err := store.Reclaim(ctx, lineage.ID)
	if err != nil || r.Objects != len(changed)+2 { // packs, the leaves, the root
		t.Errorf("reclaim did %+v, %v", r, err)
	}
	report, err := store.Verify(ctx, second.ID, func(err error) { t.Error(err) })
	if err != nil || report.Blocks != blocks {
		t.Errorf("verify: %+v, %v", report, err)
	}
	img, err := store.Open(ctx, second.ID, Holder{})
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex // guards generations
	generations := make(map[int64]uint32)
	err = img.ReadAll(ctx, func(block int64, data []byte) error {
		mu.Lock()
		defer mu.Unlock()
		generations[block] = binary.LittleEndian.Uint32(data)
		return nil
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range changed {
		if generations[block] != 2 {
			t.Errorf("block %d is of generation %d", block, generations[block])
		}
		generations[block] = 1
	}
	for block, generation := range generations {
		if generation != 1 {
			t.Errorf("block %d is of generation %d", block, generation)
		}
	}
}
