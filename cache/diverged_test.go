package cache

import (
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestDivergedIsADurableSet(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		blocks := rapid.Int64Range(1, 300).Draw(rt, "blocks")
		fsys := vfs.NewCrash(rapid.Uint64().Draw(rt, "seed"))
		want := make([]bool, blocks)
		d, err := LoadDiverged(fsys, "diverged", blocks)
		must(t, err)
		for range rapid.IntRange(1, 8).Draw(rt, "steps") {
			add := rapid.SliceOfN(rapid.Int64Range(0, blocks-1), 0, 20).Draw(rt, "add")
			must(t, d.Add(slices.Values(add)))
			for _, b := range add {
				want[b] = true
			}
			if rapid.Bool().Draw(rt, "power cut") {
				fsys.PowerCut()
				d, err = LoadDiverged(fsys, "diverged", blocks)
				must(t, err)
			}
			for b := range blocks {
				if d.Has(b) != want[b] {
					rt.Fatalf("block %d: %v", b, d.Has(b))
				}
			}
		}
	})
}

func TestFailedAddShowsNothing(t *testing.T) {
	for n := 0; ; n++ {
		fsys := vfs.NewCrash(uint64(n))
		d, err := LoadDiverged(fsys, "diverged", 100)
		must(t, err)
		must(t, d.Add(slices.Values([]int64{1})))
		fsys.FailCall(n, syscall.ENOSPC)
		err = d.Add(slices.Values([]int64{2, 3}))
		if !fsys.Faulted() {
			must(t, err)
			break
		}
		if !errors.Is(err, syscall.ENOSPC) || d.Has(2) || d.Has(3) || !d.Has(1) {
			t.Errorf("call %d: %v, %v %v %v", n, err, d.Has(1), d.Has(2), d.Has(3))
		}
		fsys.PowerCut()
		d, err = LoadDiverged(fsys, "diverged", 100)
		must(t, err)
		if !d.Has(1) || d.Has(2) != d.Has(3) {
			t.Errorf("call %d, loaded: %v %v %v", n, d.Has(1), d.Has(2), d.Has(3))
		}
		must(t, d.Add(slices.Values([]int64{4})))
	}
	d, err := LoadDiverged(vfs.NewCrash(0), "diverged", 100)
	must(t, err)
	for _, b := range []int64{-1, 100} {
		if err := d.Add(slices.Values([]int64{1, b})); err == nil || d.Has(1) {
			t.Errorf("block %d: %v", b, err)
		}
	}
}

func TestDamagedDivergedSetIsAnError(t *testing.T) {
	fsys := vfs.NewCrash(0)
	d, err := LoadDiverged(fsys, "diverged", 200)
	must(t, err)
	must(t, d.Add(slices.Values([]int64{1, 199})))
	data, err := vfs.ReadFile(fsys, "diverged", 1000)
	must(t, err)
	load := func(data []byte) error {
		must(t, vfs.WriteFileAtomic(fsys, "diverged", data))
		return second(LoadDiverged(fsys, "diverged", 200))
	}
	for i := range data {
		damaged := slices.Clone(data)
		damaged[i] ^= 1
		if err := load(damaged); !errors.Is(err, manifest.ErrCorrupt) && !errors.Is(err, manifest.ErrVersion) {
			t.Errorf("byte %d: %v", i, err)
		}
		if err := load(data[:i]); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("first %d bytes: %v", i, err)
		}
	}
	if err := load(append(slices.Clone(data), 0)); err == nil {
		t.Error("a byte too many is accepted")
	}
	must(t, load(data))
	if _, err := LoadDiverged(fsys, "diverged", 199); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("other device: %v", err)
	}
	fsys.FailCall(0, syscall.EIO)
	if _, err := LoadDiverged(fsys, "diverged", 200); !errors.Is(err, syscall.EIO) {
		t.Errorf("unreadable: %v", err)
	}
}

func FuzzDivergedDecoder(f *testing.F) {
	d := &Diverged{blocks: 130}
	f.Add(d.encode([]uint64{1, 2, 3}))
	f.Fuzz(func(t *testing.T, data []byte) {
		mended := data
		if n := len(data) - manifest.ChecksumLen; n >= 0 {
			mended = divergedFormat().AppendChecksum(slices.Clone(data[:n]))
		}
		for _, data := range [][]byte{data, mended} {
			set, err := decodeDiverged(data, 130)
			if err != nil {
				if !errors.Is(err, manifest.ErrCorrupt) && !errors.Is(err, manifest.ErrVersion) {
					t.Fatal(err)
				}
				continue
			}
			if !slices.Equal(d.encode(set), data) {
				t.Fatal("encodes to something else")
			}
		}
	})
}

func TestHasNeedsNoLock(t *testing.T) {
	d, err := LoadDiverged(vfs.NewCrash(0), "diverged", 1000)
	must(t, err)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for range 200 {
				// All of an Add or nothing: blocks are added in pairs.
				b := rand.Int64N(500) * 2
				if first := d.Has(b); first && !d.Has(b+1) {
					t.Errorf("block %d without its twin", b)
				}
			}
		})
	}
	for i := range int64(50) {
		must(t, d.Add(slices.Values([]int64{i * 20, i*20 + 1})))
	}
	wg.Wait()
}
