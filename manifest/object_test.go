package manifest_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
)

// TestUnknownVersionsAndFlagsAreRefusedByName holds every binary object to
// what a reader of today owes to the formats of tomorrow.
func TestUnknownVersionsAndFlagsAreRefusedByName(t *testing.T) {
	leaf := manifest.NewLeaf(2)
	for name, object := range map[string]struct {
		encoded []byte
		decode  func([]byte) error
	}{
		"leaf":    {leaf.Encode(), func(b []byte) error { _, err := manifest.DecodeLeaf(b); return err }},
		"root":    {testRoot().Encode(), func(b []byte) error { _, err := manifest.DecodeRoot(b); return err }},
		"section": {testSection(t).Encode(), func(b []byte) error { _, err := manifest.DecodeSection(b); return err }},
	} {
		const magic, version, flags = 0, 4, 6
		for want, bad := range map[string][]byte{
			"version 2": patched(object.encoded, version, u16(2)...),
			"version 0": patched(object.encoded, version, u16(0)...),
			"sealed":    patched(object.encoded, flags, u16(1)...),
			"0x8000":    patched(object.encoded, flags, u16(1<<15)...),
			// Of another version only the header can be believed.
			"version 3": append(append([]byte(nil), object.encoded[:version]...), 3, 0, 0xff, 0xff),
		} {
			if err := object.decode(bad); !errors.Is(err, manifest.ErrVersion) ||
				!strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), name) {
				t.Errorf("%s: %s: %v", name, want, err)
			}
		}
		if err := object.decode(patched(object.encoded, magic, []byte("LVXX")...)); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: another magic: %v", name, err)
		}
	}
}
