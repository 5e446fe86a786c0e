package main

import (
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A state directory may have any name: what is in it is found, and not what a pattern
// of that name matches.
func TestStateDirectoryIsNoPattern(t *testing.T) {
	root := t.TempDir()
	const id = "vol-0123456789abcdef0"
	there := &app{state: filepath.Join(root, "[a]"), stderr: io.Discard}
	other := &app{state: filepath.Join(root, "a"), stderr: io.Discard}
	for _, a := range []*app{there, other} {
		if err := os.MkdirAll(a.attachDir(""), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	m := attachedMount{Dir: "/mnt/data", Device: "/dev/loop3"}
	if err := there.recordMount(id, m); err != nil {
		t.Fatal(err)
	}
	for a, want := range map[*app][]attachedMount{there: {m}, other: nil} {
		found, err := a.attachments()
		if diff := cmp.Diff(want, found[id].Mounts); err != nil || diff != "" {
			t.Errorf("attached in %s, error %v (-want +got):\n%s", a.state, err, diff)
		}
	}

	dead := filepath.Join(there.state, "mounts", sessionPrefix+"0123456789abcdef0")
	if err := os.MkdirAll(dead, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := there.sweepUnrecorded(); err != nil {
		t.Fatal(err)
	}
	if there, err := fileExists(dead); there || err != nil {
		t.Errorf("the folder of a session that was killed is there: %t, %v", there, err)
	}
}
