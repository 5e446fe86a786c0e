package snapshot_test

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// devices are devices of all shapes, with some blocks of data each.
func devices() map[string]*device {
	all := make(map[string]*device)
	for _, size := range []int64{0, 512, 4096, testBlock - 512, testBlock, testBlock + 512, 10*testBlock + 4096, leafBytes, leafBytes + 512, 3*leafBytes - 512} {
		d := newDevice(size)
		all[fmt.Sprintf("%d bytes of zeros", size)] = d
		if blocks := d.geometry.Blocks(); blocks > 0 {
			some := slices.Compact([]int64{0, blocks / 2, blocks - 1})
			all[fmt.Sprintf("%d bytes", size)] = d.random(uint64(size), some...)
			all[fmt.Sprintf("%d bytes that compress", size)] = d.tiny(1, some...)
		}
	}
	for _, size := range []int64{16<<40 - 4096, 1 << 60, manifest.MaxDeviceSize} {
		d := newDevice(size)
		last := d.geometry.Blocks() - 1
		all[fmt.Sprintf("huge, %d bytes", size)] = d.random(3, 0, 1, last/3, last/2, last/2+1, last-1, last)
	}
	return all
}

func TestImageEqualsItsSource(t *testing.T) { plainAndSealed(t, testImageEqualsItsSource) }

func testImageEqualsItsSource(t *testing.T, newWorld func(testing.TB) *world) {
	t.Parallel()
	for name, d := range devices() {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			for _, src := range []snapshot.Source{d.since(nil), d.whole()} {
				outcome, err := w.store.Create(w.ctx, w.plan(nil, d), src, nil)
				if err != nil {
					t.Fatal(err)
				}
				img := w.open(outcome.Snapshot)
				w.mustHold(img, d)
				if r := w.mustVerify(img.ID()); r.Blocks != int64(len(d.blocks)) {
					t.Errorf("verified %d blocks instead of %d", r.Blocks, len(d.blocks))
				}
				if outcome.UploadedBlocks != int64(len(d.blocks)) || outcome.DataBlocks != outcome.UploadedBlocks {
					t.Errorf("outcome has %d blocks uploaded and %d of data instead of %d", outcome.UploadedBlocks, outcome.DataBlocks, len(d.blocks))
				}
			}
		})
	}
}

// More than one pack, and both kinds of blocks.
func TestImageOfSeveralPacks(t *testing.T) { plainAndSealed(t, testImageOfSeveralPacks) }

func testImageOfSeveralPacks(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	d := newDevice(1000*testBlock).random(1, span(0, 260)...).tiny(2, span(300, 340)...)
	img := w.create(nil, nil, d)
	if img.Outcome.Packs != 2 {
		t.Errorf("%d packs", img.Outcome.Packs)
	}
	w.mustHold(img, d)
}

func TestImageEqualsItsSourceInADirectory(t *testing.T) {
	w := newWorldIn(t, blockstore.NewDir(t.TempDir()))
	first := newDevice(40*testBlock+512).random(1, span(0, 40)...)
	second := first.random(2, 3, 4, 40).punched(7)
	one := w.create(nil, nil, first)
	two := w.create(one, first, second)
	w.mustHold(one, first)
	w.delete(one.ID())
	if r := w.reclaim(); r.Rewritten != 1 || r.Bytes == 0 {
		t.Errorf("reclaim did %+v, not a rewrite", r)
	}
	w.mustHold(two, second)
	w.mustVerify(two.ID())
	w.delete(two.ID())
	w.reclaim()
	if left := w.objects("data/"); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// A write of something to a place that is what it was before is no change,
// whatever the source says.
func TestUploadStoresOnlyBlocksThatDifferByHash(t *testing.T) {
	plainAndSealed(t, testUploadStoresOnlyBlocksThatDifferByHash)
}

func testUploadStoresOnlyBlocksThatDifferByHash(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	base := newDevice(3*leafBytes-512).random(1, span(0, 20)...).random(2, span(2000, 2010)...)
	parent := w.create(nil, nil, base)
	cases := []struct {
		name     string
		d        *device
		from     snapshot.Source
		uploaded int64
		packs    int64
	}{
		{"nothing", base, base.source(), 0, 0},
		{"all blocks, unchanged", base, base.source(span(0, base.geometry.Blocks())...), 0, 0},
		{"unchanged, as an image file", base, base.whole(), 0, 0},
		{"one block", base.random(3, 5), base.random(3, 5).whole(), 1, 1},
		{"one block among many said to differ", base.random(3, 5), base.random(3, 5).source(span(0, 30)...), 1, 1},
		{"a block where a hole was", base.random(3, 1500), base.random(3, 1500).since(base), 1, 1},
		{"a hole", base.punched(3), base.punched(3).since(base), 0, 0},
		{"a leaf of holes", base.punched(span(2000, 2010)...), base.punched(span(2000, 2010)...).whole(), 0, 0},
		{"nothing but holes", base.punched(slices.Collect(maps.Keys(base.blocks))...), base.punched(slices.Collect(maps.Keys(base.blocks))...).whole(), 0, 0},
		{"holes that must be read to be seen", base.punched(1, 2), base.punched(1, 2).source(0, 1, 2), 0, 0},
		{"the last block", base.random(4, base.geometry.Blocks()-1), base.random(4, base.geometry.Blocks()-1).since(base), 1, 1},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			w := w.in(t)
			before := w.stored()
			outcome, err := w.store.Create(w.ctx, w.plan(parent, c.d), c.from, nil)
			if err != nil {
				t.Fatal(err)
			}
			if outcome.UploadedBlocks != c.uploaded || outcome.Packs != c.packs {
				t.Errorf("uploaded %d blocks in %d packs instead of %d in %d", outcome.UploadedBlocks, outcome.Packs, c.uploaded, c.packs)
			}
			if grew := w.stored() - before; grew != outcome.StoredBytes {
				t.Errorf("the store grew by %d bytes, and StoredBytes is %d", grew, outcome.StoredBytes)
			}
			img := w.open(outcome.Snapshot)
			w.mustHold(img, c.d)
			w.mustVerify(img.ID())
		})
	}
}

