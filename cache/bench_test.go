package cache

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

func BenchmarkState(b *testing.B) {
	const pages = 64 << 30 / page
	m := newPageMap(pages * page)
	for i := range int64(100_000) {
		m.set(i*7919%pages, 3, Data)
	}
	at := make([]int64, 4096)
	for i := range at {
		at[i] = rand.Int64N(pages)
	}
	b.Run("State", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			m.state(at[i%len(at)])
		}
	})
	b.Run("RunOf1MiB", func(b *testing.B) {
		for i := 0; b.Loop(); i++ {
			m.run(at[i%len(at)], 256)
		}
	})
	b.Run("NextBlock", func(b *testing.B) {
		w := new(WriteLayer)
		w.pages.Store(m)
		for i := 0; b.Loop(); i++ {
			w.NextBlock(at[i%len(at)]*page/manifest.DefaultBlockSize, manifest.DefaultBlockSize)
		}
	})
}

func BenchmarkCleanRead(b *testing.B) {
	g := manifest.Geometry{Size: 64 * mib, BlockSize: manifest.DefaultBlockSize}
	c := openClean(b, vfs.OS(), b.TempDir(), g, nil)
	block := blockContent(0, g.BlockSize)
	for i := range g.Blocks() {
		must(b, c.WriteBlock(i, block))
	}
	for _, n := range []int64{512, page, 64 << 10, mib} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.SetBytes(n)
			b.ReportAllocs()
			p := make([]byte, n)
			for i := int64(0); b.Loop(); i++ {
				if hit, err := c.ReadAt(p, i*n%g.Size); !hit || err != nil {
					b.Fatal(hit, err)
				}
			}
		})
	}
	b.Run("plain/4096", func(b *testing.B) { // what the checksums cost
		b.SetBytes(page)
		p := make([]byte, page)
		for i := int64(0); b.Loop(); i++ {
			if _, err := c.data.ReadAt(p, i*page%g.Size); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkCleanWriteBlock(b *testing.B) {
	g := manifest.Geometry{Size: 64 * mib, BlockSize: manifest.DefaultBlockSize}
	c := openClean(b, vfs.OS(), b.TempDir(), g, nil)
	block := blockContent(0, g.BlockSize)
	b.SetBytes(int64(len(block)))
	for i := int64(0); b.Loop(); i++ {
		must(b, c.WriteBlock(i%g.Blocks(), block))
	}
}

func BenchmarkWrite(b *testing.B) {
	const size = 1 << 30
	p := fill('a', page)
	run := func(name string, write func(w *WriteLayer, i int64) error) {
		b.Run(name, func(b *testing.B) {
			w := newWriteLayerAt(b, filepath.Join(b.TempDir(), "w"), size, nil)
			b.ReportAllocs()
			for i := int64(0); b.Loop(); i++ {
				must(b, write(w, i))
			}
		})
	}
	run("InPlace", func(w *WriteLayer, i int64) error { return w.WriteAt(p, i%16*page) })
	run("Marked", func(w *WriteLayer, i int64) error {
		at := i % (size / page) * page
		if i >= size/page {
			at = at / 2 // all marked: no more to measure
		}
		return w.WriteAt(p, at/page*page)
	})
	run("InPlaceSynced", func(w *WriteLayer, i int64) error {
		if err := w.WriteAt(p, i%16*page); err != nil {
			return err
		}
		return w.Sync()
	})
	run("MarkedSynced", func(w *WriteLayer, i int64) error {
		if err := w.WriteAt(p, i%(size/page)*page); err != nil {
			return err
		}
		return w.Sync()
	})
}

func BenchmarkDiscardOf16TiB(b *testing.B) {
	w := newWriteLayerAt(b, filepath.Join(b.TempDir(), "w"), 16<<40-mib, nil)
	p := fill('a', page)
	for i := int64(0); b.Loop(); i++ {
		must(b, w.WriteAt(p, i*mib%w.size()))
		must(b, w.Zero(0, w.size()))
	}
}
