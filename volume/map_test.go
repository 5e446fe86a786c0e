package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A chart is what the map of a volume should be: of each page, what was done to it.
type chart struct {
	t     tester
	w     *world
	v     *Volume
	size  int64
	next  int                   // content that no page has had
	now   []int                 // content of each page; 0: zeros
	root  []int                 // what the root has
	dirty []cache.PageState     // since the last snapshot
	owner []manifest.SnapshotID // of each block of the root
}

func newChart(t tester, w *world, size int64) *chart {
	return (&chart{t: t, w: w, v: w.openNew(nil, size)}).grown(size)
}

func (c *chart) grown(size int64) *chart {
	more := func(s []int, n int64) []int { return append(s, make([]int, n-int64(len(s)))...) }
	c.size = size
	c.now, c.root = more(c.now, pagesOf(size)), more(c.root, pagesOf(size))
	c.dirty = append(c.dirty, make([]cache.PageState, len(c.now)-len(c.dirty))...)
	blocks := (size + blockSize - 1) / blockSize
	c.owner = append(c.owner, make([]manifest.SnapshotID, blocks-int64(len(c.owner)))...)
	return c
}

// touch writes pages, or discards them.
func (c *chart) touch(page, n int64, state cache.PageState) {
	n = min(n, int64(len(c.now))-page)
	off := page * pageSize
	length := min(n*pageSize, c.size-off)
	if state == cache.Zero {
		c.w.must(c.v.Zero(c.w.ctx, off, length))
	} else {
		c.w.write(c.v, noise(int(length), uint64(c.next+1)), off)
	}
	for i := page; i < page+n; i++ {
		c.dirty[i], c.now[i] = state, 0
		if state == cache.Data {
			c.next++
			c.now[i] = c.next
		}
	}
}

// committed is called when a snapshot was made of what content, of pages that were
// dirty then.
func (c *chart) committed(id manifest.SnapshotID, content []int) {
	for block := range c.owner {
		first := block * blockSize / pageSize
		last := min(first+blockSize/pageSize, len(content))
		if first >= last {
			continue
		}
		changed, data := false, false
		for i := first; i < last; i++ {
			changed = changed || content[i] != c.root[i]
			data = data || content[i] != 0
		}
		switch {
		case changed && data:
			c.owner[block] = id
		case changed:
			c.owner[block] = manifest.SnapshotID{}
		}
	}
	copy(c.root, content)
}

func (c *chart) snapshot() {
	id := c.w.snapshot(c.v)
	c.committed(id, append([]int(nil), c.now...))
	clear(c.dirty)
}

func ofAny(manifest.SnapshotID, manifest.Geometry) error { return nil }

// check compares the map, page by page, with what it should be, and as such: that it
// covers every byte once and has nothing in two that would fit in one.
func (c *chart) check(what string) {
	c.t.Helper()
	c.w.eventually("what was fetched is kept", func() bool { return c.v.DemandInFlight() == 0 })
	at := int64(0)
	var last Extent
	err := c.v.Map(c.w.ctx, func(root manifest.SnapshotID, g manifest.Geometry) error {
		if now := c.v.Record().Root; g != (manifest.Geometry{Size: c.size, BlockSize: blockSize}) || now == nil != root.IsZero() || now != nil && *now != root {
			return fmt.Errorf("it is of %v and root %v, which is %v", g, root, now)
		}
		return nil
	}, func(e Extent) error {
		if e.Offset != at || e.Length <= 0 {
			return fmt.Errorf("extent %+v after byte %d", e, at)
		}
		if at > 0 && last.Owner == e.Owner && last.Cached == e.Cached && last.Dirty == e.Dirty {
			return fmt.Errorf("extents %+v and %+v are one", last, e)
		}
		at, last = e.Offset+e.Length, e
		for off := e.Offset; off < at; off = off/pageSize*pageSize + pageSize {
			page, block := off/pageSize, off/blockSize
			want := Extent{Offset: e.Offset, Length: e.Length, Owner: c.owner[block], Dirty: c.dirty[page]}
			if !want.Owner.IsZero() {
				layer, _ := c.v.place(block)
				var err error
				if want.Cached, err = layer.Has(block); err != nil {
					return err
				}
			}
			if e != want {
				return fmt.Errorf("page %d of block %d: %+v, want %+v", page, block, e, want)
			}
		}
		return nil
	})
	if err == nil && at != c.size {
		err = fmt.Errorf("it ends at %d of %d", at, c.size)
	}
	if err != nil {
		c.t.Fatalf("%s: %v", what, err)
	}
}

