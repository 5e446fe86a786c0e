package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// wantNoneOf fails the test if a file below dir has 16 bytes of a secret, none of them
// common.
func wantNoneOf(t *testing.T, dir string, secret []byte) {
	t.Helper()
	windows := make(map[string]int)
	for off := 0; off+16 <= len(secret); off += 16 {
		if part := secret[off : off+16]; bytes.Count(part, part[:1]) < 8 {
			windows[string(part)] = off
		}
	}
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		for off := range len(data) - 15 {
			if at, ok := windows[string(data[off:off+16])]; ok {
				t.Fatalf("%s has, at %d, what is secret from %d on", path, off, at)
			}
		}
		return err
	}))
}

// A checksum of a page tells whether it is one that somebody knows: so not even that is
// in a sealed layer.
func TestSealedCleanLayerGivesNothingAway(t *testing.T) {
	g := smallGeometry()
	for _, pages := range []*crypt.Pages{testKey(1).Pages("base", true), testKey(1).Pages("volume", false)} {
		dir := t.TempDir()
		c := openClean(t, vfs.OS(), dir, g, pages)
		for b := range g.Blocks() {
			must(t, c.WriteBlock(b, blockContent(b, smallBlock)))
		}
		wantNoneOf(t, dir, deviceContent(g))
		marks, err := os.ReadFile(filepath.Join(dir, "map"))
		must(t, err)
		marks = marks[cleanHeaderLen:]
		device := deviceContent(g)
		for off := 0; off < len(device); off += page {
			plain := device[off:min(off+page, len(device))]
			if bytes.Contains(marks, binary.LittleEndian.AppendUint32(nil, markOf(plain))) {
				t.Errorf("the map has the checksum of the page at %d", off)
			}
		}
		must(t, c.Evict(2))
		must(t, c.WriteBlock(3, blockContent(30, smallBlock)))
		wantNoneOf(t, dir, device)
	}
}

// An evictor has no keys. It measures and frees what it cannot read.
func TestSealedLayerIsEvictedWithoutItsKey(t *testing.T) {
	g := smallGeometry()
	dir := t.TempDir()
	owner := openClean(t, vfs.OS(), dir, g, testKey(1).Pages("base", true))
	for b := range g.Blocks() {
		must(t, owner.WriteBlock(b, blockContent(b, smallBlock)))
	}
	if got, err := CleanGeometry(vfs.OS(), dir); got != g || err != nil {
		t.Errorf("geometry %+v, %v", got, err)
	}
	evictor := openClean(t, vfs.OS(), dir, g, nil)
	if n, err := evictor.CountPresent(); n != g.Blocks() || err != nil {
		t.Errorf("it counts %d of %d blocks, %v", n, g.Blocks(), err)
	}
	p := make([]byte, page)
	for at := int64(0); at < g.Size; at += page {
		p = p[:min(page, g.Size-at)]
		if hit, err := evictor.ReadAt(p, at); hit || err != nil {
			t.Fatalf("it reads the page at %d: %v, %v", at, hit, err)
		}
	}
	if err := evictor.WriteBlock(0, blockContent(0, smallBlock)); err == nil {
		t.Error("it writes a block")
	}
	must(t, evictor.Evict(1))
	must(t, evictor.EvictRange(3, 2))
	for b := range g.Blocks() {
		gone := b == 1 || b == 3 || b == 4
		block := make([]byte, g.BlockLen(b))
		hit, err := owner.ReadAt(block, b*smallBlock)
		if hit == gone || err != nil {
			t.Errorf("block %d: %v, %v", b, hit, err)
		}
		if hit && !bytes.Equal(block, blockContent(b, smallBlock)[:len(block)]) {
			t.Errorf("block %d has other bytes", b)
		}
	}
	if next, freed, err := evictor.EvictUnused(0, 1<<40, nil); err != nil || next != g.Blocks() && freed == 0 {
		t.Errorf("the rest: %d, %d, %v", next, freed, err)
	}
	if n, err := owner.CountPresent(); n != 0 || err != nil {
		t.Errorf("%d blocks are left, %v", n, err)
	}
	must(t, owner.WriteBlock(2, blockContent(2, smallBlock)))
	if hit, err := owner.ReadAt(p[:page:page], 2*smallBlock); !hit || err != nil {
		t.Errorf("written again: %v, %v", hit, err)
	}
}

