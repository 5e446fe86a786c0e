package main

import (
	"errors"
	"os/exec"
	"testing"
)

// Of two that wait for one process the first gives up, and kills it: the other one has
// to be told of the mount and not of that.
func TestProbeThatWasGivenUpSaysThatTheMountIsSilent(t *testing.T) {
	for script, want := range map[string]error{
		"exit 0":        nil,
		"exit 3":        errMountUnknown,
		"exit 4":        errMountDead,
		"kill -9 $$":    errMountSilent,
		"kill -SEGV $$": nil, // its own
		"exit 1":        nil,
	} {
		err := exec.Command("sh", "-c", script).Run()
		got := probed(err)
		if want == nil && err != nil { // told as it is
			want = err
		}
		if !errors.Is(got, want) {
			t.Errorf("%s: %v, want %v", script, got, want)
		}
	}
}