// Whatever is done to a volume, its map says of every page which snapshot uploaded it,
// whether it is cached, and what was done since the last snapshot.
func TestMapIsTheTruth(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t, rapid.Uint64().Draw(t, "seed"))
		// Of three leaves and a few blocks, the last neither a whole block nor page.
		c := newChart(t, w, 3*manifest.LeafBlocks*blockSize+5*blockSize+3*manifest.SectorSize)
		c.check("blank")
		edges := []int64{0, 7, manifest.LeafBlocks - 2, 2*manifest.LeafBlocks - 1, 3*manifest.LeafBlocks + 2}
		for range rapid.IntRange(1, 14).Draw(t, "steps") {
			block := rapid.SampledFrom(edges).Draw(t, "near") + rapid.Int64Range(0, 3).Draw(t, "block")
			page := block*blockSize/pageSize + rapid.Int64Range(0, blockSize/pageSize-1).Draw(t, "page")
			page = min(page, int64(len(c.now))-1)
			pages := rapid.SampledFrom([]int64{1, 3, 16, 40}).Draw(t, "pages")
			what := rapid.SampledFrom([]string{"write", "write", "discard", "snapshot", "snapshot", "fetch", "evict", "reopen", "restore", "resize"}).Draw(t, "what")
			switch what {
			case "write":
				c.touch(page, pages, cache.Data)
			case "discard":
				c.touch(page, pages, cache.Zero)
			case "snapshot":
				c.snapshot()
			case "fetch":
				_, err := c.v.ReadAt(w.ctx, make([]byte, pageSize), page*pageSize)
				if page*pageSize+pageSize <= c.size {
					w.must(err)
				}
			case "evict":
				block = min(block, int64(len(c.owner))-1)
				if layer, size := c.v.place(block); block*blockSize < size {
					w.must(layer.Evict(block))
				}
			case "reopen":
				w.must(c.v.Close())
				c.v = w.open(manifest.VolumeID(c.v.name))
			case "restore": // as a new volume, whose base is the snapshot
				c.snapshot()
				id := *c.v.Record().Root
				w.must(c.v.Close())
				c.v = w.openNew(&id, c.size)
			case "resize":
				size := c.size + rapid.SampledFrom([]int64{manifest.SectorSize, 2 * blockSize}).Draw(t, "more")
				w.must(c.v.Resize(size))
				c.grown(size)
			}
			c.check(what)
		}
		w.must(c.v.Close())
		w.end()
	})
}

// What a snapshot is being made of is dirty until that is committed, as is what was
// written since.
func TestMapDuringASnapshotIsOfBothWriteLayers(t *testing.T) {
	w := newRealWorld(t)
	c := newChart(t, w, 8*blockSize)
	c.touch(0, 40, cache.Data)
	c.snapshot()
	c.touch(3, 20, cache.Data)
	sealed := append([]int(nil), c.now...)
	outcome, err := c.v.Snapshot(w.ctx, SnapshotOptions{Cut: func(*snapshot.Attempt) {
		c.touch(10, 4, cache.Zero)
		c.touch(100, 2, cache.Data)
		c.check("while it is made")
	}})
	w.must(err)
	c.committed(outcome.Snapshot, sealed)
	for i := range c.dirty {
		if c.now[i] == sealed[i] {
			c.dirty[i] = cache.Absent
		}
	}
	c.check("afterwards")
	w.must(c.v.Close())
}

// A map is of one root, or an error.
func TestMapEndsWhenTheRootMoves(t *testing.T) {
	w := newRealWorld(t)
	c := newChart(t, w, 3*manifest.LeafBlocks*blockSize)
	c.touch(0, 1, cache.Data)
	c.snapshot()
	c.touch(1, 1, cache.Data)
	extents := 0
	err := c.v.Map(w.ctx, ofAny, func(Extent) error {
		if extents++; extents == 1 {
			c.snapshot()
		}
		return nil
	})
	if !errors.Is(err, ErrRootMoved) {
		t.Fatalf("after %d extents: %v, want %v", extents, err, ErrRootMoved)
	}
	c.check("afterwards")
	w.must(c.v.Close())
}

// Who is asked for a map hears of what its caller wants, and of leaves that cannot be
// read.
func TestMapFailsWithItsCallerAndItsLeaves(t *testing.T) {
	w := newRealWorld(t)
	v, _ := newRestored(w, 3)
	defer func() { w.must(v.Close()) }()
	if err := v.Map(w.ctx, ofAny, func(Extent) error { return errInjected }); !errors.Is(err, errInjected) {
		t.Errorf("a caller that fails: %v", err)
	}
	ctx, cancel := context.WithCancelCause(w.ctx)
	cancel(errInjected)
	if err := v.Map(ctx, ofAny, func(Extent) error { return nil }); !errors.Is(err, errInjected) {
		t.Errorf("a context that has ended: %v", err)
	}

	fresh := newRealWorld(t)
	other, _ := newRestored(fresh, 3)
	root := *other.Record().Root
	fresh.must(other.Close())
	img, err := fresh.host.Store.Open(fresh.ctx, root, snapshot.Holder{})
	fresh.must(err)
	fresh.must(fresh.mem.Delete(fresh.ctx, manifest.LeavesKey(root, 0)))
	err = fresh.host.MapSnapshot(fresh.ctx, img, func(Extent) error { return nil })
	if err == nil {
		t.Error("a map without its leaf")
	}
}

