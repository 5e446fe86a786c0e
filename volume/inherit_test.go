package volume

import (
	"errors"
	"strings"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// damages are what can befall the first block of a pack at rest.
var damages = map[string]struct {
	change func(pack []byte) []byte // nil: the pack is removed
	is     error
}{
	"flipped": {func(pack []byte) []byte {
		pack[len(pack)-3*blockSize+blockSize/2] ^= 4 // of the first of three incompressible blocks
		return pack
	}, manifest.ErrCorrupt},
	"missing": {nil, blockstore.ErrNotExist},
}

// damage damages the first pack of a snapshot and returns how to undo that.
func (w *world) damage(id manifest.SnapshotID, change func([]byte) []byte) (undo func()) {
	w.Helper()
	key := manifest.PackKey(id, 0)
	sound, _, err := w.mem.Get(w.ctx, key, blockstore.MaxObjectSize)
	w.must(err)
	put := func(data []byte) {
		w.Helper()
		_, err := w.mem.Put(w.ctx, key, data, blockstore.Condition{})
		w.must(err)
	}
	if change == nil {
		w.must(w.mem.Delete(w.ctx, key))
	} else {
		put(change(append([]byte(nil), sound...)))
	}
	return func() { put(sound) }
}

// A block that was overwritten in part needs the rest of its parent's. While
// that cannot be verified there is no snapshot, and the changes stay.
func TestSnapshotOverADamagedBlockFailsAndKeepsTheChanges(t *testing.T) {
	for name, d := range damages {
		t.Run(name, func(t *testing.T) {
			w := newRealWorld(t)
			v, data := newRestored(w, 3)
			root := *v.Record().Root
			undo := w.damage(root, d.change)
			w.overwrite(v, data, pageSize, pageSize, 2) // of block 0
			w.overwrite(v, data, blockSize, 2*blockSize, 3)
			for range 2 { // a failed one is no excuse for the next
				if _, err := v.Snapshot(w.ctx, SnapshotOptions{}); !errors.Is(err, d.is) || !strings.Contains(err.Error(), "block 0") {
					t.Fatalf("snapshot: %v, want %v of block 0", err, d.is)
				}
				if r := v.Record(); len(r.Layers) != 1 || r.Pending != nil || *r.Root != root {
					t.Fatalf("the attempt was not settled: %+v", r)
				}
				w.wantNonePending()
				w.equal(v.Device, nil, "nothing") // it is open
				for _, page := range []int{1, 2 * blockSize / pageSize} {
					p := make([]byte, pageSize)
					if _, err := v.ReadAt(w.ctx, p, int64(page)*pageSize); err != nil || firstDifference(p, data[page*pageSize:][:pageSize]) >= 0 {
						t.Errorf("the changed page %d: %v", page, err)
					}
				}
				if _, err := v.ReadAt(w.ctx, make([]byte, 1), 0); !errors.Is(err, syscall.EIO) {
					t.Errorf("a page of the damaged block: %v, want EIO", err)
				}
			}
			id := v.Record().ID
			w.must(v.Close())
			v = w.open(id)
			undo()
			w.equal(v.Device, data, "volume when the pack is sound again")
			w.equalSnapshot(w.snapshot(v), data, "its snapshot")
			w.must(v.Close())
		})
	}
}

// Nothing of the parent is needed of a block that was overwritten whole.
func TestBlockOverwrittenWholeOutlivesItsDamagedParent(t *testing.T) {
	for name, change := range map[string]func(w *world, v *Volume, data []byte){
		"written": func(w *world, v *Volume, data []byte) {
			w.overwrite(v, data, blockSize, 0, 2)
		},
		"discarded": func(w *world, v *Volume, data []byte) {
			w.must(v.Zero(w.ctx, 0, blockSize))
			clear(data[:blockSize])
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newRealWorld(t)
			v, data := newRestored(w, 3)
			w.damage(*v.Record().Root, damages["flipped"].change)
			change(w, v, data)
			w.equalSnapshot(w.snapshot(v), data, "the snapshot")
			w.equal(v.Device, data, "volume")
			w.must(v.Close())
		})
	}
}

// A block that did not change is inherited, with what is wrong with it: its
// child's readers are told so, never other bytes, and a check of the child finds
// it.
func TestDamagedBlockIsNotInheritedSilently(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 3)
	undo := w.damage(*v.Record().Root, damages["flipped"].change)
	w.overwrite(v, data, pageSize, blockSize, 2)
	child := w.snapshot(v)
	w.must(v.Close())

	d, closeIt := w.mount(child)
	p := make([]byte, blockSize)
	for range 2 { // the second finds nothing cached
		if _, err := d.ReadAt(w.ctx, p, 0); !errors.Is(err, syscall.EIO) || !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("the damaged block of the child: %v, want EIO for ErrCorrupt", err)
		}
	}
	if _, err := d.ReadAt(w.ctx, p, blockSize); err != nil || firstDifference(p, data[blockSize:][:blockSize]) >= 0 {
		t.Errorf("its neighbour: %v", err)
	}
	report, err := storeIn(w.mem).Check(w.ctx, snapshot.Check{Snapshot: child, Share: 1})
	if err != nil {
		t.Fatal(err)
	}
	found := report.Findings
	if len(found) != 1 || !errors.Is(found[0], manifest.ErrCorrupt) || !strings.Contains(found[0].Error(), "block 0") {
		t.Errorf("verify found %v, want block 0 of the child", found)
	}
	undo()
	w.equal(d, data, "the child when the pack is sound again")
	closeIt()
}
