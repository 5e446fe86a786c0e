package snapshot_test

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

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

func TestLineagesAreListedInOrder(t *testing.T) {
	w := newWorld(t)
	want := []manifest.LineageID{w.lineage}
	for range 3 {
		lineage, err := w.store.CreateLineage(w.ctx, manifest.DefaultBlockSize, "")
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, lineage.ID)
	}
	slices.Sort(want)
	got, err := w.store.Lineages(w.ctx)
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if _, err := w.store.CreateLineage(w.ctx, 12345, ""); err == nil {
		t.Error("made a lineage with blocks of 12345 bytes")
	}
}
