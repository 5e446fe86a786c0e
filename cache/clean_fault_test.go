package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/bits"
	"math/rand/v2"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// endInChecksum0 sets the last four bytes of p so that its checksum is 0. The
// checksum is an affine function of these bits, so this solves a linear system.
func endInChecksum0(p []byte) {
	tail := p[len(p)-4:]
	sum := func(x uint32) uint32 {
		binary.LittleEndian.PutUint32(tail, x)
		return manifest.Checksum(p)
	}
	base := sum(0)
	var effect, cause [32]uint32 // by the effect's highest bit
	reduce := func(e, c uint32) (uint32, uint32) {
		for e != 0 && effect[bits.Len32(e)-1] != 0 {
			top := bits.Len32(e) - 1
			e, c = e^effect[top], c^cause[top]
		}
		return e, c
	}
	for i := range 32 {
		if e, c := reduce(sum(1<<i)^base, 1<<i); e != 0 {
			effect[bits.Len32(e)-1], cause[bits.Len32(e)-1] = e, c
		}
	}
	_, x := reduce(base, 0)
	sum(x)
}

func TestPageWithChecksum0IsThere(t *testing.T) { plainAndSealed(t, testPageWithChecksum0IsThere) }

func testPageWithChecksum0IsThere(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	c := openClean(t, vfs.OS(), t.TempDir(), g, pages)
	block := blockContent(0, smallBlock)
	endInChecksum0(block[:page])
	if manifest.Checksum(block[:page]) != 0 {
		t.Fatal("the test is wrong")
	}
	must(t, c.WriteBlock(0, block))
	if hit, err := c.ReadAt(make([]byte, page), 0); !hit || err != nil {
		t.Errorf("ReadAt = %v, %v", hit, err)
	}
	if has, err := c.Has(0); !has || err != nil {
		t.Errorf("Has = %v, %v", has, err)
	}
}

func TestFlippedBitIsAMiss(t *testing.T) { plainAndSealed(t, testFlippedBitIsAMiss) }

