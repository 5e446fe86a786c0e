package integration

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// testMain runs the tests inside the sandbox.
func testMain(m *testing.M) (int, error) {
	flag.Parse()
	if !flagSet("test.parallel") {
		// Tests wait for deadlines and daemons more than they compute.
		if err := flag.Set("test.parallel", "4"); err != nil {
			return 0, err
		}
	}
	if lazyvol() == "" {
		path := filepath.Join(os.TempDir(), "bin", "lazyvol")
		if err := buildBinary(path); err != nil {
			return 0, err
		}
		if err := os.Setenv(binaryEnv, path); err != nil {
			return 0, err
		}
	}
	return m.Run(), nil
}

const binaryEnv = "LAZYVOL_BINARY"

// lazyvol returns the path of the lazyvol that is tested.
func lazyvol() string { return os.Getenv(binaryEnv) }

func buildBinary(path string) error {
	args := []string{"build", "-o", path}
	if os.Getenv("LAZYVOL_RACE") != "" {
		args = append(args, "-race")
	}
	out, err := exec.Command("go", append(args, "../cmd/lazyvol")...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("build lazyvol: %w\n%s", err, out)
	}
	return nil
}

func flagSet(name string) bool {
	set := false
	flag.Visit(func(f *flag.Flag) { set = set || f.Name == name })
	return set
}

// stressed reports whether randomised tests run for long.
func stressed() bool { return os.Getenv("LAZYVOL_STRESS") != "" }
