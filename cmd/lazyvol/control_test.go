package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/volume"
)

// serveControl serves a handler on the control socket of dir until the test
// ends.
func serveControl(t *testing.T, dir string, h http.Handler) {
	t.Helper()
	l, err := listenControl(dir)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: h, ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
		<-done
	})
}

func TestControlSocketWorksUnderALongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("long/", 40))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	serveControl(t, dir, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if _, err := io.WriteString(w, "here"); err != nil {
			t.Error(err)
		}
	}))
	body, err := dialControl(dir).call(context.Background(), "GET", "/status", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if answer, err := io.ReadAll(body); err != nil || string(answer) != "here" {
		t.Errorf("got %q, %v", answer, err)
	}
}

func TestDaemonsErrorsKeepTheirExitCode(t *testing.T) {
	dir := t.TempDir()
	serveControl(t, dir, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		writeError(w, refusal{errors.New("not now")})
	}))
	_, err := dialControl(dir).call(context.Background(), "POST", "/snapshot", strings.NewReader("{}"))
	if exitCode(err) != exitRefused || err.Error() != "not now" {
		t.Errorf("got %v with exit code %d", err, exitCode(err))
	}
}

func TestNobodyOnTheSocketIsNoDaemon(t *testing.T) {
	dir := t.TempDir()
	if _, err := dialControl(dir).call(context.Background(), "GET", "/status", nil); !errors.Is(err, errNoDaemon) {
		t.Errorf("without a socket: %v", err)
	}
	l, err := listenControl(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil { // as a killed daemon leaves it
		t.Fatal(err)
	}
	if _, err := dialControl(dir).call(context.Background(), "GET", "/status", nil); !errors.Is(err, errNoDaemon) {
		t.Errorf("with a dead socket: %v", err)
	}
	if l, err = listenControl(dir); err != nil {
		t.Fatalf("a dead socket is in the way: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// That a daemon could not be asked now does not say that there is none: its volume would
// be opened beside it, or its metrics left out.
func TestOnlyASocketThatNobodyServesIsNoDaemon(t *testing.T) {
	dial := func(call string, errno syscall.Errno) error {
		return &net.OpError{Op: "dial", Net: "unix", Err: os.NewSyscallError(call, errno)}
	}
	for _, err := range []error{dial("connect", syscall.EAGAIN), dial("socket", syscall.EMFILE), dial("connect", syscall.EACCES), context.Canceled} {
		if errors.Is(controlError(err), errNoDaemon) {
			t.Errorf("%v is taken for the absence of a daemon", err)
		}
	}
	for _, err := range []error{dial("connect", syscall.ECONNREFUSED), dial("connect", syscall.ENOENT), os.ErrNotExist} {
		if !errors.Is(controlError(err), errNoDaemon) {
			t.Errorf("%v is not taken for the absence of a daemon", err)
		}
	}
}

// Making a snapshot, and drawing a map, may take any time; that a daemon hangs must be
// found out before.
func TestDaemonThatTellsNoStatusIsAskedForNothingElse(t *testing.T) {
	state := t.TempDir()
	const id = manifest.VolumeID("vol-0123456789abcdef0")
	dir := volume.Dir(state, id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	serveControl(t, dir, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/status" {
			t.Errorf("asked for %s", r.URL)
		}
		writeError(w, refusal{errors.New("not now")})
	}))
	a := &app{state: state, stderr: io.Discard, progress: progressNone}
	for what, ask := range map[string]func() error{
		"snapshot": func() error {
			return a.askSnapshot(t.Context(), dir, &createFlags{}, nil, func() error { return nil }, &readiness{})
		},
		"map": func() error { return (&mapDrawing{app: a}).ofMounted(t.Context(), id, mapSink{}) },
	} {
		if err := ask(); err == nil || !strings.Contains(err.Error(), "not now") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// A daemon that ends just when it is asked is like one that has ended.
func TestDaemonThatHangsUpIsAskedAgain(t *testing.T) {
	dir := t.TempDir()
	l, err := listenControl(dir)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err := errors.Join(err, l.Close()); err != nil {
			t.Error(err)
			return
		}
		if err := conn.Close(); err != nil { // with a request that was not read: a reset
			t.Error(err)
		}
	}()
	if _, err := askStatus(context.Background(), dir); !errors.Is(err, errNoDaemon) {
		t.Errorf("it is %v, want %v", err, errNoDaemon)
	}
	<-done
}
