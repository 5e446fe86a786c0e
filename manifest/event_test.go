package manifest_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
)

const testEventID = "00010203-0405-4607-8809-0a0b0c0d0e0f"

func testEvent() manifest.Event {
	id := manifest.SnapshotARN("eu-central-1", testID)
	return manifest.Event{
		Version: manifest.EventVersion, ID: testEventID, DetailType: manifest.SnapshotNotification, Source: manifest.EventSource,
		Time: testTime.Add(123456789), Region: "eu-central-1", Resources: []string{id},
		Detail: manifest.EventDetail{
			Event: manifest.EventCreateSnapshot, Result: manifest.ResultFailed, Cause: "interrupted by terminated",
			SnapshotID: id, Source: manifest.VolumeARN("eu-central-1", testVolume), Start: testTime.Add(-time.Minute), End: testTime, Host: "host-1",
		},
	}
}

func testSetEvent() manifest.Event {
	e := testEvent()
	e.DetailType, e.Detail.Event = manifest.MultiVolumeNotification, manifest.EventCreateSnapshots
	e.Detail.Snapshots = []manifest.EventSnapshot{{SnapshotID: e.Detail.SnapshotID, Source: e.Detail.Source, Status: "completed"}}
	e.Detail.SnapshotID, e.Detail.Incremental, e.Detail.Completion = "", "true", testTime
	return e
}

func TestEventsDecodeToWhatWasEncoded(t *testing.T) {
	for _, e := range []manifest.Event{testEvent(), testSetEvent()} {
		data, err := e.Encode()
		if err != nil {
			t.Fatal(err)
		}
		decoded, err := manifest.DecodeEvent(data)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(e, decoded); diff != "" {
			t.Errorf("decoded differs: %s", diff)
		}
	}
}

func TestEventOnTheFormatPageIsThatOfTheCode(t *testing.T) {
	page, err := os.ReadFile("../docs/format.md")
	if err != nil {
		t.Fatal(err)
	}
	encoded, err := testEvent().Encode()
	if err != nil {
		t.Fatal(err)
	}
	var want bytes.Buffer
	if err := json.Compact(&want, []byte(example(t, string(page), "json", "event"))); err != nil {
		t.Fatal(err)
	}
	if string(encoded) != want.String() {
		t.Errorf("encoded\n%s, and the page says\n%s", encoded, want.String())
	}
	if key := "`" + testEvent().Key() + "`"; !strings.Contains(string(page), key) {
		t.Errorf("the page has no key %s", key)
	}
	if row := fmt.Sprintf("| `MaxEventLength` | %d |", manifest.MaxEventLength); !strings.Contains(string(page), row) {
		t.Errorf("the page's table of bounds has no row %s", row)
	}
}

func TestInvalidEventsAreNeitherWrittenNorRead(t *testing.T) {
	long := strings.Repeat("x", 1025)
	for name, damage := range map[string]func(*manifest.Event){
		"no id":                   func(e *manifest.Event) { e.ID = "" },
		"dashes":                  func(e *manifest.Event) { e.ID = strings.ReplaceAll(testEventID, "-", "") },
		"upper case":              func(e *manifest.Event) { e.ID = strings.ToUpper(testEventID) },
		"no time":                 func(e *manifest.Event) { e.Time = time.Time{} },
		"a year of five digits":   func(e *manifest.Event) { e.Time = testTime.AddDate(8000, 0, 0) },
		"no type":                 func(e *manifest.Event) { e.DetailType = "" },
		"no source":               func(e *manifest.Event) { e.Source = "" },
		"no event":                func(e *manifest.Event) { e.Detail.Event = "" },
		"no result":               func(e *manifest.Event) { e.Detail.Result = "" },
		"event that clears":       func(e *manifest.Event) { e.Detail.Event = "\x1b[2J" },
		"cause of two lines":      func(e *manifest.Event) { e.Detail.Cause = "a\nb" },
		"cause that is too long":  func(e *manifest.Event) { e.Detail.Cause = long },
		"host that is too long":   func(e *manifest.Event) { e.Detail.Host = long },
		"request id":              func(e *manifest.Event) { e.Detail.RequestID = "\r" },
		"account":                 func(e *manifest.Event) { e.Account = "\u0085" },
		"resource":                func(e *manifest.Event) { e.Resources[0] = "a\tb" },
		"resources":               func(e *manifest.Event) { e.Resources = make([]string, 513) },
		"members":                 func(e *manifest.Event) { e.Detail.Snapshots = make([]manifest.EventSnapshot, 513) },
		"member's status":         func(e *manifest.Event) { e.Detail.Snapshots = []manifest.EventSnapshot{{Status: "\n"}} },
		"start that cannot be":    func(e *manifest.Event) { e.Detail.Start = testTime.AddDate(8000, 0, 0) },
		"completion in year −1":   func(e *manifest.Event) { e.Detail.Completion = testTime.AddDate(-2027, 0, 0) },
		"longer than its bound":   func(e *manifest.Event) { e.Resources = slicesOf(strings.Repeat("r", 512), 512) },
		"member's source too big": func(e *manifest.Event) { e.Detail.Snapshots = []manifest.EventSnapshot{{Source: long}} },
	} {
		e := testEvent()
		damage(&e)
		if data, err := e.Encode(); err == nil {
			t.Errorf("%s: encoded as %s", name, data)
		}
		data, err := json.Marshal(e)
		if err != nil {
			continue // JSON itself cannot say it
		}
		if _, err := manifest.DecodeEvent(data); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: decoded with %v", name, err)
		}
	}
	for _, data := range []string{"", "null", "[]", "{}", `{"version":0}`, `{"version":"0"}`} {
		if _, err := manifest.DecodeEvent([]byte(data)); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%q: decoded with %v", data, err)
		}
	}
	if _, err := manifest.DecodeEvent([]byte(`{"version":"1","detail":17}`)); !errors.Is(err, manifest.ErrVersion) {
		t.Errorf("another version: %v", err)
	}
	other := testEvent()
	other.Version = "1"
	if _, err := other.Encode(); err == nil {
		t.Error("another version was encoded")
	}
}

