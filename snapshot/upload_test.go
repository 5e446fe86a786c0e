package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A gauge watches how many of something there are at once.
type gauge struct {
	mu        sync.Mutex // guards the fields below
	now, most int
}

func (g *gauge) up() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.now++
	g.most = max(g.most, g.now)
}

func (g *gauge) down() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.now--
}

// putGauge counts Puts of data under way and their bytes.
type putGauge struct {
	blockstore.Store
	gauge
	slow time.Duration
}

func (s *putGauge) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	if strings.HasPrefix(key, "data/") {
		s.up()
		defer s.down()
		time.Sleep(s.slow)
	}
	return s.Store.Put(ctx, key, data, c)
}

// With a store that is slow, no more than a few packs are on their way, and no
// more blocks are read than the pipeline has room for: memory is bounded.
func TestUploadIsBounded(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		blockSize     int
		memory        int64
		packs, budget int // at once; of blocks read ahead, in MiB
	}{
		{manifest.MinBlockSize, 0, 4, 32},
		{manifest.MaxBlockSize, 0, 4, 32},
		{manifest.MinBlockSize, 1 << 40, 4, 32},
		{manifest.DefaultBlockSize, 112 << 20, 2, 23},
		{manifest.DefaultBlockSize, 50 << 20, 1, 10},
	} {
		blockSize := c.blockSize
		t.Run(fmt.Sprint(blockSize, " ", c.memory>>20), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				objects := &putGauge{Store: sink{blockstore.NewMem()}, slow: time.Minute}
				store, err := snapshot.Init(t.Context(), objects)
				if err != nil {
					t.Fatal(err)
				}
				lineage, err := store.CreateLineage(t.Context(), blockSize, "")
				if err != nil {
					t.Fatal(err)
				}
				// Blocks of noise, which are all the same and cost nothing.
				noise := newDevice(testBlock).random(1, 0).blocks[0]
				const size = 88 << 20 // more than can be read ahead and on its way
				var reads gauge
				read := 0
				plan := snapshot.NewPlan(lineage.ID)
				plan.Geometry, plan.Memory = manifest.Geometry{Size: size, BlockSize: blockSize}, c.memory
				a, err := store.Begin(t.Context(), plan)
				if err != nil {
					t.Fatal(err)
				}
				err = a.Upload(t.Context(), snapshot.Source{
					Extents: func(yield func(snapshot.Extent, error) bool) {
						yield(snapshot.Extent{Count: plan.Geometry.Blocks()}, nil)
					},
					Read: func(_ context.Context, block int64, p []byte) error {
						reads.up()
						defer reads.down()
						reads.mu.Lock()
						read++
						ahead := int64(read)*int64(blockSize) - a.StoredBytes()
						reads.mu.Unlock()
						// The budget, the pack being filled, and one block.
						if limit := int64(c.budget<<20 + 16<<20 + 2*blockSize); ahead > limit {
							t.Errorf("%d bytes read and not packed", ahead)
						}
						for off := 0; off < len(p); off += len(noise) {
							copy(p[off:], noise)
						}
						return nil
					},
				})
				if err != nil {
					t.Fatal(err)
				}
				if objects.most != c.packs {
					t.Errorf("%d packs on their way at once", objects.most)
				}
				if limit := max(16, runtime.GOMAXPROCS(0)); reads.most > limit {
					t.Errorf("%d blocks read at once", reads.most)
				}
			})
		})
	}
}

