package cache

import (
	"errors"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestIndexFileReturnsOnlyTheLeafThatIsNamed(t *testing.T) {
	plainAndEncrypted(t, testIndexFileReturnsOnlyTheLeafThatIsNamed)
}

func testIndexFileReturnsOnlyTheLeafThatIsNamed(t *testing.T, key *crypt.Key) {
	g := manifest.Geometry{Size: 2600 * manifest.MinBlockSize, BlockSize: manifest.MinBlockSize} // leaves of 1024, 1024, 552
	path := filepath.Join(t.TempDir(), "index")
	x, err := OpenIndexFile(vfs.OS(), path, g, key)
	must(t, err)
	ref := func(leaf int64, hash manifest.Hash) manifest.LeafRef {
		return manifest.LeafRef{Leaf: leaf, Owner: 1, Hash: hash}
	}
	hashes := make([]manifest.Hash, g.Leaves())
	for i := range g.Leaves() {
		leaf, hash := testLeaf(uint64(i), g.LeafLen(i))
		hashes[i] = hash
		if _, ok := x.Load(ref(i, hash)); ok {
			t.Errorf("leaf %d is there before it is stored", i)
		}
		must(t, x.Store(ref(i, hash), leaf))
	}
	must(t, x.Close())
	x, err = OpenIndexFile(vfs.OS(), path, g, key)
	must(t, err)
	for i := range g.Leaves() {
		if leaf, ok := x.Load(ref(i, hashes[i])); !ok || leaf.Hash() != hashes[i] {
			t.Errorf("leaf %d is lost", i)
		}
		other := hashes[(i+1)%g.Leaves()]
		if _, ok := x.Load(ref(i, other)); ok {
			t.Errorf("leaf %d is another one", i)
		}
	}
	leaf, hash := testLeaf(1, 1024)
	for _, i := range []int64{-1, 2, 3} {
		if err := x.Store(ref(i, hash), leaf); err == nil {
			t.Errorf("leaf %d of that length is accepted", i)
		}
	}
	if _, ok := x.Load(ref(3, hash)); ok {
		t.Error("a leaf that the device does not have is there")
	}
	must(t, x.Close())
	if _, ok := x.Load(ref(0, hashes[0])); ok {
		t.Error("closed file has a leaf")
	}
}

func TestDamagedLeafInAnIndexFileIsAMiss(t *testing.T) {
	plainAndEncrypted(t, testDamagedLeafInAnIndexFileIsAMiss)
}

func testDamagedLeafInAnIndexFileIsAMiss(t *testing.T, key *crypt.Key) {
	g := manifest.Geometry{Size: 600 * manifest.MinBlockSize, BlockSize: manifest.MinBlockSize}
	fsys := vfs.NewCrash(1)
	x, err := OpenIndexFile(fsys, "index", g, key)
	must(t, err)
	leaf, hash := testLeaf(1, 600)
	ref := manifest.LeafRef{Hash: hash}
	must(t, x.Store(ref, leaf))
	f, err := fsys.OpenFile("index", 2 /* os.O_RDWR */, 0)
	must(t, err)
	for at := int64(0); at < int64(manifest.EncodedLeafLen(600)); at += 97 {
		var b [1]byte
		must(t, second(f.ReadAt(b[:], at)))
		must(t, second(f.WriteAt([]byte{b[0] ^ 0x10}, at)))
		if _, ok := x.Load(ref); ok {
			t.Errorf("byte %d is damaged", at)
		}
		must(t, second(f.WriteAt(b[:], at)))
	}
	fsys.FailCall(0, syscall.EIO)
	if _, ok := x.Load(ref); ok {
		t.Error("a file that cannot be read has the leaf")
	}
	if _, ok := x.Load(ref); !ok {
		t.Error("the leaf is lost")
	}
	fsys.FailCall(0, syscall.ENOSPC)
	if err := x.Store(ref, leaf); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("Store: %v", err)
	}
}
