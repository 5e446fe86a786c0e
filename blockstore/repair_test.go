package blockstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// A brokenPack is a pack of six blocks of which somebody has copies.
type brokenPack struct {
	t      *testing.T
	store  *blockstoretest.Faulty
	data   *crypt.Key // that it is sealed under; nil: it is not
	owner  manifest.SnapshotID
	key    string
	good   []byte
	needed []blockstore.NeededSlot
	blocks map[manifest.Hash][]byte
}

func newBrokenPack(t *testing.T, data *crypt.Key) *brokenPack {
	p := &brokenPack{
		t: t, store: blockstoretest.NewFaulty(blockstore.NewMem()), data: data, owner: manifest.SnapshotID{Lineage: 1, Serial: 2},
		blocks: make(map[manifest.Hash][]byte),
	}
	p.key = manifest.PackKey(p.owner, 3)
	builder := blockstore.NewPackBuilder(p.owner, 3, manifest.MinBlockSize, data)
	var compressor blockstore.Compressor
	for i := range 6 {
		block := bytes.Repeat(fmt.Appendf(nil, "%16d", i), manifest.MinBlockSize/16)
		stored, raw := compressor.Compress(nil, block)
		builder.Add(int64(10*i), manifest.Sum(block), stored, raw)
		p.blocks[manifest.Sum(block)] = block
	}
	var refs []manifest.Ref
	p.good, refs = builder.Finish()
	for i, ref := range refs {
		p.needed = append(p.needed, blockstore.NeededSlot{Block: int64(10 * i), Ref: ref})
	}
	return p
}

func (p *brokenPack) put(data []byte) {
	p.t.Helper()
	if _, err := p.store.Put(p.t.Context(), p.key, data, blockstore.Condition{}); err != nil {
		p.t.Fatal(err)
	}
}

func (p *brokenPack) get() []byte {
	p.t.Helper()
	data, _, err := p.store.Get(p.t.Context(), p.key, blockstore.MaxPackSize)
	if err != nil && !errors.Is(err, blockstore.ErrNotExist) {
		p.t.Fatal(err)
	}
	return data
}

// isGood reports whether the pack is as it was.
func (p *brokenPack) isGood() bool { return samePack(p.get(), p.good, p.owner, 3, p.data) }

func (p *brokenPack) repair(change func(*blockstore.PackRepair)) (blockstore.RepairedPack, error) {
	r := blockstore.PackRepair{
		Owner: p.owner, Pack: 3, Key: p.data, BlockSize: manifest.MinBlockSize, Needed: p.needed, Create: true,
		Find: func(slot blockstore.NeededSlot, dst []byte) bool { return copy(dst, p.blocks[slot.Hash]) > 0 },
	}
	if change != nil {
		change(&r)
	}
	return blockstore.RepairPack(p.t.Context(), p.store, r)
}

// Wherever a pack is damaged, or cut off, a repair from copies makes it what it
// was.
func TestRepairedPackIsAsItWas(t *testing.T) { plainAndSealed(t, testRepairedPackIsAsItWas) }

func testRepairedPackIsAsItWas(t *testing.T, key *crypt.Key) {
	p := newBrokenPack(t, key)
	check := func(what string) {
		t.Helper()
		if _, err := p.repair(nil); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if !p.isGood() {
			t.Fatalf("%s: it is not as it was", what)
		}
	}
	for at := 0; at < len(p.good); at += 1 + at/40 { // most of all in the header and the table
		bad := bytes.Clone(p.good)
		bad[at] ^= 0x10
		p.put(bad)
		check(fmt.Sprint("byte ", at))
	}
	for length := 0; length < len(p.good); length += 7 {
		p.put(p.good[:length])
		check(fmt.Sprint("length ", length))
	}
	p.put(append(bytes.Clone(p.good), 1, 2, 3))
	check("a tail")
	if err := p.store.Delete(t.Context(), p.key); err != nil {
		t.Fatal(err)
	}
	check("missing")
}

