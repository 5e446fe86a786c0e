package volume

import (
	"errors"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// newLost returns a volume of four blocks whose root was deleted after a person
// forgot its pin. Blocks 0 and 1 are cached, 1 is partly written, 2 discarded,
// 3 cold; if reclaimed is set, it is gone.
func newLost(w *world, reclaimed bool) (*Volume, []byte) {
	w.Helper()
	v, data := newRestored(w, 4)
	if _, err := v.ReadAt(w.ctx, make([]byte, 2*blockSize), 0); err != nil {
		w.Fatalf("read: %v", err)
	}
	w.eventually("the blocks are cached", func() bool { return v.Stats().HydratedBytes == 2*blockSize })
	w.overwrite(v, data, pageSize, blockSize, 2)
	w.must(v.Zero(w.ctx, 2*blockSize, blockSize))
	clear(data[2*blockSize : 3*blockSize])
	store := storeIn(w.mem)
	_, err := store.Forget(w.ctx, v.name)
	w.must(err)
	w.must(store.Delete(w.ctx, *v.Record().Root))
	if reclaimed {
		_, err := store.Reclaim(w.ctx, v.Record().Lineage)
		w.must(err)
	}
	return v, data
}

func TestLostRootFailsColdReadsLoudlyAndServesTheRest(t *testing.T) {
	w := newRealWorld(t)
	v, data := newLost(w, false)
	if err := v.Settle(w.ctx); !errors.Is(err, snapshot.ErrNotFound) {
		t.Fatalf("Settle: %v, want snapshot.ErrNotFound", err)
	}
	if stats := v.Stats(); stats.Lost == nil {
		t.Error("the status does not tell that the root is lost")
	}
	w.equal(v.Device, data[:3*blockSize], "what is cached or written")
	w.store.Reset()
	if _, err := v.ReadAt(w.ctx, make([]byte, 1), 3*blockSize); !errors.Is(err, syscall.EIO) || !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("a cold read: %v, want EIO that says why", err)
	}
	if err := v.Warm(w.ctx, []int64{3}); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("hydration: %v", err)
	}
	if n := w.packGets(); n != 0 {
		t.Errorf("%d requests through a lost root", n)
	}
	w.overwrite(v, data, blockSize, 3*blockSize, 3)
	w.equal(v.Device, data, "volume with the cold block overwritten")
	w.must(v.Close())
}

func TestPinThatIsGoneIsMadeAgain(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 1)
	root := v.Record().Root.String()
	_, err := storeIn(w.mem).Forget(w.ctx, v.name)
	w.must(err)
	w.must(v.Settle(w.ctx))
	if pins := w.pins(v.name); len(pins) != 1 || pins[0] != root {
		t.Errorf("pins %v, want %s", pins, root)
	}
	w.remove(*v.Record().Root) // which now only delays it
	w.equal(v.Device, data, "volume of a deleted snapshot")
	w.must(v.Close())
}

// TestSnapshotWithoutItsParent is a full one: nothing may be inherited from a
// deleted root without a pin. It takes all that can still be read.
func TestSnapshotWithoutItsParent(t *testing.T) {
	w := newRealWorld(t)
	v, data := newLost(w, false)
	old := *v.Record().Root
	var begun []manifest.SnapshotID
	outcome, err := v.Snapshot(w.ctx, SnapshotOptions{Description: "full", Cut: func(a *snapshot.Attempt) { begun = append(begun, a.ID()) }})
	w.must(err)
	if outcome.Parent != nil || outcome.DataBlocks != 3 || outcome.UploadedBlocks != 3 || outcome.Description != "full" {
		t.Errorf("outcome %+v, want 3 blocks without a parent", outcome)
	}
	if len(begun) != 1 || begun[0] != outcome.Snapshot {
		t.Errorf("told of %v, committed %s", begun, outcome.Snapshot)
	}
	if stats := v.Stats(); stats.Lost != nil || stats.Root != outcome.Snapshot.String() {
		t.Errorf("stats %+v after a full snapshot", stats)
	}
	_, err = storeIn(w.mem).Reclaim(w.ctx, old.Lineage)
	w.must(err)
	w.must(w.mem.List(w.ctx, manifest.DataPrefix(old), func(info blockstore.Info) error {
		t.Errorf("%s of the deleted root is still used", info.Key)
		return nil
	}))
	w.equalSnapshot(outcome.Snapshot, data, "the full snapshot")
	for block := range int64(4) { // what is cold comes from the new root
		w.must(v.writes.clean.Evict(block))
	}
	w.equal(v.Device, data, "volume")
	w.overwrite(v, data, pageSize, 3*blockSize, 5)
	outcome, err = v.Snapshot(w.ctx, SnapshotOptions{})
	w.must(err)
	if outcome.Parent == nil || outcome.UploadedBlocks != 1 {
		t.Errorf("outcome %+v, want one block on a parent", outcome)
	}
	w.equalSnapshot(outcome.Snapshot, data, "the snapshot after it")
	w.must(v.Close())
}

