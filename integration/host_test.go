package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// commandTimeout bounds every command: none may hang, whatever the store does.
const commandTimeout = 2 * time.Minute

// A host is a machine as lazyvol sees it.
type host struct {
	t     testing.TB
	dir   string // of everything below
	state string
	store *store // nil: the default one, in the state directory
	own   *store // that default one, nil if store is not
	env   []string
	user  *syscall.Credential // who runs lazyvol; nil is root

	binary string
}

// newHost returns a host that has never run lazyvol, which uses the given
// store.
func newHost(t testing.TB, s *store) *host {
	t.Helper()
	dir := t.TempDir()
	h := &host{t: t, dir: dir, state: filepath.Join(dir, "state"), store: s, binary: lazyvol(t, false)}
	if s != nil {
		h.env = s.env
	}
	t.Cleanup(h.checkRaces)
	if s == nil {
		h.own = &store{files: filepath.Join(h.state, "store")}
		t.Cleanup(h.verifyOwn)
	}
	return h
}

// verifyOwn checks that everything in the host's default store verifies, unless
// the test never made or has damaged it.
func (h *host) verifyOwn() {
	_, err := os.Stat(filepath.Join(h.state, "store", "store.json"))
	if h.t.Failed() || h.own.unsound || errors.Is(err, os.ErrNotExist) {
		return
	}
	h.ok("snapshot", "verify", "--all")
}

// checkRaces fails the test if lazyvol was built with the race detector and it
// found something.
func (h *host) checkRaces() {
	reports, err := filepath.Glob(h.raceLog() + ".*")
	if err != nil {
		h.t.Error(err)
	}
	for _, file := range reports {
		report, err := os.ReadFile(file)
		h.t.Errorf("%s: %v\n%s", file, err, report)
	}
}

// raceLog is where the race detector reports, with the process id appended.
func (h *host) raceLog() string { return filepath.Join(h.dir, "race") }

// in returns the same host for use in a subtest.
func (h *host) in(t testing.TB) *host {
	same := *h
	same.t = t
	return &same
}

// A result is how a command ended.
type result struct {
	args   []string
	stdout string
	stderr string
	code   int // -1: it was killed
}

// command returns a lazyvol command, to be started by the caller.
func (h *host) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, h.binary, args...)
	cmd.Dir = h.dir
	cmd.Env = append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + h.dir, "LAZYVOL_STATE=" + h.state, "GORACE=atexit_sleep_ms=0 log_path=" + h.raceLog(), "AWS_EC2_METADATA_DISABLED=true",
	}, h.env...)
	if h.store != nil {
		cmd.Env = append(cmd.Env, "LAZYVOL_STORE="+h.store.url)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: h.user}
	// A daemon that kept our pipes would keep Wait waiting.
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// run runs lazyvol to its end.
func (h *host) run(args ...string) result {
	h.t.Helper()
	return h.begin(args...).wait()
}

// A running is a command that was started.
type running struct {
	t              testing.TB
	cmd            *exec.Cmd
	cancel         context.CancelFunc
	stdout, stderr bytes.Buffer // to be read after wait
	ended          bool
}

// begin starts lazyvol. The caller waits; should the test end before, the
// command is killed.
func (h *host) begin(args ...string) *running {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	r := &running{t: h.t, cmd: h.command(ctx, args...), cancel: cancel}
	r.cmd.Stdout, r.cmd.Stderr = &r.stdout, &r.stderr
	if err := r.cmd.Start(); err != nil {
		cancel()
		h.t.Fatalf("start lazyvol %s: %v", strings.Join(args, " "), err)
	}
	h.t.Cleanup(func() {
		cancel()
		if !r.ended {
			_ = r.cmd.Wait() // killed: how it ended says nothing
		}
	})
	return r
}

