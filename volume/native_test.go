package volume

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// given reads the file that was given away.
func (w *world) given(name string, n int) []byte {
	w.Helper()
	f, err := w.host.FS.OpenFile(name, os.O_RDONLY, 0)
	w.must(err)
	p := make([]byte, n)
	_, err = f.ReadAt(p, 0)
	w.must(errors.Join(err, f.Close()))
	return p
}

// withHoles commits a snapshot of n blocks every third of which is a hole.
func (w *world) withHoles(n int) (id manifest.SnapshotID, data []byte) {
	w.Helper()
	data = noise(n*blockSize, 1)
	v := w.openNew(nil, int64(len(data)))
	for b := range n {
		block := data[b*blockSize : (b+1)*blockSize]
		if b%3 == 0 {
			clear(block)
		} else {
			w.write(v, block, int64(b)*blockSize)
		}
	}
	id = w.snapshot(v)
	w.must(v.Close())
	w.must(w.host.Delete(w.ctx, v.record.ID))
	return id, data
}

func TestGivenFileIsTheDevice(t *testing.T) {
	w := newWorld(t, 1)
	id, data := w.withHoles(12)
	d := w.mountAs("mnt-1", id)
	name := filepath.Join(w.host.State, "given")
	w.must(w.hydrate(d))
	// A page that the disk changed, a sector that it cannot read, and something where
	// there is nothing.
	file := cache.DataFile(d.base.dir)
	w.must(w.crash.FlipBit(file, 4*blockSize+pageSize))
	w.must(w.crash.BadSector(file, 7*blockSize))
	f, err := w.host.FS.OpenFile(file, os.O_RDWR, 0)
	w.must(err)
	_, err = f.WriteAt(noise(2*pageSize, 5), 6*blockSize+pageSize)
	w.must(errors.Join(err, f.Close()))

	w.must(d.GiveAway(w.ctx, name))
	if got := w.given(name, len(data)); !bytes.Equal(got, data) {
		t.Errorf("the file is wrong from %d", firstDifference(got, data))
	}
	if err := d.GiveAway(w.ctx, name); !errors.Is(err, os.ErrExist) {
		t.Errorf("under the same name again: %v", err)
	}
	w.abandon()
}

func TestFileWithABlockMissingIsNotGiven(t *testing.T) {
	w := newWorld(t, 1)
	id, data := w.withHoles(12)
	d := w.mountAs("mnt-1", id)
	name := filepath.Join(w.host.State, "given")
	w.must(d.Warm(w.ctx, []int64{1, 2, 4, 5}))
	w.store.Inject(packReads(), blockstoretest.Fault{Err: blockstore.ErrUnavailable})
	if err := d.GiveAway(w.ctx, name); !errors.Is(err, ErrIncomplete) {
		t.Errorf("with blocks missing: %v", err)
	}
	w.store.Heal()
	w.must(w.hydrate(d))
	w.store.Inject(packReads(), blockstoretest.Fault{Err: blockstore.ErrUnavailable})
	w.must(w.crash.FlipBit(cache.DataFile(d.base.dir), 4*blockSize))
	if err := d.GiveAway(w.ctx, name); !errors.Is(err, blockstore.ErrUnavailable) {
		t.Errorf("with a damaged block and the store away: %v", err)
	}
	if w.exists(name) {
		t.Fatal("it was given away")
	}
	w.store.Heal()
	w.must(d.GiveAway(w.ctx, name))
	if got := w.given(name, len(data)); !bytes.Equal(got, data) {
		t.Errorf("the file is wrong from %d", firstDifference(got, data))
	}
	w.abandon()
}

func TestVolumeIsNotGivenAway(t *testing.T) {
	w := newWorld(t, 1)
	v, _ := newRestored(w, 2)
	if err := v.GiveAway(w.ctx, filepath.Join(w.host.State, "given")); err == nil {
		t.Error("a volume's base was given away as the volume")
	}
	w.must(v.Close())
	w.abandon()
}

// TestNobodyEvictsWhatWasGivenAway neither this process, nor another one, nor one after
// all have closed it, until the name is gone.
func TestNobodyEvictsWhatWasGivenAway(t *testing.T) {
	w := newWorld(t, 1)
	id, data := w.source(6, 1)
	d := w.mountAs("mnt-1", id)
	name := filepath.Join(w.host.State, "given")
	w.must(w.hydrate(d))
	w.must(d.GiveAway(w.ctx, name))
	other := w.process()
	press := func(what string) {
		t.Helper()
		for _, p := range []*world{w, other} {
			p.host.Budget.reclaim(p.host.Budget.rounds.Load(), 1<<40, shared)
		}
		if got := w.given(name, len(data)); !bytes.Equal(got, data) {
			t.Errorf("%s: the file is wrong from %d", what, firstDifference(got, data))
		}
		if !w.exists(d.base.dir) {
			t.Errorf("%s: the base is gone, and no space is free", what)
		}
	}
	press("open")
	w.must(d.Close())
	press("closed")
	w.must(w.host.FS.Remove(name))
	w.host.Budget.reclaim(w.host.Budget.rounds.Load(), 1<<40, shared)
	if w.exists(d.base.dir) {
		t.Error("the base stays although nobody uses it")
	}
	w.abandon()
	other.abandon()
}

// TestGivingAwayWaitsForAnEvictor that is at work, and no longer than it is told to.
func TestGivingAwayWaitsForAnEvictor(t *testing.T) {
	w := newWorld(t, 1)
	id, _ := w.source(2, 1)
	d := w.mountAs("mnt-1", id)
	w.must(w.hydrate(d))
	release, err := w.host.Budget.lockNative(d.base.dir)
	w.must(err)
	ctx, cancel := context.WithTimeoutCause(w.ctx, 20*time.Millisecond, errInjected)
	defer cancel()
	name := filepath.Join(w.host.State, "given")
	if err := d.GiveAway(ctx, name); !errors.Is(err, errInjected) {
		t.Errorf("while an evictor has it: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- d.GiveAway(w.ctx, name) }()
	w.must(release())
	w.must(<-done)
	if release, err := w.host.Budget.lockNative(d.base.dir); !errors.Is(err, vfs.ErrLocked) {
		t.Errorf("an evictor got it: %v", err)
		w.must(release())
	}
	w.abandon()
}

func TestNobodyEvictsWhatIsBeingGivenAway(t *testing.T) {
	w := newWorld(t, 1)
	id, data := w.source(6, 1)
	d := w.mountAs("mnt-1", id)
	w.must(w.hydrate(d))
	w.must(w.crash.FlipBit(cache.DataFile(d.base.dir), 5*blockSize))
	waiting, letGo := w.hold()
	name := filepath.Join(w.host.State, "given")
	done := make(chan error, 1)
	go func() { done <- d.GiveAway(w.ctx, name) }()
	w.eventually("the damaged block is fetched", func() bool { return waiting.Load() == 1 })
	other := w.process()
	other.host.Budget.reclaim(other.host.Budget.rounds.Load(), 1<<40, shared)
	letGo()
	w.must(<-done)
	if got := w.given(name, len(data)); !bytes.Equal(got, data) {
		t.Errorf("the file is wrong from %d", firstDifference(got, data))
	}
	w.abandon()
	other.abandon()
}