// Whoever has another key has misses, whose blocks it fetches; and so has the owner
// then. Nobody sees other bytes.
func TestWrongKeyOfACleanLayerIsAMiss(t *testing.T) {
	g := smallGeometry()
	dir := t.TempDir()
	owner := openClean(t, vfs.OS(), dir, g, testKey(1).Pages("base", true))
	must(t, owner.WriteBlock(0, blockContent(0, smallBlock)))
	must(t, owner.WriteBlock(1, blockContent(1, smallBlock)))
	p := make([]byte, smallBlock)
	for name, pages := range map[string]*crypt.Pages{
		"another key": testKey(2).Pages("base", true), "another layer": testKey(1).Pages("other", true), "as a volume's": testKey(1).Pages("base", false),
	} {
		other := openClean(t, vfs.OS(), dir, g, pages)
		if hit, err := other.ReadAt(p, 0); hit || err != nil {
			t.Errorf("%s: %v, %v", name, hit, err)
		}
		must(t, other.WriteBlock(1, blockContent(1, smallBlock)))
		if hit, err := owner.ReadAt(p, smallBlock); hit || err != nil {
			t.Errorf("%s: the owner reads what it wrote: %v, %v", name, hit, err)
		}
	}
	if hit, err := owner.ReadAt(p, 0); !hit || err != nil || !bytes.Equal(p, blockContent(0, smallBlock)) {
		t.Errorf("the owner: %v, %v", hit, err)
	}
}

// Any number of processes fill one base: what one wrote the other reads, and of
// writes at the same time either's bytes go with either's marks.
func TestSealedBaseIsShared(t *testing.T) {
	g := smallGeometry()
	dir := t.TempDir()
	one := openClean(t, vfs.OS(), dir, g, testKey(1).Pages("base", true))
	two := openClean(t, vfs.OS(), dir, g, testKey(1).Pages("base", true))
	must(t, one.WriteBlock(0, blockContent(0, smallBlock)))
	must(t, two.WriteBlock(1, blockContent(1, smallBlock)))
	// One has written the bytes, and two the bytes and the marks.
	must(t, one.WriteBlock(2, blockContent(2, smallBlock)))
	before, err := os.ReadFile(filepath.Join(dir, "map"))
	must(t, err)
	must(t, two.WriteBlock(2, blockContent(2, smallBlock)))
	after, err := os.ReadFile(filepath.Join(dir, "map"))
	must(t, err)
	if !bytes.Equal(before, after) {
		t.Error("two processes seal a page of a base differently")
	}
	p := make([]byte, 3*smallBlock)
	for i, c := range []*Clean{one, two} {
		if hit, err := c.ReadAt(p, 0); !hit || err != nil || !bytes.Equal(p, deviceContent(g)[:len(p)]) {
			t.Errorf("process %d: %v, %v", i, hit, err)
		}
	}
}

// Who can write the host's disk can make pages miss, but not move or bring one back.
func TestPageMovedWithItsMarkIsAMiss(t *testing.T) {
	g := smallGeometry()
	for name, pages := range map[string]*crypt.Pages{"base": testKey(1).Pages("base", true), "volume": testKey(1).Pages("volume", false)} {
		c := openClean(t, vfs.OS(), t.TempDir(), g, pages)
		must(t, c.WriteBlock(0, blockContent(0, smallBlock)))
		data, mark := make([]byte, page), make([]byte, c.markLen)
		must(t, second(c.data.ReadAt(data, 3*page)))
		must(t, second(c.marks.ReadAt(mark, c.markOffset(3))))
		must(t, second(c.data.WriteAt(data, 5*page)))
		must(t, second(c.marks.WriteAt(mark, c.markOffset(5))))
		if hit, err := c.ReadAt(data, 5*page); hit || err != nil {
			t.Errorf("%s: %v, %v", name, hit, err)
		}
		// A page in clear, with the checksum that a plain layer has.
		plain := blockContent(7, smallBlock)[:page]
		must(t, second(c.data.WriteAt(plain, 6*page)))
		for _, first := range []uint32{markOf(plain), sealedMark} {
			forged := make([]byte, c.markLen)
			binary.LittleEndian.PutUint32(forged, first)
			must(t, second(c.marks.WriteAt(forged, c.markOffset(6))))
			if hit, err := c.ReadAt(data, 6*page); hit || err != nil {
				t.Errorf("%s: in clear: %v, %v", name, hit, err)
			}
		}
	}
}