// Whatever fails, Upload ends at once with that error, though everything else
// hangs, and nothing of it runs on.
func TestUploadEndsAtTheFirstError(t *testing.T) {
	t.Parallel()
	boom := errors.New("boom")
	small := newDevice(20*testBlock).random(1, span(0, 20)...)
	large := newDevice(300*testBlock).random(1, span(0, 300)...) // more than a pack
	hang := blockstoretest.Fault{Hang: true}
	for name, c := range map[string]struct {
		change func(src *snapshot.Source)
		prefix string // of the calls that fail
		fault  blockstoretest.Fault
		hang   string // prefix of the calls that hang
		want   error
	}{
		"read": {
			change: func(src *snapshot.Source) { src.Read = failingRead(src.Read, 290, boom) },
			hang:   "data/", want: boom,
		},
		"read, while others hang": {
			change: func(src *snapshot.Source) {
				src.Read = func(ctx context.Context, block int64, p []byte) error {
					if block == 3 {
						return boom
					}
					<-ctx.Done()
					return context.Cause(ctx)
				}
			},
			want: boom,
		},
		"extents": {
			change: func(src *snapshot.Source) {
				extents := src.Extents
				src.Extents = func(yield func(snapshot.Extent, error) bool) {
					extents(yield)
					yield(snapshot.Extent{}, boom)
				}
			},
			hang: "data/", want: boom,
		},
		"check":                        {change: func(src *snapshot.Source) { src.Check = func() error { return boom } }, hang: "data/", want: boom},
		"put of a pack":                {prefix: "packs/00000000", fault: blockstoretest.Fault{Err: boom}, hang: "leaves/", want: boom},
		"put of leaves":                {prefix: "leaves/", fault: blockstoretest.Fault{Err: boom}, hang: "packs/", want: boom},
		"put of the root":              {prefix: "root", fault: blockstoretest.Fault{Err: boom}, want: boom},
		"read of a leaf of the parent": {prefix: "leaves/", fault: blockstoretest.Fault{Flip: true}, hang: "packs/", want: manifest.ErrCorrupt},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			var parent *snapshot.Image
			d := small
			switch {
			case strings.Contains(name, "parent"):
				parent = w.create(nil, nil, small)
				d = small.random(2, 3)
			case c.hang == "data/": // a pack is on its way
				d = large
			}
			a, err := w.store.Begin(w.ctx, w.plan(parent, d))
			if err != nil {
				t.Fatal(err)
			}
			of := func(part string) blockstoretest.Rule {
				return blockstoretest.Rule{Match: func(c blockstoretest.Call) bool { return part != "" && strings.Contains(c.Keys[0], part) }}
			}
			w.faults.Inject(of(c.prefix), c.fault)
			w.faults.Inject(of(c.hang), hang)
			src := d.whole()
			if c.change != nil {
				c.change(&src)
			}
			ctx, cancel := context.WithTimeout(w.ctx, time.Minute)
			defer cancel()
			if err := a.Upload(ctx, src); !errors.Is(err, c.want) {
				t.Errorf("upload: %v", err)
			}
			w.faults.Heal()
			if err := a.Abort(w.ctx, "test"); err != nil {
				t.Fatal(err)
			}
			if left := w.objects(manifest.DataPrefix(a.ID())); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func failingRead(read func(context.Context, int64, []byte) error, at int64, err error) func(context.Context, int64, []byte) error {
	return func(ctx context.Context, block int64, p []byte) error {
		if block == at {
			return err
		}
		return read(ctx, block, p)
	}
}

func TestExtentsMustBeInOrderAndInside(t *testing.T) {
	w := newWorld(t)
	d := newDevice(10*testBlock).tiny(1, span(0, 10)...)
	for name, extents := range map[string][]snapshot.Extent{
		"descending":  {{First: 5, Count: 1}, {First: 4, Count: 1}},
		"twice":       {{First: 5, Count: 1}, {First: 5, Count: 1}},
		"overlap":     {{First: 0, Count: 3}, {First: 2, Count: 3, Hole: true}},
		"beyond":      {{First: 9, Count: 2}},
		"far beyond":  {{First: 10, Count: math.MaxInt64}},
		"overflowing": {{First: math.MaxInt64, Count: math.MaxInt64}},
		"negative":    {{First: -1, Count: 2}},
		"less":        {{First: 3, Count: -1}},
	} {
		a, err := w.store.Begin(w.ctx, w.plan(nil, d))
		if err != nil {
			t.Fatal(err)
		}
		src := d.since(nil)
		src.Extents = func(yield func(snapshot.Extent, error) bool) {
			for _, e := range extents {
				if !yield(e, nil) {
					return
				}
			}
		}
		if err := a.Upload(w.ctx, src); err == nil {
			t.Errorf("%s: uploaded", name)
		}
	}
}