func TestBlockThatReturnsToTheParentsContentIsInherited(t *testing.T) {
	plainAndSealed(t, testBlockThatReturnsToTheParentsContentIsInherited)
}

func testBlockThatReturnsToTheParentsContentIsInherited(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	first := newDevice(10*testBlock).random(1, span(0, 10)...)
	second := first.random(2, 4)
	one := w.create(nil, nil, first)
	two := w.create(one, first, second)
	// Written twice since two, the last time with what it had then.
	outcome, err := w.store.Create(w.ctx, w.plan(two, second), second.source(4), nil)
	if err != nil {
		t.Fatal(err)
	}
	if outcome.UploadedBlocks != 0 {
		t.Errorf("uploaded %d blocks", outcome.UploadedBlocks)
	}
	three := w.open(outcome.Snapshot)
	w.delete(one.ID(), two.ID())
	w.reclaim()
	w.mustHold(three, second)
}

func TestGrowthOfTheDevice(t *testing.T) { plainAndSealed(t, testGrowthOfTheDevice) }

func testGrowthOfTheDevice(t *testing.T, newWorld func(testing.TB) *world) {
	t.Parallel()
	sizes := []int64{0, 512, 5 * testBlock, 5*testBlock + 512, leafBytes - testBlock, leafBytes, leafBytes + testBlock, 2*leafBytes + 512, 16 << 40}
	for i, from := range sizes {
		for _, to := range sizes[i:] {
			t.Run(fmt.Sprintf("%d to %d", from, to), func(t *testing.T) {
				w := newWorld(t)
				first := newDevice(from)
				if blocks := first.geometry.Blocks(); blocks > 0 {
					first = first.tiny(1, 0, blocks-1)
				}
				one := w.create(nil, nil, first)
				// Grown, and nothing written: the last leaf may have to grow.
				second := first.grown(to)
				two := w.create(one, first, second)
				w.mustHold(two, second)
				w.mustVerify(two.ID())
				if to == 0 {
					return
				}
				third := second.tiny(2, second.geometry.Blocks()-1)
				three := w.create(two, second, third)
				w.delete(one.ID(), two.ID())
				w.reclaim()
				w.mustHold(three, third)
				w.mustVerify(three.ID())
			})
		}
	}
}

// An extent of holes as large as the largest device costs no more than the
// parent has data in it.
func TestHolesOfTheLargestDevice(t *testing.T) { plainAndSealed(t, testHolesOfTheLargestDevice) }

func testHolesOfTheLargestDevice(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	base := newDevice(manifest.MaxDeviceSize)
	end := base.geometry.Blocks()
	base = base.tiny(1, 0, 1024, 1025, end/2, end-1)
	one := w.create(nil, nil, base)
	wiped := newDevice(manifest.MaxDeviceSize)
	two, err := w.store.Create(w.ctx, w.plan(one, wiped), wiped.whole(), nil)
	if err != nil {
		t.Fatal(err)
	}
	w.mustHold(w.open(two.Snapshot), wiped)
	w.mustVerify(two.Snapshot)
}

