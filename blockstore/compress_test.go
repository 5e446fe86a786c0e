package blockstore_test

import (
	"bytes"
	"errors"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestBlocksDecompressToWhatWasCompressed(t *testing.T) {
	var c blockstore.Compressor // reused, which must not show
	buffer := make([]byte, packBlockSize)
	rapid.Check(t, func(t *rapid.T) {
		block := testBlock(rapid.Uint64().Draw(t, "seed"))
		stored, raw := c.Compress(buffer[:0], block)
		if raw != (len(stored) == len(block)) || len(stored) > len(block) {
			t.Fatalf("%d bytes stored, raw %v", len(stored), raw)
		}
		got := make([]byte, len(block))
		if err := blockstore.Decompress(got, stored, raw); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, block) {
			t.Fatal("decompressed differs")
		}
	})
}

func TestCompressUsesTheBufferGiven(t *testing.T) {
	var c blockstore.Compressor
	block, buffer := testBlock(1), make([]byte, packBlockSize)
	if stored, raw := c.Compress(buffer[:0], block); raw || &stored[0] != &buffer[0] {
		t.Errorf("compressed elsewhere, raw %v", raw)
	}
	incompressible := testBlock(0)
	if stored, raw := c.Compress(buffer, incompressible); !raw || &stored[0] != &incompressible[0] {
		t.Errorf("block that does not shrink is not stored as it is, raw %v", raw)
	}
}

func TestDecompressFillsABlockOrFails(t *testing.T) {
	var c blockstore.Compressor
	block := testBlock(1)
	stored, _ := c.Compress(nil, block)
	for name, test := range map[string]struct {
		n      int
		stored []byte
		raw    bool
	}{
		"nothing":             {packBlockSize, nil, false},
		"raw nothing":         {packBlockSize, nil, true},
		"raw too short":       {packBlockSize, block[1:], true},
		"raw too long":        {packBlockSize - 1, block, true},
		"compressed as raw":   {packBlockSize, stored, true},
		"raw as compressed":   {packBlockSize, testBlock(0), false},
		"cut short":           {packBlockSize, stored[:len(stored)-1], false},
		"less than a block":   {packBlockSize + 1, stored, false},
		"more than a block":   {packBlockSize - 1, stored, false},
		"followed by garbage": {packBlockSize, append(bytes.Clone(stored), 0xff), false},
	} {
		if err := blockstore.Decompress(make([]byte, test.n), test.stored, test.raw); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzDecompress(f *testing.F) {
	var c blockstore.Compressor
	for seed := range uint64(3) {
		stored, raw := c.Compress(nil, testBlock(seed)[:1000])
		f.Add(stored, raw)
	}
	f.Fuzz(func(t *testing.T, stored []byte, raw bool) {
		const n, guard = 1000, 64
		backing := bytes.Repeat([]byte{0xa5}, n+2*guard)
		want := bytes.Clone(stored)
		if err := blockstore.Decompress(backing[guard:guard+n], stored, raw); err != nil && !errors.Is(err, manifest.ErrCorrupt) {
			t.Fatal(err)
		}
		if !bytes.Equal(stored, want) {
			t.Fatal("the input was changed")
		}
		around := append(bytes.Clone(backing[:guard]), backing[guard+n:]...)
		if !bytes.Equal(around, bytes.Repeat([]byte{0xa5}, 2*guard)) {
			t.Fatal("bytes around the block were changed")
		}
	})
}

func BenchmarkCompress(b *testing.B) {
	for name, seed := range map[string]uint64{"compressible": 1, "incompressible": 0} {
		b.Run(name, func(b *testing.B) {
			var c blockstore.Compressor
			block, buffer := testBlock(seed), make([]byte, packBlockSize)
			b.SetBytes(packBlockSize)
			b.ReportAllocs()
			for b.Loop() {
				c.Compress(buffer, block)
			}
		})
	}
}
