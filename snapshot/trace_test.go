package snapshot_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func TestTraceIsFoundByItsName(t *testing.T) { plainAndSealed(t, testTraceIsFoundByItsName) }

func testTraceIsFoundByItsName(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	d := newDevice(leafBytes).random(1, 1, 2)
	id := w.create(nil, nil, d).ID()
	if _, err := w.store.Trace(w.ctx, id, "boot"); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("before it is recorded: %v", err)
	}
	for _, want := range []manifest.Trace{{2, 1}, {1}, {}} {
		if err := w.store.SaveTrace(w.ctx, id, "boot", want); err != nil {
			t.Fatal(err)
		}
		if got, err := w.reopen().Trace(w.ctx, id, "boot"); err != nil || !slices.Equal(got, want) {
			t.Errorf("got %v, %v, want %v", got, err, want)
		}
	}
	if _, err := w.store.Trace(w.ctx, id, "other"); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("another name: %v", err)
	}
	w.overwrite(manifest.TraceKey(id, "boot"), "nonsense")
	if _, err := w.store.Trace(w.ctx, id, "boot"); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("a damaged one: %v", err)
	}
}

func TestLastTracedIsThatWithTheNewestTraceOfTheName(t *testing.T) {
	w := newWorld(t)
	d := newDevice(leafBytes).random(1, 1, 2)
	one := w.create(nil, nil, d)
	two := w.create(one, d, d.random(2, 2))
	lineage := w.lineage
	r, err := w.store.CreateLineage(w.ctx, testBlock, "")
	if err != nil {
		t.Fatal(err)
	}
	w.lineage = r.ID
	other := w.create(nil, nil, d)
	save := func(img *snapshot.Image, name string) {
		t.Helper()
		if err := w.store.SaveTrace(w.ctx, img.ID(), name, manifest.Trace{1}); err != nil {
			t.Fatal(err)
		}
	}
	save(other, "boot")
	save(one, "grep")
	if id, err := w.store.LastTraced(w.ctx, lineage, "boot"); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("only others have one: %s, %v", id, err)
	}
	for _, img := range []*snapshot.Image{two, one, two} {
		save(img, "boot")
		if id, err := w.store.LastTraced(w.ctx, lineage, "boot"); err != nil || id != img.ID() {
			t.Errorf("got %s, %v, want %s", id, err, img.ID())
		}
	}
}

func TestTraceNamesThatAreNoKeysAreRefused(t *testing.T) {
	plainAndSealed(t, testTraceNamesThatAreNoKeysAreRefused)
}

func testTraceNamesThatAreNoKeysAreRefused(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	id := w.create(nil, nil, newDevice(leafBytes).random(1, 1)).ID()
	before := w.objects("")
	for _, name := range []string{"", "Boot", "a/b", "..", "a b", strings.Repeat("a", 65)} {
		if err := w.store.SaveTrace(w.ctx, id, name, nil); !errors.Is(err, snapshot.ErrName) {
			t.Errorf("SaveTrace %q: %v", name, err)
		}
		if _, err := w.store.Trace(w.ctx, id, name); !errors.Is(err, snapshot.ErrName) {
			t.Errorf("Trace %q: %v", name, err)
		}
	}
	if len(w.objects("")) != len(before) {
		t.Error("something was stored")
	}
}

func TestTracesGoWithTheirSnapshot(t *testing.T) { plainAndSealed(t, testTracesGoWithTheirSnapshot) }

func testTracesGoWithTheirSnapshot(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	d := newDevice(leafBytes).random(1, 1, 2)
	one := w.create(nil, nil, d)
	two := w.create(one, d, d.random(2, 2))
	for _, img := range []*snapshot.Image{one, two} {
		for _, name := range []string{"boot", "grep"} {
			if err := w.store.SaveTrace(w.ctx, img.ID(), name, manifest.Trace{1}); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.delete(one.ID())
	w.reclaim()
	traces := w.objects(manifest.KindPrefix(manifest.KindTraces))
	if len(traces) != 2 {
		t.Errorf("%d traces are left, want the other's 2", len(traces))
	}
	if _, err := w.store.Trace(w.ctx, two.ID(), "grep"); err != nil {
		t.Error(err)
	}
}
