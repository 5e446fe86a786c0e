package main

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/internal/loopdev"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

func TestExitCodesFollowTheContract(t *testing.T) {
	for _, c := range []struct {
		err  error
		code int
	}{
		{nil, exitDone},
		{errors.New("anything"), exitFailed},
		{blockstore.ErrUnavailable, exitFailed},
		{blockstore.ErrDenied, exitFailed},
		{manifest.ErrVersion, exitFailed},
		{usageError{errors.New("words")}, exitUsage},
		{manifest.ErrID, exitUsage},
		{fmt.Errorf("%w: %w", manifest.ErrCorrupt, manifest.ErrID), exitFailed},
		{volume.ErrSize, exitUsage},
		{snapshot.ErrNotFound, exitNotFound},
		{volume.ErrNotFound, exitNotFound},
		{snapshot.ErrNotStore, exitNotFound},
		{snapshot.ErrPending, exitRefused},
		{volume.ErrInUse, exitRefused},
		{volume.ErrBusy, exitRefused},
		{fs.ErrBusy, exitRefused},
		{loopdev.ErrBusy, exitRefused},
		{refusal{errors.New("words")}, exitRefused},
		{errInterrupted, exitInterrupted},
		{errors.Join(errInterrupted, snapshot.ErrPending), exitInterrupted},
		{codedError{"words", 3}, exitNotFound},
		{errors.Join(context.Canceled, codedError{"words", 4}), exitRefused},
	} {
		if c.err != nil {
			c.err = fmt.Errorf("while doing: %w", c.err)
		}
		if code := exitCode(c.err); code != c.code {
			t.Errorf("exit code of %v is %d, want %d", c.err, code, c.code)
		}
	}
}

func TestSizesAreReadAsPeopleWriteThem(t *testing.T) {
	for text, want := range map[string]int64{"10GiB": 10 << 30, "512MiB": 512 << 20, "1GB": 1e9, "4096": 4096, "1 TiB": 1 << 40} {
		var b byteSize
		if err := b.Set(text); err != nil || int64(b) != want {
			t.Errorf("%q is %d (%v), want %d", text, b, err, want)
		}
	}
	for _, text := range []string{"", "ten", "-1", "1XB"} {
		if err := new(byteSize).Set(text); err == nil {
			t.Errorf("%q passed for a size", text)
		}
	}
}

func TestTagsNeedAKey(t *testing.T) {
	tags, err := parseTags([]string{"env=prod", "note=a=b", "empty="})
	if err != nil || tags["env"] != "prod" || tags["note"] != "a=b" || tags["empty"] != "" || len(tags) != 3 {
		t.Errorf("parsed %v, %v", tags, err)
	}
	for _, bad := range []string{"env", "=prod", "aws:x=y"} {
		if _, err := parseTags([]string{bad}); !errors.Is(err, errUsage) {
			t.Errorf("%q: %v, want a usage error", bad, err)
		}
	}
}
