package main

import (
	"errors"
	"testing"
	"time"
)

func TestWildcardsMatchAsEC2sDo(t *testing.T) {
	for _, c := range []struct {
		pattern, value string
		want           bool
	}{
		{"", "", true},
		{"", "a", false},
		{"a", "", false},
		{"abc", "abc", true},
		{"abc", "ABC", false},
		{"*", "", true},
		{"*", "anything at all", true},
		{"a*", "a", true},
		{"a*c", "abbbc", true},
		{"a*c", "abbb", false},
		{"*b*", "abc", true},
		{"a?c", "abc", true},
		{"a?c", "ac", true},
		{"a?c", "abbc", false},
		{"??", "", true},
		{"??", "ab", true},
		{"??", "abc", false},
		{`\*`, "*", true},
		{`\*`, "a", false},
		{`a\?`, "a?", true},
		{`a\?`, "ab", false},
		{`a\\b`, `a\b`, true},
		{`end\`, `end\`, true},
		{"grün?", "grüne", true},
		{"*a*a*a*a*a*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", false},
	} {
		if got := matchWildcards(c.pattern, c.value); got != c.want {
			t.Errorf("%q and %q: %t", c.pattern, c.value, got)
		}
	}
}

func TestFiltersOfOneNameAreAlternativesAndThoseOfSeveralAllHold(t *testing.T) {
	s := snapshotJSON{
		SnapshotId: "snap-0123456789abcdef0", VolumeId: "vol-0123456789abcdef0", State: "completed", Progress: "100%",
		StartTime: time.Date(2026, 11, 22, 20, 0, 0, 0, time.FixedZone("east", 3600)), Description: "before the upgrade",
		OwnerId: "team-a", StorageTier: "standard", VolumeSize: 8, Tags: []tag{{"env", "prod"}, {"made-by", "timer"}},
	}
	for _, c := range []struct {
		pairs []string
		want  bool
	}{
		{nil, true},
		{[]string{"status=completed"}, true},
		{[]string{"status=pending"}, false},
		{[]string{"status=pending", "status=completed"}, true},
		{[]string{"status=completed", "volume-size=9"}, false},
		{[]string{"status=completed", "volume-size=8", "volume-id=vol-0123*"}, true},
		{[]string{"description=before*"}, true},
		{[]string{"description=before"}, false},
		{[]string{"start-time=2026-11-22T19:*"}, true},
		{[]string{"start-time=2026-11-22T20:*"}, false},
		{[]string{"snapshot-id=snap-0123456789abcdef0", "progress=100%", "encrypted=false", "storage-tier=standard"}, true},
		{[]string{"owner-id=team-?"}, true},
		{[]string{"owner-id=self"}, false},
		{[]string{"storage-tier=archive"}, false},
		{[]string{"transfer-type=*"}, false},
		{[]string{"tag:env=prod"}, true},
		{[]string{"tag:env=pr?d"}, true},
		{[]string{"tag:env=test"}, false},
		{[]string{"tag:none=*"}, false},
		{[]string{"tag-key=made-*"}, true},
		{[]string{"tag-key=none"}, false},
		{[]string{"tag:made-by=timer", "tag:env=prod"}, true},
	} {
		f, err := parseFilters(c.pairs)
		if err != nil {
			t.Fatal(err)
		}
		if got := f.pass(s); got != c.want {
			t.Errorf("%q: %t", c.pairs, got)
		}
	}
	var usage usageError
	for _, pair := range []string{"status", "state=completed", "tag:=x", "=x", "Status=completed"} {
		if _, err := parseFilters([]string{pair}); !errors.As(err, &usage) {
			t.Errorf("%q: %v, want a usage error", pair, err)
		}
	}
}
