package cache

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

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

func second[T any](_ T, err error) error { return err }
