package manifest_test

import (
	"errors"
	"math"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
)

// roots are any valid roots of up to 20 leaves and 20 sections.
var roots = rapid.Custom(func(t *rapid.T) *manifest.Root {
	r := &manifest.Root{Snapshot: snapshots.Draw(t, "snapshot"), Geometry: geometries.Draw(t, "geometry")}
	var room int64
	if n := r.Geometry.Leaves(); n > 0 {
		numbers := rapid.SliceOfNDistinct(rapid.Int64Range(0, n-1), 0, int(min(n, 20)), rapid.ID).Draw(t, "leaves")
		slices.Sort(numbers)
		for _, leaf := range numbers {
			blocks := r.Geometry.LeafLen(leaf)
			room += int64(blocks)
			r.Leaves = append(r.Leaves, manifest.LeafRef{
				Leaf: leaf, Owner: serials.Draw(t, "owner"), Hash: hashes.Draw(t, "hash"),
				Offset: offsets(manifest.EncodedLeafLen(blocks)).Draw(t, "offset"),
			})
		}
	}
	r.DataBlocks = rapid.Int64Range(int64(len(r.Leaves)), room).Draw(t, "data blocks")
	for range rapid.IntRange(0, 20).Draw(t, "sections") {
		length := rapid.Uint32Range(28, manifest.MaxSectionLength).Draw(t, "length")
		r.Sections = append(r.Sections, manifest.SectionRef{
			Owner: serials.Draw(t, "owner"), Section: rapid.Uint32Range(0, manifest.MaxPack/manifest.SectionPacks).Draw(t, "section"),
			Home: serials.Draw(t, "home"), Offset: offsets(int(length)).Draw(t, "offset"), Length: length, Hash: hashes.Draw(t, "hash"),
		})
	}
	byOwner := func(a, b manifest.SectionRef) int {
		if a.Owner != b.Owner {
			return int(a.Owner) - int(b.Owner)
		}
		return int(a.Section) - int(b.Section)
	}
	slices.SortFunc(r.Sections, byOwner)
	r.Sections = slices.CompactFunc(r.Sections, func(a, b manifest.SectionRef) bool { return byOwner(a, b) == 0 })
	return r
})

// offsets are where n bytes can lie in a stream of leaves.
func offsets(n int) *rapid.Generator[int64] {
	return rapid.Custom(func(t *rapid.T) int64 {
		part := rapid.Int64Range(0, 1<<40/manifest.LeavesPartSize-1).Draw(t, "part")
		return part*manifest.LeavesPartSize + rapid.Int64Range(0, int64(manifest.LeavesPartSize-n)).Draw(t, "within")
	})
}

func TestRootDecodesToWhatWasEncoded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		root := roots.Draw(t, "root")
		encoded := root.Encode()
		decoded, err := manifest.DecodeRoot(encoded)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(root, decoded, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("decoded differs: %s", diff)
		}
		if root.Hash() != manifest.Sum(encoded) {
			t.Error("the hash is not that of the encoding")
		}
		for _, want := range root.Leaves {
			if got, ok := root.Find(want.Leaf); !ok || got != want {
				t.Errorf("Find(%d) = %+v, %v", want.Leaf, got, ok)
			}
		}
	})
}

// testRoot is a root with two leaves and two sections.
func testRoot() *manifest.Root {
	return &manifest.Root{
		Snapshot:   manifest.SnapshotID{Lineage: 0x1a2b3c4d, Serial: 0x123456789},
		Geometry:   manifest.Geometry{Size: 2<<30 + 512, BlockSize: manifest.DefaultBlockSize},
		DataBlocks: 42,
		Leaves: []manifest.LeafRef{
			{Leaf: 1, Owner: 0x123456789, Offset: manifest.LeavesPartSize, Hash: manifest.Sum([]byte("one"))},
			{Leaf: 4, Owner: 0xabcdef012, Offset: 100, Hash: manifest.Sum([]byte("four"))},
		},
		Sections: []manifest.SectionRef{
			{Owner: 0x123456789, Section: 0, Home: 0x123456789, Offset: manifest.LeavesPartSize + 57360, Length: 1000, Hash: manifest.Sum([]byte("s0"))},
			{Owner: 0xabcdef012, Section: 3, Home: 0x123456789, Offset: 200, Length: 1000, Hash: manifest.Sum([]byte("s3"))},
		},
	}
}

func TestAbsentLeafIsNotFound(t *testing.T) {
	for _, leaf := range []int64{-1, 0, 2, 3, 5, math.MaxInt64} {
		if ref, ok := testRoot().Find(leaf); ok {
			t.Errorf("Find(%d) = %+v", leaf, ref)
		}
	}
}

