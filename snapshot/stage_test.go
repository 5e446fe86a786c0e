package snapshot_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A stage is a lineage as the hosts of a scenario find it, and what each
// snapshot holds that is there or will be. Snapshots go by their serials, in the
// order of which listings show them; 0 is none.
type stage struct {
	*world
	stored  map[string][]byte // all objects
	content map[manifest.SnapshotID]*device
	roots   map[manifest.SnapshotID]*manifest.Root
	changes []int64 // the blocks that every snapshot to be made changes
	other   manifest.LineageID
}

func newStage(t testing.TB, set func(*stage)) *stage {
	st := &stage{
		world: newWorld(t), stored: make(map[string][]byte),
		content: make(map[manifest.SnapshotID]*device), roots: make(map[manifest.SnapshotID]*manifest.Root),
		changes: []int64{1},
	}
	set(st)
	for key := range st.objects("") {
		data, _, err := st.faults.Get(st.ctx, key, blockstore.MaxObjectSize)
		if err != nil {
			t.Fatal(err)
		}
		st.stored[key] = data
	}
	return st
}

// id returns the snapshot of a serial, which from elsewhere on is one of the other
// lineage.
func (st *stage) id(serial uint64) manifest.SnapshotID {
	if serial >= elsewhere {
		return manifest.SnapshotID{Lineage: st.other, Serial: serial}
	}
	return manifest.SnapshotID{Lineage: st.lineage, Serial: serial}
}

// elsewhere is the least serial in the other lineage.
const elsewhere = 100

// lineages lists them.
func (st *stage) lineages() []manifest.LineageID {
	if st.other == 0 {
		return []manifest.LineageID{st.lineage}
	}
	return []manifest.LineageID{st.lineage, st.other}
}

// another makes the other lineage.
func (st *stage) another() {
	record, err := st.store.CreateLineage(st.ctx, testBlock, "")
	if err != nil {
		st.t.Fatal(err)
	}
	st.other = record.ID
}

// first makes a snapshot without a parent.
func (st *stage) first(serial uint64, d *device) {
	st.content[st.id(serial)] = d
	st.commit(serial, 0)
}

// next makes a snapshot that differs from its parent in one block.
func (st *stage) next(serial, parent uint64, block int64) {
	st.content[st.id(serial)] = st.content[st.id(parent)].tiny(int(serial), block)
	st.commit(serial, parent)
}

func (st *stage) commit(serial, parent uint64) {
	st.t.Helper()
	plan, source := st.attempt(st.store, st.id(serial), st.roots[st.id(parent)])
	outcome, err := st.store.Create(st.ctx, plan, source, nil)
	if err != nil {
		st.t.Fatal(err)
	}
	st.roots[plan.ID] = st.open(outcome.Snapshot).Root
}

func (st *stage) pin(serial uint64, holders ...string) {
	st.t.Helper()
	for _, holder := range holders {
		if err := st.store.Pin(st.ctx, st.id(serial), snapshot.Holder{ID: holder}); err != nil {
			st.t.Fatal(err)
		}
	}
}

// will says what snapshots are going to hold: what the parent does, and other
// content in a few blocks. These are of different leaves: uploads of several of
// one leaf wait for the first to read the parent's, with a mutex, and that is
// not waiting to synctest.
func (st *stage) will(parent uint64, serials ...uint64) (ids []manifest.SnapshotID) {
	for _, serial := range serials {
		id := st.id(serial)
		if st.content[id] == nil {
			st.content[id] = st.content[st.id(parent)].tiny(int(serial), st.changes...)
		}
		ids = append(ids, id)
	}
	return ids
}

// attempt returns how to make a snapshot.
func (st *stage) attempt(s *snapshot.Store, id manifest.SnapshotID, parent *manifest.Root) (snapshot.Plan, snapshot.Source) {
	d := st.content[id]
	plan := snapshot.Plan{ID: id, Nonce: nonceOf(id), Geometry: d.geometry}
	if parent == nil {
		return plan, d.since(nil)
	}
	plan.Parent = imageOf(s, parent)
	return plan, d.since(st.content[parent.Snapshot])
}

// imageOf returns the image of a root that is not encrypted.
func imageOf(s *snapshot.Store, root *manifest.Root) *snapshot.Image {
	data := root.Encode()
	img, err := s.ImageOf(root.Snapshot, data, manifest.Sum(data), nil)
	if err != nil {
		panic(err) // the root is one that was read
	}
	return img
}

// nonceOf returns the nonce of every attempt at a snapshot.
func nonceOf(id manifest.SnapshotID) string { return fmt.Sprintf("%032x", id.Serial) }

// holds compares an image with what it must hold.
func (st *stage) holds(ctx context.Context, img *snapshot.Image) error {
	return holds(ctx, img, st.content[img.ID()])
}
