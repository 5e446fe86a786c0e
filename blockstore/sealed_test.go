package blockstore_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
)

// sealedTableEnd is where the first slot of a sealed pack begins.
func sealedTableEnd(p *testPack) int { return int(p.refs[0].Offset) }

// withChecksum gives a table that somebody changed its right checksum again, as who
// forges it does.
func withChecksum(object []byte, tableEnd int) []byte {
	format := manifest.ObjectFormat{Name: "pack", Magic: "LVPK", Version: 1}
	table := format.AppendChecksum(slices.Clone(object[:tableEnd-manifest.ChecksumLen]))
	return append(table, object[tableEnd:]...)
}

// slotBytes returns where a slot lies in a pack that was not rewritten.
func slotBytes(p *testPack, slot int) []byte {
	return p.object[p.refs[slot].Offset:][:int(p.refs[slot].Length)+p.data.Overhead()]
}

func TestSealedPackHasNothingInClear(t *testing.T) {
	p := newTestPack(t, blockstore.NewMem(), newKey(t, 1), 1, 12)
	plain := newTestPack(t, blockstore.NewMem(), nil, 1, 12)
	for i, block := range p.blocks {
		stored := slotBytes(plain, i)
		for off := 0; off+16 <= len(stored); off += 16 {
			if bytes.Contains(p.object, stored[off:off+16]) {
				t.Fatalf("slot %d: its bytes from %d are in clear", i, off)
			}
		}
		if hash := manifest.Sum(block); bytes.Contains(p.object, hash[:]) {
			t.Errorf("slot %d: its hash is in clear", i)
		}
	}
	table, err := blockstore.ReadSlotTable(t.Context(), p.store, packOwner, 1, p.data)
	if err != nil {
		t.Fatal(err)
	}
	for i, slot := range table.Slots { // as a table in clear has it
		entry := binary.LittleEndian.AppendUint64(nil, uint64(slot.Block))
		entry = binary.LittleEndian.AppendUint32(entry, slot.Offset)
		entry = binary.LittleEndian.AppendUint32(entry, slot.Length)
		if bytes.Contains(p.object, entry) {
			t.Errorf("slot %d: its entry in the table is in clear", i)
		}
	}
	again := newTestPack(t, blockstore.NewMem(), p.data, 1, 12)
	for i := range p.refs {
		if bytes.Equal(slotBytes(p, i)[:16], slotBytes(again, i)[:16]) {
			t.Errorf("slot %d is sealed alike twice", i)
		}
	}
}

// What a store that does as it likes can make of packs: whatever it serves, a slot has
// its own bytes or is corrupt.
func TestMovedSlotsAreCorrupt(t *testing.T) {
	key := newKey(t, 1)
	// All slots are raw and as long as each other, so that bytes fit anywhere.
	pack := func(owner manifest.SnapshotID, number uint32, seed uint64) *testPack {
		p := &testPack{store: blockstore.NewMem(), data: key, key: manifest.PackKey(owner, number), number: number}
		b := blockstore.NewPackBuilder(owner, number, packBlockSize, key)
		for i := range int64(4) {
			block := testBlock(3 * (seed + uint64(i)))
			p.blocks = append(p.blocks, block)
			b.Add(10*i, manifest.Sum(block), block, true)
		}
		p.object, p.refs = b.Finish()
		return p
	}
	p := pack(packOwner, 1, 0)
	sibling := packOwner
	sibling.Serial++
	elsewhere := packOwner
	elsewhere.Lineage++
	for name, from := range map[string][]byte{
		"another slot":                          slotBytes(p, 2),
		"the slot of another pack":              slotBytes(pack(packOwner, 2, 0), 1),
		"the slot of another snapshot":          slotBytes(pack(sibling, 1, 0), 1),
		"the slot of another lineage":           slotBytes(pack(elsewhere, 1, 0), 1),
		"the slot as it was, with other blocks": slotBytes(pack(packOwner, 1, 100), 1),
		"zeros":                                 make([]byte, packBlockSize+key.Overhead()),
	} {
		object := slices.Clone(p.object)
		copy(object[p.refs[1].Offset:], from)
		p.put(t, object)
		errs, err := p.read(newReader(p.store, key), p.refs) // which compares what comes back
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for i, err := range errs {
			if (i == 1) != errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("%s: slot %d: %v", name, i, err)
			}
		}
		if err := p.rewrite(0); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: a rewrite keeps it: %v", name, err)
		}
	}
	for name, other := range map[string]*testPack{
		"another pack": pack(packOwner, 2, 0), "a pack of another snapshot": pack(sibling, 1, 0), "a pack of another lineage": pack(elsewhere, 1, 0),
	} {
		p.put(t, other.object)
		errs, err := p.read(newReader(p.store, key), p.refs)
		if err != nil {
			t.Fatal(err)
		}
		for i, err := range errs {
			if !errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("%s, slot %d: %v", name, i, err)
			}
		}
	}
}

