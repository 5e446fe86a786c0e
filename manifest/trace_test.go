package manifest_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
)

func testTrace() manifest.Trace { return manifest.Trace{0, 1, 2, 1000, 999, 1000} }

func encodedTrace(tb testing.TB, t manifest.Trace) []byte {
	tb.Helper()
	data, err := t.Encode()
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

func TestTraceKeepsItsOrder(t *testing.T) {
	last := int64(manifest.MaxDeviceSize / manifest.MinBlockSize)
	rapid.Check(t, func(t *rapid.T) {
		trace := manifest.Trace(rapid.SliceOf(rapid.OneOf(rapid.Int64Range(0, last), rapid.Int64Range(0, 2000))).Draw(t, "blocks"))
		data, err := trace.Encode()
		if err != nil {
			t.Fatal(err)
		}
		decoded, err := manifest.DecodeTrace(data)
		if err != nil || !slices.Equal(decoded, trace) {
			t.Errorf("decoded %v, %v", decoded, err)
		}
	})
}

func TestTraceInAddressOrderTakesAByteABlock(t *testing.T) {
	trace := make(manifest.Trace, manifest.MaxTraceBlocks)
	for i := range trace {
		trace[i] = int64(i)
	}
	data := encodedTrace(t, trace)
	if len(data) > len(trace)+100 {
		t.Errorf("%d bytes for %d blocks", len(data), len(trace))
	}
	if decoded, err := manifest.DecodeTrace(data); err != nil || len(decoded) != len(trace) {
		t.Errorf("decoded %d blocks, %v", len(decoded), err)
	}
	if _, err := append(trace, 0).Encode(); err == nil {
		t.Error("a block too many is encoded")
	}
}

func TestTraceOfNoDeviceIsNotEncoded(t *testing.T) {
	for _, block := range []int64{-1, manifest.MaxDeviceSize/manifest.MinBlockSize + 1} {
		if _, err := (manifest.Trace{block}).Encode(); err == nil {
			t.Errorf("block %d is encoded", block)
		}
	}
}

func TestHostileTraceIsRefused(t *testing.T) {
	good := encodedTrace(t, testTrace())
	const count, blocks = 8, 12
	for name, bad := range map[string][]byte{
		"empty":                  {},
		"cut short":              reseal(good[:len(good)-1]),
		"a byte too many":        reseal(append(slices.Clone(good), 0)),
		"more blocks than bytes": patched(good, count, u32(100)...),
		"fewer blocks":           patched(good, count, u32(5)...),
		"not the shortest":       patched(good, blocks, 0x80, 0),
		"before the first":       patched(good, blocks, 1),
		"without its end":        patched(good, blocks+6, 0xff),
	} {
		if _, err := manifest.DecodeTrace(bad); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := manifest.DecodeTrace(patched(good, 4, u16(2)...)); !errors.Is(err, manifest.ErrVersion) {
		t.Errorf("another version: %v", err)
	}
}

func FuzzDecodeTrace(f *testing.F) {
	f.Add(encodedTrace(f, testTrace()))
	f.Add(encodedTrace(f, nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, data := range [][]byte{data, reseal(data)} {
			trace, err := manifest.DecodeTrace(data)
			if err != nil {
				checkDecodeError(t, err)
				continue
			}
			if again, err := trace.Encode(); err != nil || !bytes.Equal(again, data) {
				t.Fatalf("decoded %x, which encodes to %x, %v", data, again, err)
			}
		}
	})
}
