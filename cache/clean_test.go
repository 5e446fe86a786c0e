package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

const smallBlock = manifest.MinBlockSize

// smallGeometry has a last block, and in it a last page, that are short.
func smallGeometry() manifest.Geometry {
	return manifest.Geometry{Size: 5*smallBlock + 3*page + 512, BlockSize: smallBlock}
}

func openClean(t testing.TB, fsys vfs.FS, dir string, g manifest.Geometry, pages *crypt.Pages) *Clean {
	t.Helper()
	c, err := OpenClean(fsys, dir, g, pages)
	must(t, err)
	t.Cleanup(func() {
		if err := c.Close(); err != nil && !errors.Is(err, fs.ErrClosed) && !errors.Is(err, vfs.ErrStopped) {
			t.Error(err)
		}
	})
	return c
}

// blockContent is what block has in a base: always the same, and different in each
// page.
func blockContent(block int64, blockSize int) []byte {
	rng := rand.New(rand.NewPCG(uint64(block), 5))
	p := make([]byte, 0, blockSize)
	for len(p) < blockSize {
		p = binary.LittleEndian.AppendUint64(p, rng.Uint64())
	}
	if block%3 == 1 {
		clear(p[page : 2*page]) // zeros must not look like a hole
	}
	return p
}

// deviceContent is the whole device of a geometry.
func deviceContent(g manifest.Geometry) []byte {
	var p []byte
	for b := range g.Blocks() {
		p = append(p, blockContent(b, g.BlockSize)[:g.BlockLen(b)]...)
	}
	return p
}

// Two processes write, evict and read one layer. A read is a hit exactly if all its
// blocks are there, and a hit has the right bytes.
func TestCleanLayerIsASetOfBlocks(t *testing.T) { plainAndSealed(t, testCleanLayerIsASetOfBlocks) }

func testCleanLayerIsASetOfBlocks(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	device := deviceContent(g)
	rapid.Check(t, func(rt *rapid.T) {
		fsys := vfs.NewCrash(0)
		var handles [2]*Clean
		for i := range handles {
			handles[i] = openClean(t, fsys, "base", g, pages)
		}
		there := make([]bool, g.Blocks())
		for range rapid.IntRange(1, 30).Draw(rt, "steps") {
			c := handles[rapid.IntRange(0, 1).Draw(rt, "process")]
			block := rapid.Int64Range(0, g.Blocks()-1).Draw(rt, "block")
			switch rapid.SampledFrom([]string{"write", "write", "read", "read", "evict", "evict range", "count"}).Draw(rt, "op") {
			case "write":
				must(t, c.WriteBlock(block, blockContent(block, g.BlockSize)))
				there[block] = true
			case "evict":
				must(t, c.Evict(block))
				there[block] = false
			case "evict range":
				n := rapid.Int64Range(0, g.Blocks()-block).Draw(rt, "blocks")
				must(t, c.EvictRange(block, n))
				clear(there[block:][:n])
			case "read":
				off := rapid.Int64Range(0, g.Size).Draw(rt, "off")
				n := rapid.Int64Range(0, min(g.Size-off, 2*smallBlock)).Draw(rt, "n")
				if rapid.Bool().Draw(rt, "aligned") {
					off = off / page * page
					n = min((n+page-1)/page*page, g.Size-off)
				}
				want := true
				for b := off / smallBlock; n > 0 && b*smallBlock < off+n; b++ {
					want = want && there[b]
				}
				p := make([]byte, n)
				hit, err := c.ReadAt(p, off)
				if err != nil || hit != want {
					rt.Fatalf("ReadAt(%d bytes at %d) = %v, %v; want %v", n, off, hit, err, want)
				}
				if hit && !bytes.Equal(p, device[off:off+n]) {
					rt.Fatalf("ReadAt(%d bytes at %d) returned other bytes", n, off)
				}
			case "count":
				var present []int64
				for b, err := range c.Present() {
					must(t, err)
					present = append(present, b)
				}
				var want []int64
				for b := range g.Blocks() {
					has, err := c.Has(b)
					must(t, err)
					if has != there[b] {
						rt.Fatalf("Has(%d) = %v", b, has)
					}
					if there[b] {
						want = append(want, b)
					}
				}
				count, err := c.CountPresent()
				if err != nil || count != int64(len(want)) || !slices.Equal(present, want) {
					rt.Fatalf("present: %v, %d, %v; want %v", present, count, err, want)
				}
			}
		}
	})
}

