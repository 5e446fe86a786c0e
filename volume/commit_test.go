package volume

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// TestWritersAndReadersGoOnWhileTheStoreHangs: only the snapshot waits for it.
func TestWritersAndReadersGoOnWhileTheStoreHangs(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 3)
	w.equal(v.Device, data, "volume")
	w.overwrite(v, data, pageSize, 0, 2)
	cut := append([]byte(nil), data...)

	gate, waiting := make(chan struct{}), make(chan struct{}, 8)
	w.store.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "data/"}, blockstoretest.Fault{Before: func(context.Context, blockstoretest.Call) {
		waiting <- struct{}{}
		<-gate
	}})
	type made struct {
		outcome manifest.Outcome
		err     error
	}
	done := make(chan made)
	go func() {
		outcome, err := v.Snapshot(w.ctx, SnapshotOptions{Description: "d", Tags: map[string]string{"k": "v"}})
		done <- made{outcome, err}
	}()
	<-waiting
	if _, err := v.Snapshot(w.ctx, SnapshotOptions{}); !errors.Is(err, ErrBusy) {
		t.Errorf("a second snapshot: %v, want ErrBusy", err)
	}
	w.overwrite(v, data, 2*pageSize, 100, 3)
	w.must(v.Zero(w.ctx, blockSize, blockSize))
	clear(data[blockSize : 2*blockSize])
	w.must(v.Sync(w.ctx))
	w.equal(v.Device, data, "volume while the store hangs")
	close(gate)
	m := <-done
	w.must(m.err)
	w.store.Heal()
	if m.outcome.Description != "d" || m.outcome.Tags["k"] != "v" || m.outcome.Volume != v.Record().ID {
		t.Errorf("outcome %+v", m.outcome)
	}
	w.equalSnapshot(m.outcome.Snapshot, cut, "the snapshot")
	w.equal(v.Device, data, "volume")
	w.equalSnapshot(w.snapshot(v), data, "the next snapshot")
	w.must(v.Close())
}

// TestReadThroughTheOldRootOutlivesTheCommit, and the pin on it outlives the
// read. What it brings is not kept: the block has changed.
func TestReadThroughTheOldRootOutlivesTheCommit(t *testing.T) {
	w := newRealWorld(t)
	v, data := newDiverged(w)
	old := v.Record().Root.String()
	waiting, letGo := w.hold()
	before := append([]byte(nil), data...)
	read := w.readInBackground(w.ctx, v.Device, pageSize, pageSize)
	w.eventually("the read's request", func() bool { return waiting.Load() == 1 })
	w.overwrite(v, data, blockSize, 0, 3)
	done := w.snapshotInBackground(v, nil)
	w.eventually("the new root", func() bool { return v.Stats().Root != old })
	if pins := w.pins(v.name); len(pins) != 2 {
		t.Errorf("pins %v while a read through the old root is under way", pins)
	}
	w.equal(v.Device, data, "volume")
	letGo()
	w.wantRead(<-read, before[pageSize:][:pageSize])
	id := <-done
	if pins := w.pins(v.name); len(pins) != 1 || pins[0] != id.String() {
		t.Errorf("pins %v, want %s alone", pins, id)
	}
	w.equal(v.Device, data, "volume after the read")
	w.equalSnapshot(id, data, "snapshot")
	w.must(v.Close())
}

// TestFetchedBlockDoesNotReplaceTheSnapshotsCopy: the clean copy of a changed
// block is the snapshot's from the cut on.
func TestFetchedBlockDoesNotReplaceTheSnapshotsCopy(t *testing.T) {
	w := newRealWorld(t)
	v, data := newDiverged(w)
	before := append([]byte(nil), data...)
	w.overwrite(v, data, pageSize, 0, 3) // of block 0, the rest of which is cold
	outcome, committing := make(chan struct{}), make(chan struct{})
	w.store.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "outcomes/"}, blockstoretest.Fault{Before: func(context.Context, blockstoretest.Call) {
		close(committing)
		<-outcome
	}})
	fetched, fetching := make(chan struct{}), make(chan struct{})
	first := packReads()
	first.Times = 1
	w.store.Inject(first, blockstoretest.Fault{Before: func(context.Context, blockstoretest.Call) {
		close(fetching)
		<-fetched
	}})
	var read <-chan result
	done := w.snapshotInBackground(v, func(*snapshot.Attempt) {
		read = w.readInBackground(w.ctx, v.Device, pageSize, pageSize)
		<-fetching
	})
	<-committing // so the snapshot's copy is there
	close(fetched)
	w.wantRead(<-read, before[pageSize:][:pageSize])
	w.eventually("the end of the fetch", func() bool { return v.DemandInFlight() == 0 })
	copied := make([]byte, blockSize)
	if hit, err := v.writes.clean.ReadAt(copied, 0); !hit || err != nil {
		t.Errorf("the snapshot's copy is gone: %v", err)
	} else if i := firstDifference(copied, data[:blockSize]); i >= 0 {
		t.Errorf("the snapshot's copy was replaced, at %d", i)
	}
	close(outcome)
	w.equalSnapshot(<-done, data, "snapshot")
	w.equal(v.Device, data, "volume")
	w.must(v.Close())
}

// TestPartialWriteAcrossACommit: what it had fetched of the rest of the page is
// not what lies below any more.
func TestPartialWriteAcrossACommit(t *testing.T) {
	w := newRealWorld(t)
	v, data := newDiverged(w)
	old := v.Record().Root.String()
	waiting, letGo := w.hold()
	written := make(chan error)
	go func() {
		_, err := v.WriteAt(w.ctx, noise(512, 4), 512)
		written <- err
	}()
	w.eventually("the fetch of the page's rest", func() bool { return waiting.Load() == 1 })
	w.overwrite(v, data, blockSize, 0, 3)
	done := w.snapshotInBackground(v, nil)
	w.eventually("the new root", func() bool { return v.Stats().Root != old })
	letGo()
	w.must(<-written)
	w.equalSnapshot(<-done, data, "snapshot")
	copy(data[512:], noise(512, 4))
	w.equal(v.Device, data, "volume")
	w.must(v.Close())
}

