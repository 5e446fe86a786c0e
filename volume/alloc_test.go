//go:build !race

// The race detector makes sync.Pool forget at random.

package volume

import (
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
)

// TestHotPathsAllocateNothing: reads of what is on this host, and writes of
// whole pages.
func TestHotPathsAllocateNothing(t *testing.T) {
	v, d := newWarm(t, 8)
	page, run := make([]byte, pageSize), make([]byte, 3*blockSize)
	off := int64(0)
	for name, call := range map[string]func() error{
		"read a page of a snapshot": func() error { _, err := d.ReadAt(t.Context(), page, off); return err },
		"read a part of a page":     func() error { _, err := d.ReadAt(t.Context(), page[:512], off+700); return err },
		"read a run of a snapshot":  func() error { _, err := d.ReadAt(t.Context(), run, off); return err },
		"read a page of a volume":   func() error { _, err := v.ReadAt(t.Context(), page, off); return err },
		"read a run of a volume":    func() error { _, err := v.ReadAt(t.Context(), run, off); return err },
		"write a page":              func() error { _, err := v.WriteAt(t.Context(), page, off); return err },
		"write a part of it again":  func() error { _, err := v.WriteAt(t.Context(), page[:512], 512); return err },
		"ask what is allocated":     func() error { v.Allocated(); return nil },
	} {
		if _, err := v.WriteAt(t.Context(), page, 0); err != nil {
			t.Fatal(err)
		}
		n := testing.AllocsPerRun(100, func() {
			if err := call(); err != nil {
				t.Fatal(err)
			}
			off = (off + pageSize) % (4 * blockSize)
		})
		// A new region of the write layer's map is allocated once.
		if n >= 1 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
}

// TestReadOfAHoleAllocatesNothing: half a sparse disk is holes.
func TestReadOfAHoleAllocatesNothing(t *testing.T) {
	w := newRealWorld(t)
	id, _ := w.withHoles(12)
	d, closeIt := w.mount(id)
	defer closeIt()
	w.must(w.hydrate(d))
	page := noise(pageSize, 1)
	n := testing.AllocsPerRun(100, func() {
		if _, err := d.ReadAt(w.ctx, page, 3*blockSize); err != nil {
			t.Fatal(err)
		}
	})
	if n >= 1 {
		t.Errorf("%v allocations", n)
	}
	if !manifest.IsZero(page) {
		t.Error("a hole is not zeros")
	}
}