func TestSealedIndexFileGivesNothingAway(t *testing.T) {
	g := manifest.Geometry{Size: 600 * smallBlock, BlockSize: smallBlock}
	dir := t.TempDir()
	path := filepath.Join(dir, "index")
	x, err := OpenIndexFile(vfs.OS(), path, g, testKey(1))
	must(t, err)
	leaf, hash := testLeaf(1, 600)
	ref := manifest.LeafRef{Owner: 1, Hash: hash}
	must(t, x.Store(ref, leaf))
	wantNoneOf(t, dir, leaf.Encode())
	must(t, x.Close())
	for name, key := range map[string]*crypt.Key{"none": nil, "another": testKey(2)} {
		x, err := OpenIndexFile(vfs.OS(), path, g, key)
		must(t, err)
		if _, ok := x.Load(ref); ok {
			t.Errorf("it opens with key: %s", name)
		}
		must(t, x.Close())
	}
	// Leaves in clear, of a former lineage say, are not taken for sealed ones.
	plain, err := OpenIndexFile(vfs.OS(), path, g, nil)
	must(t, err)
	must(t, plain.Store(ref, leaf))
	must(t, plain.Close())
	x, err = OpenIndexFile(vfs.OS(), path, g, testKey(1))
	must(t, err)
	if _, ok := x.Load(ref); ok {
		t.Error("it loads a leaf that is not sealed")
	}
	must(t, x.Close())
}

// Every operation of a write layer, also after it was opened again: nothing that was
// written, and nothing that was written over, is in its folder.
func TestEncryptedWriteLayerHasNothingInClear(t *testing.T) {
	dir := t.TempDir()
	size := int64(300*page - 512)
	w, err := CreateWriteLayer(vfs.OS(), filepath.Join(dir, "w"), size, boot, testKey(1))
	must(t, err)
	secret := slices.Concat(blockContent(1, 4*page), blockContent(2, 300*page))
	must(t, w.WriteAt(secret[:4*page], 0))
	must(t, w.WriteAt(secret[4*page:][:size-4*page], 4*page))
	must(t, w.WriteAt(secret[100:1000], 777))    // parts of sectors
	must(t, w.WriteAt(secret[5000:5001], 12345)) // of one
	must(t, w.Zero(8*page, 4*page))
	must(t, w.WriteAt(secret[:page], 9*page))
	must(t, w.Sync())
	wantNoneOf(t, dir, secret)
	must(t, w.Close())
	w, err = OpenWriteLayer(vfs.OS(), filepath.Join(dir, "w"), size, otherBoot, testKey(1))
	must(t, err)
	must(t, w.WriteAt(secret[page:2*page], 9*page))
	wantNoneOf(t, dir, secret)
	want := slices.Clone(secret[:size])
	copy(want[777:], secret[100:1000])
	copy(want[12345:], secret[5000:5001])
	clear(want[8*page : 12*page])
	copy(want[9*page:], secret[page:2*page])
	got := make([]byte, size)
	must(t, w.ReadAt(got[:8*page], 0))
	must(t, w.ReadAt(got[9*page:10*page], 9*page))
	must(t, w.ReadAt(got[12*page:], 12*page))
	if !bytes.Equal(got, want) {
		t.Error("it is not what was written")
	}
	must(t, w.Close())
}

func TestNoTwoWriteLayersAreEncryptedAlike(t *testing.T) {
	var data [2][]byte
	for i := range data {
		dir := filepath.Join(t.TempDir(), "w")
		w, err := CreateWriteLayer(vfs.OS(), dir, page, boot, testKey(1))
		must(t, err)
		must(t, w.WriteAt(fill('a', page), 0))
		must(t, w.Close())
		data[i], err = os.ReadFile(filepath.Join(dir, "data"))
		must(t, err)
	}
	for off := 0; off < page; off += 16 {
		if bytes.Equal(data[0][off:off+16], data[1][off:off+16]) {
			t.Fatalf("16 bytes at %d are the same", off)
		}
	}
}

