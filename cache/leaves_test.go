package cache

import (
	"context"
	"errors"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// testLeaf is a leaf of n blocks that differs by its number.
func testLeaf(number uint64, n int) (*manifest.Leaf, manifest.Hash) {
	l := manifest.NewLeaf(n)
	for i := range min(n, 3) {
		l.Set(i, manifest.Ref{Owner: number + 1, Pack: uint32(i), Length: 100, Hash: manifest.Hash{1}})
	}
	return l, l.Hash()
}

func newLeaves(t testing.TB, maxBytes int64) *Leaves {
	t.Helper()
	l, err := NewLeaves(maxBytes)
	must(t, err)
	t.Cleanup(l.Close)
	return l
}

func TestLeafIsLoadedOnceForAllWhoAsk(t *testing.T) {
	l := newLeaves(t, 1<<20)
	leaf, hash := testLeaf(1, 1024)
	var loads atomic.Int64
	release := make(chan struct{})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			got, err := l.Get(context.Background(), hash, func(context.Context) (*manifest.Leaf, error) {
				loads.Add(1)
				<-release
				return leaf, nil
			})
			if got != leaf || err != nil {
				t.Errorf("%v, %v", got, err)
			}
		})
	}
	close(release)
	wg.Wait()
	if n := loads.Load(); n != 1 {
		t.Errorf("%d loads", n)
	}
}

func TestCancelledReaderFailsNobodyElse(t *testing.T) {
	l := newLeaves(t, 1<<20)
	leaf, hash := testLeaf(1, 1024)
	started, release := make(chan struct{}), make(chan struct{})
	load := func(ctx context.Context) (*manifest.Leaf, error) {
		close(started)
		<-release
		return leaf, ctx.Err()
	}
	first, cancel := context.WithCancel(context.Background())
	firstErr := make(chan error)
	go func() {
		_, err := l.Get(first, hash, load)
		firstErr <- err
	}()
	<-started
	second := make(chan error)
	go func() {
		got, err := l.Get(context.Background(), hash, nil)
		if got != leaf {
			err = errors.Join(err, errors.New("another leaf"))
		}
		second <- err
	}()
	cancel()
	if err := <-firstErr; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled reader: %v", err)
	}
	close(release)
	must(t, <-second)
}

func TestFailedLoadIsTriedAgain(t *testing.T) {
	l := newLeaves(t, 1<<20)
	leaf, hash := testLeaf(1, 1024)
	_, err := l.Get(context.Background(), hash, func(context.Context) (*manifest.Leaf, error) { return nil, syscall.EIO })
	if !errors.Is(err, syscall.EIO) {
		t.Errorf("%v", err)
	}
	got, err := l.Get(context.Background(), hash, func(context.Context) (*manifest.Leaf, error) { return leaf, nil })
	if got != leaf || err != nil {
		t.Errorf("%v, %v", got, err)
	}
}

func TestLeavesWithEqualKeysAreNotConfused(t *testing.T) {
	l := newLeaves(t, 1<<20)
	leaf, hash := testLeaf(1, 1024)
	other, _ := testLeaf(2, 1024)
	twin := hash
	twin[31]++
	for range 3 {
		for h, want := range map[manifest.Hash]*manifest.Leaf{hash: leaf, twin: other} {
			got, err := l.Get(context.Background(), h, func(context.Context) (*manifest.Leaf, error) { return want, nil })
			if got != want || err != nil {
				t.Fatalf("another leaf, %v", err)
			}
		}
	}
}

// Ristretto refuses new entries as long as it thinks better of the old ones. A leaf
// serves a thousand blocks that are often read in a row, so one load must do.
func TestRefusedLeafIsStillThereForItsNextBlocks(t *testing.T) {
	for name, maxBytes := range map[string]int64{"full of popular leaves": 200_000, "too small for any": 1} {
		l := newLeaves(t, maxBytes)
		get := func(number uint64) (loaded bool) {
			leaf, hash := testLeaf(number, 1024)
			_, err := l.Get(context.Background(), hash, func(context.Context) (*manifest.Leaf, error) {
				loaded = true
				return leaf, nil
			})
			must(t, err)
			return loaded
		}
		for range 100 {
			for number := range uint64(3) {
				get(number)
			}
		}
		for number := uint64(10); number < 30; number++ {
			if !get(number) {
				t.Errorf("%s: leaf %d was there before it was loaded", name, number)
			}
			if get(number) {
				t.Errorf("%s: leaf %d was loaded twice", name, number)
			}
		}
	}
}

func TestLeavesStayWithinTheirBound(t *testing.T) {
	const maxBytes = 1 << 20
	l := newLeaves(t, maxBytes)
	for number := range uint64(200) {
		leaf, hash := testLeaf(number, 1024)
		_, err := l.Get(context.Background(), hash, func(context.Context) (*manifest.Leaf, error) { return leaf, nil })
		must(t, err)
		if left := l.memory.RemainingCost(); left < 0 || left > maxBytes {
			t.Fatalf("%d bytes left of %d", left, maxBytes)
		}
	}
	if left := l.memory.RemainingCost(); left > maxBytes/2 {
		t.Errorf("%d bytes unused", left)
	}
}

func TestCloseCancelsLoadsAndWaitsForThem(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, err := NewLeaves(1 << 20)
		must(t, err)
		_, hash := testLeaf(1, 1024)
		var ended atomic.Bool
		waiter := make(chan error, 1)
		go func() {
			_, err := l.Get(context.Background(), hash, func(ctx context.Context) (*manifest.Leaf, error) {
				<-ctx.Done()
				time.Sleep(time.Second) // a request that takes time to give up
				ended.Store(true)
				return nil, ctx.Err()
			})
			waiter <- err
		}()
		synctest.Wait()
		l.Close()
		if !ended.Load() {
			t.Error("Close has not waited")
		}
		if err := <-waiter; !errors.Is(err, context.Canceled) {
			t.Errorf("waiter: %v", err)
		}
		if _, err := l.Get(context.Background(), hash, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("Get after Close: %v", err)
		}
	})
}

func TestNewLeavesRefusesANonsensicalBound(t *testing.T) {
	for _, maxBytes := range []int64{0, -1} {
		if _, err := NewLeaves(maxBytes); err == nil {
			t.Errorf("%d is accepted", maxBytes)
		}
	}
}

func TestIndexFileReturnsOnlyTheLeafThatIsNamed(t *testing.T) {
	g := manifest.Geometry{Size: 2600 * manifest.MinBlockSize, BlockSize: manifest.MinBlockSize} // leaves of 1024, 1024, 552
	path := filepath.Join(t.TempDir(), "index")
	x, err := OpenIndexFile(vfs.OS(), path, g)
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
	x, err = OpenIndexFile(vfs.OS(), path, g)
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
	g := manifest.Geometry{Size: 600 * manifest.MinBlockSize, BlockSize: manifest.MinBlockSize}
	fsys := vfs.NewCrash(1)
	x, err := OpenIndexFile(fsys, "index", g)
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

func second[T any](_ T, err error) error { return err }

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