// Many compressible blocks far apart are what the bounds of the index writer
// are about: more leaves than wait for one pack.
func TestChangesScatteredOverManyLeaves(t *testing.T) {
	plainAndSealed(t, testChangesScatteredOverManyLeaves)
}

func testChangesScatteredOverManyLeaves(t *testing.T, newWorld func(testing.TB) *world) {
	t.Parallel()
	w := newWorld(t)
	const leaves = 300
	base := newDevice(leaves * leafBytes)
	blocks := make([]int64, leaves)
	for i := range blocks {
		blocks[i] = int64(i)*manifest.LeafBlocks + int64(i)
	}
	base = base.tiny(1, blocks...)
	one := w.create(nil, nil, base)
	if one.Outcome.Packs != 2 {
		t.Errorf("%d packs instead of 2 for %d leaves", one.Outcome.Packs, leaves)
	}
	second := base.tiny(2, blocks[:40]...).punched(blocks[40:60]...)
	w.faults.Reset()
	two := w.create(one, base, second)
	// Each leaf is read once, to be compared and to be rewritten.
	if n := w.faults.Count(blockstoretest.OpReadRange); n > 60+1 {
		t.Errorf("%d reads for 60 leaves and a section", n)
	}
	w.mustHold(two, second)
	w.mustVerify(two.ID())
	w.delete(one.ID())
	w.reclaim()
	w.mustHold(two, second)
	w.mustVerify(two.ID())
}

func TestDiffIsWhereTwoImagesDiffer(t *testing.T) { plainAndSealed(t, testDiffIsWhereTwoImagesDiffer) }

func testDiffIsWhereTwoImagesDiffer(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	a := newDevice(2*leafBytes-512).tiny(1, 0, 1, 2, 5, 8, 1023, 1024, 2047)
	b := a.tiny(2, 1, 8, 1023, 1024).punched(5, 2047).tiny(3, 6, 7).grown(2*leafBytes + 4096)
	one := w.create(nil, nil, a)
	two := w.create(one, a, b)
	compare := func(x, y *snapshot.Image, dx, dy *device) {
		t.Helper()
		seen := make(map[int64]bool)
		last := int64(-1)
		err := snapshot.Diff(w.ctx, x, y, func(c snapshot.Change) error {
			if c.Offset <= last || c.Length <= 0 || c.Offset+c.Length > max(dx.geometry.Size, dy.geometry.Size) {
				return fmt.Errorf("change %+v after %d", c, last)
			}
			last = c.Offset + c.Length - 1
			for block := c.Offset / testBlock; block*testBlock < c.Offset+c.Length; block++ {
				seen[block] = true
				if c.First != (dx.blocks[block] != nil) || c.Second != (dy.blocks[block] != nil) {
					return fmt.Errorf("block %d is not as %+v says", block, c)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for block := range max(dx.geometry.Blocks(), dy.geometry.Blocks()) {
			if seen[block] == bytes.Equal(dx.blocks[block], dy.blocks[block]) {
				t.Errorf("block %d: seen %v", block, seen[block])
			}
		}
	}
	compare(one, two, a, b)
	compare(two, one, b, a)
	compare(one, one, a, a)
}

// What is uploaded is what arrives, whatever order blocks and packs take.
func TestManyRandomIncrements(t *testing.T) { plainAndSealed(t, testManyRandomIncrements) }

func testManyRandomIncrements(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	rng := rand.New(rand.NewPCG(1, 2))
	d := newDevice(2*leafBytes + 4096)
	var img *snapshot.Image
	var last *device
	for step := range 12 {
		next := d.clone()
		for range rng.IntN(20) {
			block := rng.Int64N(d.geometry.Blocks())
			switch rng.IntN(4) {
			case 0:
				next = next.punched(block)
			case 1:
				next = next.random(uint64(step), block)
			default:
				next = next.tiny(step, block)
			}
		}
		src := next.since(last)
		if step%3 == 0 {
			src = next.whole()
		}
		outcome, err := w.store.Create(w.ctx, w.plan(img, next), src, nil)
		if err != nil {
			t.Fatal(err)
		}
		img, last, d = w.open(outcome.Snapshot), next, next
		w.mustHold(img, d)
	}
	w.mustVerify(img.ID())
}