// gatedFS calls gate before the next write to a file in a folder of that name.
type gatedFS struct {
	vfs.FS
	folder string
	gate   atomic.Pointer[func()]
}

type gatedFile struct {
	vfs.File
	fs *gatedFS
}

func (g *gatedFS) OpenFile(name string, flag int, perm fs.FileMode) (vfs.File, error) {
	f, err := g.FS.OpenFile(name, flag, perm)
	if err == nil && filepath.Base(name) == "data" && strings.Contains(name, "/"+g.folder+"/") {
		f = gatedFile{f, g}
	}
	return f, err
}

func (f gatedFile) WriteAt(p []byte, off int64) (int, error) {
	if gate := f.fs.gate.Swap(nil); gate != nil {
		(*gate)()
	}
	return f.File.WriteAt(p, off)
}

// hold makes the next write wait for letGo. writing is closed when it does.
func (g *gatedFS) hold() (writing <-chan struct{}, letGo func()) {
	reached, open := make(chan struct{}), make(chan struct{})
	gate := func() {
		close(reached)
		<-open
	}
	g.gate.Store(&gate)
	return reached, func() { close(open) }
}

// TestCutWaitsForWritesUnderWay, which would else change the sealed layer.
func TestCutWaitsForWritesUnderWay(t *testing.T) {
	for name, n := range map[string]int{"whole page": pageSize, "part of a page": 600} {
		t.Run(name, func(t *testing.T) {
			w := newRealWorld(t)
			gated := &gatedFS{FS: vfs.OS(), folder: "layers"}
			w.host.FS = gated
			v, data := w.openNew(nil, blockSize), make([]byte, blockSize)
			writing, letGo := gated.hold()
			written := make(chan error)
			go func() {
				_, err := v.WriteAt(w.ctx, noise(n, 2), 0)
				written <- err
			}()
			<-writing
			done := w.snapshotInBackground(v, nil)
			time.Sleep(20 * time.Millisecond)
			if v.hasSealed() {
				t.Error("the layer was sealed during a write")
			}
			letGo()
			w.must(<-written)
			copy(data, noise(n, 2))
			w.equal(v.Device, data, "volume")
			w.equalSnapshot(<-done, data, "snapshot")
			w.must(v.Close())
		})
	}
}

// TestCutWaitsForACopyUnderWay of a fetched block, which would else end up over
// the snapshot's own.
func TestCutWaitsForACopyUnderWay(t *testing.T) {
	w := newRealWorld(t)
	gated := &gatedFS{FS: vfs.OS(), folder: "clean"}
	w.host.FS = gated
	v, data := newDiverged(w)
	w.write(v, noise(pageSize, 3), 0)
	writing, letGo := gated.hold()
	read := w.readInBackground(w.ctx, v.Device, pageSize, pageSize)
	<-writing
	w.wantRead(<-read, data[pageSize:][:pageSize]) // which does not wait for it
	done := w.snapshotInBackground(v, nil)
	time.Sleep(20 * time.Millisecond)
	if v.hasSealed() {
		t.Error("the layer was sealed while a block of the old root was being cached")
	}
	w.write(v, noise(pageSize, 4), 2*pageSize) // nor does a write
	letGo()
	copy(data, noise(pageSize, 3))
	copy(data[2*pageSize:], noise(pageSize, 4))
	w.equalSnapshot(<-done, data, "snapshot")
	w.equal(v.Device, data, "volume")
	w.must(v.Close())
}

// newDiverged returns a volume of two blocks whose first one diverged from the
// base and is not on this host, while the second is.
func newDiverged(w *world) (*Volume, []byte) {
	w.Helper()
	v, data := newRestored(w, 2)
	w.overwrite(v, data, blockSize, 0, 2)
	w.snapshot(v)
	w.equal(v.Device, data, "volume")
	w.must(v.writes.clean.Evict(0))
	return v, data
}

func (w *world) snapshotInBackground(v *Volume, begun func(*snapshot.Attempt)) <-chan manifest.SnapshotID {
	done := make(chan manifest.SnapshotID, 1)
	go func() {
		outcome, err := v.Snapshot(w.ctx, SnapshotOptions{Cut: begun})
		if err != nil {
			w.Errorf("snapshot: %v", err)
		}
		done <- outcome.Snapshot
	}()
	return done
}

// Whoever holds something up for the moment of a snapshot, such as a filesystem that is
// frozen, must not do so for the store.
func TestSealedIsToldBeforeTheStoreIsAsked(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 1)
	w.overwrite(v, data, blockSize, 0, 2)
	w.store.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Hang: true})
	w.store.Reset()
	ctx, giveUp := context.WithCancel(w.ctx)
	var asked []blockstoretest.Call
	told := 0
	_, err := v.Snapshot(ctx, SnapshotOptions{
		Sealed: func() {
			told++
			asked = w.store.Calls()
			w.overwrite(v, data, pageSize, 0, 3) // nobody is held up any more
			giveUp()
		},
		Cut: func(*snapshot.Attempt) { t.Error("its intent is in no store") },
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want context.Canceled", err)
	}
	if told != 1 || len(asked) > 0 {
		t.Errorf("told %d times, after the store was asked for %v", told, asked)
	}
	w.store.Heal()
	w.equal(v.Device, data, "volume")
	w.must(v.Close())
}
