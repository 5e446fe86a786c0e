package snapshot_test

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A chest is what a host has: some blocks, leaves and roots, by their hashes.
type chest map[manifest.Hash][]byte

func (c chest) Block(_ manifest.LineageID, _ int64, hash manifest.Hash, p []byte) bool {
	return copy(p, c[hash]) == len(p)
}

func (c chest) Leaf(_ manifest.LineageID, ref manifest.LeafRef, _ int) ([]byte, bool) {
	data, ok := c[ref.Hash]
	return data, ok
}

func (c chest) Root(_ manifest.SnapshotID, hash manifest.Hash) ([]byte, bool) {
	data, ok := c[hash]
	return data, ok
}

// collect puts all that an image refers to into a chest.
func (w *world) collect(c chest, img *snapshot.Image, d *device) {
	w.t.Helper()
	root := img.StoredRoot()
	c[manifest.Sum(root)] = root
	for _, ref := range img.Root.Leaves {
		leaf, err := img.FetchLeaf(w.ctx, ref)
		if err != nil {
			w.t.Fatal(err)
		}
		c[ref.Hash] = leaf.Encode()
	}
	for _, block := range d.blocks {
		c[manifest.Sum(block)] = block
	}
}

// repair repairs the whole store with what a host has.
func (w *world) repair(from snapshot.Salvage) *snapshot.Repaired {
	w.t.Helper()
	repaired, err := w.reopen().Repair(w.ctx, snapshot.Repair{From: from, Pin: w.pinner(w.reopen())})
	if err != nil {
		w.t.Fatal(err)
	}
	return repaired
}

// pinner returns what pins snapshots for a repair.
func (w *world) pinner(s *snapshot.Store) func(context.Context, manifest.SnapshotID) (func(), error) {
	return func(ctx context.Context, id manifest.SnapshotID) (func(), error) {
		err := s.Pin(ctx, id, snapshot.Holder{ID: "mount-repair"})
		return func() {
			if err := s.Unpin(context.WithoutCancel(ctx), id, "mount-repair"); err != nil {
				w.t.Error(err)
			}
		}, err
	}
}

// contents returns all objects.
func (w *world) contents() map[string][]byte {
	w.t.Helper()
	all := make(map[string][]byte)
	for key := range w.objects("") {
		data, _, err := w.faults.Get(w.ctx, key, blockstore.MaxObjectSize)
		if err != nil {
			w.t.Fatal(err)
		}
		all[key] = data
	}
	return all
}

// A gallery is a lineage with some of everything: snapshots that share blocks,
// deleted ones, and packs that were rewritten.
type gallery struct {
	*world
	rng     *rand.Rand
	content map[manifest.SnapshotID]*device
	images  map[manifest.SnapshotID]*snapshot.Image // that are live
	chest   chest                                   // all that they refer to
}

// newGallery returns one that is encrypted if the seed is odd.
func newGallery(t testing.TB, seed uint64) *gallery {
	key := ""
	if seed%2 == 1 {
		key = "toy"
	}
	g := &gallery{
		world: newWorldUnder(t, blockstore.NewMem(), key), rng: rand.New(rand.NewPCG(seed, 1)), chest: make(chest),
		content: make(map[manifest.SnapshotID]*device), images: make(map[manifest.SnapshotID]*snapshot.Image),
	}
	var last *snapshot.Image
	d := newDevice(leafBytes + int64(1+g.rng.IntN(20))*testBlock - 512)
	var before *device
	var made []manifest.SnapshotID
	for i := range 2 + g.rng.IntN(4) {
		if last != nil && g.rng.IntN(5) == 0 { // a branch, or another first one
			last, before = nil, nil
		}
		for range 1 + g.rng.IntN(12) {
			block := []int64{int64(g.rng.IntN(16)), leafBytes/testBlock + int64(g.rng.IntN(int(d.geometry.Blocks()-leafBytes/testBlock)))}[g.rng.IntN(2)]
			switch g.rng.IntN(6) {
			case 0:
				d = d.punched(block)
			case 1, 2:
				d = d.random(g.rng.Uint64(), block)
			case 3:
				d = d.tiny(0, block) // as in another snapshot
			default:
				d = d.tiny(i*1000+g.rng.IntN(1000), block)
			}
		}
		last = g.create(last, before, d)
		before = d
		made = append(made, last.ID())
		g.content[last.ID()], g.images[last.ID()] = d, last
	}
	for _, id := range made[:len(made)-1] {
		if g.rng.IntN(3) == 0 {
			g.delete(id)
			delete(g.images, id)
		}
	}
	g.reclaim()
	for id, img := range g.images {
		g.collect(g.chest, img, g.content[id])
	}
	return g
}