// The hash in a ref is known only to who has the index. Even with one that fits, what
// was sealed as another slot is refused: the hash alone does not decide.
func TestSealOfASlotIsBoundToItsPlace(t *testing.T) {
	key := newKey(t, 1)
	p := newTestPack(t, blockstore.NewMem(), key, 1, 4)
	sibling := packOwner
	sibling.Serial++
	for slot := range p.refs {
		ref := p.refs[slot]
		block := make([]byte, packBlockSize)
		open := func(owner manifest.SnapshotID, pack uint32, slot uint16) error {
			return blockstore.DecodeSlot(block, slotBytes(p, int(ref.Slot)), ref.Raw, key, owner, pack, slot)
		}
		if err := open(packOwner, 1, ref.Slot); err != nil || !bytes.Equal(block, p.blocks[slot]) {
			t.Fatalf("slot %d: %v", slot, err)
		}
		for name, err := range map[string]error{
			"slot": open(packOwner, 1, ref.Slot+1), "pack": open(packOwner, 2, ref.Slot), "snapshot": open(sibling, 1, ref.Slot),
		} {
			if !errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("slot %d opens as one of another %s: %v", slot, name, err)
			}
		}
	}
}

// A sealed table says where slots lie. Forged, it must not even be able to kill one:
// a reclaimer would make that true.
func TestForgedSlotTableIsCorrupt(t *testing.T) {
	key := newKey(t, 1)
	p := newTestPack(t, blockstore.NewMem(), key, 1, 5)
	end := sealedTableEnd(p)
	if err := p.rewrite(2); err != nil {
		t.Fatal(err)
	}
	rewritten := p.get(t)
	const header = 32                                            // in clear: whose pack it is, and how many slots it has
	other := newTestPack(t, blockstore.NewMem(), key, 1|1<<5, 5) // of another number
	forged := map[string][]byte{
		"the table of the rewrite":          append(slices.Clone(rewritten[:end]), p.object[end:]...),
		"the table of another pack":         append(slices.Clone(p.object[:header]), other.object[header:]...),
		"another pack under its own header": other.object,
	}
	for at := range end - manifest.ChecksumLen {
		object := slices.Clone(p.object)
		object[at] ^= 0x04
		forged[fmt.Sprint("byte ", at)] = object
	}
	for name, object := range forged {
		object = withChecksum(object, end)
		table, err := blockstore.DecodePack(object, packOwner, 1, key)
		if !errors.Is(err, manifest.ErrCorrupt) && !errors.Is(err, manifest.ErrVersion) {
			t.Errorf("%s: %v, %v", name, table, err)
		}
	}
	// A pack that was rewritten may be served as it was before, with all of its
	// slots, and a reader that has a ref to a dead one gets what that held.
	p.put(t, p.object)
	p.mustRead(t, newReader(p.store, key), p.refs)
}

func TestRewriteKeepsSealedSlotsVerbatim(t *testing.T) {
	key := newKey(t, 1)
	p := newTestPack(t, blockstore.NewMem(), key, 1, 6)
	salts := map[string]bool{string(p.object[32:64]): true}
	for _, dead := range []uint16{0, 3} {
		if err := p.rewrite(dead); err != nil {
			t.Fatal(err)
		}
		object := p.get(t)
		if salt := string(object[32:64]); salts[salt] {
			t.Error("the table is sealed under a salt that was used before")
		} else {
			salts[salt] = true
		}
	}
	object := p.get(t)
	table, err := blockstore.DecodePack(object, packOwner, 1, key)
	if err != nil {
		t.Fatal(err)
	}
	for i, slot := range table.Slots {
		if slot.Dead {
			continue
		}
		if !bytes.Equal(object[slot.Offset:][:table.StoredLen(i)], slotBytes(p, i)) {
			t.Errorf("slot %d was sealed anew", i)
		}
	}
	for _, dead := range []int{0, 3} {
		if bytes.Contains(object, slotBytes(p, dead)[:16]) {
			t.Errorf("slot %d is dead and still there", dead)
		}
	}
}

