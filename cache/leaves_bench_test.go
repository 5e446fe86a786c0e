package cache

import (
	"context"
	"errors"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
)

// BenchmarkLeafLookup finds leaves in memory: what every read of a block that
// is missing begins with.
func BenchmarkLeafLookup(b *testing.B) {
	const leaves = 64
	cache := newLeaves(b, 32<<20)
	hashes := make([]manifest.Hash, leaves)
	for i := range hashes {
		leaf, hash := testLeaf(uint64(i), manifest.LeafBlocks)
		hashes[i] = hash
		_, err := cache.Get(b.Context(), hash, func(context.Context) (*manifest.Leaf, error) { return leaf, nil })
		must(b, err)
	}
	cache.memory.Wait()
	load := func(context.Context) (*manifest.Leaf, error) { return nil, errors.New("not in memory") }
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for i := 0; pb.Next(); i++ {
			if _, err := cache.Get(b.Context(), hashes[i%leaves], load); err != nil {
				b.Error(err)
				return
			}
		}
	})
}

// BenchmarkStateInParallel is BenchmarkState with a reader a core: what a
// lock on the warm path would show in.
func BenchmarkStateInParallel(b *testing.B) {
	const pages = 64 << 30 / page
	m := newPageMap(pages * page)
	for i := range int64(100_000) {
		m.set(i*7919%pages, 3, Data)
	}
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for i := int64(0); pb.Next(); i++ {
			m.state(i * 104_729 % pages)
		}
	})
}
