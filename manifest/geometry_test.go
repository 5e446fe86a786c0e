package manifest_test

import (
	"errors"
	"math"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
)

func TestGeometryBounds(t *testing.T) {
	const bs = manifest.DefaultBlockSize
	for _, g := range []manifest.Geometry{
		{Size: 0, BlockSize: bs},
		{Size: 512, BlockSize: manifest.MinBlockSize},
		{Size: manifest.MaxDeviceSize, BlockSize: manifest.MinBlockSize},
		{Size: manifest.MaxDeviceSize, BlockSize: manifest.MaxBlockSize},
	} {
		if err := g.Validate(); err != nil {
			t.Errorf("%+v: %v", g, err)
		}
	}
	for _, g := range []manifest.Geometry{
		{Size: -512, BlockSize: bs},
		{Size: 511, BlockSize: bs},
		{Size: math.MaxInt64, BlockSize: bs},
		{Size: 0, BlockSize: 0},
		{Size: 0, BlockSize: -bs},
		{Size: 0, BlockSize: manifest.MinBlockSize / 2},
		{Size: 0, BlockSize: manifest.MaxBlockSize * 2},
		{Size: 0, BlockSize: bs + 512},
	} {
		if err := g.Validate(); !errors.Is(err, manifest.ErrGeometry) {
			t.Errorf("%+v: %v", g, err)
		}
	}
}

func TestGeometryOf16TiB(t *testing.T) {
	g := manifest.Geometry{Size: 16 << 40, BlockSize: manifest.DefaultBlockSize}
	if got, want := g.Blocks(), int64(32<<20); got != want {
		t.Errorf("%d blocks, not %d", got, want)
	}
	if got, want := g.Leaves(), int64(32<<10); got != want {
		t.Errorf("%d leaves, not %d", got, want)
	}
}

// TestBlocksAndLeavesCoverTheDevice checks, at both ends of any device, that
// blocks and leaves are whole but for the last and that nothing is beyond it.
func TestBlocksAndLeavesCoverTheDevice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		g := geometries.Draw(t, "geometry")
		blocks, leaves := g.Blocks(), g.Leaves()
		if blocks > 0 {
			if got := (blocks-1)*int64(g.BlockSize) + int64(g.BlockLen(blocks-1)); got != g.Size {
				t.Errorf("blocks cover %d bytes of %d", got, g.Size)
			}
			if got := (leaves-1)*manifest.LeafBlocks + int64(g.LeafLen(leaves-1)); got != blocks {
				t.Errorf("leaves cover %d blocks of %d", got, blocks)
			}
		}
		if blocks > 1 && g.BlockLen(0) != g.BlockSize {
			t.Errorf("first block is %d bytes long", g.BlockLen(0))
		}
		if leaves > 1 && g.LeafLen(0) != manifest.LeafBlocks {
			t.Errorf("first leaf has %d blocks", g.LeafLen(0))
		}
		for _, beyond := range []int64{-1, math.MinInt64, blocks, math.MaxInt64} {
			if n := g.BlockLen(beyond); n != 0 {
				t.Errorf("block %d of %d is %d bytes long", beyond, blocks, n)
			}
		}
		for _, beyond := range []int64{-1, math.MinInt64, leaves, math.MaxInt64} {
			if n := g.LeafLen(beyond); n != 0 {
				t.Errorf("leaf %d of %d has %d blocks", beyond, leaves, n)
			}
		}
	})
}
