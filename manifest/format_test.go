package manifest_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
)

// TestFormatPageAgreesWithTheCode pins the encoding of everything to the
// examples on the page that specifies it: a change of either that the other
// does not follow is a change of the format that nobody meant.
func TestFormatPageAgreesWithTheCode(t *testing.T) {
	data, err := os.ReadFile("../docs/format.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(data)

	leaf := manifest.NewLeaf(2)
	leaf.Set(0, testRef())
	for name, encoded := range map[string][]byte{
		"leaf": leaf.Encode(), "section": testSection(t).Encode(), "root": testRoot().Encode(),
		"trace": encodedTrace(t, testTrace()),
	} {
		if want := hexExample(t, page, name); !bytes.Equal(encoded, want) {
			t.Errorf("%s encodes to %x, and the page says %x", name, encoded, want)
		}
	}
	for name, record := range map[string]any{
		"store": testStore(), "lineage": testLineage(), "intent": testIntent(), "committed": testOutcome(), "aborted": testAborted(), "set": testSet(),
		"tombstone": testTombstone(), "pin": testPin(), "meta": testMeta(), "kept": testKept(), "policy": testPolicy(), "progress": testProgress(),
	} {
		encoded, err := manifest.EncodeRecord(record)
		if err != nil {
			t.Fatal(err)
		}
		var want bytes.Buffer
		if err := json.Compact(&want, []byte(example(t, page, "json", name))); err != nil {
			t.Fatal(err)
		}
		if string(encoded) != want.String() {
			t.Errorf("%s encodes to %s, and the page says %s", name, encoded, want.String())
		}
	}
	for name, bound := range map[string]int64{
		"MaxSerial": manifest.MaxSerial, "SectorSize": manifest.SectorSize, "MaxDeviceSize": manifest.MaxDeviceSize,
		"MinBlockSize": manifest.MinBlockSize, "DefaultBlockSize": manifest.DefaultBlockSize, "MaxBlockSize": manifest.MaxBlockSize,
		"LeafBlocks": manifest.LeafBlocks, "MaxPack": manifest.MaxPack, "MaxPackSize": manifest.MaxPackSize,
		"MaxPackSlots": manifest.MaxPackSlots, "SectionPacks": manifest.SectionPacks, "MaxSectionLength": manifest.MaxSectionLength,
		"LeavesPartSize": manifest.LeavesPartSize, "MaxRootLength": manifest.MaxRootLength,
		"InlineRootMax": manifest.InlineRootMax, "MaxRecordLength": manifest.MaxRecordLength,
		"MaxTraceBlocks": manifest.MaxTraceBlocks, "MaxSetMembers": manifest.MaxSetMembers,
	} {
		if row := fmt.Sprintf("| `%s` | %d |", name, bound); !strings.Contains(page, row) {
			t.Errorf("the page's table of bounds has no row %s", row)
		}
	}
}

// example returns the text of a fenced example.
func example(t *testing.T, page, language, name string) string {
	t.Helper()
	_, rest, ok := strings.Cut(page, "```"+language+" "+name+"\n")
	text, _, closed := strings.Cut(rest, "```")
	if !ok || !closed {
		t.Fatalf("the page has no example %q in %s", name, language)
	}
	return text
}

// hexExample returns the bytes of an example in hex, whose lines may end in a
// comment.
func hexExample(t *testing.T, page, name string) []byte {
	t.Helper()
	digits := regexp.MustCompile(`#.*|\s`).ReplaceAllString(example(t, page, "hex", name), "")
	data, err := hex.DecodeString(digits)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
