package snapshot_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// sink is a store that forgets packs, so that a benchmark measures the upload.
type sink struct{ blockstore.Store }

func (s sink) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	if strings.HasPrefix(key, "data/") {
		return "etag", ctx.Err()
	}
	return s.Store.Put(ctx, key, data, c)
}

// contents are blocks of the two kinds there are: noise, and what lz4 makes
// half as long.
func contents() map[string][]byte {
	const size = 64 * manifest.DefaultBlockSize
	noise := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(noise)
	half := make([]byte, size)
	copy(half, noise)
	for off := 0; off < size; off += 128 {
		copy(half[off+64:off+128], "all work and no play makes a dull block, and lz4 a short one....")
	}
	return map[string][]byte{"noise": noise, "half": half}
}

func BenchmarkUpload(b *testing.B) {
	const blocks = 512 // of the default size: 256 MiB
	for name, content := range contents() {
		b.Run(name, func(b *testing.B) {
			store, err := snapshot.Init(b.Context(), sink{blockstore.NewMem()})
			if err != nil {
				b.Fatal(err)
			}
			lineage, err := store.CreateLineage(b.Context(), manifest.DefaultBlockSize, "")
			if err != nil {
				b.Fatal(err)
			}
			src := snapshot.Source{
				Extents: func(yield func(snapshot.Extent, error) bool) { yield(snapshot.Extent{Count: blocks}, nil) },
				Read: func(_ context.Context, block int64, p []byte) error {
					copy(p, content[int(block)*len(p)%len(content):])
					return nil
				},
			}
			b.SetBytes(blocks * manifest.DefaultBlockSize)
			b.ReportAllocs()
			for b.Loop() {
				plan := snapshot.NewPlan(lineage.ID)
				plan.Geometry = manifest.Geometry{Size: blocks * manifest.DefaultBlockSize, BlockSize: manifest.DefaultBlockSize}
				if _, err := store.Create(b.Context(), plan, src, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkStages is what one core does of each stage of an upload, and all
// cores of both: what BenchmarkUpload cannot exceed.
func BenchmarkStages(b *testing.B) {
	for name, content := range contents() {
		hash := func(block []byte) { _ = sha256.Sum256(block) }
		compress := func() func(block []byte) {
			var c blockstore.Compressor
			dst := make([]byte, 0, manifest.DefaultBlockSize)
			return func(block []byte) { c.Compress(dst, block) }
		}
		each := func(stages ...func([]byte)) {
			for off := 0; off < len(content); off += manifest.DefaultBlockSize {
				for _, stage := range stages {
					stage(content[off:][:manifest.DefaultBlockSize])
				}
			}
		}
		b.Run(name+"/sha256", func(b *testing.B) {
			b.SetBytes(int64(len(content)))
			for b.Loop() {
				each(hash)
			}
		})
		b.Run(name+"/lz4", func(b *testing.B) {
			b.SetBytes(int64(len(content)))
			stage := compress()
			for b.Loop() {
				each(stage)
			}
		})
		b.Run(fmt.Sprintf("%s/both on %d cores", name, runtime.GOMAXPROCS(0)), func(b *testing.B) {
			b.SetBytes(int64(len(content) * runtime.GOMAXPROCS(0)))
			for b.Loop() {
				var wg sync.WaitGroup
				for range runtime.GOMAXPROCS(0) {
					wg.Go(func() { each(hash, compress()) })
				}
				wg.Wait()
			}
		})
	}
}
