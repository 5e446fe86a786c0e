package volume

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
)

// TestFormerCopyNeverComesBackOverALaterSnapshot: one that an evictor removed while
// the volume was closed, and that a power cut may bring back.
func TestFormerCopyNeverComesBackOverALaterSnapshot(t *testing.T) {
	for seed := range uint64(max(8, 40/thinning)) {
		w := newWorld(t, seed)
		v, data := newRestored(w, 3)
		w.overwrite(v, data, blockSize, blockSize, 2)
		w.snapshot(v) // block 1 has a clean copy, durably
		w.must(v.Close())
		w.host.Budget.reclaim(w.host.Budget.rounds.Load(), 1<<40, idle)
		v = w.open(v.record.ID)
		if got := w.cached(v.writes.clean); len(got) != 0 {
			t.Fatalf("seed %d: blocks %v were not evicted", seed, got)
		}
		w.overwrite(v, data, blockSize, blockSize, 3)
		w.snapshot(v)
		w.powerCut()
		v = w.open(v.record.ID)
		w.equal(v.Device, data, fmt.Sprintf("seed %d: after the power cut", seed))
		w.must(v.Close())
		w.end()
	}
}

// TestStatusNamesABadSectorOfAWriteLayer: the only copy of its bytes is gone, and a person
// has to know where.
func TestStatusNamesABadSectorOfAWriteLayer(t *testing.T) {
	w := newWorld(t, 1)
	v := w.openNew(nil, 4*blockSize)
	w.write(v, noise(blockSize, 1), 2*blockSize)
	w.crash.FailCall(0, syscall.EIO)
	_, err := v.ReadAt(w.ctx, make([]byte, pageSize), 2*blockSize+pageSize)
	if !errors.Is(err, syscall.EIO) {
		t.Fatalf("read of a bad sector: %v, want EIO", err)
	}
	stats := v.Stats()
	if len(stats.Errors) != 1 {
		t.Fatalf("the status has the errors %v", stats.Errors)
	}
	for _, text := range []string{err.Error(), stats.Errors[0].Message} {
		for _, want := range []string{layerDir(v.dir, 1) + "/data", fmt.Sprint(2*blockSize + pageSize)} {
			if !strings.Contains(text, want) {
				t.Errorf("%q does not name %s", text, want)
			}
		}
	}
	w.must(v.Close())
	w.end()
}