// injure damages some object with data, and returns its key.
func (g *gallery) injure(objects map[string][]byte) string {
	keys := slices.DeleteFunc(slices.Sorted(maps.Keys(objects)), func(key string) bool { return !strings.HasPrefix(key, "data/") })
	key := keys[g.rng.IntN(len(keys))]
	data := bytes.Clone(objects[key])
	at := g.rng.IntN(len(data))
	switch g.rng.IntN(6) {
	case 0:
		data[at] ^= 1 << g.rng.IntN(8)
	case 1:
		data[g.rng.IntN(min(len(data), 200))] ^= 0xff // the table, or the header
	case 2:
		data = data[:at]
	case 3:
		clear(data[at:])
		data[at] ^= 1
	case 4:
		data = append(data, 1, 2, 3)
	default:
		if err := g.faults.Delete(g.ctx, key); err != nil {
			g.t.Fatal(err)
		}
		return key
	}
	g.overwrite(key, string(data))
	return key
}

// readable returns which blocks of the live snapshots can be read. What can be
// is as it was.
func (g *gallery) readable() map[manifest.SnapshotID]map[int64]bool {
	g.t.Helper()
	found := make(map[manifest.SnapshotID]map[int64]bool)
	for id := range g.images {
		found[id] = make(map[int64]bool)
		img, err := g.reopen().Open(g.ctx, id, snapshot.Holder{})
		if err != nil {
			continue
		}
		blocks := make(chan int64, g.content[id].geometry.Blocks())
		err = img.ReadAll(g.ctx, func(block int64, data []byte) error {
			if !bytes.Equal(data, g.content[id].blocks[block]) {
				return fmt.Errorf("block %d of %s differs", block, id)
			}
			blocks <- block
			return nil
		}, func(int64, error) {})
		if err != nil {
			g.t.Fatal(err)
		}
		close(blocks)
		for block := range blocks {
			found[id][block] = true
		}
	}
	return found
}

// Whatever is damaged, and whatever a host has: a repair loses nothing that could
// be read, touches nothing that is sound, and restores all that the host has; and
// if it has everything, every object of a snapshot that is not deleted is as it
// was.
func TestRepairRestoresWhatTheHostHas(t *testing.T) {
	t.Parallel()
	seeds := uint64(60)
	if stressed() {
		seeds = 1500
	}
	for seed := range seeds {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { repairAtRandom(t, seed) })
	}
}

func repairAtRandom(t *testing.T, seed uint64) {
	g := newGallery(t, seed)
	sound := g.contents()
	if report := g.check(1); report.Problems != 0 {
		t.Fatalf("before any damage: %v", report.Findings)
	}
	injured := make(map[string]bool)
	for range 1 + g.rng.IntN(4) {
		injured[g.injure(sound)] = true
	}
	damaged := g.contents()
	removed := make(map[manifest.SnapshotID]bool) // owners of what is gone
	for key := range injured {
		if id, err := manifest.ParseSnapshotID(strings.Split(key, "/")[1]); err == nil && damaged[key] == nil && g.images[id] == nil {
			removed[id] = true
		}
	}
	all, full := g.rng.IntN(2) == 0, true
	has := make(chest)
	for hash, data := range g.chest {
		if all || len(data) != testBlock || g.rng.IntN(2) == 0 {
			has[hash] = data
		} else {
			full = false
		}
	}
	before := g.readable()
	repaired := g.repair(has)
	after := g.readable()
	now := g.contents()

	for key, data := range now {
		if !injured[key] && !bytes.Equal(data, sound[key]) {
			t.Errorf("%s was sound, and was changed", key)
		}
	}
	for id, d := range g.content {
		if g.images[id] == nil {
			continue
		}
		for block, data := range d.blocks {
			recoverable := before[id][block] || len(removed) == 0 && has[manifest.Sum(data)] != nil
			if recoverable && !after[id][block] {
				t.Errorf("block %d of %s is not restored", block, id)
			}
		}
	}
	if !full || len(removed) > 0 {
		return
	}
	if repaired.Problems > 0 {
		t.Errorf("after a repair from everything: %v", repaired.Findings)
	}
	for key := range injured {
		id, _ := manifest.ParseSnapshotID(strings.Split(key, "/")[1])
		if g.images[id] != nil && len(now[key]) != len(sound[key]) && !strings.HasSuffix(key, "/root") {
			t.Errorf("%s has %d bytes now, and had %d", key, len(now[key]), len(sound[key]))
		}
	}
	if t.Failed() {
		t.Logf("injured %v; obstacles: %v", injured, repaired.Obstacles)
	}
}
