package manifest_test

import (
	"encoding/binary"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
)

// fullRoot is the root of 16 TiB every leaf of which has data.
func fullRoot() *manifest.Root {
	g := manifest.Geometry{Size: 16 << 40, BlockSize: manifest.DefaultBlockSize}
	root := &manifest.Root{Snapshot: manifest.SnapshotID{Lineage: 1, Serial: 1}, Geometry: g, DataBlocks: g.Blocks()}
	for leaf := range g.Leaves() {
		ref := manifest.LeafRef{Leaf: leaf, Owner: 1, Offset: leaf / 256 * manifest.LeavesPartSize}
		binary.LittleEndian.PutUint64(ref.Hash[:], uint64(leaf))
		root.Leaves = append(root.Leaves, ref)
	}
	return root
}

func BenchmarkLeafEncode(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		leaf := manifest.NewLeaf(manifest.LeafBlocks)
		for i := range leaf.Len() {
			leaf.Set(i, testRef())
		}
		b.SetBytes(int64(len(leaf.Encode())))
	}
}

func BenchmarkLeafRef(b *testing.B) {
	leaf := manifest.NewLeaf(manifest.LeafBlocks)
	for i := range leaf.Len() {
		leaf.Set(i, testRef())
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if leaf.Ref(i % manifest.LeafBlocks).IsHole() {
			b.Fatal("a hole")
		}
	}
}

// BenchmarkRootOf16TiB is what mounting the largest of volumes does.
func BenchmarkRootOf16TiB(b *testing.B) {
	root := fullRoot()
	encoded := root.Encode()
	b.Run("Encode", func(b *testing.B) {
		b.SetBytes(int64(len(encoded)))
		for b.Loop() {
			root.Encode()
		}
	})
	b.Run("Hash", func(b *testing.B) {
		b.SetBytes(int64(len(encoded)))
		for b.Loop() {
			manifest.Sum(encoded)
		}
	})
	b.Run("Decode", func(b *testing.B) {
		b.SetBytes(int64(len(encoded)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := manifest.DecodeRoot(encoded); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("Find", func(b *testing.B) {
		b.ReportAllocs()
		leaves := root.Geometry.Leaves()
		for i := int64(0); b.Loop(); i++ {
			if _, ok := root.Find(i * 7919 % leaves); !ok {
				b.Fatal("a hole")
			}
		}
	})
}
