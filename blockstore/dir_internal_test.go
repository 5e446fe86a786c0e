package blockstore

import (
	"os"
	"testing"
)

// A process that was stopped for more than dirTempAge finds its file swept up.
func TestPutWhoseTemporaryFileVanishedFails(t *testing.T) {
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for name, publish := range map[string]func(*tempFile) error{
		"link":    func(f *tempFile) error { return f.link("dir/k") },
		"replace": func(f *tempFile) error { return f.replace("dir/k", Condition{}) },
	} {
		f, err := writeTemp(t.Context(), root, []byte("data"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.discard()
		if err := root.Remove(f.name); err != nil {
			t.Fatal(err)
		}
		if err := publish(f); err == nil {
			t.Errorf("%s of a file that is gone succeeded", name)
		}
	}
}
