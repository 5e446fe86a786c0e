package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func TestMain(m *testing.M) {
	// A check of a lineage makes a score of snapshots: fewer do, unless the
	// command line asks for more.
	if err := flag.Set("rapid.checks", "25"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// testBlock is the block size of most tests: the smallest.
const testBlock = manifest.MinBlockSize

// leafBytes is how much of a device one leaf describes.
const leafBytes = int64(manifest.LeafBlocks) * testBlock

// A world is a store with one lineage, which a test can make misbehave.
type world struct {
	t       testing.TB
	ctx     context.Context
	faults  *blockstoretest.Faulty
	store   *snapshot.Store
	lineage manifest.LineageID
}

func newWorld(t testing.TB) *world { return newWorldIn(t, blockstore.NewMem()) }

func newWorldIn(t testing.TB, objects blockstore.Store) *world {
	t.Helper()
	return newWorldUnder(t, objects, "")
}

// newWorldUnder returns a world whose lineage is encrypted under a key, unless that is "".
func newWorldUnder(t testing.TB, objects blockstore.Store, key string) *world {
	t.Helper()
	w := &world{t: t, ctx: t.Context(), faults: blockstoretest.NewFaulty(objects)}
	if _, err := snapshot.Init(w.ctx, w.faults); err != nil {
		t.Fatal(err)
	}
	w.store = w.reopen()
	lineage, err := w.store.CreateLineage(w.ctx, testBlock, key)
	if err != nil {
		t.Fatal(err)
	}
	w.lineage = lineage.ID
	return w
}

// plainAndSealed runs a test in worlds that are not encrypted and in ones that are.
func plainAndSealed(t *testing.T, test func(t *testing.T, newWorld func(testing.TB) *world)) {
	t.Run("plain", func(t *testing.T) { test(t, newWorld) })
	t.Run("sealed", func(t *testing.T) { test(t, newEncryptedWorld) })
}

func newEncryptedWorld(t testing.TB) *world {
	t.Helper()
	return newWorldUnder(t, blockstore.NewMem(), "toy")
}

// reopen returns the store as another host sees it, with nothing cached.
func (w *world) reopen() *snapshot.Store { return storeIn(w.faults) }

// storeIn returns the store of a host that has all keys.
func storeIn(objects blockstore.Store) *snapshot.Store {
	s := snapshot.New(objects)
	s.UseKeys(toyKeys{})
	return s
}

// in returns the world for another test, with nothing amiss.
func (w *world) in(t testing.TB) *world {
	faults := blockstoretest.NewFaulty(w.faults)
	return &world{t: t, ctx: t.Context(), faults: faults, store: storeIn(faults), lineage: w.lineage}
}

// plan returns the plan of a snapshot of d.
func (w *world) plan(parent *snapshot.Image, d *device) snapshot.Plan {
	p := snapshot.NewPlan(w.lineage)
	p.Parent, p.Geometry = parent, d.geometry
	return p
}

// create makes a snapshot of d, and opens it. before is what the parent holds.
func (w *world) create(parent *snapshot.Image, before, d *device) *snapshot.Image {
	w.t.Helper()
	outcome, err := w.store.Create(w.ctx, w.plan(parent, d), d.since(before), nil)
	if err != nil {
		w.t.Fatal(err)
	}
	return w.open(outcome.Snapshot)
}

// begin begins an attempt and uploads d.
func (w *world) begin(p snapshot.Plan, before, d *device) *snapshot.Attempt {
	w.t.Helper()
	a, err := w.store.Begin(w.ctx, p)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := a.Upload(w.ctx, d.since(before)); err != nil {
		w.t.Fatal(err)
	}
	return a
}

func (w *world) open(id manifest.SnapshotID) *snapshot.Image {
	w.t.Helper()
	img, err := w.store.Open(w.ctx, id, snapshot.Holder{})
	if err != nil {
		w.t.Fatal(err)
	}
	return img
}

func (w *world) delete(ids ...manifest.SnapshotID) {
	w.t.Helper()
	for _, id := range ids {
		if err := w.store.Delete(w.ctx, id); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (w *world) reclaim() snapshot.Reclaimed {
	w.t.Helper()
	r, err := w.store.Reclaim(w.ctx, w.lineage)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// put writes a record, whatever is there.
func (w *world) put(key string, record any) {
	w.t.Helper()
	data, err := manifest.EncodeRecord(record)
	if err != nil {
		w.t.Fatal(err)
	}
	w.overwrite(key, string(data))
}

// overwrite writes an object, whatever is there.
func (w *world) overwrite(key, data string) {
	w.t.Helper()
	if _, err := w.faults.Put(w.ctx, key, []byte(data), blockstore.Condition{}); err != nil {
		w.t.Fatal(err)
	}
}

// objects lists the keys that begin with a prefix, with their sizes.
func (w *world) objects(prefix string) map[string]int64 {
	w.t.Helper()
	found := make(map[string]int64)
	err := w.faults.List(w.ctx, prefix, func(o blockstore.Info) error {
		found[o.Key] = o.Size
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return found
}

// wantNone checks that the store has no key with one of the prefixes.
func (w *world) wantNone(prefixes ...string) {
	w.t.Helper()
	for _, prefix := range prefixes {
		if left := w.objects(prefix); len(left) > 0 {
			w.t.Errorf("left: %v", left)
		}
	}
}

// stored returns the bytes of all packs, leaves and roots.
func (w *world) stored() int64 {
	w.t.Helper()
	n := int64(0)
	for _, size := range w.objects("data/") {
		n += size
	}
	return n
}

// mustHold fails the test unless the image reads as d, and verifies.
func (w *world) mustHold(img *snapshot.Image, d *device) {
	w.t.Helper()
	if err := holds(w.ctx, img, d); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) mustVerify(id manifest.SnapshotID) snapshot.Report {
	w.t.Helper()
	var problems []error
	report, err := w.store.Verify(w.ctx, id, func(err error) { problems = append(problems, err) })
	if err := errors.Join(append(problems, err)...); err != nil {
		w.t.Fatalf("verify %s: %v", id, err)
	}
	return report
}

// holds compares an image with a device.
func holds(ctx context.Context, img *snapshot.Image, d *device) error {
	if img.Geometry() != d.geometry {
		return fmt.Errorf("%s has geometry %v instead of %v", img.ID(), img.Geometry(), d.geometry)
	}
	if img.Root.DataBlocks != int64(len(d.blocks)) {
		return fmt.Errorf("%s has %d blocks of data instead of %d", img.ID(), img.Root.DataBlocks, len(d.blocks))
	}
	var mu sync.Mutex
	unread := maps.Clone(d.blocks)
	err := img.ReadAll(ctx, func(block int64, data []byte) error {
		mu.Lock()
		defer mu.Unlock()
		if !bytes.Equal(data, unread[block]) {
			return fmt.Errorf("block %d differs", block)
		}
		delete(unread, block)
		return nil
	}, nil)
	if err != nil {
		return err
	}
	if len(unread) > 0 {
		return fmt.Errorf("%s lacks blocks %v", img.ID(), slices.Sorted(maps.Keys(unread)))
	}
	return nil
}

// A device is what snapshots are made of: a model of a block device. Blocks
// that are absent are zeros, those present are not, and none ever changes.
type device struct {
	geometry manifest.Geometry
	blocks   map[int64][]byte // BlockSize long, zeros beyond the end
}

func newDevice(size int64) *device {
	return &device{manifest.Geometry{Size: size, BlockSize: testBlock}, make(map[int64][]byte)}
}

func (d *device) clone() *device { return &device{d.geometry, maps.Clone(d.blocks)} }

// grown returns a copy of another size.
func (d *device) grown(size int64) *device {
	c := d.clone()
	c.geometry.Size = size
	return c
}

// random returns a copy with incompressible data in some blocks.
func (d *device) random(seed uint64, blocks ...int64) *device {
	source := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), 1})
	c := d.clone()
	for _, block := range blocks {
		data := make([]byte, c.geometry.BlockSize)
		source.Read(data[:c.geometry.BlockLen(block)]) // never fails
		c.blocks[block] = data
	}
	return c
}

// tiny returns a copy with data that compresses to almost nothing in some
// blocks.
func (d *device) tiny(seed int, blocks ...int64) *device {
	c := d.clone()
	for _, block := range blocks {
		data := make([]byte, c.geometry.BlockSize)
		copy(data, fmt.Sprintf("block %d, seed %d", block, seed)) // at least a sector is inside
		c.blocks[block] = data
	}
	return c
}

// punched returns a copy with holes in some blocks.
func (d *device) punched(blocks ...int64) *device {
	c := d.clone()
	for _, block := range blocks {
		delete(c.blocks, block)
	}
	return c
}

// sparse returns a device of a number of leaves, with one small block in each.
func sparse(leaves int64) *device {
	d := newDevice(leaves * leafBytes)
	var blocks []int64
	for leaf := range leaves {
		blocks = append(blocks, leaf*manifest.LeafBlocks)
	}
	return d.tiny(1, blocks...)
}

// span lists the blocks from first to before end.
func span(first, end int64) []int64 {
	var blocks []int64
	for block := first; block < end; block++ {
		blocks = append(blocks, block)
	}
	return blocks
}

func (d *device) read(_ context.Context, block int64, p []byte) error {
	clear(p)
	copy(p, d.blocks[block])
	return nil
}

// since returns the device as a source that knows exactly what differs from
// before; nil is a device of zeros.
func (d *device) since(before *device) snapshot.Source {
	if before == nil {
		before = newDevice(0)
	}
	changed := make(map[int64]bool)
	for block, data := range d.blocks {
		if !bytes.Equal(data, before.blocks[block]) {
			changed[block] = true
		}
	}
	for block := range before.blocks {
		if d.blocks[block] == nil {
			changed[block] = true
		}
	}
	return d.source(slices.Sorted(maps.Keys(changed))...)
}

// source returns the device as a source of some blocks. Every other hole is
// one that the source does not know of.
func (d *device) source(blocks ...int64) snapshot.Source {
	return snapshot.Source{
		Read: d.read,
		Extents: func(yield func(snapshot.Extent, error) bool) {
			for i, block := range blocks {
				if !yield(snapshot.Extent{First: block, Count: 1, Hole: d.blocks[block] == nil && i%2 == 0}, nil) {
					return
				}
			}
		},
	}
}

// whole returns the device as a source that says of every block whether it is
// a hole, as an image file does.
func (d *device) whole() snapshot.Source {
	return snapshot.Source{
		Read: d.read,
		Extents: func(yield func(snapshot.Extent, error) bool) {
			next := int64(0)
			for _, block := range slices.Sorted(maps.Keys(d.blocks)) {
				if block > next && !yield(snapshot.Extent{First: next, Count: block - next, Hole: true}, nil) {
					return
				}
				if !yield(snapshot.Extent{First: block, Count: 1}, nil) {
					return
				}
				next = block + 1
			}
			if end := d.geometry.Blocks(); next < end {
				yield(snapshot.Extent{First: next, Count: end - next, Hole: true}, nil)
			}
		},
	}
}

// calls lists the calls made, without the ids of snapshots in their keys.
func (w *world) calls() []string {
	var names []string
	for _, c := range w.faults.Calls() {
		parts := strings.Split(c.Keys[0], "/")
		parts = slices.DeleteFunc(parts, func(p string) bool { return strings.HasPrefix(p, "snap-") })
		names = append(names, string(c.Op)+" "+strings.Join(parts, "/"))
	}
	return names
}
