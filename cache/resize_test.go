package cache

import (
	"bytes"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestGrownPageMapIsTheSameWithAbsentPagesBehind(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pages := rapid.IntRange(1, 2*regionPages).Draw(t, "pages")
		size := int64(pages)*page - rapid.Int64Range(0, page-1).Draw(t, "short")
		m := newPageMap(size)
		want := make([]PageState, pages)
		for range rapid.IntRange(1, 12).Draw(t, "ops") {
			switch rapid.IntRange(0, 5).Draw(t, "op") {
			case 0:
				m.freeze()
				continue
			case 1:
				size += rapid.OneOf(rapid.Int64Range(0, 3*page), rapid.Int64Range(0, regionPages*page)).Draw(t, "more")
				before := m
				m = m.grown(size)
				checkPageMap(t, before, want)
				want = append(want, make([]PageState, m.pages-int64(len(want)))...)
				checkPageMap(t, m, want)
				continue
			}
			first, n := drawRange(t, len(want))
			s := rapid.SampledFrom([]PageState{Data, Zero}).Draw(t, "state")
			m.set(int64(first), int64(n), s)
			for i := first; i < first+n; i++ {
				want[i] = s
			}
		}
		checkPageMap(t, m, want)
		checkPageMap(t, roundTrip(t, m.freeze(), size), want)
	})
}

// A discarded device of several chunks, which have no regions of their own.
func TestGrownPageMapOfManyChunks(t *testing.T) {
	for _, regions := range []int64{1, chunkRegions - 1, chunkRegions, chunkRegions + 1, 2 * chunkRegions} {
		for _, s := range []PageState{Data, Zero} {
			for _, more := range []int64{1, regionPages, chunkRegions * regionPages} {
				pages := regions*regionPages - 7
				m := newPageMap(pages * page)
				m.set(0, pages, s)
				m = m.grown((pages + more) * page)
				if got, n := m.run(0, m.pages); got != s || n != pages || m.dirty.Load() != pages*page {
					t.Fatalf("%d regions: %v × %d, %d dirty, want %v × %d", regions, got, n, m.dirty.Load(), s, pages)
				}
				if got, n := m.run(pages, m.pages); got != Absent || n != more {
					t.Fatalf("%d regions: behind them %v × %d, want absent × %d", regions, got, n, more)
				}
				m.set(0, m.pages, s)
				if got, n := m.run(0, m.pages); got != s || n != m.pages || m.dirty.Load() != m.pages*page {
					t.Fatalf("%d regions: when all is set: %v × %d, %d dirty", regions, got, n, m.dirty.Load())
				}
			}
		}
	}
}

// The log of a map goes on when the device grows, and a rotation that began before
// may end after.
func TestMarksBehindTheFormerEndSurviveBothRecoveryAndRotation(t *testing.T) {
	plainAndEncrypted(t, testMarksBehindTheFormerEndSurviveBothRecoveryAndRotation)
}

func testMarksBehindTheFormerEndSurviveBothRecoveryAndRotation(t *testing.T, key *crypt.Key) {
	for _, rotate := range []bool{false, true} {
		dir := filepath.Join(t.TempDir(), "layer")
		w := newWriteLayerAt(t, dir, 3*page+512, key)
		must(t, w.WriteAt(fill(1, 512), 3*page))
		must(t, w.Extend(9*page))
		w.Grow(9 * page)
		got := make([]byte, page)
		must(t, w.ReadAt(got, 3*page))
		if w.State(3) != Data || !bytes.Equal(got, append(fill(1, 512), make([]byte, page-512)...)) {
			t.Errorf("the page at the former end is %v, and does not go on with zeros", w.State(3))
		}
		must(t, w.WriteAt(fill(2, page), 8*page))
		if rotate {
			w.syncMu.Lock()
			must(t, w.rotate())
			w.syncMu.Unlock()
		}
		must(t, w.Sync())
		must(t, w.Close())
		w, err := OpenWriteLayer(vfs.OS(), dir, 9*page, otherBoot, key)
		must(t, err)
		if w.State(3) != Data || w.State(4) != Absent || w.State(8) != Data {
			t.Errorf("after the next boot: %v, %v, %v", w.State(3), w.State(4), w.State(8))
		}
		must(t, w.Close())
	}
}

func TestLayerThatWasExtendedInVainHasItsFormerSize(t *testing.T) {
	plainAndEncrypted(t, testLayerThatWasExtendedInVainHasItsFormerSize)
}

func testLayerThatWasExtendedInVainHasItsFormerSize(t *testing.T, key *crypt.Key) {
	dir := filepath.Join(t.TempDir(), "layer")
	w := newWriteLayerAt(t, dir, 2*page, key)
	must(t, w.WriteAt(fill(1, page), page))
	must(t, w.Extend(5*page))
	if err := w.WriteAt(fill(1, page), 2*page); err == nil {
		t.Error("a write beyond the size is accepted before the layer has grown")
	}
	must(t, w.Close())
	w, err := OpenWriteLayer(vfs.OS(), dir, 2*page, boot, key)
	must(t, err)
	if n, err := w.data.Size(); n != 2*page || err != nil || w.State(1) != Data {
		t.Errorf("the file has %d bytes, %v, and page 1 is %v", n, err, w.State(1))
	}
	must(t, w.Close())
	// A layer that lacks what the record promises has lost it.
	if _, err := OpenWriteLayer(vfs.OS(), dir, 5*page, boot, key); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("a layer shorter than the device opens: %v", err)
	}
}