// A host without the key, or with one of a lineage that is not encrypted, is told.
func TestPackOfAnotherKindOfLineageIsRefused(t *testing.T) {
	key := newKey(t, 1)
	for name, c := range map[string]struct {
		pack *testPack
		with string
		want error
		says string
	}{
		"sealed, read without a key": {newTestPack(t, blockstore.NewMem(), key, 1, 3), "none", manifest.ErrVersion, "sealed"},
		"plain, read with a key":     {newTestPack(t, blockstore.NewMem(), nil, 1, 3), "key", manifest.ErrCorrupt, "not sealed"},
		"sealed, the wrong key":      {newTestPack(t, blockstore.NewMem(), key, 1, 3), "other", manifest.ErrCorrupt, "do not authenticate"},
	} {
		with := key
		switch c.with {
		case "none":
			with = nil
		case "other":
			with = newKey(t, 2)
		}
		_, err := blockstore.ReadSlotTable(t.Context(), c.pack.store, packOwner, 1, with)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: table: %v", name, err)
		}
		before := c.pack.get(t)
		if _, err := blockstore.RewritePack(t.Context(), c.pack.store, packOwner, 1, with, func(uint16) bool { return false }); !errors.Is(err, c.want) {
			t.Errorf("%s: rewrite: %v", name, err)
		}
		if !bytes.Equal(c.pack.get(t), before) {
			t.Errorf("%s: it was rewritten", name)
		}
		errs, err := c.pack.read(newReader(c.pack.store, with), c.pack.refs)
		if err != nil {
			t.Fatal(err)
		}
		for i, err := range errs {
			if !errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("%s: slot %d: %v", name, i, err)
			}
		}
	}
}

// A repair that has blocks from elsewhere seals them, and as the same slots.
func TestRepairSealsWhatItFinds(t *testing.T) {
	key := newKey(t, 1)
	p := newBrokenPack(t, key)
	bad := bytes.Clone(p.good)
	at := int(p.needed[1].Offset)
	clear(bad[at : at+int(p.needed[1].Length)])
	p.put(bad)
	if r, err := p.repair(nil); err != nil || len(r.Repaired) != 1 {
		t.Fatalf("%+v, %v", r, err)
	}
	for _, block := range p.blocks {
		if bytes.Contains(p.get(), block[:16]) {
			t.Error("a block is in clear")
		}
	}
	for i, need := range p.needed {
		if same := bytes.Contains(p.get(), p.good[need.Offset:][:need.Length]); same == (i == 1) {
			t.Errorf("slot %d is as it was: %t", i, same)
		}
	}
	reader := &blockstore.BlockReader{Store: p.store, Lineage: p.owner.Lineage, BlockSize: packBlockSize, Key: key}
	for _, need := range p.needed {
		block := make([]byte, packBlockSize)
		err := reader.ReadRun(t.Context(), []manifest.Ref{need.Ref}, func(int) []byte { return block }, func(int, error) {})
		if err != nil || !bytes.Equal(block, p.blocks[need.Hash]) {
			t.Errorf("slot %d: %v", need.Slot, err)
		}
	}
	// Without the key nothing is touched.
	p.put(bad)
	p.store.Reset()
	_, err := p.repair(func(r *blockstore.PackRepair) { r.Key, r.Create = nil, false; r.Find = nobodyHas })
	if p.store.Count(blockstoretest.OpPut) > 0 || !bytes.Equal(p.get(), bad) {
		t.Errorf("repaired without the key: %v", err)
	}
}

func nobodyHas(blockstore.NeededSlot, []byte) bool { return false }

// While anything happens to sealed packs, reads with the wrong ref hand out nothing.
func TestHostileHintsHandOutNoOtherSlot(t *testing.T) {
	key := newKey(t, 1)
	store := blockstoretest.NewFaulty(blockstore.NewMem())
	p := newTestPack(t, store, key, 1, 6)
	for i, ref := range p.refs {
		for j, other := range p.refs {
			lie := ref
			lie.Offset, lie.Length, lie.Raw = other.Offset, other.Length, other.Raw
			block := make([]byte, packBlockSize)
			err := newReader(store, key).ReadRun(context.Background(), []manifest.Ref{lie}, func(int) []byte { return block }, func(int, error) {})
			if err != nil || !bytes.Equal(block, p.blocks[i]) {
				t.Errorf("slot %d, said to lie where %d does: %v", i, j, err)
			}
		}
	}
}