func testFlippedBitIsAMiss(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	fsys := vfs.NewCrash(1)
	c := openClean(t, fsys, "base", g, pages)
	last := g.Blocks() - 1
	must(t, c.WriteBlock(last, blockContent(last, smallBlock)))
	p := make([]byte, g.BlockLen(last))
	off := last * smallBlock
	expect := func(want bool, what string) {
		t.Helper()
		if hit, err := c.ReadAt(p, off); hit != want || err != nil {
			t.Errorf("%s: %v, %v", what, hit, err)
		}
	}
	expect(true, "intact")
	flip := func(f vfs.File, at int64, bit int) {
		var b [1]byte
		if _, err := f.ReadAt(b[:], at); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 1 << bit
		if _, err := f.WriteAt(b[:], at); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 400 {
		at, bit := off+int64(i)*int64(len(p))/400, i%8
		flip(c.data, at, bit)
		expect(false, "data")
		flip(c.data, at, bit)
	}
	for at := c.markOffset(off / page); at < c.markOffset(pagesOf(g.Size)); at++ {
		for bit := range 8 {
			flip(c.marks, at, bit)
			expect(false, "mark")
			flip(c.marks, at, bit)
		}
	}
	expect(true, "mended")
}

func TestBadSectorIsAMiss(t *testing.T) { plainAndSealed(t, testBadSectorIsAMiss) }

func testBadSectorIsAMiss(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	fsys := vfs.NewCrash(1)
	c := openClean(t, fsys, "base", g, pages)
	must(t, c.WriteBlock(0, blockContent(0, smallBlock)))
	must(t, c.WriteBlock(1, blockContent(1, smallBlock)))
	p := make([]byte, 2*page)
	for n := 0; ; n++ {
		fsys.FailCall(n, syscall.EIO)
		hit, err := c.ReadAt(p, page/2)
		if err != nil || hit == fsys.Faulted() {
			t.Errorf("call %d: %v, %v", n, hit, err)
		}
		if !fsys.Faulted() {
			if n != 4 {
				t.Errorf("%d calls: want the marks, a head, a tail and what is between", n)
			}
			break
		}
	}
	fsys.FailCall(0, syscall.EIO)
	if has, err := c.Has(0); has || err != nil {
		t.Errorf("Has = %v, %v", has, err)
	}
	// Calls 0 and 1 find the marks, 2 reads them. Then they are read block by block.
	fsys.FailCall(2, syscall.EIO)
	if n, err := c.CountPresent(); n != 2 || err != nil {
		t.Errorf("CountPresent = %d, %v", n, err)
	}
	if !fsys.Faulted() {
		t.Error("no fault")
	}
}

// A base is written, evicted, and opened by one process that stops anywhere; then the
// power fails, or not. Whatever is a hit is right, and everything can go on.
func TestCrashNeverMakesACleanPageLie(t *testing.T) {
	plainAndSealed(t, testCrashNeverMakesACleanPageLie)
}

func testCrashNeverMakesACleanPageLie(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	device := deviceContent(g)
	var contents [][]byte
	for b := range g.Blocks() {
		contents = append(contents, blockContent(b, smallBlock))
	}
	var hits, misses int
	for seed := range uint64(60) {
		fsys := vfs.NewCrash(seed)
		fsys.StopCall(int(seed * 2))
		rng := rand.New(rand.NewPCG(seed, 1))
		c, err := OpenClean(fsys, "base", g, pages)
		for i := 0; err == nil; i++ {
			switch block := rng.Int64N(g.Blocks()); {
			case rng.IntN(4) == 0:
				err = c.Evict(block)
			case rng.IntN(8) == 0:
				err = errors.Join(c.Sync(), fsys.SyncDir("/"), fsys.SyncDir("base"))
			default:
				err = c.WriteBlock(block, contents[block])
			}
		}
		if !errors.Is(err, vfs.ErrStopped) {
			t.Fatal(err)
		}
		if seed%4 == 0 {
			fsys.Kill()
		} else {
			fsys.PowerCut()
		}
		c = openClean(t, fsys, "base", g, pages)
		p := make([]byte, page)
		for off := int64(0); off < g.Size; off += page {
			p = p[:min(page, g.Size-off)]
			hit, err := c.ReadAt(p, off)
			must(t, err)
			if !hit {
				misses++
				continue
			}
			hits++
			if !bytes.Equal(p, device[off:off+int64(len(p))]) {
				t.Fatalf("seed %d: page at %d has other bytes", seed, off)
			}
		}
		for b := range g.Blocks() {
			must(t, c.WriteBlock(b, contents[b]))
		}
		p = make([]byte, g.Size)
		if hit, err := c.ReadAt(p, 0); !hit || err != nil || !bytes.Equal(p, device) {
			t.Fatalf("seed %d: written anew, it is %v, %v", seed, hit, err)
		}
	}
	if hits < 100 || misses < 100 {
		t.Errorf("%d hits and %d misses prove little", hits, misses)
	}
}

// What the documentation asks of a volume's clean layer: new contents and evictions
// count after a power cut once Sync has succeeded.
func TestSyncedBlockHasItsLatestContent(t *testing.T) {
	plainAndSealed(t, testSyncedBlockHasItsLatestContent)
}

func testSyncedBlockHasItsLatestContent(t *testing.T, pages *crypt.Pages) {
	g := smallGeometry()
	old, latest := blockContent(0, smallBlock), blockContent(100, smallBlock)
	for seed := range uint64(50) {
		fsys := vfs.NewCrash(seed)
		c := openClean(t, fsys, "clean", g, pages)
		must(t, errors.Join(c.WriteBlock(0, old), c.WriteBlock(1, old), c.Sync(), fsys.SyncDir("/"), fsys.SyncDir("clean")))
		must(t, errors.Join(c.WriteBlock(0, latest), c.Evict(1), c.Sync()))
		fsys.PowerCut()
		c = openClean(t, fsys, "clean", g, pages)
		p := make([]byte, smallBlock)
		if hit, err := c.ReadAt(p, 0); !hit || err != nil || !bytes.Equal(p, latest) {
			t.Errorf("written: %v, %v", hit, err)
		}
		if hit, err := c.ReadAt(p[:page], smallBlock); hit || err != nil {
			t.Errorf("evicted: %v, %v", hit, err)
		}
	}
}

func TestFailedSyncOfACleanLayerFailsAllLaterOnes(t *testing.T) {
	plainAndSealed(t, testFailedSyncOfACleanLayerFailsAllLaterOnes)
}

func testFailedSyncOfACleanLayerFailsAllLaterOnes(t *testing.T, pages *crypt.Pages) {
	for n := range 2 {
		fsys := vfs.NewCrash(uint64(n))
		c := openClean(t, fsys, "base", smallGeometry(), pages)
		must(t, c.WriteBlock(0, blockContent(0, smallBlock)))
		fsys.FailCall(n, syscall.EIO)
		for range 2 {
			if err := c.Sync(); !errors.Is(err, syscall.EIO) {
				t.Errorf("call %d: %v", n, err)
			}
		}
	}
}

func TestFailedWriteOfABlockTellsWhy(t *testing.T) {
	plainAndSealed(t, testFailedWriteOfABlockTellsWhy)
}

func testFailedWriteOfABlockTellsWhy(t *testing.T, pages *crypt.Pages) {
	for n := 0; ; n++ {
		fsys := vfs.NewCrash(uint64(n))
		c := openClean(t, fsys, "base", smallGeometry(), pages)
		fsys.FailCall(n, syscall.ENOSPC)
		err := c.WriteBlock(0, blockContent(0, smallBlock))
		if !fsys.Faulted() {
			must(t, err)
			break
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("call %d: %v", n, err)
		}
		if hit, err := c.ReadAt(make([]byte, smallBlock), 0); hit || err != nil {
			t.Errorf("call %d: a failed write is a hit: %v, %v", n, hit, err)
		}
	}
}
