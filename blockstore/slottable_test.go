package blockstore

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// someTable has a compressed, a dead and a raw slot.
func someTable() *SlotTable {
	t := &SlotTable{
		Owner: manifest.SnapshotID{Lineage: 0x1a2b3c4d, Serial: 0x123456789}, Pack: 7, BlockSize: manifest.MinBlockSize,
		Slots: []Slot{
			{Block: 5, Length: 1000, Checksum: 0xdeadbeef},
			{Block: 6, Dead: true},
			{Block: 1 << 40, Length: manifest.MinBlockSize, Checksum: 0xcafebabe, Raw: true},
		},
	}
	t.layOut()
	return t
}

func (t *SlotTable) encode() []byte {
	b := make([]byte, t.encodedLen())
	t.encodeTo(b)
	return b
}

// patched returns an encoded table with other bytes at an offset, and the
// right checksum again.
func patched(table []byte, off int, with ...byte) []byte {
	p := slices.Clone(table)
	copy(p[off:], with)
	return packFormat().AppendChecksum(p[:len(p)-manifest.ChecksumLen])
}

func TestSlotTableDecodesToWhatWasEncoded(t *testing.T) {
	want := someTable()
	encoded := want.encode()
	got, need, err := DecodeSlotTable(append(slices.Clone(encoded), "the data of the pack"...), nil)
	if err != nil || need != len(encoded) {
		t.Fatalf("need %d of %d, %v", need, len(encoded), err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if n := got.PackLen(); n != int64(len(encoded))+1000+manifest.MinBlockSize {
		t.Errorf("pack is %d bytes long", n)
	}
}

// sealedTable is someTable, sealed.
func sealedTable(t testing.TB) *SlotTable {
	t.Helper()
	key, err := crypt.NewKey(bytes.Repeat([]byte{1}, crypt.KeyLen))
	if err != nil {
		t.Fatal(err)
	}
	table := someTable()
	table.Key = key
	table.layOut()
	return table
}

func TestSealedSlotTableDecodesToWhatWasEncoded(t *testing.T) {
	want := sealedTable(t)
	encoded := want.encode()
	got, need, err := DecodeSlotTable(encoded, want.Key)
	if err != nil || need != len(encoded) {
		t.Fatalf("need %d of %d, %v", need, len(encoded), err)
	}
	if got.Owner != want.Owner || got.Pack != want.Pack || got.BlockSize != want.BlockSize || !slices.Equal(got.Slots, want.Slots) || got.Key != want.Key {
		t.Errorf("%+v, not %+v", got, want)
	}
	if n := got.PackLen(); n != int64(len(encoded))+1000+manifest.MinBlockSize+2*crypt.Overhead {
		t.Errorf("pack is %d bytes long", n)
	}
	for n := range encoded {
		table, need, err := DecodeSlotTable(encoded[:n], want.Key)
		if table != nil || err != nil || need <= n || need > len(encoded) {
			t.Fatalf("%d of %d bytes: %v, need %d, %v", n, len(encoded), table, need, err)
		}
	}
}

func TestPrefixTooShortForATableTellsHowMuchItNeeds(t *testing.T) {
	encoded := someTable().encode()
	for n := range encoded {
		table, need, err := DecodeSlotTable(encoded[:n], nil)
		if table != nil || err != nil || need <= n || need > len(encoded) {
			t.Fatalf("%d of %d bytes: %v, need %d, %v", n, len(encoded), table, need, err)
		}
	}
}

func TestHostileSlotTableIsRefused(t *testing.T) {
	good := someTable().encode()
	const lineage, serial, pack, blockSize, slots, first = 8, 12, 20, 24, 28, 32
	const second, third = first + slotLen, first + 2*slotLen
	u32 := func(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
	u64 := func(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }
	for name, bad := range map[string][]byte{
		"magic":                   patched(good, 0, 'X'),
		"no lineage":              patched(good, lineage, u32(0)...),
		"no serial":               patched(good, serial, u64(0)...),
		"serial too great":        patched(good, serial, u64(manifest.MaxSerial+1)...),
		"pack too great":          patched(good, pack, u32(manifest.MaxPack+1)...),
		"block size":              patched(good, blockSize, u32(manifest.MinBlockSize+1)...),
		"block size of 32 bits":   patched(good, blockSize, u32(1<<31)...),
		"no slots":                patched(good, slots, u32(0)...),
		"too many slots":          patched(good, slots, u32(MaxPackSlots+1)...),
		"fewer slots than bytes":  patched(good, slots, u32(2)...),
		"block below zero":        patched(good, first, u64(1<<63)...),
		"block past all devices":  patched(good, third, u64(1<<47)...),
		"block twice":             patched(good, second, u64(5)...),
		"blocks out of order":     patched(good, third, u64(4)...),
		"offset before its place": patched(good, first+8, u32(uint32(len(good)-1))...),
		"offset after its place":  patched(good, third+8, u32(uint32(len(good)+1001))...),
		"length zero":             patched(good, first+12, u32(0)...),
		"length of a block":       patched(good, first+12, u32(manifest.MinBlockSize)...),
		"raw and shorter":         patched(good, third+12, u32(manifest.MinBlockSize-1)...),
		"raw and dead":            patched(good, second+20, u32(slotRaw|slotDead)...),
		"dead with an offset":     patched(good, second+8, 1),
		"dead with a checksum":    patched(good, second+16, 1),
		"unknown flag":            patched(good, first+20, u32(4)...),
		"checksum":                append(slices.Clone(good[:len(good)-1]), good[len(good)-1]^1),
	} {
		if table, _, err := DecodeSlotTable(bad, nil); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: %v, %v", name, table, err)
		}
	}
	for want, bad := range map[string][]byte{
		"version 2": patched(good, 4, 2, 0),
		"sealed":    patched(good, 6, 1, 0),
		"0x4000":    patched(good, 6, 0, 0x40),
	} {
		if _, _, err := DecodeSlotTable(bad, nil); !errors.Is(err, manifest.ErrVersion) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}

func TestPackLargerThanItsBoundIsRefused(t *testing.T) {
	table := someTable()
	table.BlockSize = manifest.MaxBlockSize
	table.Slots = nil
	for i := range int64(8) { // 8 blocks fill the bound, and the table is on top
		table.Slots = append(table.Slots, Slot{Block: i, Length: manifest.MaxBlockSize, Raw: true})
	}
	table.layOut()
	if err := table.validate(); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("pack of %d bytes: %v", table.PackLen(), err)
	}
	table.Slots = table.Slots[:7]
	table.layOut()
	if err := table.validate(); err != nil {
		t.Errorf("pack of %d bytes: %v", table.PackLen(), err)
	}
}

func FuzzDecodeSlotTable(f *testing.F) {
	f.Add(someTable().encode())
	f.Fuzz(func(t *testing.T, data []byte) {
		// As it is, and with a valid checksum, which a fuzzer does not find.
		if _, need, _ := DecodeSlotTable(data, nil); need > packHeaderLen && need <= len(data) {
			checkSlotTable(t, packFormat().AppendChecksum(slices.Clone(data[:need-manifest.ChecksumLen])))
		}
		checkSlotTable(t, data)
		checkSlotTable(t, packFormat().AppendChecksum(slices.Clone(data)))
	})
}

// checkSlotTable asserts that any bytes are refused, found too short, or
// decode to a table that encodes to the same bytes.
func checkSlotTable(t *testing.T, data []byte) {
	t.Helper()
	table, need, err := DecodeSlotTable(data, nil)
	switch {
	case err != nil:
		if table != nil || !errors.Is(err, manifest.ErrCorrupt) && !errors.Is(err, manifest.ErrVersion) {
			t.Fatalf("%v, %v", table, err)
		}
	case need > MaxSlotTableLen:
		t.Fatalf("need %d bytes", need)
	case table == nil:
		if need <= len(data) {
			t.Fatalf("%d bytes are too few, but %d are needed", len(data), need)
		}
	case !bytes.Equal(table.encode(), data[:need]):
		t.Fatalf("decoded %x, which encodes to %x", data[:need], table.encode())
	}
}

// TestFormatPageAgreesWithTheCode pins the encoding of a slot table to the
// example on the page that specifies it: see the test of the same name in
// manifest.
func TestFormatPageAgreesWithTheCode(t *testing.T) {
	data, err := os.ReadFile("../docs/format.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "```hex pack\n")
	example, _, _ := strings.Cut(rest, "```")
	want, err := hex.DecodeString(regexp.MustCompile(`#.*|\s`).ReplaceAllString(example, ""))
	if err != nil {
		t.Fatal(err)
	}
	if got := someTable().encode(); !bytes.Equal(got, want) {
		t.Errorf("encodes to %x, and the page says %x", got, want)
	}
	for name, bound := range map[string]int{"PackTarget": PackTarget, "MaxSlotTableLen": MaxSlotTableLen} {
		if row := fmt.Sprintf("| `%s` | %d |", name, bound); !strings.Contains(string(data), row) {
			t.Errorf("the page's table of bounds has no row %s", row)
		}
	}
}
