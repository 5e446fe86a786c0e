package snapshot_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A stage is a lineage as the hosts of a scenario find it, and what the
// snapshots hold that are there or will be made. It knows them by their serials,
// in the order of which listings show them.
type stage struct {
	*world
	stored  map[string][]byte // all objects
	content map[manifest.SnapshotID]*device
	roots   map[manifest.SnapshotID]*manifest.Root
}

func newStage(t testing.TB) *stage {
	return &stage{
		world: newWorld(t), stored: make(map[string][]byte),
		content: make(map[manifest.SnapshotID]*device), roots: make(map[manifest.SnapshotID]*manifest.Root),
	}
}

func (st *stage) id(serial uint64) manifest.SnapshotID {
	return manifest.SnapshotID{Lineage: st.lineage, Serial: serial}
}

// expect says what a snapshot is going to hold.
func (st *stage) expect(serial uint64, d *device) { st.content[st.id(serial)] = d }

// commit makes a snapshot; one with the parent 0 has none.
func (st *stage) commit(serial, parent uint64, d *device) {
	st.t.Helper()
	st.expect(serial, d)
	plan, source := st.attempt(st.store, st.id(serial), st.roots[st.id(parent)])
	outcome, err := st.store.Create(st.ctx, plan, source, nil)
	if err != nil {
		st.t.Fatal(err)
	}
	st.roots[st.id(serial)] = st.open(outcome.Snapshot).Root
}

// pin pins a snapshot for somebody.
func (st *stage) pin(serial uint64, holder string) {
	st.t.Helper()
	if err := st.store.Pin(st.ctx, st.id(serial), snapshot.Holder{ID: holder}); err != nil {
		st.t.Fatal(err)
	}
}

// set ends the making of the stage.
func (st *stage) set() *stage {
	st.t.Helper()
	for key := range st.objects("") {
		data, _, err := st.faults.Get(st.ctx, key, blockstore.MaxObjectSize)
		if err != nil {
			st.t.Fatal(err)
		}
		st.stored[key] = data
	}
	return st
}

// attempt returns how to make a snapshot.
func (st *stage) attempt(s *snapshot.Store, id manifest.SnapshotID, parent *manifest.Root) (snapshot.Plan, snapshot.Source) {
	d := st.content[id]
	plan := snapshot.Plan{ID: id, Nonce: nonceOf(id), Geometry: d.geometry}
	if parent == nil {
		return plan, d.since(nil)
	}
	plan.Parent = s.ImageOf(parent)
	return plan, d.since(st.content[parent.Snapshot])
}

// nonceOf returns the nonce of every attempt at a snapshot.
func nonceOf(id manifest.SnapshotID) string { return fmt.Sprintf("%032x", id.Serial) }

// holds compares an image with what it must hold.
func (st *stage) holds(ctx context.Context, img *snapshot.Image) error {
	return holds(ctx, img, st.content[img.ID()])
}
