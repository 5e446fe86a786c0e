package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
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
		{manifest.ErrTags, exitUsage},
		{usageError{manifest.ErrTooManyTags}, exitRefused},
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
		{crypt.ErrKeyURI, exitUsage},
		{crypt.ErrKeyNotFound, exitNotFound},
		{crypt.ErrKeyDisabled, exitRefused},
		{crypt.ErrWrongKey, exitRefused},
		{crypt.ErrKeyDenied, exitFailed},
		{crypt.ErrKeyUnavailable, exitFailed},
		{crypt.ErrKeyFormat, exitFailed},
		{errInterrupted, exitInterrupted},
		{errors.Join(errInterrupted, snapshot.ErrPending), exitInterrupted},
		{codedError{"words", 3}, exitNotFound},
		{errors.Join(context.Canceled, remoteError{report{Error: "words", Code: 4}}), exitRefused},
	} {
		if c.err != nil {
			c.err = fmt.Errorf("while doing: %w", c.err)
		}
		if code := exitCode(c.err); code != c.code {
			t.Errorf("exit code of %v is %d, want %d", c.err, code, c.code)
		}
	}
}

func TestErrorsNameTheCodeOfEBS(t *testing.T) {
	for _, c := range []struct {
		err          error
		text         string // of the code, behind the message
		code, reason string // to scripts
	}{
		{errors.New("anything"), "", "InternalError", ""},
		{usageError{manifest.ErrSnapshotID}, " (InvalidSnapshotID.Malformed)", "InvalidSnapshotID.Malformed", ""},
		{usageError{manifest.ErrVolumeID}, " (InvalidVolumeID.Malformed)", "InvalidVolumeID.Malformed", ""},
		{fmt.Errorf("%w: %w", manifest.ErrCorrupt, manifest.ErrSnapshotID), "", "InternalError", ""},
		{usageError{errors.New("words")}, "", "InvalidParameterValue", ""},
		{combinationError{errors.New("words")}, " (InvalidParameterCombination)", "InvalidParameterCombination", ""},
		{manifest.ErrTags, " (InvalidParameterValue)", "InvalidParameterValue", ""},
		{manifest.ErrTooManyTags, " (TagLimitExceeded)", "TagLimitExceeded", ""},
		{snapshot.ErrNotFound, " (InvalidSnapshot.NotFound)", "InvalidSnapshot.NotFound", ""},
		{volume.ErrNotFound, " (InvalidVolume.NotFound)", "InvalidVolume.NotFound", ""},
		{snapshot.ErrPending, " (IncorrectState)", "IncorrectState", ""},
		{snapshot.ErrUnrelated, " (ValidationException: UNRELATED_SNAPSHOTS)", "ValidationException", "UNRELATED_SNAPSHOTS"},
		{refusal{errors.New("words")}, "", "IncorrectState", ""},
		{refusal{snapshot.ErrPending}, " (IncorrectState)", "IncorrectState", ""},
		{codedError{"words", 3}, "", "ResourceNotFoundException", ""},
		{remoteError{failure(snapshot.ErrUnrelated)}, " (ValidationException: UNRELATED_SNAPSHOTS)", "ValidationException", "UNRELATED_SNAPSHOTS"},
		{errInterrupted, "", "Interrupted", ""},
	} {
		var text, script strings.Builder
		err := fmt.Errorf("while doing: %w", c.err)
		printError(&text, err, false)
		if want := "lazyvol: " + err.Error() + c.text + "\n"; text.String() != want {
			t.Errorf("printed %q, want %q", text.String(), want)
		}
		printError(&script, err, true)
		var got errorJSON
		if err := json.Unmarshal([]byte(script.String()), &got); err != nil {
			t.Fatal(err)
		}
		if e := got.Error; e.Code != c.code || e.Reason != c.reason || e.Message != err.Error() {
			t.Errorf("scripts read %+v of %v, want code %q, reason %q", e, err, c.code, c.reason)
		}
	}
}

func TestErrorsOfCommandsThatPrintJSONAreJSON(t *testing.T) {
	for _, c := range []struct {
		line string
		code string // "": plain text
		exit int
	}{
		{"snapshot show --json snap-1", "InvalidSnapshotID.Malformed", exitUsage},
		{"snapshot show snap-1", "", exitUsage},
		{"snapshot show snap-00000001000000001 --json", "InvalidSnapshot.NotFound", exitNotFound},
		{"snapshot show --json", "InvalidParameterValue", exitUsage},
		{"snapshot show --frobnicate --json snap-1", "InvalidParameterValue", exitUsage},
		{"volume show --json vol-00000000000000001", "InvalidVolume.NotFound", exitNotFound},
		{"frobnicate --json", "InvalidParameterValue", exitUsage},
		{"frobnicate", "", exitUsage},
		{"snapshot delete --json snap-00000001000000001", "InvalidSnapshot.NotFound", exitNotFound},
		{"snapshot list --owner-id self --json", "InvalidParameterValue", exitUsage},
	} {
		var stdout, stderr strings.Builder
		args := append([]string{"--state", t.TempDir()}, strings.Fields(c.line)...)
		exit := run(context.Background(), args, strings.NewReader(""), &stdout, &stderr)
		var e errorJSON
		err := json.Unmarshal([]byte(stderr.String()), &e)
		if exit != c.exit || stdout.String() != "" || e.Error.Code != c.code || (err == nil) != (c.code != "") {
			t.Errorf("lazyvol %s exited %d with %q, want %d with code %q", c.line, exit, stderr.String(), c.exit, c.code)
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
	for _, bad := range []string{"env", "=prod", "aws:x=y", "AWS:x=y", "lazyvol:x=y", "Lazyvol:=", "a=1 a=2", strings.Repeat("k", 129) + "=", "k=" + strings.Repeat("v", 257)} {
		if _, err := parseTags(strings.Fields(bad)); !errors.Is(err, errUsage) {
			t.Errorf("%q: %v, want a usage error", bad, err)
		}
	}
	good := []string{strings.Repeat("ü", 128) + "=" + strings.Repeat("ü", 256), "lazyvol=x", "aws=y"}
	if _, err := parseTags(good); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "aws:x", "lazyvol:x", strings.Repeat("k", 129)} {
		if err := checkRemoved(nil, []string{bad}); !errors.Is(err, manifest.ErrTags) || exitCode(err) != exitUsage {
			t.Errorf("removing %q: %v, want a usage error", bad, err)
		}
	}
	if err := checkRemoved(tags, []string{"new", "env"}); !errors.Is(err, errCombination) {
		t.Errorf("removing what is set: %v", err)
	}
}
