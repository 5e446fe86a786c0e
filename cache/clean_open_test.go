package cache

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestCleanLayerOfAnotherGeometryIsRefusedByName(t *testing.T) {
	plainAndSealed(t, testCleanLayerOfAnotherGeometryIsRefusedByName)
}

func testCleanLayerOfAnotherGeometryIsRefusedByName(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	dir := t.TempDir()
	c := openClean(t, vfs.OS(), dir, g, pages)
	must(t, c.WriteBlock(0, blockContent(0, smallBlock)))
	for _, other := range []manifest.Geometry{
		{Size: g.Size + 512, BlockSize: g.BlockSize}, {Size: g.Size - 512, BlockSize: g.BlockSize}, {Size: g.Size, BlockSize: 2 * g.BlockSize},
	} {
		_, err := OpenClean(vfs.OS(), dir, other, pages)
		if err == nil {
			t.Fatalf("%+v is accepted", other)
		}
		for _, n := range []int{int(g.Size), g.BlockSize, int(other.Size), other.BlockSize} {
			if !strings.Contains(err.Error(), fmt.Sprint(n)) {
				t.Errorf("error does not name %d: %v", n, err)
			}
		}
	}
	if hit, err := c.ReadAt(make([]byte, page), 0); !hit || err != nil {
		t.Errorf("the layer was touched: %v, %v", hit, err)
	}
	if _, err := OpenClean(vfs.OS(), t.TempDir(), manifest.Geometry{Size: 1, BlockSize: 1}, pages); !errors.Is(err, manifest.ErrGeometry) {
		t.Errorf("invalid geometry: %v", err)
	}

	// An unknown version may lay out everything differently.
	f, err := os.OpenFile(filepath.Join(dir, "map"), os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte{9}, 4)
	must(t, errors.Join(err, f.Close()))
	if _, err := OpenClean(vfs.OS(), dir, g, pages); !errors.Is(err, manifest.ErrVersion) {
		t.Errorf("version 9: %v", err)
	}
}

func TestDamagedHeaderIsMended(t *testing.T) { plainAndSealed(t, testDamagedHeaderIsMended) }

func testDamagedHeaderIsMended(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	dir := t.TempDir()
	c := openClean(t, vfs.OS(), dir, g, pages)
	must(t, c.WriteBlock(0, blockContent(0, smallBlock)))
	for _, at := range []int64{0, 10, 17, 4000, 4093} {
		_, err := c.marks.WriteAt([]byte{0xee}, at)
		must(t, err)
		again := openClean(t, vfs.OS(), dir, g, pages)
		if hit, err := again.ReadAt(make([]byte, page), page); !hit || err != nil {
			t.Errorf("%v, %v", hit, err)
		}
		if _, err := OpenClean(vfs.OS(), dir, manifest.Geometry{Size: g.Size, BlockSize: 2 * smallBlock}, pages); err == nil {
			t.Error("the header does not refuse")
		}
	}
}

func TestCleanLayerTooLargeForItsFilesystemIsRefused(t *testing.T) {
	plainAndSealed(t, testCleanLayerTooLargeForItsFilesystemIsRefused)
}

func testCleanLayerTooLargeForItsFilesystemIsRefused(t *testing.T, pages *crypt.Pages) {
	if _, err := OpenClean(limitedFS{vfs.OS()}, t.TempDir(), smallGeometry(), pages); !errors.Is(err, syscall.EFBIG) {
		t.Errorf("%v", err)
	}
}

func TestManyMayCreateACleanLayerAtOnce(t *testing.T) {
	plainAndSealed(t, testManyMayCreateACleanLayerAtOnce)
}

func testManyMayCreateACleanLayerAtOnce(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	for range 20 {
		dir := filepath.Join(t.TempDir(), "base")
		var wg sync.WaitGroup
		var layers [4]*Clean
		for i := range layers {
			wg.Go(func() {
				c, err := OpenClean(vfs.OS(), dir, g, pages)
				if err == nil {
					err = c.WriteBlock(int64(i), blockContent(int64(i), smallBlock))
				}
				if err != nil {
					t.Error(err)
				}
				layers[i] = c
			})
		}
		wg.Wait()
		p := make([]byte, smallBlock)
		for i, c := range layers {
			for b := range int64(len(layers)) {
				if hit, err := c.ReadAt(p, b*smallBlock); !hit || err != nil || !bytes.Equal(p, blockContent(b, smallBlock)) {
					t.Errorf("layer %d, block %d: %v, %v", i, b, hit, err)
				}
			}
			must(t, c.Close())
		}
	}
}
