package volume

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
)

func TestWholePagesAreWrittenWithoutTheStore(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 3)
	w.store.Reset()
	w.overwrite(v, data, blockSize, pageSize, 2)
	w.overwrite(v, data, pageSize, 3*blockSize-pageSize, 3)
	w.must(v.Zero(w.ctx, 2*blockSize, pageSize))
	clear(data[2*blockSize:][:pageSize])
	w.must(v.Sync(w.ctx))
	if calls := w.store.Calls(); len(calls) != 0 {
		t.Errorf("writing whole pages asked the store %v", calls)
	}
	w.equal(v.Device, data, "volume")
	w.must(v.Close())
}

func TestWriteRacingAFetchWins(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 2)
	waiting, letGo := w.hold()
	warmed := make(chan error, 1)
	go func() { warmed <- v.Warm(w.ctx, []int64{0, 1}) }()
	w.eventually("the background's request", func() bool { return waiting.Load() == 1 })
	read := w.readInBackground(w.ctx, v.Device, 2*blockSize, 0)
	w.eventually("the reader's request", func() bool { return waiting.Load() == 2 })
	w.overwrite(v, data, pageSize, 0, 2)
	w.must(v.Zero(w.ctx, blockSize, 2*pageSize))
	clear(data[blockSize:][:2*pageSize])
	letGo()
	if r := <-read; r.err != nil {
		t.Error(r.err)
	}
	w.must(<-warmed)
	w.equal(v.Device, data, "volume")
	w.must(v.Close())
}

func TestDiscardedBlockStaysZeroAfterHydration(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 2)
	w.must(v.Zero(w.ctx, 0, blockSize))
	clear(data[:blockSize])
	w.must(w.hydrate(v.Device))
	w.equal(v.Device, data, "hydrated volume")
	id := w.snapshot(v)
	w.must(w.hydrate(v.Device))
	w.equal(v.Device, data, "snapshotted volume")
	w.equalSnapshot(id, data, "its snapshot")
	w.must(v.Close())
}

func TestRefusedRanges(t *testing.T) {
	w := newRealWorld(t)
	v, _ := newRestored(w, 1)
	p := make([]byte, pageSize)
	for _, c := range []struct {
		off  int64
		n    int
		want syscall.Errno
	}{
		{-pageSize, pageSize, syscall.EINVAL},
		{blockSize, 1, syscall.ENOSPC},
		{blockSize - 1, 2, syscall.ENOSPC},
		{1<<63 - 1, 1, syscall.ENOSPC},
	} {
		if n, err := v.WriteAt(w.ctx, p[:c.n], c.off); n != 0 || !errors.Is(err, c.want) {
			t.Errorf("write %d at %d: %d, %v, want %v", c.n, c.off, n, err, c.want)
		}
		if err := v.Zero(w.ctx, c.off, int64(c.n)); !errors.Is(err, c.want) {
			t.Errorf("zero %d at %d: %v, want %v", c.n, c.off, err, c.want)
		}
	}
	if err := v.Zero(w.ctx, 0, -1); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("zero -1 bytes: %v", err)
	}
	root := *v.Record().Root
	w.must(v.Close())
	d, closeIt := w.mount(root)
	defer closeIt()
	if n, err := d.WriteAt(w.ctx, p, 0); n != 0 || !errors.Is(err, syscall.EROFS) {
		t.Errorf("write a snapshot: %d, %v, want EROFS", n, err)
	}
	if err := d.Zero(w.ctx, 0, pageSize); !errors.Is(err, syscall.EROFS) {
		t.Errorf("zero a snapshot: %v, want EROFS", err)
	}
	if err := d.Sync(w.ctx); err != nil || !d.ReadOnly() || v.ReadOnly() {
		t.Errorf("sync a snapshot: %v; read-only %t, %t", err, d.ReadOnly(), v.ReadOnly())
	}
}

