package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/snapshot"
)

// What a store, a mountpoint or a stranger's status.json says is shown, and commands no
// terminal.
func TestWhatOthersSayCommandsNoTerminal(t *testing.T) {
	const evil = "\x1b]0;evil\a\u009b31mred\u202e"
	var out strings.Builder
	printError(&out, errors.New("one "+evil+"\ntwo"), false)
	fleet := fleetHealth{Served: []healthJSON{{ID: "vol-0123456789abcdef0", Mountpoint: "/mnt/" + evil, Reasons: []reason{{"store", degraded, evil}}}}}
	if err := printHealth(&out, fleet); err != nil {
		t.Fatal(err)
	}
	if err := printFindings(&out, []finding{fail("run 'lazyvol unmount /mnt/"+evil+"'", "%s", evil)}, true); err != nil {
		t.Fatal(err)
	}
	if strings.Count(out.String(), "evil") != 5 || !strings.Contains(out.String(), "\ntwo") {
		t.Errorf("not all is shown: %q", out.String())
	}
	dir := t.TempDir()
	status := `{"id": "snap-\u001b[31m", "state": "\u001b", "root": "\u009b", "mountpoint": "/\u001b", "errors": ["one\u0007", "two\u001b"]}`
	if err := os.WriteFile(filepath.Join(dir, fs.StatusName), []byte(status), 0o600); err != nil {
		t.Fatal(err)
	}
	out.WriteString(ok(t, "status", dir))
	if i := strings.IndexAny(out.String(), "\x1b\a\u009b\u202e"); i >= 0 {
		t.Errorf("a control character: %q", out.String()[i:])
	}
}

// What cannot be read is not what is not there.
func TestAnUnreadableStatusIsNoMissingOne(t *testing.T) {
	dir := t.TempDir()
	if code, _, stderr := try(t, "status", dir); code != exitNotFound {
		t.Errorf("an empty directory: exit %d: %s", code, stderr)
	}
	if err := os.Mkdir(filepath.Join(dir, fs.StatusName), 0o700); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := try(t, "status", dir); code != exitFailed {
		t.Errorf("one that cannot be read: exit %d: %s", code, stderr)
	}
	huge := t.TempDir()
	if err := os.WriteFile(filepath.Join(huge, fs.StatusName), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(huge, fs.StatusName), 1<<40); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := try(t, "status", huge); code != exitFailed {
		t.Errorf("a terabyte: exit %d: %s", code, stderr)
	}
}

func TestRecordsOfTheStoreCommandNoTerminal(t *testing.T) {
	const evil = "\x1b[2J\u009b\n\u202e"
	var out strings.Builder
	e := snapshot.Event{Resources: []string{evil}}
	e.Detail.Event, e.Detail.Source, e.Detail.Cause = evil, evil, evil
	if err := printEvent(&out, e); err != nil {
		t.Fatal(err)
	}
	a := &app{stdout: &out, stderr: &out}
	if err := a.printReport(&snapshot.Report{Findings: []snapshot.Finding{{Object: evil, Err: errors.New(evil)}}}, snapshot.Check{Share: 1}); err != nil {
		t.Fatal(err)
	}
	a.warning("%s", evil)
	if i := strings.IndexAny(out.String(), "\x1b\u009b\u202e"); i >= 0 {
		t.Errorf("a control character: %q", out.String()[i:])
	}
}

// What is printed on a disk that is full is a failure of each command, and told: it may
// be all that there is of an id.
func TestWhatCannotBePrintedIsAFailure(t *testing.T) {
	clearEnvironment(t)
	t.Setenv("LAZYVOL_STATE", t.TempDir())
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close() // nothing was written
	for line, told := range map[string]string{
		"version": "lazyvol", "help": "", "config show": "", "config show --json": "", "volume create --size 1MiB": "vol-",
	} {
		var stderr bytes.Buffer
		code := run(t.Context(), strings.Fields(line), strings.NewReader(""), full, &stderr)
		if code != exitFailed || !strings.Contains(stderr.String(), "no space left on device") || !strings.Contains(stderr.String(), told) {
			t.Errorf("%s: exit %d: %s; want it to tell of %q", line, code, &stderr, told)
		}
	}
}