func TestGrownCleanLayerKeepsWhatItHas(t *testing.T) {
	plainAndSealed(t, testGrownCleanLayerKeepsWhatItHas)
}

func testGrownCleanLayerKeepsWhatItHas(t *testing.T, pages *crypt.Pages) {
	for name, grow := range map[string]func(c *Clean, fsys vfs.FS, size int64) error{
		"open": func(c *Clean, _ vfs.FS, size int64) error { return c.Grow(size) },
		"closed": func(_ *Clean, fsys vfs.FS, size int64) error {
			return GrowClean(fsys, "clean", size)
		},
	} {
		t.Run(name, func(t *testing.T) {
			g := manifest.Geometry{Size: 3*manifest.MinBlockSize + page + 512, BlockSize: manifest.MinBlockSize}
			fsys := vfs.NewCrash(1)
			c := openClean(t, fsys, "clean", g, pages)
			for b := range g.Blocks() {
				must(t, c.WriteBlock(b, blockContent(b, g.BlockSize)))
			}
			must(t, c.Sync())
			must(t, fsys.SyncDir("clean"))
			must(t, fsys.SyncDir("/"))
			grown := manifest.Geometry{Size: 9 * manifest.MinBlockSize, BlockSize: g.BlockSize}
			must(t, grow(c, fsys, grown.Size))
			fsys.PowerCut()
			c = openClean(t, fsys, "clean", grown, pages)
			got := make([]byte, g.BlockSize)
			for b := range int64(3) {
				if hit, err := c.ReadAt(got, b*int64(g.BlockSize)); !hit || err != nil || !bytes.Equal(got, blockContent(b, g.BlockSize)) {
					t.Errorf("block %d: %v, %v", b, hit, err)
				}
			}
			// The short page counts as missing, and so do those that are new.
			for _, off := range []int64{3*manifest.MinBlockSize + page, 5 * manifest.MinBlockSize} {
				if hit, err := c.ReadAt(got[:512], off); hit || err != nil {
					t.Errorf("at %d: %v, %v", off, hit, err)
				}
			}
			must(t, c.WriteBlock(8, blockContent(8, g.BlockSize)))
			must(t, c.Use(8))
			if hit, err := c.ReadAt(got, 8*manifest.MinBlockSize); !hit || err != nil {
				t.Errorf("a new block: %v, %v", hit, err)
			}
		})
	}
}

func TestLeafOfASmallerDeviceStaysInTheIndexFile(t *testing.T) {
	plainAndEncrypted(t, testLeafOfASmallerDeviceStaysInTheIndexFile)
}

func testLeafOfASmallerDeviceStaysInTheIndexFile(t *testing.T, key *crypt.Key) {
	g := manifest.Geometry{Size: 600 * manifest.MinBlockSize, BlockSize: manifest.MinBlockSize}
	x, err := OpenIndexFile(vfs.OS(), filepath.Join(t.TempDir(), "index"), g, key)
	must(t, err)
	leaf, hash := testLeaf(1, 600)
	ref := manifest.LeafRef{Owner: 1, Hash: hash}
	must(t, x.Store(ref, leaf))
	x.Grow(2000 * manifest.MinBlockSize)
	if got, ok := x.Load(ref); !ok || got.Len() != 600 {
		t.Error("the leaf is lost when the device grows")
	}
	longer, longerHash := testLeaf(2, 1024)
	must(t, x.Store(manifest.LeafRef{Owner: 1, Hash: longerHash}, longer))
	if _, ok := x.Load(ref); ok {
		t.Error("the former leaf is there beside the one in its place")
	}
	must(t, x.Store(ref, leaf))
	if got, ok := x.Load(ref); !ok || got.Len() != 600 {
		t.Error("a leaf of fewer blocks is not kept")
	}
	must(t, x.Close())
}

func TestDivergedBlocksOfASmallerDeviceStay(t *testing.T) {
	fsys := vfs.NewCrash(1)
	d, err := LoadDiverged(fsys, "diverged", 70)
	must(t, err)
	must(t, d.Add(slices.Values([]int64{3, 69})))
	d.Grow(200)
	if d.Has(199) || !d.Has(69) {
		t.Errorf("after growing: %v, %v", d.Has(199), d.Has(69))
	}
	if d, err = LoadDiverged(fsys, "diverged", 200); err != nil || d.Has(199) || !d.Has(69) || !d.Has(3) {
		t.Fatalf("opened as a larger one: %v", err)
	}
	must(t, d.Add(slices.Values([]int64{199})))
	if d, err = LoadDiverged(fsys, "diverged", 200); err != nil || !d.Has(199) || !d.Has(69) {
		t.Fatalf("added to: %v", err)
	}
	if _, err = LoadDiverged(fsys, "diverged", 70); err == nil {
		t.Error("a set of more blocks than the device has is accepted")
	}
}
