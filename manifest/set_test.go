package manifest_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
)

const testSetID = manifest.SetID("set-0123456789abcdef0")

// testMember is testOutcome as a set lists it.
func testMember() manifest.Outcome {
	m := testOutcome()
	m.Set, m.Description, m.Tags, m.Root = testSetID, "", nil, nil
	return m
}

func testSet() manifest.SetOutcome {
	return manifest.SetOutcome{
		Version: 1, Set: testSetID, State: manifest.StateCommitted, End: testOutcome().End, Members: []manifest.Outcome{testMember()},
	}
}

func TestOutcomesOfSetsDecodeToWhatWasEncoded(t *testing.T) {
	checkRoundTrip(t, testSet())
	checkRoundTrip(t, manifest.SetOutcome{Version: 1, Set: testSetID, State: manifest.StateAborted, Why: "interrupted", End: testTime})
	intent, outcome := testIntent(), testOutcome()
	intent.Set, outcome.Set = testSetID, testSetID
	checkRoundTrip(t, intent)
	checkRoundTrip(t, outcome)

	most := testSet()
	for serial := uint64(1); len(most.Members) < manifest.MaxSetMembers; serial++ {
		m := testMember()
		m.Snapshot.Serial = serial
		most.Members = append(most.Members, m)
	}
	checkRoundTrip(t, most)
}

func TestInvalidOutcomesOfSetsAreNeitherWrittenNorRead(t *testing.T) {
	for name, damage := range map[string]func(*manifest.SetOutcome){
		"no set":                func(s *manifest.SetOutcome) { s.Set = "" },
		"another id":            func(s *manifest.SetOutcome) { s.Set = "vol-0123456789abcdef0" },
		"state":                 func(s *manifest.SetOutcome) { s.State = "done" },
		"no end":                func(s *manifest.SetOutcome) { s.End = testTime.AddDate(-3000, 0, 0) },
		"why":                   func(s *manifest.SetOutcome) { s.Why = "no reason" },
		"no members":            func(s *manifest.SetOutcome) { s.Members = nil },
		"twice":                 func(s *manifest.SetOutcome) { s.Members = append(s.Members, s.Members[0]) },
		"of another set":        func(s *manifest.SetOutcome) { s.Members[0].Set = "set-1123456789abcdef0" },
		"of none":               func(s *manifest.SetOutcome) { s.Members[0].Set = "" },
		"aborted member":        func(s *manifest.SetOutcome) { m := testAborted(); m.Set = testSetID; s.Members[0] = m },
		"another version":       func(s *manifest.SetOutcome) { s.Members[0].Version = 2 },
		"root":                  func(s *manifest.SetOutcome) { s.Members[0].Root = testOutcome().Root },
		"description":           func(s *manifest.SetOutcome) { s.Members[0].Description = "x" },
		"tags":                  func(s *manifest.SetOutcome) { s.Members[0].Tags = map[string]string{"a": "b"} },
		"a member that is none": func(s *manifest.SetOutcome) { s.Members[0].Nonce = "" },
		"members of an aborted": func(s *manifest.SetOutcome) { s.State = manifest.StateAborted },
		"too many": func(s *manifest.SetOutcome) {
			for serial := uint64(1); len(s.Members) <= manifest.MaxSetMembers; serial++ {
				m := testMember()
				m.Snapshot.Serial = serial
				s.Members = append(s.Members, m)
			}
		},
	} {
		s := testSet()
		damage(&s)
		if _, err := manifest.EncodeRecord(s); err == nil {
			t.Errorf("%s: encoded", name)
		}
	}
	intent := testIntent()
	intent.Set = "set-1"
	if _, err := manifest.EncodeRecord(intent); err == nil {
		t.Error("an intent of a set that is none: encoded")
	}
	for _, text := range []string{
		`{"version":1,"set":"set-0123456789abcdef0","state":"committed","end":"2026-11-22T13:15:15Z"}`,
		`{"version":1,"set":"set-0123456789ABCDEF0","state":"aborted","end":"2026-11-22T13:15:15Z"}`,
	} {
		if _, err := manifest.DecodeRecord[manifest.SetOutcome]([]byte(text)); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestKeysOfSetsAreParsedBack(t *testing.T) {
	id := manifest.NewSetID()
	if got, err := manifest.ParseSetOutcomeKey(manifest.SetOutcomeKey(id)); got != id || err != nil {
		t.Errorf("%s is that of %q, %v", manifest.SetOutcomeKey(id), got, err)
	}
	key := manifest.SetOutcomeKey(id)
	for _, bad := range []string{"", "sets/outcome", strings.TrimPrefix(key, "sets/"), key + "s", strings.ToUpper(key), "sets/" + string(id)} {
		if _, err := manifest.ParseSetOutcomeKey(bad); !errors.Is(err, manifest.ErrID) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestAMemberIsKnownByItsNonce(t *testing.T) {
	s := testSet()
	if m, ok := s.Member(testID, testNonce); !ok || m.RootHash != testOutcome().RootHash {
		t.Errorf("its member: %+v, %t", m, ok)
	}
	if _, ok := s.Member(testID, strings.Repeat("f", 32)); ok {
		t.Error("another attempt with its id is taken for a member")
	}
	if _, ok := s.Member(testParent, testNonce); ok {
		t.Error("another snapshot is taken for a member")
	}
}
