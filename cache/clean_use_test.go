package cache

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// fillClean writes all blocks of a layer.
func fillClean(t testing.TB, c *Clean) {
	t.Helper()
	for b := range c.g.Blocks() {
		must(t, c.WriteBlock(b, blockContent(b, c.g.BlockSize)))
	}
}

// there returns the blocks that reads find, without using them.
func there(t testing.TB, c *Clean) []int64 {
	t.Helper()
	blocks := []int64{}
	for b, err := range c.Present() {
		must(t, err)
		blocks = append(blocks, b)
	}
	return blocks
}

func TestEvictUnusedPassesByWhatWasUsedOnce(t *testing.T) {
	plainAndSealed(t, testEvictUnusedPassesByWhatWasUsedOnce)
}

func testEvictUnusedPassesByWhatWasUsedOnce(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	c := openClean(t, vfs.NewCrash(1), "clean", g, pages)
	fillClean(t, c)
	if hit, err := c.ReadAt(make([]byte, 2*smallBlock), smallBlock/2); !hit || err != nil { // blocks 0 to 2
		t.Fatal(hit, err)
	}
	must(t, c.Use(4))
	next, freed, err := c.EvictUnused(0, smallBlock+1, nil)
	if last := int64(g.BlockLen(5)); next != 6 || freed != smallBlock+last || err != nil {
		t.Errorf("EvictUnused = %d, %d, %v; want blocks 3 and 5", next, freed, err)
	}
	if got := there(t, c); !slices.Equal(got, []int64{0, 1, 2, 4}) {
		t.Errorf("after the first round: %v", got)
	}
	if hit, err := c.ReadAt(make([]byte, 1), smallBlock); !hit || err != nil {
		t.Fatal(hit, err)
	}
	next, freed, err = c.EvictUnused(0, 1, func(b int64) bool { return b == 0 })
	if next != 3 || freed != smallBlock || err != nil {
		t.Errorf("EvictUnused = %d, %d, %v; want block 2", next, freed, err)
	}
	if got := there(t, c); !slices.Equal(got, []int64{0, 1, 4}) {
		t.Errorf("after the second: %v", got)
	}
	if _, _, err := c.EvictUnused(-1, 1<<40, nil); err != nil {
		t.Fatal(err)
	}
	if got := there(t, c); len(got) != 0 {
		t.Errorf("in the end: %v", got)
	}
	if next, freed, err := c.EvictUnused(0, 1, nil); next != g.Blocks() || freed != 0 || err != nil {
		t.Errorf("of an empty layer: %d, %d, %v", next, freed, err)
	}
	if err := c.Use(g.Blocks()); err == nil {
		t.Error("a block beyond the end is in use")
	}
}

func TestEvictUnusedFreesTheSpace(t *testing.T) { plainAndSealed(t, testEvictUnusedFreesTheSpace) }

func testEvictUnusedFreesTheSpace(t *testing.T, pages *crypt.Pages) {
	for name, fsys := range map[string]vfs.FS{"OS": vfs.OS(), "Crash": vfs.NewCrash(1)} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "clean")
			c := openClean(t, fsys, dir, smallGeometry(), pages)
			empty, err := CleanAllocated(fsys, dir)
			must(t, err)
			fillClean(t, c)
			full, err := CleanAllocated(fsys, dir)
			must(t, err)
			if full < empty+5*smallBlock {
				t.Errorf("%d bytes with blocks, %d without", full, empty)
			}
			if _, _, err := c.EvictUnused(0, 2*smallBlock, nil); err != nil {
				t.Fatal(err)
			}
			if n, err := CleanAllocated(fsys, dir); n != full-2*smallBlock || err != nil {
				t.Errorf("%d bytes after two blocks of %d are gone, %v", n, full, err)
			}
		})
	}
}

// A process that dies between bytes and marks, or between taking the marks and
// freeing the bytes, must not leave space that nobody ever finds.
func TestEvictUnusedFindsBytesWithoutMarks(t *testing.T) {
	plainAndSealed(t, testEvictUnusedFindsBytesWithoutMarks)
}

func testEvictUnusedFindsBytesWithoutMarks(t *testing.T, pages *crypt.Pages) {
	fsys := vfs.NewCrash(1)
	c := openClean(t, fsys, "clean", smallGeometry(), pages)
	must(t, c.WriteBlock(1, blockContent(1, smallBlock)))
	if _, err := c.marks.WriteAt(make([]byte, smallBlock/page*c.markLen), c.markOffset(smallBlock/page)); err != nil {
		t.Fatal(err)
	}
	next, freed, err := c.EvictUnused(0, 1, nil)
	if next != 2 || freed != smallBlock || err != nil {
		t.Errorf("EvictUnused = %d, %d, %v", next, freed, err)
	}
	if n, err := fsys.Allocated("clean/data"); n != 0 || err != nil {
		t.Errorf("%d bytes are left, %v", n, err)
	}
}

func TestEvictUnusedNeedsNoSpace(t *testing.T) { plainAndSealed(t, testEvictUnusedNeedsNoSpace) }

