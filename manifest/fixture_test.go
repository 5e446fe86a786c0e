package manifest_test

import (
	"encoding/binary"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
)

// reseal replaces the checksum that an object ends with by the right one, so
// that what is tested is the check behind it.
func reseal(object []byte) []byte {
	body := object[:max(0, len(object)-manifest.ChecksumLen)]
	return binary.LittleEndian.AppendUint32(body[:len(body):len(body)], manifest.Checksum(body))
}

// patched returns a resealed copy of an object with other bytes at an offset.
func patched(object []byte, off int, with ...byte) []byte {
	p := append([]byte(nil), object...)
	copy(p[off:], with)
	return reseal(p)
}

func u16(v uint16) []byte { return binary.LittleEndian.AppendUint16(nil, v) }
func u32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
func u64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

var (
	serials = rapid.Uint64Range(1, manifest.MaxSerial)
	hashes  = rapid.Custom(func(t *rapid.T) manifest.Hash {
		return manifest.Sum(u64(rapid.Uint64().Draw(t, "seed")))
	})
	snapshots = rapid.Custom(func(t *rapid.T) manifest.SnapshotID {
		return manifest.SnapshotID{
			Lineage: manifest.LineageID(rapid.Uint32Min(1).Draw(t, "lineage")),
			Serial:  serials.Draw(t, "serial"),
		}
	})
	// refs are holes and any other valid refs.
	refs = rapid.Custom(func(t *rapid.T) manifest.Ref {
		if rapid.Bool().Draw(t, "hole") {
			return manifest.Ref{}
		}
		r := manifest.Ref{
			Owner: serials.Draw(t, "owner"),
			Pack:  rapid.Uint32Range(0, manifest.MaxPack).Draw(t, "pack"),
			Slot:  rapid.Uint16Range(0, manifest.MaxPackSlots-1).Draw(t, "slot"),
			Raw:   rapid.Bool().Draw(t, "raw"),
			Hash:  hashes.Draw(t, "hash"),
		}
		if r.Raw {
			r.Length = manifest.MinBlockSize << rapid.IntRange(0, 6).Draw(t, "block size")
		} else {
			r.Length = rapid.Uint32Range(1, manifest.MaxBlockSize-1).Draw(t, "length")
		}
		r.Offset = rapid.Uint32Range(0, manifest.MaxPackSize-r.Length).Draw(t, "offset")
		return r
	})
	geometries = rapid.Custom(func(t *rapid.T) manifest.Geometry {
		return manifest.Geometry{
			Size:      rapid.Int64Range(0, manifest.MaxDeviceSize/manifest.SectorSize).Draw(t, "sectors") * manifest.SectorSize,
			BlockSize: manifest.MinBlockSize << rapid.IntRange(0, 6).Draw(t, "block size"),
		}
	})
)

// testRef is some valid ref.
func testRef() manifest.Ref {
	return manifest.Ref{
		Owner: 0xabcdef012, Pack: 7, Slot: 3, Offset: 4096, Length: 1000,
		Hash: manifest.Sum([]byte("block")),
	}
}

// checkCanonical asserts what every decoder of binary objects promises for any
// bytes: it fails, or what it decoded encodes to the same bytes.
func checkCanonical[T interface{ Encode() []byte }](t *testing.T, data []byte, decode func([]byte) (T, error)) {
	t.Helper()
	// As it is, and with a valid checksum, which a fuzzer does not find.
	for _, data := range [][]byte{data, reseal(data)} {
		want := string(data) // a decoder may take ownership
		decoded, err := decode(data)
		if err != nil {
			checkDecodeError(t, err)
			continue
		}
		if got := decoded.Encode(); string(got) != want {
			t.Fatalf("decoded %x, which encodes to %x", want, got)
		}
	}
}