func TestReadOfEvictedPageIsAMiss(t *testing.T) { plainAndSealed(t, testReadOfEvictedPageIsAMiss) }

func testReadOfEvictedPageIsAMiss(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	dir := t.TempDir()
	c := openClean(t, vfs.OS(), dir, g, pages)
	must(t, c.WriteBlock(0, blockContent(0, smallBlock)))
	// Another process punches first and gets no further.
	must(t, c.data.PunchHole(2*page, page))
	p := make([]byte, page)
	for at, want := range map[int64]bool{page: true, 2 * page: false, 2*page + 100: false, 3 * page: true} {
		if hit, err := c.ReadAt(p[:page-200], at); hit != want || err != nil {
			t.Errorf("at %d: %v, %v", at, hit, err)
		}
	}
	must(t, c.Evict(0))
	if at, err := c.data.SeekData(0); err == nil {
		t.Errorf("data left at %d", at)
	}
}

func TestCleanLayerRefusesMisuse(t *testing.T) { plainAndSealed(t, testCleanLayerRefusesMisuse) }

func testCleanLayerRefusesMisuse(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	c := openClean(t, vfs.OS(), t.TempDir(), g, pages)
	block := make([]byte, smallBlock)
	for name, call := range map[string]func() error{
		"read past the end":   func() error { _, err := c.ReadAt(make([]byte, 2), g.Size-1); return err },
		"read before":         func() error { _, err := c.ReadAt(make([]byte, 2), -1); return err },
		"no such block":       func() error { return c.WriteBlock(g.Blocks(), block) },
		"short block":         func() error { return c.WriteBlock(g.Blocks()-1, block[:g.BlockLen(g.Blocks()-1)]) },
		"evict no such block": func() error { return c.Evict(-1) },
		"has no such block":   func() error { _, err := c.Has(g.Blocks()); return err },
	} {
		if err := call(); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	must(t, c.Close())
	for name, call := range map[string]func() error{
		"ReadAt":     func() error { _, err := c.ReadAt(make([]byte, 2), 0); return err },
		"Has":        func() error { _, err := c.Has(0); return err },
		"WriteBlock": func() error { return c.WriteBlock(0, block) },
		"Evict":      func() error { return c.Evict(0) },
		"Count":      func() error { _, err := c.CountPresent(); return err },
		"Sync":       c.Sync,
	} {
		if err := call(); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}

func TestReadersWritersAndEvictorsNeverSeeOtherBytes(t *testing.T) {
	plainAndSealed(t, testReadersWritersAndEvictorsNeverSeeOtherBytes)
}

func testReadersWritersAndEvictorsNeverSeeOtherBytes(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	device := deviceContent(g)
	var contents [][]byte
	for b := range g.Blocks() {
		contents = append(contents, blockContent(b, smallBlock))
	}
	dir := t.TempDir()
	var hits atomic.Int64
	var wg sync.WaitGroup
	for i := range uint64(4) {
		c := openClean(t, vfs.OS(), dir, g, pages)
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(i, 1))
			p := make([]byte, 3*page)
			for range 500 {
				block := rng.Int64N(g.Blocks())
				switch rng.IntN(8) {
				case 0:
					must(t, c.Evict(block))
				case 1, 2:
					must(t, c.WriteBlock(block, contents[block]))
				default:
					off := rng.Int64N(g.Size - int64(len(p)))
					hit, err := c.ReadAt(p, off)
					must(t, err)
					if hit && !bytes.Equal(p, device[off:off+int64(len(p))]) {
						t.Errorf("other bytes at %d", off)
					}
					if hit {
						hits.Add(1)
					}
				}
			}
		})
	}
	wg.Wait()
	if hits.Load() == 0 {
		t.Error("no hits")
	}
}