func testEvictUnusedNeedsNoSpace(t *testing.T, pages *crypt.Pages) {
	fsys := vfs.NewCrash(1)
	c := openClean(t, fsys, "clean", smallGeometry(), pages)
	fillClean(t, c)
	fsys.SetCapacity(fsys.Used())
	if _, _, err := c.EvictUnused(0, 1<<40, nil); err != nil {
		t.Fatal(err)
	}
	if got := there(t, c); len(got) != 0 {
		t.Errorf("blocks %v are left", got)
	}
}

// TestEvictUnusedThatFailsNeverLies fails at each of its calls: what is said to be
// there can be read, the rest is a miss, and the evictor can go on behind.
func TestEvictUnusedThatFailsNeverLies(t *testing.T) {
	plainAndSealed(t, testEvictUnusedThatFailsNeverLies)
}

func testEvictUnusedThatFailsNeverLies(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	for n := 0; ; n++ {
		fsys := vfs.NewCrash(uint64(n))
		c := openClean(t, fsys, "clean", g, pages)
		fillClean(t, c)
		fsys.FailCall(n, syscall.EIO)
		next, freed, err := c.EvictUnused(0, 1<<40, nil)
		if !fsys.Faulted() {
			must(t, err)
			break
		}
		if err != nil && !errors.Is(err, syscall.EIO) {
			t.Fatalf("call %d: %v", n, err)
		}
		if err == nil && (next != g.Blocks() || freed < g.Size) {
			t.Errorf("call %d: no error, and %d bytes freed up to block %d", n, freed, next)
		}
		for b := range g.Blocks() {
			p := make([]byte, g.BlockLen(b))
			if hit, err := c.ReadAt(p, b*smallBlock); err != nil || hit && !bytes.Equal(p, blockContent(b, smallBlock)[:len(p)]) {
				t.Fatalf("call %d: block %d: %t, %v, or wrong bytes", n, b, hit, err)
			}
		}
		for range 2 { // the reads were uses
			_, _, err = c.EvictUnused(0, 1<<40, nil)
			must(t, err)
		}
		if left, err := fsys.Allocated("clean/data"); left != 0 || err != nil {
			t.Errorf("call %d: %d bytes are left for ever, %v", n, left, err)
		}
	}
}

// TestWritersAndEvictorsOfOneBlockLeaveNoEmptyMarks: what Has promises after them can
// be read.
func TestWritersAndEvictorsOfOneBlockLeaveNoEmptyMarks(t *testing.T) {
	plainAndSealed(t, testWritersAndEvictorsOfOneBlockLeaveNoEmptyMarks)
}

func testWritersAndEvictorsOfOneBlockLeaveNoEmptyMarks(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	c := openClean(t, vfs.OS(), t.TempDir(), g, pages)
	for round := range 200 {
		var both sync.WaitGroup
		both.Go(func() { must(t, c.WriteBlock(1, blockContent(1, smallBlock))) })
		both.Go(func() {
			var err error
			if round%2 == 0 {
				err = c.Evict(1)
			} else {
				_, _, err = c.EvictUnused(1, smallBlock, nil)
			}
			must(t, err)
		})
		both.Wait()
		has, err := c.Has(1)
		must(t, err)
		hit, err := c.ReadAt(make([]byte, smallBlock), smallBlock)
		must(t, err)
		if has != hit {
			t.Fatalf("round %d: has %t, read %t", round, has, hit)
		}
		must(t, c.Evict(1))
		c.used.take(1)
	}
}

func TestUsedBlocksAreASet(t *testing.T) {
	const blocks = 200
	var u usedBlocks
	u.grow(blocks)
	want := make(map[int64]bool)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 5000 {
		b := rng.Int64N(blocks)
		if rng.IntN(2) == 0 {
			last := min(blocks-1, b+rng.Int64N(4))
			u.markRange(b, last)
			for ; b <= last; b++ {
				want[b] = true
			}
			continue
		}
		if got := u.take(b); got != want[b] {
			t.Fatalf("take(%d) = %t", b, got)
		}
		delete(want, b)
	}
}

func TestCleanGeometryIsThatOfTheHeader(t *testing.T) {
	plainAndSealed(t, testCleanGeometryIsThatOfTheHeader)
}

func testCleanGeometryIsThatOfTheHeader(t *testing.T, pages *crypt.Pages) {
	fsys := vfs.NewCrash(1)
	g := smallGeometry()
	c := openClean(t, fsys, "clean", g, pages)
	if got, err := CleanGeometry(fsys, "clean"); got != g || err != nil {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := c.marks.WriteAt([]byte{1}, 9); err != nil {
		t.Fatal(err)
	}
	if _, err := CleanGeometry(fsys, "clean"); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("of a damaged header: %v", err)
	}
	must(t, RemoveClean(fsys, "clean"))
	must(t, RemoveClean(fsys, "clean"))
	if _, err := CleanGeometry(fsys, "clean"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of no layer: %v", err)
	}
	if n, err := CleanAllocated(fsys, "clean"); n != 0 || err != nil {
		t.Errorf("no layer takes %d bytes, %v", n, err)
	}
}

func BenchmarkUse(b *testing.B) {
	var u usedBlocks
	u.grow(1 << 20)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			u.markRange(77, 77)
		}
	})
}