// wait waits until the command has ended.
func (r *running) wait() result {
	r.t.Helper()
	defer r.cancel()
	err := r.cmd.Wait()
	r.ended = true
	args := r.cmd.Args[1:]
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		r.t.Fatalf("lazyvol %s: %v", strings.Join(args, " "), err)
	}
	res := result{args: args, stdout: r.stdout.String(), stderr: r.stderr.String(), code: r.cmd.ProcessState.ExitCode()}
	if strings.Contains(res.stderr, "goroutine ") {
		r.t.Errorf("%s", res)
	}
	return res
}

// signal sends a signal to the command.
func (r *running) signal(sig syscall.Signal) {
	r.t.Helper()
	if err := r.cmd.Process.Signal(sig); err != nil {
		r.t.Fatalf("signal lazyvol %s: %v", strings.Join(r.cmd.Args[1:], " "), err)
	}
}

// String shows the command and how it ended.
func (r result) String() string {
	return fmt.Sprintf("lazyvol %s exited %d\nstdout: %s\nstderr: %s", strings.Join(r.args, " "), r.code, r.stdout, r.stderr)
}

// ok runs lazyvol, which must succeed, and returns what it printed, without
// the last newline.
func (h *host) ok(args ...string) string {
	h.t.Helper()
	r := h.run(args...)
	if r.code != 0 {
		h.t.Fatalf("%s", r)
	}
	return strings.TrimSuffix(r.stdout, "\n")
}

// fails runs lazyvol, which must exit with code, print nothing on stdout and
// say all of want on stderr.
func (h *host) fails(code int, want []string, args ...string) {
	h.t.Helper()
	r := h.run(args...)
	r.failed(h.t, code, want...)
}

// failed checks that a command exited with code, printed nothing on stdout and
// said all of want on stderr.
func (r result) failed(t testing.TB, code int, want ...string) {
	t.Helper()
	if r.code != code || r.stdout != "" {
		t.Fatalf("%s\nwant exit %d and nothing on stdout", r, code)
	}
	for _, w := range append(want, "lazyvol: ") {
		if !strings.Contains(strings.ToLower(r.stderr), strings.ToLower(w)) {
			t.Fatalf("%s\nwant %q on stderr", r, w)
		}
	}
}

// parse decodes what a command printed as JSON.
func parse[T any](t testing.TB, out string) (v T) {
	t.Helper()
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("%v in:\n%s", err, out)
	}
	return v
}

// snapshotInfo is what 'snapshot show --json' and 'list --json' print.
type snapshotInfo struct {
	SnapshotId              string
	VolumeId                string
	State                   string
	Progress                string
	StartTime               time.Time
	CompletionTime          *time.Time
	Description             string
	VolumeSize              int64
	Encrypted               bool
	KmsKeyId                string
	Tags                    []struct{ Key, Value string }
	ParentSnapshotId        string
	SetId                   string
	FullSnapshotSizeInBytes int64
	VolumeSizeBytes         int64
	StoredBytes             int64
	UniqueBytes             int64
}

// show returns what is known of a snapshot.
func (h *host) show(snap string) snapshotInfo {
	h.t.Helper()
	return parse[snapshotInfo](h.t, h.ok("snapshot", "show", "--json", snap))
}

// list returns the snapshots of the store.
func (h *host) list(flags ...string) []snapshotInfo {
	h.t.Helper()
	args := append([]string{"snapshot", "list", "--json"}, flags...)
	return parse[struct{ Snapshots []snapshotInfo }](h.t, h.ok(args...)).Snapshots
}

// export exports a snapshot and returns the file.
func (h *host) export(snap string) string {
	h.t.Helper()
	file := filepath.Join(h.t.TempDir(), "export.img")
	h.ok("snapshot", "export", snap, file)
	return file
}

// exported returns the content of a snapshot.
func (h *host) exported(snap string) []byte {
	h.t.Helper()
	file := h.export(snap)
	data, err := os.ReadFile(file)
	if err != nil {
		h.t.Fatal(err)
	}
	if err := os.Remove(file); err != nil {
		h.t.Fatal(err)
	}
	return data
}

// waitFor waits until a condition holds, and fails the test if it does not
// within the time.
func waitFor(t testing.TB, what string, within time.Duration, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", within, what)
		}
	}
}
