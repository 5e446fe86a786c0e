package cache

import (
	"errors"
	"io/fs"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// A full disk and a huge discard: neither may stand in the way of evicting what is
// not there, and what is takes no new space to evict.
func TestEvictRangeNeedsNoSpaceAndPassesOverWhatIsAbsent(t *testing.T) {
	plainAndSealed(t, testEvictRangeNeedsNoSpaceAndPassesOverWhatIsAbsent)
}

func testEvictRangeNeedsNoSpaceAndPassesOverWhatIsAbsent(t *testing.T, pages *crypt.Pages) {
	g := manifest.Geometry{Size: 16<<40 - 1<<20, BlockSize: manifest.DefaultBlockSize}
	full := &fullFS{FS: vfs.OS()}
	full.left.Store(mib)
	c := openClean(t, full, filepath.Join(t.TempDir(), "base"), g, pages)
	middle := g.Blocks() / 2
	must(t, c.WriteBlock(middle, blockContent(0, g.BlockSize)))
	full.left.Store(0)
	start := time.Now()
	must(t, c.EvictRange(0, middle))
	if has, err := c.Has(middle); !has || err != nil {
		t.Errorf("the block behind the range: %v, %v", has, err)
	}
	must(t, c.EvictRange(0, g.Blocks()))
	if has, err := c.Has(middle); has || err != nil {
		t.Errorf("the block inside the range: %v, %v", has, err)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("took %v", took)
	}
}

func TestEvictRangeTakesUnreadableMarksAway(t *testing.T) {
	plainAndSealed(t, testEvictRangeTakesUnreadableMarksAway)
}

func testEvictRangeTakesUnreadableMarksAway(t *testing.T, pages *crypt.Pages) {
	fsys := vfs.NewCrash(1)
	c := openClean(t, fsys, "clean", smallGeometry(), pages)
	must(t, c.WriteBlock(1, blockContent(1, smallBlock)))
	// Calls 0 and 1 find the marks, 2 reads those of block 0, 3 those of block 1.
	fsys.FailCall(3, syscall.EIO)
	must(t, c.EvictRange(0, 2))
	if !fsys.Faulted() {
		t.Fatal("no fault")
	}
	if hit, err := c.ReadAt(make([]byte, page), smallBlock); hit || err != nil {
		t.Errorf("ReadAt = %v, %v", hit, err)
	}
}

func TestEvictRangeThatFailsSaysSo(t *testing.T) { plainAndSealed(t, testEvictRangeThatFailsSaysSo) }

func testEvictRangeThatFailsSaysSo(t *testing.T, pages *crypt.Pages) {
	for n := 0; ; n++ {
		fsys := vfs.NewCrash(uint64(n))
		c := openClean(t, fsys, "clean", smallGeometry(), pages)
		must(t, c.WriteBlock(0, blockContent(0, smallBlock)))
		fsys.FailCall(n, syscall.EIO)
		err := c.EvictRange(0, 1)
		has, hasErr := c.Has(0)
		must(t, hasErr)
		if err == nil && has {
			t.Errorf("call %d: evicted, and still there", n)
		}
		if !fsys.Faulted() {
			must(t, err)
			break
		}
	}
	c := openClean(t, vfs.OS(), t.TempDir(), smallGeometry(), pages)
	for _, r := range [][2]int64{{-1, 1}, {0, -1}, {0, smallGeometry().Blocks() + 1}, {smallGeometry().Blocks(), 1}} {
		if err := c.EvictRange(r[0], r[1]); err == nil {
			t.Errorf("%d blocks from %d are accepted", r[1], r[0])
		}
	}
	must(t, c.Close())
	if err := c.EvictRange(0, 1); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}