// A layer is not taken for one of the other kind: neither is what was written in clear
// decrypted, nor what is encrypted shown.
func TestWriteLayerOfTheOtherKindIsRefused(t *testing.T) {
	for name, keys := range map[string][2]*crypt.Key{"encrypted, without a key": {testKey(1), nil}, "plain, with a key": {nil, testKey(1)}} {
		dir := filepath.Join(t.TempDir(), "w")
		w, err := CreateWriteLayer(vfs.OS(), dir, 2*page, boot, keys[0])
		must(t, err)
		must(t, w.WriteAt(fill('a', page), 0))
		must(t, w.Close())
		if _, err := OpenWriteLayer(vfs.OS(), dir, 2*page, boot, keys[1]); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
		w, err = OpenWriteLayer(vfs.OS(), dir, 2*page, boot, keys[0])
		must(t, err)
		p := make([]byte, page)
		must(t, w.ReadAt(p, 0))
		if !bytes.Equal(p, fill('a', page)) {
			t.Errorf("%s: the refusal changed it", name)
		}
		must(t, w.Close())
	}
}

func randomBytes(rng *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

// A byte model of the promise about power cuts, with writes that begin and end
// anywhere, and discards: each sector is, as a whole, as some write or discard since
// the last sync left it, or as it was then.
func TestSectorIsOldOrNewAfterAPowerCut(t *testing.T) {
	plainAndEncrypted(t, testSectorIsOldOrNewAfterAPowerCut)
}

func testSectorIsOldOrNewAfterAPowerCut(t *testing.T, key *crypt.Key) {
	const size = 6*page + 1024
	for seed := range uint64(60) {
		rng := rand.New(rand.NewPCG(seed, 9))
		fsys := vfs.NewCrash(seed)
		must(t, fsys.MkdirAll("vol", 0o700))
		must(t, fsys.SyncDir("/"))
		w, err := CreateWriteLayer(fsys, layerDir, size, boot, key)
		must(t, err)
		now := randomBytes(rng, size)
		must(t, w.WriteAt(now, 0)) // all pages are data from here on
		must(t, w.Sync())
		var allowed [size / sectorSize][][]byte
		note := func() {
			for i := range allowed {
				sector := bytes.Clone(now[i*sectorSize : (i+1)*sectorSize])
				allowed[i] = append(allowed[i], sector)
			}
		}
		note()
		for boots := range 4 {
			for range 1 + rng.IntN(8) {
				off := rng.IntN(size - 1)
				n := 1 + rng.IntN(min(2*page, size-off))
				if rng.IntN(2) == 0 {
					n = 1 + rng.IntN(min(700, size-off))
				}
				switch rng.IntN(6) {
				case 0: // a discard, and the page is zero until it is written whole
					at := off / page * page
					n := min(page, size-at)
					must(t, w.Zero(int64(at), int64(n)))
					clear(now[at : at+n])
					note()
					p := randomBytes(rng, n)
					must(t, w.WriteAt(p, int64(at)))
					copy(now[at:], p)
				case 1:
					must(t, w.Sync())
					for i := range allowed {
						allowed[i] = nil
					}
				default:
					p := randomBytes(rng, n)
					must(t, w.WriteAt(p, int64(off)))
					copy(now[off:], p)
				}
				note()
				got := make([]byte, size)
				must(t, w.ReadAt(got, 0))
				if !bytes.Equal(got, now) {
					t.Fatalf("seed %d: it does not read as written", seed)
				}
			}
			fsys.PowerCut()
			w, err = OpenWriteLayer(fsys, layerDir, size, fmt.Sprint("boot ", boots), key)
			must(t, err)
			for i := range allowed {
				sector := now[i*sectorSize : (i+1)*sectorSize]
				switch w.State(int64(i / sectorsPerPage)) {
				case Data:
					must(t, w.ReadAt(sector, int64(i*sectorSize)))
				case Zero:
					clear(sector)
				default:
					t.Fatalf("seed %d: sector %d is lost", seed, i)
				}
				if !slices.ContainsFunc(allowed[i], func(s []byte) bool { return bytes.Equal(s, sector) }) {
					t.Fatalf("seed %d: after power cut %d sector %d is none of the %d it may be", seed, boots, i, len(allowed[i]))
				}
				allowed[i] = nil
			}
			for at := 0; at < size; at += page { // what is zero is written whole again
				if n := min(page, size-at); w.State(int64(at/page)) == Zero {
					must(t, w.WriteAt(now[at:at+n], int64(at)))
				}
			}
			must(t, w.Sync())
			note()
		}
		must(t, w.Close())
	}
}
