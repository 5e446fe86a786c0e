package blockstore_test

import (
	"bytes"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestPackBeginsWithTheTableThatItsRefsSay(t *testing.T) {
	plainAndSealed(t, testPackBeginsWithTheTableThatItsRefsSay)
}

func testPackBeginsWithTheTableThatItsRefsSay(t *testing.T, key *crypt.Key) {
	p := newTestPack(t, blockstore.NewMem(), key, 7, 20)
	table, err := blockstore.ReadSlotTable(t.Context(), p.store, packOwner, 7, key)
	if err != nil {
		t.Fatal(err)
	}
	if table.Owner != packOwner || table.Pack != 7 || table.BlockSize != packBlockSize || table.PackLen() != int64(len(p.object)) {
		t.Errorf("table of pack %d of %s, blocks of %d, %d bytes of %d", table.Pack, table.Owner, table.BlockSize, table.PackLen(), len(p.object))
	}
	raw := 0
	for i, ref := range p.refs {
		slot := table.Slots[i]
		want := blockstore.Slot{
			Block: 10 * int64(i), Offset: ref.Offset, Length: ref.Length, Raw: ref.Raw,
			Checksum: manifest.Checksum(p.object[ref.Offset:][:table.StoredLen(i)]),
		}
		if slot != want {
			t.Errorf("slot %d is %+v, not %+v", i, slot, want)
		}
		if err := ref.Validate(); err != nil || ref.Owner != packOwner.Serial || ref.Pack != 7 || int(ref.Slot) != i {
			t.Errorf("ref %+v of slot %d: %v", ref, i, err)
		}
		block := make([]byte, packBlockSize)
		if err := blockstore.DecodeSlot(block, p.object[ref.Offset:][:table.StoredLen(i)], ref.Raw, key, packOwner, 7, uint16(i)); err != nil || !bytes.Equal(block, p.blocks[i]) {
			t.Errorf("slot %d does not hold its block: %v", i, err)
		}
		if ref.Raw {
			raw++
		}
	}
	if raw == 0 || raw == len(p.refs) {
		t.Errorf("%d of %d slots are raw: the test tests half of it", raw, len(p.refs))
	}
}

// TestFullPackKeepsItsBounds fills packs to both of their limits.
func TestFullPackKeepsItsBounds(t *testing.T) { plainAndSealed(t, testFullPackKeepsItsBounds) }

func testFullPackKeepsItsBounds(t *testing.T, key *crypt.Key) {
	for name, test := range map[string]struct {
		blockSize, stored int
		raw               bool
		slots             int
	}{
		"by bytes, largest blocks":  {manifest.MaxBlockSize, manifest.MaxBlockSize, true, 4},
		"by bytes, just below them": {manifest.MaxBlockSize, blockstore.PackTarget/4 - 1 - key.Overhead(), false, 5},
		"by slots":                  {manifest.MinBlockSize, 100, false, blockstore.MaxPackSlots},
	} {
		b := blockstore.NewPackBuilder(packOwner, 0, test.blockSize, key)
		stored := make([]byte, test.stored)
		for !b.Full() {
			b.Add(int64(b.Slots()), manifest.Hash{}, stored, test.raw)
		}
		if b.Slots() != test.slots || b.Len() != test.slots*(test.stored+key.Overhead()) {
			t.Errorf("%s: full at %d slots and %d bytes", name, b.Slots(), b.Len())
		}
		object, refs := b.Finish()
		if len(object) > blockstore.MaxPackSize || len(refs) != test.slots {
			t.Errorf("%s: %d bytes, %d refs", name, len(object), len(refs))
		}
		table, need, err := blockstore.DecodeSlotTable(object, key)
		if err != nil || need > blockstore.MaxSlotTableLen || table.PackLen() != int64(len(object)) {
			t.Errorf("%s: table of %d bytes, %v", name, need, err)
		}
	}
}

func TestMisuseOfAPackBuilderPanics(t *testing.T) {
	stored := make([]byte, 100)
	for name, misuse := range map[string]func(b *blockstore.PackBuilder){
		"block twice":               func(b *blockstore.PackBuilder) { b.Add(5, manifest.Hash{}, stored, false) },
		"descending":                func(b *blockstore.PackBuilder) { b.Add(4, manifest.Hash{}, stored, false) },
		"raw and short":             func(b *blockstore.PackBuilder) { b.Add(6, manifest.Hash{}, stored, true) },
		"nothing stored":            func(b *blockstore.PackBuilder) { b.Add(6, manifest.Hash{}, nil, false) },
		"not shorter than a block":  func(b *blockstore.PackBuilder) { b.Add(6, manifest.Hash{}, make([]byte, packBlockSize), false) },
		"finishing an empty one":    func(*blockstore.PackBuilder) { blockstore.NewPackBuilder(packOwner, 0, packBlockSize, nil).Finish() },
		"more slots than there are": fillBeyond,
	} {
		b := blockstore.NewPackBuilder(packOwner, 0, packBlockSize, nil)
		b.Add(5, manifest.Hash{}, stored, false)
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			misuse(b)
		}()
	}
}

func fillBeyond(b *blockstore.PackBuilder) {
	for i := range int64(blockstore.MaxPackSlots) {
		b.Add(6+i, manifest.Hash{}, []byte{1}, false)
	}
}