// A snapshot's map shows what this host's base has, and leaves no base where there is
// none.
func TestMapOfASnapshotShowsTheBase(t *testing.T) {
	for name, newWorld := range map[string]func(testing.TB) *world{"plain": newRealWorld, "encrypted": newEncryptedRealWorld} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			c := newChart(t, w, 20*blockSize)
			c.touch(0, 5*blockSize/pageSize, cache.Data)
			c.snapshot()
			first := *c.v.Record().Root
			c.touch(2*blockSize/pageSize, 1, cache.Data)
			c.snapshot()
			id := *c.v.Record().Root
			w.must(c.v.Close())

			drawn := func() (got []Extent) {
				t.Helper()
				img, err := w.host.Store.Open(w.ctx, id, snapshot.Holder{})
				w.must(err)
				w.must(w.host.MapSnapshot(w.ctx, img, func(e Extent) error {
					got = append(got, e)
					return nil
				}))
				return got
			}
			want := []Extent{
				{Offset: 0, Length: 2 * blockSize, Owner: first},
				{Offset: 2 * blockSize, Length: blockSize, Owner: id},
				{Offset: 3 * blockSize, Length: 2 * blockSize, Owner: first},
				{Offset: 5 * blockSize, Length: 15 * blockSize},
			}
			if diff := cmp.Diff(want, drawn()); diff != "" {
				t.Errorf("without a base (-want +got):\n%s", diff)
			}
			storeID, err := w.host.Store.ID(w.ctx)
			w.must(err)
			if _, err := w.host.FS.ReadDir(w.host.baseDir(storeID, id)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the map made a base: %v", err)
			}

			w.end() // another process, that has no leaf in memory
			w.start()
			d, closeIt := w.mount(id)
			_, err = d.ReadAt(w.ctx, make([]byte, blockSize), blockSize+pageSize) // of blocks 1 and 2
			w.must(err)
			want = []Extent{
				{Offset: 0, Length: blockSize, Owner: first},
				{Offset: blockSize, Length: blockSize, Owner: first, Cached: true},
				{Offset: 2 * blockSize, Length: blockSize, Owner: id, Cached: true},
				{Offset: 3 * blockSize, Length: 2 * blockSize, Owner: first},
				{Offset: 5 * blockSize, Length: 15 * blockSize},
			}
			// What was read is kept after its reader has it.
			w.eventually("both blocks are cached", func() bool { return d.Stats().HydratedBytes == 2*blockSize })
			if diff := cmp.Diff(want, drawn()); diff != "" {
				t.Errorf("while it is mounted (-want +got):\n%s", diff)
			}
			closeIt()
			w.store.Reset()
			if diff := cmp.Diff(want, drawn()); diff != "" {
				t.Errorf("afterwards (-want +got):\n%s", diff)
			}
			for _, call := range w.store.Calls() {
				if call.Keys[0] == manifest.LeavesKey(id, 0) {
					t.Errorf("a leaf that the base has was read from the store: %v", call)
				}
			}
		})
	}
}

// The leaves of a large device are read a few at a time, and come in order.
func TestLeavesAheadAreInOrderAndFew(t *testing.T) {
	refs := make([]manifest.LeafRef, 3*mapLeaves)
	for i := range refs {
		refs[i].Leaf = int64(i)
	}
	began := make([]chan struct{}, len(refs))
	for i := range began {
		began[i] = make(chan struct{})
	}
	var next atomic.Int64
	for i, r := range leavesAhead(t.Context(), refs, func(_ context.Context, ref manifest.LeafRef) (*manifest.Leaf, error) {
		if ahead := ref.Leaf - next.Load(); ahead >= mapLeaves {
			return nil, fmt.Errorf("leaf %d is read %d ahead", ref.Leaf, ahead)
		}
		close(began[ref.Leaf])
		if ref.Leaf%2 == 0 { // not before the one after it
			<-began[ref.Leaf+1]
		}
		return manifest.NewLeaf(int(ref.Leaf) + 1), nil
	}) {
		if int64(i) != next.Load() || r.err != nil || r.leaf.Len() != i+1 {
			t.Fatalf("leaf %d as the %dth: %v", i, next.Load(), r.err)
		}
		next.Add(1)
	}
	if next.Load() != int64(len(refs)) {
		t.Errorf("%d leaves of %d", next.Load(), len(refs))
	}
}
