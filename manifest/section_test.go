package manifest_test

import (
	"cmp"
	"errors"
	"maps"
	"slices"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
)

type slotID struct {
	pack uint32
	slot uint16
}

// TestSectionBehavesAsASetOfSlots drives a section and a map side by side.
func TestSectionBehavesAsASetOfSlots(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const number = 3
		owner := serials.Draw(t, "owner")
		section, model := manifest.NewSection(owner, number), make(map[slotID]uint32)
		packs := rapid.Uint32Range(number*manifest.SectionPacks-1, (number+1)*manifest.SectionPacks)
		slots := rapid.Uint16Range(0, 20)
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				id := slotID{packs.Draw(t, "pack"), slots.Draw(t, "slot")}
				length := rapid.Uint32Range(1, manifest.MaxBlockSize).Draw(t, "length")
				err := section.Add(id.pack, id.slot, length)
				if _, live := model[id]; live || id.pack/manifest.SectionPacks != number {
					if !errors.Is(err, manifest.ErrCorrupt) {
						t.Fatalf("added %+v: %v", id, err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				model[id] = length
			},
			"remove": func(t *rapid.T) {
				ids := slices.SortedFunc(maps.Keys(model), func(a, b slotID) int {
					return cmp.Or(cmp.Compare(a.pack, b.pack), cmp.Compare(a.slot, b.slot))
				})
				if len(ids) == 0 {
					return
				}
				id := rapid.SampledFrom(ids).Draw(t, "live")
				if err := section.Remove(id.pack, id.slot); err != nil {
					t.Fatal(err)
				}
				delete(model, id)
				if err := section.Remove(id.pack, id.slot); !errors.Is(err, manifest.ErrCorrupt) {
					t.Fatalf("removed %+v twice: %v", id, err)
				}
			},
			"": func(t *rapid.T) {
				decoded, err := manifest.DecodeSection(section.Encode())
				if err != nil {
					t.Fatal(err)
				}
				for _, s := range []*manifest.Section{section, section.Clone(), decoded} {
					checkSection(t, s, model)
				}
				if section.Hash() != decoded.Hash() {
					t.Fatal("decoded has another hash: its encoding depends on its past")
				}
			},
		})
	})
}

func checkSection(t *rapid.T, s *manifest.Section, model map[slotID]uint32) {
	got := make(map[slotID]uint32)
	var bytes int64
	last := -1
	for pack := range s.Packs() {
		if int(pack.Pack) <= last || len(pack.Slots) == 0 {
			t.Fatalf("pack %d after %d with %d slots", pack.Pack, last, len(pack.Slots))
		}
		last = int(pack.Pack)
		for _, slot := range pack.Slots {
			got[slotID{pack.Pack, slot.Slot}] = slot.Length
			bytes += int64(slot.Length)
			if !s.Live(pack.Pack, slot.Slot) {
				t.Fatalf("slot %d of pack %d is not live", slot.Slot, pack.Pack)
			}
		}
	}
	if diff := gocmp.Diff(model, got); diff != "" {
		t.Fatal(diff)
	}
	if s.Bytes() != bytes || s.Empty() != (len(model) == 0) {
		t.Fatalf("%d bytes, empty %v, with %d bytes in %d slots", s.Bytes(), s.Empty(), bytes, len(model))
	}
}

func TestSectionRefusesWhatIsOutOfRange(t *testing.T) {
	s := manifest.NewSection(1, 1)
	for name, err := range map[string]error{
		"pack of another section": s.Add(manifest.SectionPacks-1, 0, 1),
		"slot too great":          s.Add(manifest.SectionPacks, manifest.MaxPackSlots, 1),
		"no length":               s.Add(manifest.SectionPacks, 0, 0),
		"length too great":        s.Add(manifest.SectionPacks, 0, manifest.MaxBlockSize+1),
		"pack past the last":      manifest.NewSection(1, manifest.MaxPack/manifest.SectionPacks).Add(manifest.MaxPack+1, 0, 1),
		"removal of dead":         s.Remove(manifest.SectionPacks, 5),
	} {
		if !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !s.Empty() {
		t.Error("something was added")
	}
}

func TestLargestSectionFitsItsBound(t *testing.T) {
	s := manifest.NewSection(manifest.MaxSerial, 0)
	for pack := range uint32(manifest.SectionPacks) {
		for slot := range uint16(manifest.MaxPackSlots) {
			if err := s.Add(pack, slot, manifest.MaxBlockSize); err != nil {
				t.Fatal(err)
			}
		}
	}
	encoded := s.Encode()
	if len(encoded) != manifest.MaxSectionLength || len(encoded) > manifest.LeavesPartSize {
		t.Errorf("%d bytes, with a bound of %d and parts of %d", len(encoded), manifest.MaxSectionLength, manifest.LeavesPartSize)
	}
	if decoded, err := manifest.DecodeSection(encoded); err != nil || decoded.Bytes() != s.Bytes() {
		t.Errorf("decoded %v, %v", decoded, err)
	}
}

// testSection has three live slots in two packs.
func testSection(tb testing.TB) *manifest.Section {
	tb.Helper()
	s := manifest.NewSection(0x123456789, 2)
	for _, err := range []error{s.Add(2048, 0, 100), s.Add(2048, 9, 200), s.Add(2050, 1, 300)} {
		if err != nil {
			tb.Fatal(err)
		}
	}
	return s
}

func TestHostileSectionIsRefused(t *testing.T) {
	good := testSection(t).Encode()
	const packs, first, bitmap, lengths = 20, 24, 28, 30
	for name, bad := range map[string][]byte{
		"empty":                      {},
		"cut short":                  reseal(good[:len(good)-1]),
		"a byte too many":            reseal(append(slices.Clone(good), 0)),
		"no owner":                   patched(good, 8, u64(0)...),
		"number too great":           patched(good, 16, u32(manifest.MaxPack/manifest.SectionPacks+1)...),
		"too many packs":             patched(good, packs, u32(manifest.SectionPacks+1)...),
		"more packs than bytes":      patched(good, packs, u32(3)...),
		"fewer packs than bytes":     patched(good, packs, u32(1)...),
		"packs out of order":         patched(good, first, u16(3)...),
		"pack twice":                 patched(good, first, u16(2)...),
		"pack of the next section":   patched(good, first, u16(manifest.SectionPacks)...),
		"no bitmap":                  patched(good, first+2, u16(0)...),
		"bitmap of too many slots":   patched(good, first+2, u16(manifest.MaxPackSlots/8+1)...),
		"bitmap ends in a zero byte": patched(good, bitmap+1, 0),
		"length zero":                patched(good, lengths, u32(0)...),
		"length too great":           patched(good, lengths, u32(manifest.MaxBlockSize+1)...),
	} {
		if _, err := manifest.DecodeSection(bad); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzDecodeSection(f *testing.F) {
	f.Add(testSection(f).Encode())
	f.Add(manifest.NewSection(1, 0).Encode())
	f.Fuzz(func(t *testing.T, data []byte) { checkCanonical(t, data, manifest.DecodeSection) })
}