func TestLeavesPartsAreEveryObjectReferredTo(t *testing.T) {
	got := testRoot().LeavesParts()
	want := []manifest.LeavesPart{
		{Owner: 0x123456789, Part: 0}, // the second section's home
		{Owner: 0x123456789, Part: 1}, // a leaf and the first section
		{Owner: 0xabcdef012, Part: 0},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestInvalidRootIsRefusedAndNotEncoded(t *testing.T) {
	for name, damage := range map[string]func(*manifest.Root){
		"no lineage":               func(r *manifest.Root) { r.Snapshot.Lineage = 0 },
		"no serial":                func(r *manifest.Root) { r.Snapshot.Serial = 0 },
		"serial too great":         func(r *manifest.Root) { r.Snapshot.Serial = manifest.MaxSerial + 1 },
		"size not in sectors":      func(r *manifest.Root) { r.Geometry.Size++ },
		"block size":               func(r *manifest.Root) { r.Geometry.BlockSize++ },
		"fewer blocks than leaves": func(r *manifest.Root) { r.DataBlocks = 1 },
		"more blocks than fit":     func(r *manifest.Root) { r.DataBlocks = 1026 },
		"leaf beyond the device":   func(r *manifest.Root) { r.Leaves[1].Leaf = 5 },
		"leaf twice":               func(r *manifest.Root) { r.Leaves[1].Leaf = 1 },
		"leaves out of order":      func(r *manifest.Root) { r.Leaves[0].Leaf, r.Leaves[1].Leaf = 4, 1 },
		"leaf below zero":          func(r *manifest.Root) { r.Leaves[0].Leaf = -1 },
		"leaf without owner":       func(r *manifest.Root) { r.Leaves[0].Owner = 0 },
		"leaf before the stream":   func(r *manifest.Root) { r.Leaves[0].Offset = -1 },
		"leaf across parts":        func(r *manifest.Root) { r.Leaves[0].Offset = manifest.LeavesPartSize - 57359 },
		"leaf past the stream":     func(r *manifest.Root) { r.Leaves[0].Offset = 1 << 40 },
		"section without owner":    func(r *manifest.Root) { r.Sections[0].Owner = 0 },
		"section without home":     func(r *manifest.Root) { r.Sections[0].Home = 0 },
		"section number":           func(r *manifest.Root) { r.Sections[1].Section = manifest.MaxPack/manifest.SectionPacks + 1 },
		"sections out of order":    func(r *manifest.Root) { slices.Reverse(r.Sections) },
		"section twice":            func(r *manifest.Root) { r.Sections[1] = r.Sections[0] },
		"section too short":        func(r *manifest.Root) { r.Sections[0].Length = 27 },
		"section too long":         func(r *manifest.Root) { r.Sections[0].Length = manifest.MaxSectionLength + 1 },
		"section across parts":     func(r *manifest.Root) { r.Sections[1].Offset = manifest.LeavesPartSize - 999 },
		"section before stream":    func(r *manifest.Root) { r.Sections[1].Offset = math.MinInt64 },
		"section past the stream":  func(r *manifest.Root) { r.Sections[1].Offset = math.MaxInt64 },
		"too long": func(r *manifest.Root) {
			r.Leaves = make([]manifest.LeafRef, manifest.MaxRootLength/48)
		},
	} {
		r := testRoot()
		damage(r)
		if err := r.Validate(); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: encoding it did not panic", name)
				}
			}()
			r.Encode()
		}()
	}
}

// Offsets in an encoded root of what the test below damages.
const (
	rootBlockSize = 28
	rootLeaves    = 40
	rootSections  = 48
	rootEntries   = 52
)

func TestHostileRootIsRefused(t *testing.T) {
	good := testRoot().Encode()
	for name, bad := range map[string][]byte{
		"empty":                   {},
		"a header only":           good[:8],
		"cut short":               reseal(good[:len(good)-1]),
		"a byte too many":         reseal(append(slices.Clone(good), 0)),
		"more leaves than bytes":  patched(good, rootLeaves, u64(3)...),
		"leaves that overflow":    patched(good, rootLeaves, u64(1<<63)...),
		"leaves that wrap around": patched(good, rootLeaves, u64((1<<64-1)/48+3)...),
		"sections beyond bytes":   patched(good, rootSections, u32(1<<32-1)...),
		"block size of 31 bits":   patched(good, rootBlockSize, u32(1<<31)...),
		"sections become leaves":  patched(good, rootLeaves, append(u64(6), u32(0)...)...),
		"first leaf is the last":  patched(good, rootEntries, 4),
	} {
		if _, err := manifest.DecodeRoot(bad); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for i := range good {
		bad := slices.Clone(good)
		bad[i] ^= 0x10
		if _, err := manifest.DecodeRoot(bad); err == nil {
			t.Errorf("accepted with byte %d damaged", i)
		}
	}
}

func FuzzDecodeRoot(f *testing.F) {
	f.Add(testRoot().Encode())
	f.Add((&manifest.Root{
		Snapshot: manifest.SnapshotID{Lineage: 1, Serial: 1},
		Geometry: manifest.Geometry{BlockSize: manifest.MinBlockSize},
	}).Encode())
	f.Fuzz(func(t *testing.T, data []byte) { checkCanonical(t, data, manifest.DecodeRoot) })
}
