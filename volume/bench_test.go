package volume

import (
	"context"
	"fmt"
	"slices"
	"sync"
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

// BenchmarkSeal measures how long writers are stopped when the write layers are
// replaced, by themselves and in the eyes of the writers, which write all the
// time.
func BenchmarkSeal(b *testing.B) {
	v, _ := newWarm(b, 256)
	ctx, stop := context.WithCancel(b.Context())
	var writing sync.WaitGroup
	slowest := make([]time.Duration, 4) // write of each writer
	for i := range slowest {
		writing.Go(func() {
			p := noise(64<<10, uint64(i))
			for n := int64(0); ctx.Err() == nil; n++ {
				begin := time.Now()
				if _, err := v.WriteAt(b.Context(), p, (n*4+int64(i))%256*blockSize); err != nil {
					b.Error(err)
					return
				}
				slowest[i] = max(slowest[i], time.Since(begin))
				time.Sleep(100 * time.Microsecond)
			}
		})
	}
	var longest time.Duration
	for b.Loop() {
		begin := time.Now()
		v.swap(func(now *view) *view { return newView(now.open, now.sealed, now.image) })
		longest = max(longest, time.Since(begin))
		time.Sleep(time.Millisecond)
	}
	stop()
	writing.Wait()
	b.ReportMetric(float64(longest.Microseconds()), "max-swap-µs")
	b.ReportMetric(float64(slices.Max(slowest).Microseconds()), "max-write-µs")
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
