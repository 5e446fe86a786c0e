package integration

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// module is the path of this module, with a slash.
const module = "github.com/lazyvol/lazyvol/"

// mayImport is the layering: which of our packages each one may import.
// ARCHITECTURE.md has it in words.
var mayImport = map[string][]string{
	"manifest":                  {},
	"internal/vfs":              {},
	"internal/loopdev":          {},
	"fs":                        {},
	"hydrate":                   {"manifest"},
	"blockstore":                {"manifest"},
	"blockstore/blockstoretest": {"manifest", "blockstore"},
	"snapshot":                  {"manifest", "blockstore"},
	"cache":                     {"manifest", "internal/vfs"},
	"volume":                    {"manifest", "blockstore", "snapshot", "cache", "internal/vfs"},
	"integration":               {},
	"cmd/lazyvol": {
		"manifest", "blockstore", "snapshot", "cache", "volume", "hydrate", "fs", "internal/vfs", "internal/loopdev",
	},
}

func TestImportsRunOneWay(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for decoder := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		seen++
		name := strings.TrimPrefix(p.ImportPath, module)
		allowed, ok := mayImport[name]
		if !ok {
			t.Errorf("package %s has no place in the layering", name)
			continue
		}
		for _, path := range p.Imports {
			if of, ours := strings.CutPrefix(path, module); ours && !slices.Contains(allowed, of) {
				t.Errorf("%s imports %s", name, of)
			}
		}
	}
	if seen != len(mayImport) {
		t.Errorf("the layering names %d packages, and there are %d", len(mayImport), seen)
	}
}
