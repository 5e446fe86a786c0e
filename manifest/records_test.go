package manifest_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/manifest"
)

var (
	testID     = manifest.SnapshotID{Lineage: 0x1a2b3c4d, Serial: 0x123456789}
	testParent = manifest.SnapshotID{Lineage: 0x1a2b3c4d, Serial: 0xabcdef012}
	testTime   = time.Date(2026, 11, 22, 13, 14, 15, 0, time.UTC)
)

const (
	testNonce  = "000102030405060708090a0b0c0d0e0f"
	testVolume = manifest.VolumeID("vol-0123456789abcdef0")
)

func testIntent() manifest.Intent {
	return manifest.Intent{
		Version: 1, Snapshot: testID, Parent: &testParent, Volume: testVolume, Size: 1 << 30, BlockSize: manifest.DefaultBlockSize,
		Nonce: testNonce, Start: testTime, Owner: "team-a", Description: "before the upgrade", Tags: map[string]string{"env": "prod"},
	}
}

func testOutcome() manifest.Outcome {
	root := []byte(strings.Repeat("r", 100))
	return manifest.Outcome{
		Version: 1, Snapshot: testID, State: manifest.StateCommitted, Nonce: testNonce, Parent: &testParent, Volume: testVolume,
		Size: 1 << 30, BlockSize: manifest.DefaultBlockSize, Start: testTime, End: testTime.Add(time.Minute),
		Owner: "team-a", Description: "before the upgrade", Tags: map[string]string{"env": "prod"},
		RootHash: manifest.HexHash(manifest.Sum(root)), RootLength: int64(len(root)), Root: root,
		DataBlocks: 2000, UploadedBlocks: 20, StoredBytes: 5 << 20, LeavesLength: 57360, Packs: 1,
	}
}

func testAborted() manifest.Outcome {
	return manifest.Outcome{Version: 1, Snapshot: testID, State: manifest.StateAborted, Why: "its parent was deleted", End: testTime}
}

func testLineage() manifest.LineageRecord {
	return manifest.LineageRecord{Version: 1, ID: testID.Lineage, BlockSize: manifest.DefaultBlockSize, Created: testTime}
}

func testProgress() manifest.Progress {
	return manifest.Progress{Version: 1, Snapshot: testID, Percent: 40, Heartbeat: testTime}
}

func testPin() manifest.Pin {
	return manifest.Pin{Version: 1, Snapshot: testID, Holder: string(testVolume), Host: "host-1", Mounted: testTime}
}

func testStore() manifest.StoreRecord { return manifest.StoreRecord{Version: 1, ID: testNonce} }

func testTombstone() manifest.Tombstone {
	return manifest.Tombstone{Version: 1, Snapshot: testID, Deleted: testTime}
}

func testMeta() manifest.Meta {
	return manifest.Meta{Version: 1, Tags: map[string]string{"env": "test"}}
}

func checkRoundTrip[T any](t *testing.T, record T) {
	t.Helper()
	data, err := manifest.EncodeRecord(record)
	if err != nil {
		t.Errorf("encode: %v", err)
		return
	}
	decoded, err := manifest.DecodeRecord[T](data)
	if err != nil {
		t.Errorf("decode %s: %v", data, err)
		return
	}
	if diff := cmp.Diff(record, decoded); diff != "" {
		t.Errorf("decoded differs: %s", diff)
	}
}

func TestRecordsDecodeToWhatWasEncoded(t *testing.T) {
	checkRoundTrip(t, testStore())
	checkRoundTrip(t, testLineage())
	checkRoundTrip(t, testIntent())
	checkRoundTrip(t, testOutcome())
	checkRoundTrip(t, testAborted())
	checkRoundTrip(t, testTombstone())
	checkRoundTrip(t, testPin())
	checkRoundTrip(t, testMeta())
	checkRoundTrip(t, testProgress())

	encrypted := testLineage()
	encrypted.Encryption = &manifest.Encryption{KeyURI: "file:///key", WrappedKey: []byte{1, 2, 3}}
	checkRoundTrip(t, encrypted)
	image := testIntent()
	image.Parent, image.Volume, image.Tags, image.Description, image.Size = nil, "", nil, "", 0
	checkRoundTrip(t, image)
	large := testOutcome()
	large.Root, large.RootLength = nil, manifest.MaxRootLength
	checkRoundTrip(t, large)
}