// readCounter counts the reads of all its files.
type readCounter struct {
	vfs.FS
	reads atomic.Int64
}

type countedFile struct {
	vfs.File
	fs *readCounter
}

func (c *readCounter) OpenFile(name string, flag int, perm fs.FileMode) (vfs.File, error) {
	f, err := c.FS.OpenFile(name, flag, perm)
	return countedFile{f, c}, err
}

func (f countedFile) ReadAt(p []byte, off int64) (int, error) {
	f.fs.reads.Add(1)
	return f.File.ReadAt(p, off)
}

func TestWarmReadCostsTwoReadsAndNoAllocation(t *testing.T) {
	plainAndSealed(t, testWarmReadCostsTwoReadsAndNoAllocation)
}

func testWarmReadCostsTwoReadsAndNoAllocation(t *testing.T, pages *crypt.Pages) {
	g := manifest.Geometry{Size: 4 * mib, BlockSize: manifest.DefaultBlockSize}
	counter := &readCounter{FS: vfs.OS()}
	c := openClean(t, counter, t.TempDir(), g, pages)
	for b := range g.Blocks() {
		must(t, c.WriteBlock(b, blockContent(b, g.BlockSize)))
	}
	for _, want := range []struct {
		off, n, reads int64
	}{{8 * page, page, 2}, {mib, mib, 2}, {mib / 2, mib, 2}, {0, 2 * mib, 4}, {100, page - 200, 2}, {100, mib, 5}} {
		p := make([]byte, want.n)
		counter.reads.Store(0)
		if hit, err := c.ReadAt(p, want.off); !hit || err != nil {
			t.Fatalf("%v, %v", hit, err)
		}
		if got := counter.reads.Load(); got != want.reads {
			t.Errorf("%d bytes at %d: %d reads, want %d", want.n, want.off, got, want.reads)
		}
		if n := testing.AllocsPerRun(50, func() { must2(c.ReadAt(p, want.off)) }); n > 0.5 {
			t.Errorf("%d bytes at %d: %v allocations", want.n, want.off, n)
		}
	}
}

func must2(_ bool, err error) {
	if err != nil {
		panic(err)
	}
}

func TestPresentBlocksOfAHugeDeviceAreFoundQuickly(t *testing.T) {
	plainAndSealed(t, testPresentBlocksOfAHugeDeviceAreFoundQuickly)
}

func testPresentBlocksOfAHugeDeviceAreFoundQuickly(t *testing.T, pages *crypt.Pages) {
	g := manifest.Geometry{Size: 16<<40 - 1<<20, BlockSize: manifest.DefaultBlockSize}
	c := openClean(t, vfs.OS(), filepath.Join(t.TempDir(), "base"), g, pages)
	want := []int64{0, 7, 8, g.Blocks() / 2, g.Blocks() - 1}
	for _, b := range want {
		must(t, c.WriteBlock(b, blockContent(b, g.BlockSize)))
	}
	start := time.Now()
	var got []int64
	for b, err := range c.Present() {
		must(t, err)
		got = append(got, b)
	}
	if !slices.Equal(got, want) {
		t.Errorf("present: %v, want %v", got, want)
	}
	for b, err := range c.Present() {
		must(t, err)
		if b == 7 {
			break
		}
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("took %v", took)
	}
}

// CountPresent counts what [Clean.Present] yields.
func (c *Clean) CountPresent() (int64, error) {
	var count int64
	for _, err := range c.Present() {
		if err != nil {
			return 0, err
		}
		count++
	}
	return count, nil
}
