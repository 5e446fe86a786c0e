package main

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
)

func TestTagsBecomeTheFileNamesThatTheManualShows(t *testing.T) {
	for tag, want := range map[string]string{
		"prod":               "prod",
		"":                   "%empty",
		"%empty":             "%25empty",
		"a/b":                "a%2Fb",
		"..":                 "%2E.",
		".hidden":            "%2Ehidden",
		"-rf":                "%2Drf",
		"100%":               "100%25",
		"two words":          "two words",
		"Größe":              "Größe",
		"line\nbreak\x1b[2J": "line%0Abreak%1B[2J",
		"\u202egnp.exe":      "%E2%80%AEgnp.exe",
	} {
		if got := fileName(tag); got != want {
			t.Errorf("%q is called %q, want %q", tag, got, want)
		}
	}
}

// unescape is what a person does to read a name that was not cut.
func unescape(t *rapid.T, name string) string {
	if name == emptyName {
		return ""
	}
	var s strings.Builder
	for i := 0; i < len(name); i++ {
		if name[i] != '%' {
			s.WriteByte(name[i])
			continue
		}
		b, err := strconv.ParseUint(name[i+1:i+3], 16, 8)
		if err != nil {
			t.Fatalf("%q has a percent sign that is no escape", name)
		}
		s.WriteByte(byte(b))
		i += 2
	}
	return s.String()
}

// Whatever a tag is, its name is one that any filesystem and terminal bears, and no
// other tag has it.
func TestEveryTagHasASafeFileNameOfItsOwn(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tag := rapid.OneOf(
			rapid.String(),
			rapid.StringOf(rapid.SampledFrom([]rune("/.%-~a \x00\n\u202e\U0001F4BE"))),
			rapid.StringN(100, 300, 1200),
			rapid.Map(rapid.SliceOf(rapid.Byte()), func(b []byte) string { return string(b) }),
		).Draw(t, "tag")
		name := fileName(tag)
		if len(name) < 1 || len(name) > maxFileName || !utf8.ValidString(name) || strings.ContainsAny(name, "/") || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "-") {
			t.Fatalf("%q is called %q, of %d bytes", tag, name, len(name))
		}
		for _, r := range name {
			if !unicode.IsPrint(r) {
				t.Fatalf("%q is called %q", tag, name)
			}
		}
		start, hash, cut := strings.Cut(name, cutMark)
		if !cut {
			if got := unescape(t, name); got != tag {
				t.Fatalf("%q is called %q, which reads %q", tag, name, got)
			}
			return
		}
		if !strings.HasPrefix(tag, unescape(t, start)) || len(hash) != 32 || len(name) < maxFileName-20 {
			t.Fatalf("%q is called %q", tag, name)
		}
		if other := fileName(tag + "x"); other == name {
			t.Fatalf("%q and another are called %q", tag, name)
		}
	})
}

func TestNamesByTimeSortAsTheSnapshotsWereMade(t *testing.T) {
	id := func(n uint64) manifest.SnapshotID { return manifest.SnapshotID{Lineage: 0x1a2b3c4d, Serial: n} }
	at := time.Date(2026, 11, 22, 11, 30, 5, 7e6, time.FixedZone("CET", 3600))
	first, second := timeName(at, id(9)), timeName(at.Add(time.Millisecond), id(1))
	if want := fmt.Sprintf("2026-11-22T10-30-05.007Z_%s.img", id(9)); first != want {
		t.Errorf("it is called %q, want %q", first, want)
	}
	if first >= second {
		t.Errorf("%q does not sort before %q", first, second)
	}
}
