package manifest_test

import (
	"errors"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
)

func TestKeysAreWhatTheFormatSays(t *testing.T) {
	const id = "snap-1a2b3c4d000000005"
	s, err := manifest.ParseSnapshotID(id)
	if err != nil {
		t.Fatal(err)
	}
	for got, want := range map[string]string{
		manifest.StoreKey():                                      "store.json",
		manifest.LineageKey(s.Lineage):                           "lineages/1a2b3c4d",
		manifest.IntentKey(s):                                    "intents/" + id,
		manifest.ProgressKey(s):                                  "progress/" + id,
		manifest.OutcomeKey(s):                                   "outcomes/" + id,
		manifest.TombstoneKey(s):                                 "tombstones/" + id,
		manifest.MetaKey(s):                                      "meta/" + id,
		manifest.PinPrefix(s):                                    "pins/" + id + "/",
		manifest.PinKey(s, "vol-0123"):                           "pins/" + id + "/vol-0123",
		manifest.DataPrefix(s):                                   "data/" + id + "/",
		manifest.PackKey(s, 42):                                  "data/" + id + "/packs/00000042",
		manifest.LeavesPrefix(s):                                 "data/" + id + "/leaves/",
		manifest.LeavesKey(s, 42):                                "data/" + id + "/leaves/00000042",
		manifest.RootKey(s):                                      "data/" + id + "/root",
		manifest.KindPrefix(manifest.KindIntents):                "intents/",
		manifest.LineagePrefix(manifest.KindIntents, s.Lineage):  "intents/snap-1a2b3c4d",
		manifest.LineagePrefix(manifest.KindData, s.Lineage):     "data/snap-1a2b3c4d",
		manifest.LineagePrefix(manifest.KindOutcomes, s.Lineage): "outcomes/snap-1a2b3c4d",
	} {
		if got != want {
			t.Errorf("key is %q, not %q", got, want)
		}
	}
}

func TestKeysParseBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := snapshots.Draw(t, "snapshot")
		n := rapid.Uint32Range(0, manifest.MaxPack).Draw(t, "number")
		holder := rapid.StringMatching(`[0-9a-z-]{1,64}`).Draw(t, "holder")
		if got, err := manifest.ParseSnapshotKey(manifest.KindOutcomes, manifest.OutcomeKey(s)); got != s || err != nil {
			t.Errorf("outcome key of %v parses to %v, %v", s, got, err)
		}
		if got, gotHolder, err := manifest.ParsePinKey(manifest.PinKey(s, holder)); got != s || gotHolder != holder || err != nil {
			t.Errorf("pin key of %v, %q parses to %v, %q, %v", s, holder, got, gotHolder, err)
		}
		if got, err := manifest.ParsePackKey(manifest.PackKey(s, n)); got != n || err != nil {
			t.Errorf("pack key of %v, %d parses to %d, %v", s, n, got, err)
		}
		if got, err := manifest.ParseLeavesKey(manifest.LeavesKey(s, n)); got != n || err != nil {
			t.Errorf("leaves key of %v, %d parses to %d, %v", s, n, got, err)
		}
		if got, err := manifest.ParseLineageKey(manifest.LineageKey(s.Lineage)); got != s.Lineage || err != nil {
			t.Errorf("lineage key of %v parses to %v, %v", s, got, err)
		}
	})
}

func TestForeignKeysAreRefused(t *testing.T) {
	const id = "snap-1a2b3c4d000000005"
	for _, key := range []string{
		"", "/", "intents", "intents/", "intents/x", "outcomes/" + id, "Intents/" + id, "intents/" + id + "/", id,
	} {
		if s, err := manifest.ParseSnapshotKey(manifest.KindIntents, key); !errors.Is(err, manifest.ErrID) {
			t.Errorf("ParseSnapshotKey(intents, %q) = %v, %v", key, s, err)
		}
	}
	for _, key := range []string{
		"", "pins/" + id, "pins/" + id + "/", "pins/" + id + "/a/b", "pins/" + id + "/A", id + "/vol", "intents/" + id + "/vol",
		"pins/" + id + "/" + strings.Repeat("x", 65),
	} {
		if s, holder, err := manifest.ParsePinKey(key); !errors.Is(err, manifest.ErrID) {
			t.Errorf("ParsePinKey(%q) = %v, %q, %v", key, s, holder, err)
		}
	}
	for _, key := range []string{
		"", "data/" + id + "/packs/1", "data/" + id + "/packs/000000001", "data/" + id + "/packs/0000000x",
		"data/" + id + "/leaves/00000001", "data/" + id + "/00000001", id + "/packs/00000001", "data/" + id + "/root",
		"data/" + id + "/packs/+0000001",
	} {
		if n, err := manifest.ParsePackKey(key); !errors.Is(err, manifest.ErrID) {
			t.Errorf("ParsePackKey(%q) = %d, %v", key, n, err)
		}
	}
}
