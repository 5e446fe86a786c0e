package manifest_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
)

func checkDecodeError(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, manifest.ErrCorrupt) && !errors.Is(err, manifest.ErrVersion) {
		t.Fatalf("error is neither ErrCorrupt nor ErrVersion: %v", err)
	}
}

func TestDrawnIDsParseBack(t *testing.T) {
	for range 1000 {
		lineage := manifest.NewLineageID()
		if got, err := manifest.ParseLineageID(lineage.String()); got != lineage || err != nil {
			t.Fatalf("ParseLineageID(%q) = %v, %v", lineage, got, err)
		}
		snapshot := manifest.NewSnapshotID(lineage)
		if got, err := manifest.ParseSnapshotID(snapshot.String()); got != snapshot || err != nil {
			t.Fatalf("ParseSnapshotID(%q) = %v, %v", snapshot, got, err)
		}
		volume := manifest.NewVolumeID()
		if got, err := manifest.ParseVolumeID(string(volume)); got != volume || err != nil {
			t.Fatalf("ParseVolumeID(%q) = %v, %v", volume, got, err)
		}
	}
}

func TestIDsPrintAsDocumented(t *testing.T) {
	id := manifest.SnapshotID{Lineage: 0x1a2b3c4d, Serial: 0x5}
	if got, want := id.String(), "snap-1a2b3c4d000000005"; got != want {
		t.Errorf("snapshot prints as %q, not %q", got, want)
	}
	if got, want := manifest.LineageID(0xab).String(), "000000ab"; got != want {
		t.Errorf("lineage prints as %q, not %q", got, want)
	}
	if got, want := len(manifest.NewVolumeID()), len("vol-")+17; got != want {
		t.Errorf("volume id has %d characters, not %d", got, want)
	}
}

func TestMalformedIDsAreRefused(t *testing.T) {
	for _, s := range []string{
		"", "snap-", "snap", "1a2b3c4d000000005",
		"snap-1a2b3c4d00000005", "snap-1a2b3c4d0000000005", // a digit fewer, one more
		"snap-1A2B3C4D000000005", "snap-1a2b3c4g000000005", "snap-+a2b3c4d000000005",
		"snap-1a2b3c4d000000000", "snap-00000000000000001", // no serial, no lineage
		"vol-1a2b3c4d000000005", " snap-1a2b3c4d000000005", "snap-1a2b3c4d000000005\n",
	} {
		if id, err := manifest.ParseSnapshotID(s); !errors.Is(err, manifest.ErrID) || !id.IsZero() {
			t.Errorf("ParseSnapshotID(%q) = %v, %v", s, id, err)
		}
	}
	for _, s := range []string{"", "0", "1a2b3c4", "1a2b3c4d5", "00000000", "1A2B3C4D", "-a2b3c4d"} {
		if id, err := manifest.ParseLineageID(s); !errors.Is(err, manifest.ErrID) || id != 0 {
			t.Errorf("ParseLineageID(%q) = %v, %v", s, id, err)
		}
	}
	for _, s := range []string{"", "vol-", "vol-123", "vol-1a2b3c4d00000000G", "snap-1a2b3c4d000000005", "vol-1a2b3c4d0000000050"} {
		if id, err := manifest.ParseVolumeID(s); !errors.Is(err, manifest.ErrID) || id != "" {
			t.Errorf("ParseVolumeID(%q) = %v, %v", s, id, err)
		}
	}
}

func TestIDsThatNameNothingHaveNoText(t *testing.T) {
	for _, v := range []any{manifest.LineageID(0), manifest.SnapshotID{}, manifest.SnapshotID{Lineage: 1, Serial: manifest.MaxSerial + 1}} {
		if text, err := json.Marshal(v); !errors.Is(err, manifest.ErrID) {
			t.Errorf("%#v marshals to %s, %v", v, text, err)
		}
	}
}

func FuzzParseSnapshotID(f *testing.F) {
	f.Add("snap-1a2b3c4d000000005")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := manifest.ParseSnapshotID(s)
		if err != nil {
			if !errors.Is(err, manifest.ErrID) || !id.IsZero() {
				t.Fatalf("ParseSnapshotID(%q) = %v, %v", s, id, err)
			}
			return
		}
		if !id.Valid() || id.String() != s {
			t.Fatalf("%q parses to %#v, which prints as %q", s, id, id)
		}
	})
}

func FuzzParseKeys(f *testing.F) {
	id := manifest.SnapshotID{Lineage: 0x1a2b3c4d, Serial: 5}
	f.Add(manifest.IntentKey(id))
	f.Add(manifest.PinKey(id, "vol-1a2b3c4d000000005"))
	f.Add(manifest.PackKey(id, 12))
	f.Add(manifest.LeavesKey(id, 3))
	f.Add(manifest.LineageKey(id.Lineage))
	f.Fuzz(func(t *testing.T, key string) {
		if s, err := manifest.ParseSnapshotKey(manifest.KindIntents, key); err == nil && manifest.IntentKey(s) != key {
			t.Fatalf("%q parses to %v", key, s)
		}
		if s, holder, err := manifest.ParsePinKey(key); err == nil && (manifest.PinKey(s, holder) != key || strings.Contains(holder, "/")) {
			t.Fatalf("%q parses to %v, %q", key, s, holder)
		}
		if n, err := manifest.ParsePackKey(key); err == nil && !strings.HasSuffix(key, fmt.Sprintf("/packs/%08d", n)) {
			t.Fatalf("%q parses to pack %d", key, n)
		}
		if n, err := manifest.ParseLeavesKey(key); err == nil && !strings.HasSuffix(key, fmt.Sprintf("/leaves/%08d", n)) {
			t.Fatalf("%q parses to part %d", key, n)
		}
		if l, err := manifest.ParseLineageKey(key); err == nil && manifest.LineageKey(l) != key {
			t.Fatalf("%q parses to %v", key, l)
		}
	})
}
