package manifest_test

import (
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
)

func TestLeafKeepsWhatWasSet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, manifest.LeafBlocks).Draw(t, "blocks")
		leaf, model := manifest.NewLeaf(n), make([]manifest.Ref, n)
		for range rapid.IntRange(0, 50).Draw(t, "sets") {
			i := rapid.IntRange(0, n-1).Draw(t, "block")
			model[i] = refs.Draw(t, "ref")
			leaf.Set(i, model[i])
		}
		decoded, err := manifest.DecodeLeaf(leaf.Encode())
		if err != nil {
			t.Fatal(err)
		}
		var data int
		for i, want := range model {
			if leaf.Ref(i) != want || decoded.Ref(i) != want {
				t.Fatalf("block %d is %+v, decoded %+v, not %+v", i, leaf.Ref(i), decoded.Ref(i), want)
			}
			if !want.IsHole() {
				data++
			}
		}
		if leaf.Len() != n || decoded.Len() != n {
			t.Errorf("%d blocks, decoded %d, not %d", leaf.Len(), decoded.Len(), n)
		}
		if leaf.DataBlocks() != data || decoded.DataBlocks() != data {
			t.Errorf("%d data blocks, decoded %d, not %d", leaf.DataBlocks(), decoded.DataBlocks(), data)
		}
		if leaf.Hash() != decoded.Hash() || leaf.Hash() != manifest.Sum(leaf.Encode()) {
			t.Error("the hash is not that of the encoding")
		}
		if got := len(leaf.Encode()); got != manifest.EncodedLeafLen(n) {
			t.Errorf("encoded to %d bytes, not %d", got, manifest.EncodedLeafLen(n))
		}
	})
}

func TestCloneOfLeafSharesNothing(t *testing.T) {
	leaf := manifest.NewLeaf(2)
	leaf.Set(0, testRef())
	clone := leaf.Clone()
	clone.Set(0, manifest.Ref{})
	if leaf.Ref(0) != testRef() || leaf.DataBlocks() != 1 || clone.DataBlocks() != 0 {
		t.Error("setting a block of the clone changed the original")
	}
}

func TestReadingALeafAllocatesNothing(t *testing.T) {
	leaf := manifest.NewLeaf(manifest.LeafBlocks)
	leaf.Set(5, testRef())
	var got manifest.Ref
	if n := testing.AllocsPerRun(100, func() { got = leaf.Ref(5) }); n != 0 {
		t.Errorf("Ref allocates %v times", n)
	}
	if got != testRef() {
		t.Errorf("read %+v", got)
	}
	encoded := leaf.Encode()
	if n := testing.AllocsPerRun(100, func() {
		if _, err := manifest.DecodeLeaf(encoded); err != nil {
			t.Fatal(err)
		}
	}); n > 1 {
		t.Errorf("DecodeLeaf allocates %v times", n)
	}
}

// Offsets in an encoded leaf of what the tests below damage.
const (
	leafCount = 8
	leafEntry = 12 // the first one
)

func TestDamagedLeafIsRefused(t *testing.T) {
	leaf := manifest.NewLeaf(3)
	leaf.Set(0, testRef())
	good := leaf.Encode()
	for i := range good {
		for bit := range 8 {
			bad := append([]byte(nil), good...)
			bad[i] ^= 1 << bit
			if _, err := manifest.DecodeLeaf(bad); err == nil {
				t.Fatalf("accepted with bit %d of byte %d flipped", bit, i)
			}
		}
		if _, err := manifest.DecodeLeaf(append([]byte(nil), good[:i]...)); err == nil {
			t.Fatalf("accepted cut to %d bytes", i)
		}
	}
	if _, err := manifest.DecodeLeaf(append(append([]byte(nil), good...), 0)); err == nil {
		t.Error("accepted with a byte too many")
	}
}

