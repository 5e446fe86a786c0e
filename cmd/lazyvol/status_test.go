package main

import (
	"bytes"
	"io"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/lazyvol/lazyvol/manifest"
)

// 'status --watch' looks into volumes that are not mounted again and again, for days.
func TestLookIntoAVolumeLeavesNothingBehind(t *testing.T) {
	state := t.TempDir()
	var out bytes.Buffer
	if code := run(t.Context(), []string{"--config=", "--state", state, "volume", "create", "--size", "1MiB"}, strings.NewReader(""), &out, io.Discard); code != 0 {
		t.Fatalf("exit %d", code)
	}
	id, err := manifest.ParseVolumeID(strings.TrimSpace(out.String()))
	if err != nil {
		t.Fatal(err)
	}
	a := &app{state: state, stderr: io.Discard, keys: newSecretKeys(), meter: newStoreMeter(), memory: defaultMemory}
	before := goleak.IgnoreCurrent()
	for range 3 {
		if s, err := a.statusUnmounted(t.Context(), id); err != nil || s.Size != 1<<20 {
			t.Fatalf("%+v, %v", s, err)
		}
	}
	if err := goleak.Find(before); err != nil {
		t.Error(err)
	}
}