func TestInvalidRecordsAreNeitherWrittenNorRead(t *testing.T) {
	for name, damage := range map[string]func(*manifest.Outcome){
		"no snapshot":                func(o *manifest.Outcome) { o.Snapshot = manifest.SnapshotID{} },
		"parent of another lineage":  func(o *manifest.Outcome) { o.Parent = &manifest.SnapshotID{Lineage: 1, Serial: 1} },
		"its own parent":             func(o *manifest.Outcome) { o.Parent = &testID },
		"volume":                     func(o *manifest.Outcome) { o.Volume = "vol-1" },
		"state":                      func(o *manifest.Outcome) { o.State = "done" },
		"nonce":                      func(o *manifest.Outcome) { o.Nonce = "" },
		"why":                        func(o *manifest.Outcome) { o.Why = "no reason" },
		"size":                       func(o *manifest.Outcome) { o.Size = 100 },
		"block size":                 func(o *manifest.Outcome) { o.BlockSize = 0 },
		"start":                      func(o *manifest.Outcome) { o.Start = time.Time{} },
		"end":                        func(o *manifest.Outcome) { o.End = time.Time{} },
		"a year of five digits":      func(o *manifest.Outcome) { o.End = testTime.AddDate(8000, 0, 0) },
		"owner":                      func(o *manifest.Outcome) { o.Owner = "self" },
		"description":                func(o *manifest.Outcome) { o.Description = strings.Repeat("x", 256) },
		"tags":                       func(o *manifest.Outcome) { o.Tags = map[string]string{"": ""} },
		"root hash":                  func(o *manifest.Outcome) { o.RootHash = manifest.HexHash{} },
		"root length":                func(o *manifest.Outcome) { o.RootLength, o.Root = 10, nil },
		"root too long":              func(o *manifest.Outcome) { o.RootLength, o.Root = manifest.MaxRootLength+1, nil },
		"inline root of other hash":  func(o *manifest.Outcome) { o.Root[0]++ },
		"inline root of less length": func(o *manifest.Outcome) { o.RootLength++ },
		"data blocks":                func(o *manifest.Outcome) { o.DataBlocks = 2049 },
		"uploaded blocks":            func(o *manifest.Outcome) { o.UploadedBlocks = 2001 },
		"packs":                      func(o *manifest.Outcome) { o.Packs = -1 },
		"leaves length":              func(o *manifest.Outcome) { o.LeavesLength = -1 },
		"stored bytes":               func(o *manifest.Outcome) { o.StoredBytes = -1 },
		"aborted with a root":        func(o *manifest.Outcome) { o.State = manifest.StateAborted },
	} {
		o := testOutcome()
		damage(&o)
		if data, err := manifest.EncodeRecord(o); err == nil {
			t.Errorf("%s: encoded as %s", name, data)
		}
		data, err := json.Marshal(o)
		if err != nil {
			continue // JSON itself cannot say it
		}
		if _, err := manifest.DecodeRecord[manifest.Outcome](data); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: decoded with %v", name, err)
		}
	}

	intent := testIntent()
	intent.Nonce = strings.ToUpper(testNonce)
	lineage := testLineage()
	lineage.BlockSize = 1000
	encrypted := testLineage()
	encrypted.Encryption = &manifest.Encryption{}
	pin := testPin()
	pin.Holder = "a/b"
	progress := testProgress()
	progress.Percent = 101
	for _, record := range []any{
		manifest.StoreRecord{Version: 1, ID: "1"}, intent, lineage, encrypted, pin, progress,
		manifest.Tombstone{Version: 1, Snapshot: testID}, manifest.Meta{Version: 1, Tags: map[string]string{"aws:x": ""}},
		"not a record", nil,
	} {
		if data, err := manifest.EncodeRecord(record); err == nil {
			t.Errorf("%T: encoded as %s", record, data)
		}
	}
}

func TestRecordOfAnotherVersionIsRefusedByName(t *testing.T) {
	for _, version := range []int{-1, 0, 2, 17} {
		// The other fields of another version may be anything.
		data := fmt.Appendf(nil, `{"version": %d, "snapshot": {"new": "shape"}}`, version)
		_, err := manifest.DecodeRecord[manifest.Tombstone](data)
		if !errors.Is(err, manifest.ErrVersion) || !strings.Contains(err.Error(), fmt.Sprint(version)) {
			t.Errorf("version %d: %v", version, err)
		}
		other := testTombstone()
		other.Version = version
		if _, err := manifest.EncodeRecord(other); !errors.Is(err, manifest.ErrVersion) {
			t.Errorf("encoded version %d: %v", version, err)
		}
	}
}

