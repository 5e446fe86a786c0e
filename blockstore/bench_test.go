package blockstore_test

import (
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

func BenchmarkDecompress(b *testing.B) {
	for name, seed := range map[string]uint64{"compressible": 1, "incompressible": 0} {
		b.Run(name, func(b *testing.B) {
			var c blockstore.Compressor
			block := testBlock(seed)
			stored, raw := c.Compress(make([]byte, len(block)), block)
			dst := make([]byte, len(block)) // raw, stored is the block itself
			b.SetBytes(int64(len(block)))
			b.ReportAllocs()
			for b.Loop() {
				if err := blockstore.Decompress(dst, stored, raw); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkPackBuilder makes whole packs: what an upload does besides hashing
// and compressing.
func BenchmarkPackBuilder(b *testing.B) {
	owner := manifest.SnapshotID{Lineage: 1, Serial: 1}
	stored := testBlock(0)
	hash := manifest.Sum(stored)
	b.ReportAllocs()
	for b.Loop() {
		p := blockstore.NewPackBuilder(owner, 0, len(stored), nil)
		for block := int64(0); !p.Full(); block++ {
			p.Add(block, hash, stored, true)
		}
		object, _ := p.Finish()
		b.SetBytes(int64(len(object)))
	}
}