// A pack that is gone is not made unless that is asked for, nor one whose table
// is lost if more may be needed than is known.
func TestRepairRefusesWhatItMustNotWrite(t *testing.T) {
	plainAndSealed(t, testRepairRefusesWhatItMustNotWrite)
}

func testRepairRefusesWhatItMustNotWrite(t *testing.T, key *crypt.Key) {
	p := newBrokenPack(t, key)
	if _, err := p.repair(func(r *blockstore.PackRepair) { r.Create = false }); !errors.Is(err, blockstore.ErrNoCreate) {
		t.Errorf("missing: %v", err)
	}
	if _, err := p.repair(func(r *blockstore.PackRepair) { r.Partial = true }); !errors.Is(err, blockstore.ErrPartial) {
		t.Errorf("missing, partly known: %v", err)
	}
	if p.get() != nil {
		t.Error("it was made")
	}
	p.put(p.good)
	p.store.Reset()
	if r, err := p.repair(nil); err != nil || r.Written || p.store.Count(blockstoretest.OpPut) > 0 {
		t.Errorf("a sound one: %+v, %v", r, err)
	}
}

// What cannot be recovered now can be later; and nobody takes it for sound.
func TestLostSlotsCanBeRepairedLater(t *testing.T) {
	plainAndSealed(t, testLostSlotsCanBeRepairedLater)
}

func testLostSlotsCanBeRepairedLater(t *testing.T, key *crypt.Key) {
	p := newBrokenPack(t, key)
	lost := p.needed[2].Hash
	block := p.blocks[lost]
	delete(p.blocks, lost)
	r, err := p.repair(nil) // it is missing
	if err != nil || len(r.Repaired) != 5 || len(r.Lost) != 1 || r.Lost[0].Slot != 2 {
		t.Fatalf("%+v, %v", r, err)
	}
	live := func(slot uint16) bool { return slot != 5 }
	if _, err := blockstore.RewritePack(t.Context(), p.store, p.owner, 3, key, live); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("rewrite: %v", err)
	}
	p.blocks[lost] = block
	if r, err := p.repair(nil); err != nil || len(r.Repaired) != 1 || !p.isGood() {
		t.Errorf("later: %+v, %v", r, err)
	}
}

// If somebody rewrites the pack meanwhile, the repair goes on with that: slots
// that died stay dead.
func TestRepairBesideARewrite(t *testing.T) { plainAndSealed(t, testRepairBesideARewrite) }

func testRepairBesideARewrite(t *testing.T, key *crypt.Key) {
	p := newBrokenPack(t, key)
	bad := bytes.Clone(p.good)
	bad[len(bad)-1] ^= 1 // slot 5
	p.put(bad)
	p.store.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Times: 1}, blockstoretest.Fault{Before: func(ctx context.Context, _ blockstoretest.Call) {
		live := func(slot uint16) bool { return slot < 3 }
		if _, err := blockstore.RewritePack(ctx, p.store, p.owner, 3, key, live); err != nil {
			t.Error(err)
		}
	}})
	r, err := p.repair(nil)
	if err != nil || r.Written {
		t.Fatalf("%+v, %v", r, err)
	}
	table, err := blockstore.DecodePack(p.get(), p.owner, 3, key)
	if err != nil || table.Slots[2].Dead || !table.Slots[3].Dead || !table.Slots[5].Dead {
		t.Errorf("%+v, %v", table, err)
	}
}

// Slots that nobody is known to need are kept: who knows better may come later.
func TestRepairKillsNoSlot(t *testing.T) { plainAndSealed(t, testRepairKillsNoSlot) }

func testRepairKillsNoSlot(t *testing.T, key *crypt.Key) {
	p := newBrokenPack(t, key)
	p.put(p.good[:len(p.good)-1000]) // the table and a part of the bytes
	if r, err := p.repair(func(r *blockstore.PackRepair) { r.Needed, r.Partial = p.needed[:5], true }); err != nil || !r.Written {
		t.Fatalf("%+v, %v", r, err)
	}
	if _, err := p.repair(nil); err != nil || !p.isGood() {
		t.Errorf("it is not as it was: %v", err)
	}
}