func slicesOf(s string, n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = s
	}
	return all
}

// Keys list in the order of time, whatever the zone it was told in.
func TestEventKeysAreInTheOrderOfTime(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		zone := time.FixedZone("", rapid.IntRange(-50000, 50000).Draw(t, "zone"))
		draw := func(name string) time.Time {
			seconds := rapid.Int64Range(0, 4e9).Draw(t, name)
			return time.Unix(seconds, rapid.Int64Range(0, 1e9-1).Draw(t, name+" ns")).In(zone)
		}
		a, b := draw("a"), draw("b")
		keyA, keyB := manifest.EventKey(a, manifest.NewEventID()), manifest.EventKey(b, manifest.NewEventID())
		if a.Before(b) && keyA >= keyB || b.Before(a) && keyB >= keyA {
			t.Errorf("%v and %v have %s and %s", a, b, keyA, keyB)
		}
		if from := manifest.EventKeysFrom(b); (keyA >= from) != !a.Before(b) {
			t.Errorf("%s and from %s", keyA, from)
		}
		at, id, err := manifest.ParseEventKey(keyA)
		if err != nil || !at.Equal(a) || manifest.EventKey(at, id) != keyA {
			t.Errorf("%s is of %v and %s: %v", keyA, at, id, err)
		}
	})
	good := testEvent().Key()
	for _, key := range []string{
		"", "events/", "intents/" + good[7:], good[:len(good)-1], good + "0", strings.ToUpper(good), strings.Replace(good, "Z-", "Z_", 1),
		strings.Replace(good, "-11-", "-13-", 1), manifest.EventKeysFrom(testTime),
	} {
		if _, _, err := manifest.ParseEventKey(key); !errors.Is(err, manifest.ErrID) {
			t.Errorf("%q is a key: %v", key, err)
		}
	}
}

func TestEventTextIsOneBoundedLine(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.OneOf(rapid.String(), rapid.StringN(300, 2000, -1), rapid.Map(rapid.SliceOf(rapid.Byte()), func(b []byte) string { return string(b) })).Draw(t, "text")
		e := testEvent()
		if e.Detail.Cause = manifest.EventText(s); len(e.Detail.Cause) > manifest.MaxEventCause || !utf8.ValidString(e.Detail.Cause) {
			t.Fatalf("%d bytes: %q", len(e.Detail.Cause), e.Detail.Cause)
		}
		if _, err := e.Encode(); err != nil {
			t.Fatal(err)
		}
	})
	if got := manifest.EventText("the disk\nis full"); got != "the disk is full" {
		t.Errorf("%q", got)
	}
}

// Any bytes are refused, or decode to an event that encodes, and to bytes that
// decode and encode to themselves.
func FuzzDecodeEvent(f *testing.F) {
	for _, e := range []manifest.Event{testEvent(), testSetEvent()} {
		data, err := e.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := manifest.DecodeEvent(data)
		if err != nil {
			if !errors.Is(err, manifest.ErrCorrupt) && !errors.Is(err, manifest.ErrVersion) {
				t.Errorf("%q: %v", data, err)
			}
			return
		}
		if _, id, err := manifest.ParseEventKey(e.Key()); err != nil || id != e.ID {
			t.Errorf("its key %s: %v", e.Key(), err)
		}
		encoded, err := e.Encode()
		if err != nil {
			// JSON escapes some characters that its source may have had in clear.
			if len(data) < manifest.MaxEventLength/6 {
				t.Errorf("%q decodes to what cannot be encoded: %v", data, err)
			}
			return
		}
		again, err := manifest.DecodeEvent(encoded)
		if err != nil {
			t.Fatalf("%s: %v", encoded, err)
		}
		if twice, err := again.Encode(); err != nil || !bytes.Equal(encoded, twice) {
			t.Errorf("%s became %s: %v", encoded, twice, err)
		}
	})
}