// TestSnapshotWithoutItsParentNeedsAllBlocks and keeps the changes until it
// has them.
func TestSnapshotWithoutItsParentNeedsAllBlocks(t *testing.T) {
	w := newRealWorld(t)
	v, data := newLost(w, true)
	if _, err := v.Snapshot(w.ctx, SnapshotOptions{}); !errors.Is(err, blockstore.ErrNotExist) {
		t.Fatalf("snapshot without block 3: %v, want ErrNotExist", err)
	}
	w.equal(v.Device, data[:3*blockSize], "what is cached or written")
	if stats := v.Stats(); stats.Lost == nil {
		t.Error("the status does not tell that the root is lost")
	}
	w.overwrite(v, data, blockSize, 3*blockSize, 3)
	id := w.snapshot(v)
	w.equalSnapshot(id, data, "the full snapshot")
	w.equal(v.Device, data, "volume")
	if pins := w.pins(v.name); len(pins) != 1 || pins[0] != id.String() {
		t.Errorf("pins %v, want %s alone", pins, id)
	}
	w.must(v.Close())
}

// TestLostRootAndAFailingStore has each request of the full snapshot fail.
func TestLostRootAndAFailingStore(t *testing.T) {
	for skip := 0; ; skip++ {
		w := newWorld(t, uint64(skip))
		v, data := newLost(w, false)
		w.store.Reset()
		w.store.Inject(blockstoretest.Rule{Skip: skip, Times: 1}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
		outcome, err := v.Snapshot(w.ctx, SnapshotOptions{})
		failed := len(w.store.Calls()) > skip
		w.store.Heal()
		if err != nil {
			outcome, err = v.Snapshot(w.ctx, SnapshotOptions{})
		}
		w.must(err)
		w.equalSnapshot(outcome.Snapshot, data, "the full snapshot")
		w.must(v.Settle(w.ctx))
		w.equal(v.Device, data, "volume")
		w.must(v.Close())
		w.must(w.host.Delete(w.ctx, v.record.ID))
		if pins := w.pins(v.name); len(pins) != 0 {
			t.Fatalf("pins %v of a deleted volume", pins)
		}
		w.wantNonePending()
		w.end()
		if !failed {
			return
		}
	}
}

// TestPinOnTheRootThatSettleMovesToIsLookedAfter: that on the one before says
// nothing of it.
func TestPinOnTheRootThatSettleMovesToIsLookedAfter(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 2)
	w.overwrite(v, data, pageSize, 0, 2)
	w.store.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "outcomes/"}, blockstoretest.Fault{LoseReply: true})
	w.store.Inject(blockstoretest.Rule{Op: blockstoretest.OpGet, Prefix: "outcomes/"}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
	if _, err := v.Snapshot(w.ctx, SnapshotOptions{}); !errors.Is(err, blockstore.ErrUnavailable) {
		t.Fatalf("snapshot of which nobody can tell whether it was committed: %v", err)
	}
	w.store.Heal()
	committed := v.Record().Pending.Snapshot
	store := storeIn(w.mem)
	w.must(store.Unpin(w.ctx, committed, v.name))
	w.must(store.Delete(w.ctx, committed))
	if err := v.Settle(w.ctx); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("Settle: %v, want snapshot.ErrNotFound", err)
	}
	if root := v.Record().Root; *root != committed {
		t.Errorf("the root is %s, want %s", root, committed)
	}
	if v.Stats().Lost == nil {
		t.Error("the status does not tell that the root is lost")
	}
	w.must(v.Close())
}
