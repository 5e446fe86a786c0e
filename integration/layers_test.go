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

const module = "github.com/lazyvol/lazyvol/"

// layers is the table of ARCHITECTURE.md: which package may import which others
// of ours. Tests may import more, of what is made for tests.
var layers = map[string][]string{
	"manifest":                     {},
	"crypt":                        {},
	"crypt/kmstest":                {},
	"blockstore":                   {"manifest", "crypt"},
	"blockstore/blockstoretest":    {"manifest", "blockstore"},
	"snapshot":                     {"manifest", "crypt", "blockstore"},
	"cache":                        {"manifest", "crypt", "internal/vfs"},
	"volume":                       {"manifest", "crypt", "blockstore", "snapshot", "cache", "internal/vfs"},
	"hydrate":                      {"manifest"},
	"fs":                           {},
	"internal/loopdev":             {},
	"internal/loopdev/loopdevtest": {},
	"internal/probe":               {},
	"internal/vfs":                 {},
	"cmd/lazyvol":                  {"manifest", "crypt", "blockstore", "snapshot", "cache", "volume", "hydrate", "fs", "internal/loopdev", "internal/probe", "internal/vfs"},
	"integration":                  {},
	"integration/bench":            {"manifest", "blockstore"},
}

// forTests are the packages that only tests may import, wherever they are.
var forTests = []string{"blockstore/blockstoretest", "crypt/kmstest", "internal/loopdev/loopdevtest"}

func TestImportsGoOneWay(t *testing.T) {
	t.Parallel()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", "../...").Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for decoder := json.NewDecoder(strings.NewReader(string(out))); ; seen++ {
		var pkg struct {
			ImportPath   string
			Imports      []string
			TestImports  []string
			XTestImports []string
		}
		if err := decoder.Decode(&pkg); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(pkg.ImportPath, module)
		allowed, ok := layers[name]
		if !ok {
			t.Errorf("%s is in no layer: add it to the table here and in ARCHITECTURE.md", name)
			continue
		}
		check := func(imports, allowed []string, where string) {
			for _, path := range imports {
				if other, ours := strings.CutPrefix(path, module); ours && other != name && !slices.Contains(allowed, other) {
					t.Errorf("%s%s imports %s", name, where, other)
				}
			}
		}
		check(pkg.Imports, allowed, "")
		tests := slices.Concat(pkg.TestImports, pkg.XTestImports)
		check(tests, slices.Concat(allowed, forTests), " in its tests")
	}
	if seen != len(layers) {
		t.Errorf("the table has %d packages, the module %d", len(layers), seen)
	}
}