func TestHostileLeafIsRefused(t *testing.T) {
	leaf := manifest.NewLeaf(3)
	leaf.Set(0, testRef())
	good := leaf.Encode()
	if _, err := manifest.DecodeLeaf(reseal(good)); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{
		"no blocks":                 patched(good, leafCount, u32(0)...),
		"too many blocks":           patched(good, leafCount, u32(manifest.LeafBlocks+1)...),
		"more blocks than bytes":    patched(good, leafCount, u32(4)...),
		"owner zero":                patched(good, leafEntry, u64(0)...),
		"owner too great":           patched(good, leafEntry, u64(manifest.MaxSerial+1)...),
		"pack too great":            patched(good, leafEntry+8, u32(manifest.MaxPack+1)...),
		"slot too great":            patched(good, leafEntry+12, u16(manifest.MaxPackSlots)...),
		"unknown flag":              patched(good, leafEntry+14, u16(2)...),
		"unknown high flag":         patched(good, leafEntry+14, u16(1<<15)...),
		"raw but no block size":     patched(good, leafEntry+14, u16(1)...),
		"past the largest pack":     patched(good, leafEntry+16, u32(manifest.MaxPackSize-999)...),
		"offset that overflows":     patched(good, leafEntry+16, u32(1<<32-1)...),
		"no length":                 patched(good, leafEntry+20, u32(0)...),
		"length of the largest":     patched(good, leafEntry+20, u32(manifest.MaxBlockSize)...),
		"hole with a hash":          patched(good, leafEntry+56+24, 1),
		"hole with a flag":          patched(good, leafEntry+56+14, u16(1)...),
		"hole with an unknown flag": patched(good, leafEntry+56+14, u16(4)...),
	} {
		if _, err := manifest.DecodeLeaf(bad); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestMisuseOfALeafPanics(t *testing.T) {
	leaf := manifest.NewLeaf(2)
	invalid := testRef()
	invalid.Owner = 0
	for name, misuse := range map[string]func(){
		"no blocks":       func() { manifest.NewLeaf(0) },
		"too many blocks": func() { manifest.NewLeaf(manifest.LeafBlocks + 1) },
		"block beyond":    func() { leaf.Ref(2) },
		"block before":    func() { leaf.Set(-1, manifest.Ref{}) },
		"invalid ref":     func() { leaf.Set(0, invalid) },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			misuse()
		}()
	}
}

func FuzzDecodeLeaf(f *testing.F) {
	leaf := manifest.NewLeaf(2)
	f.Add(leaf.Encode())
	leaf.Set(1, testRef())
	f.Add(leaf.Encode())
	f.Fuzz(func(t *testing.T, data []byte) { checkCanonical(t, data, manifest.DecodeLeaf) })
}

func BenchmarkLeafDecode(b *testing.B) {
	leaf := manifest.NewLeaf(manifest.LeafBlocks)
	for i := range leaf.Len() {
		leaf.Set(i, testRef())
	}
	encoded := leaf.Encode()
	b.SetBytes(int64(len(encoded)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := manifest.DecodeLeaf(encoded); err != nil {
			b.Fatal(err)
		}
	}
}

func TestIsZero(t *testing.T) {
	for _, n := range []int{0, 1, 2, 511, 4096, 65536} {
		p := make([]byte, n)
		if !manifest.IsZero(p) {
			t.Errorf("%d zeros are not", n)
		}
		for i := 0; i < n; i += max(1, n/100) {
			p[i] = 1
			if manifest.IsZero(p) {
				t.Errorf("%d bytes with a 1 at %d are zeros", n, i)
			}
			p[i] = 0
		}
		if n > 0 {
			p[n-1] = 0x80
			if manifest.IsZero(p) {
				t.Errorf("%d bytes with a last one that is not", n)
			}
		}
		for i := range p {
			p[i] = 7 // equal to itself one on
		}
		if n > 0 && manifest.IsZero(p) {
			t.Errorf("%d sevens are zeros", n)
		}
	}
}