// TestFullDiskFailsTheWriteAndLosesNothing fails each call of a write in turn.
func TestFullDiskFailsTheWriteAndLosesNothing(t *testing.T) {
	for _, c := range []struct{ off, n int }{{0, pageSize}, {100, 50}, {blockSize - 10, 20}, {0, 2 * blockSize}} {
		for call := 0; ; call++ {
			w := newWorld(t, uint64(call))
			v, old := newRestored(w, 2)
			w.equal(v.Device, old, "volume")
			p := noise(c.n, 5)
			w.crash.FailCall(call, syscall.ENOSPC)
			n, err := v.WriteAt(w.ctx, p, int64(c.off))
			failed := w.crash.Faulted()
			w.crash.ClearFault()
			if err != nil && !errors.Is(err, syscall.ENOSPC) {
				t.Fatalf("write: %v, want ENOSPC", err)
			}
			if err == nil && n != c.n {
				t.Fatalf("wrote %d of %d without an error", n, c.n)
			}
			got := make([]byte, len(old))
			if _, err := v.ReadAt(w.ctx, got, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got[c.off:][:n], p[:n]) {
				t.Fatal("what was acknowledged is not there")
			}
			for i := range got {
				inside := i >= c.off && i < c.off+c.n
				if got[i] != old[i] && !(inside && got[i] == p[i-c.off]) {
					t.Fatalf("byte %d has a third content", i)
				}
			}
			w.write(v, p, int64(c.off))
			copy(old[c.off:], p)
			w.equal(v.Device, old, "written again")
			w.must(v.Close())
			w.end()
			if !failed {
				break
			}
		}
	}
}

func TestDiscardOfAHugeVolumeIsQuick(t *testing.T) {
	const size = 1 << 40
	w := newRealWorld(t)
	id, err := w.host.Create(w.ctx, nil, size, manifest.DefaultBlockSize, "")
	w.must(err)
	v := w.open(id)
	w.write(v, noise(pageSize, 1), size/2)
	first := w.snapshot(v)
	w.must(v.Zero(w.ctx, 512, size-1024)) // no whole pages at the ends
	if data, err := v.NextData(w.ctx, 0); err != nil || data != 0 {
		t.Errorf("the first page is data: %d, %v", data, err)
	}
	p := make([]byte, pageSize)
	if _, err := v.ReadAt(w.ctx, p, size/2); err != nil || !manifest.IsZero(p) {
		t.Errorf("discarded, and holds data: %v", err)
	}
	w.snapshot(v)
	if stats := v.Stats(); stats.TotalBytes != 0 || stats.DirtyBytes != 0 {
		t.Errorf("a volume of zeros has %d bytes of data, %d dirty", stats.TotalBytes, stats.DirtyBytes)
	}
	if _, err := v.NextData(w.ctx, 0); err == nil {
		t.Error("a volume of zeros has data")
	}
	w.must(v.Close())
	d, closeIt := w.mount(first)
	defer closeIt()
	if _, err := d.ReadAt(w.ctx, p, size/2); err != nil || !bytes.Equal(p, noise(pageSize, 1)) {
		t.Errorf("the snapshot before: %v", err)
	}
}

func TestPartOfAColdPageWaitsForTheStoreAndWriterMayGiveUp(t *testing.T) {
	w := newRealWorld(t)
	v, data := newRestored(w, 1)
	waiting, letGo := w.hold()
	ctx, giveUp := context.WithCancel(w.ctx)
	done := make(chan error, 1)
	go func() {
		_, err := v.WriteAt(ctx, make([]byte, 10), 10)
		done <- err
	}()
	w.eventually("the request", func() bool { return waiting.Load() == 1 })
	w.overwrite(v, data, pageSize, pageSize, 2) // nobody else waits
	giveUp()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("the writer that gave up got %v", err)
	}
	letGo()
	w.equal(v.Device, data, "volume")
	w.must(v.Close())
}
