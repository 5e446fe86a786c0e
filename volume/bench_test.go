package volume

import (
	"fmt"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/manifest"
)

// newWarm returns a volume of a snapshot that is all on this host, and the same
// snapshot opened read-only.
func newWarm(tb testing.TB, blocks int) (*Volume, *Device) {
	tb.Helper()
	w := newRealWorld(tb)
	v, _ := newRestored(w, blocks)
	w.must(w.hydrate(v.Device))
	d, closeIt := w.mount(*v.Record().Root)
	tb.Cleanup(func() {
		closeIt()
		w.must(v.Close())
	})
	return v, d
}

func BenchmarkWarmRead(b *testing.B) {
	v, d := newWarm(b, 256)
	for name, device := range map[string]*Device{"snapshot": d, "volume": v.Device} {
		for _, n := range []int{pageSize, 128 << 10} {
			b.Run(fmt.Sprintf("%s/%d", name, n), func(b *testing.B) {
				p := make([]byte, n)
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for i := range b.N {
					if _, err := device.ReadAt(b.Context(), p, int64(i)*int64(n)%d.Size()); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkWrite(b *testing.B) {
	v, _ := newWarm(b, 256)
	for _, n := range []int{512, pageSize, 128 << 10} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			p := noise(n, 1)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for i := range b.N {
				if _, err := v.WriteAt(b.Context(), p, int64(i)*int64(n)%v.Size()); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkSnapshot changes a page of some blocks, and snapshots.
func BenchmarkSnapshot(b *testing.B) {
	v, _ := newWarm(b, 256)
	for i := range b.N {
		for block := range int64(16) {
			if _, err := v.WriteAt(b.Context(), noise(pageSize, uint64(i)), block*blockSize); err != nil {
				b.Fatal(err)
			}
		}
		if _, err := v.Snapshot(b.Context(), SnapshotOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkSeal measures how long writers are stopped: from one write of a page
// to the next one's end, while nothing else happens but cuts.
func BenchmarkSeal(b *testing.B) {
	v, _ := newWarm(b, 4)
	var slowest time.Duration
	for range b.N {
		if err := v.seal(); err != nil {
			b.Fatal(err)
		}
		begin := time.Now()
		<-v.swap(func(now *view) *view { return newView(now.open, now.sealed, now.image) })
		slowest = max(slowest, time.Since(begin))
		if err := v.mergeBack(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(slowest.Nanoseconds()), "max-ns")
}

func BenchmarkColdRead(b *testing.B) {
	w := newRealWorld(b)
	v, _ := newRestored(w, 64)
	p := make([]byte, pageSize)
	b.SetBytes(manifest.MinBlockSize)
	for i := range b.N {
		block := int64(i) % 64
		if err := v.base.Evict(block); err != nil {
			b.Fatal(err)
		}
		if _, err := v.ReadAt(b.Context(), p, block*blockSize); err != nil {
			b.Fatal(err)
		}
	}
	w.must(v.Close())
}