func TestMalformedRecordsAreCorrupt(t *testing.T) {
	good, err := manifest.EncodeRecord(testTombstone())
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string]string{
		"nothing":        "",
		"no JSON":        "tombstone",
		"no object":      "[1]",
		"null":           "null",
		"no version":     `{"snapshot": "snap-1a2b3c4d123456789"}`,
		"version's type": `{"version": "1"}`,
		"no fields":      `{"version": 1}`,
		"cut short":      string(good[:len(good)-1]),
		"trailing bytes": string(good) + "x",
		"malformed id":   strings.Replace(string(good), "snap-", "snip-", 1),
		"malformed time": strings.Replace(string(good), "2026-", "26-", 1),
		"too long":       string(good) + strings.Repeat(" ", manifest.MaxRecordLength),
		"too deep":       `{"version":1,"x":` + strings.Repeat("[", 1<<19),
	} {
		if _, err := manifest.DecodeRecord[manifest.Tombstone]([]byte(data)); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestUnknownFieldsOfARecordAreIgnored(t *testing.T) {
	data, err := manifest.EncodeRecord(testTombstone())
	if err != nil {
		t.Fatal(err)
	}
	data = []byte(strings.Replace(string(data), "{", `{"later": {"added": [1]},`, 1))
	if got, err := manifest.DecodeRecord[manifest.Tombstone](data); err != nil || got != testTombstone() {
		t.Errorf("decoded %+v, %v", got, err)
	}
}

func TestTagLimitsAreThoseOfEBS(t *testing.T) {
	many := make(map[string]string)
	for i := range manifest.MaxTags {
		many[fmt.Sprint(i)] = ""
	}
	for name, tags := range map[string]map[string]string{
		"none":                     nil,
		"the most":                 many,
		"the longest":              {strings.Repeat("k", 128): strings.Repeat("v", 256)},
		"characters and not bytes": {strings.Repeat("ü", 128): strings.Repeat("ü", 256)},
	} {
		if err := manifest.CheckTags(tags); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	many["more"] = ""
	for name, tags := range map[string]map[string]string{
		"too many":        many,
		"empty key":       {"": "v"},
		"long key":        {strings.Repeat("k", 129): ""},
		"long value":      {"k": strings.Repeat("v", 257)},
		"reserved key":    {"aws:k": "v"},
		"key not UTF-8":   {"\xff": "v"},
		"value not UTF-8": {"k": "\xff"},
	} {
		if err := manifest.CheckTags(tags); !errors.Is(err, manifest.ErrTags) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := manifest.CheckDescription(strings.Repeat("ü", 255)); err != nil {
		t.Error(err)
	}
	for _, s := range []string{strings.Repeat("x", 256), "\xff"} {
		if err := manifest.CheckDescription(s); !errors.Is(err, manifest.ErrDescription) {
			t.Errorf("%.10q…: %v", s, err)
		}
	}
}

func FuzzDecodeRecord(f *testing.F) {
	for _, record := range []any{
		testStore(), testLineage(), testIntent(), testOutcome(), testAborted(), testTombstone(), testPin(), testMeta(), testKept(), testPolicy(), testProgress(),
	} {
		data, err := manifest.EncodeRecord(record)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		checkRecord[manifest.StoreRecord](t, data)
		checkRecord[manifest.LineageRecord](t, data)
		checkRecord[manifest.Intent](t, data)
		checkRecord[manifest.Outcome](t, data)
		checkRecord[manifest.Tombstone](t, data)
		checkRecord[manifest.Pin](t, data)
		checkRecord[manifest.Meta](t, data)
		checkRecord[manifest.Policy](t, data)
		checkRecord[manifest.Progress](t, data)
	})
}

// checkRecord asserts that any bytes are refused, or decode to a record that
// encodes, and to bytes that decode and encode to themselves.
func checkRecord[T any](t *testing.T, data []byte) {
	t.Helper()
	record, err := manifest.DecodeRecord[T](data)
	if err != nil {
		checkDecodeError(t, err)
		return
	}
	encoded, err := manifest.EncodeRecord(record)
	if err != nil {
		t.Fatalf("%q decodes to %+v, which does not encode: %v", data, record, err)
	}
	again, err := manifest.DecodeRecord[T](encoded)
	if err != nil {
		t.Fatalf("%q encodes to %q, which does not decode: %v", data, encoded, err)
	}
	if reencoded, err := manifest.EncodeRecord(again); err != nil || string(reencoded) != string(encoded) {
		t.Fatalf("%q encodes to %q and then to %q, %v", data, encoded, reencoded, err)
	}
}

func TestOwnersAreBounded(t *testing.T) {
	for _, owner := range []string{"1", "123456789012", "backup@example.org", "Team_A-1.x", strings.Repeat("f", manifest.MaxOwnerLength)} {
		if err := manifest.CheckOwner(owner); err != nil {
			t.Error(err)
		}
	}
	for _, owner := range []string{"", "self", "a b", "a/b", "ä", "a\n", strings.Repeat("f", manifest.MaxOwnerLength+1)} {
		if err := manifest.CheckOwner(owner); !errors.Is(err, manifest.ErrOwner) {
			t.Errorf("owner %q: %v", owner, err)
		}
	}
}

func TestTooManyTagsIsAnErrorOfItsOwn(t *testing.T) {
	tags := make(map[string]string)
	for n := range manifest.MaxTags {
		tags[fmt.Sprint(n)] = ""
	}
	if err := manifest.CheckTags(tags); err != nil {
		t.Error(err)
	}
	tags["one more"] = ""
	if err := manifest.CheckTags(tags); !errors.Is(err, manifest.ErrTooManyTags) || !errors.Is(err, manifest.ErrTags) {
		t.Errorf("%d tags: %v", len(tags), err)
	}
	if err := manifest.CheckTags(map[string]string{"aws:x": ""}); errors.Is(err, manifest.ErrTooManyTags) {
		t.Error(err)
	}
}
