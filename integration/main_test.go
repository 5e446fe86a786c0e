package integration

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// testMain runs the tests inside the sandbox.
func testMain(m *testing.M) (int, error) {
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		// Tests wait for deadlines and daemons more than they compute.
		if err := flag.Set("test.parallel", "4"); err != nil {
			return 0, err
		}
	}
	return m.Run(), nil
}

// stressed reports whether randomised tests run for long.
func stressed() bool { return os.Getenv("LAZYVOL_STRESS") != "" }

// lazyvol returns the path of the binary that is tested, with the race detector
// in it if race is set and the binary was not given.
func lazyvol(t testing.TB, race bool) string {
	t.Helper()
	if path := os.Getenv("LAZYVOL_BINARY"); path != "" {
		return path
	}
	built := plainBinary
	if race || os.Getenv("LAZYVOL_RACE") != "" {
		built = raceBinary
	}
	path, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Each binary is built once, when a test first wants it.
var (
	plainBinary = sync.OnceValues(func() (string, error) { return build() })
	raceBinary  = sync.OnceValues(func() (string, error) { return build("-race") })
)

// build builds lazyvol and returns the path of the binary.
func build(flags ...string) (string, error) {
	path := filepath.Join(os.TempDir(), "bin", "lazyvol"+strings.Join(flags, ""))
	args := append([]string{"build", "-o", path}, flags...)
	out, err := exec.Command("go", append(args, "../cmd/lazyvol")...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("build lazyvol: %w\n%s", err, out)
	}
	return path, nil
}
