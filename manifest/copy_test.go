package manifest_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
)

const (
	copyOf     = `{"version": 1, "id": "1a2b3c4d", "blockSize": 524288, "created": "2026-11-22T13:14:15Z", "copyOf": {"store": "000102030405060708090a0b0c0d0e0f", "lineage": "1a2b3c4e"}}`
	copiedFrom = `{"version": 1, "snapshot": "snap-1a2b3c4d123456789", "size": 512, "blockSize": 65536, "nonce": "000102030405060708090a0b0c0d0e0f",
		"start": "2026-11-22T13:14:15Z", "copiedFrom": {"store": "000102030405060708090a0b0c0d0e0f", "snapshot": "snap-1a2b3c4e123456789"}}`
)

func TestRecordsOfCopiesNameTheirSource(t *testing.T) {
	lineage, err := manifest.DecodeRecord[manifest.LineageRecord]([]byte(copyOf))
	if err != nil || lineage.CopyOf == nil || lineage.CopyOf.Lineage != 0x1a2b3c4e {
		t.Errorf("%+v, %v", lineage, err)
	}
	intent, err := manifest.DecodeRecord[manifest.Intent]([]byte(copiedFrom))
	if err != nil || intent.CopiedFrom == nil || intent.CopiedFrom.Snapshot.String() != "snap-1a2b3c4e123456789" {
		t.Errorf("%+v, %v", intent, err)
	}
}

func TestRecordsOfCopiesWithoutAProperSourceAreRefused(t *testing.T) {
	for name, wrong := range map[string]func(string) string{
		"store": func(s string) string {
			return strings.Replace(s, `{"store": "000102030405060708090a0b0c0d0e0f"`, `{"store": "00"`, 1)
		},
		"source": func(s string) string { return strings.Replace(s, `1a2b3c4e`, `00000000`, 1) },
	} {
		if _, err := manifest.DecodeRecord[manifest.LineageRecord]([]byte(wrong(copyOf))); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("lineage with a wrong %s: %v", name, err)
		}
		if _, err := manifest.DecodeRecord[manifest.Intent]([]byte(wrong(copiedFrom))); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("intent with a wrong %s: %v", name, err)
		}
	}
}
