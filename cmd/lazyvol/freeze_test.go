package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
)

// unfreezable are flags that look for a filesystem that Linux cannot freeze: nothing is
// frozen, and all else is as if it was.
func unfreezable() *createFlags {
	return &createFlags{freezeMounted: true, mounted: []string{"/dev/shm"}}
}

func TestFilesystemsAreNotFrozenForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &app{stderr: io.Discard, state: "/"}
		ctx, sealed, thaw, err := a.freezeForCut(t.Context(), unfreezable())
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(frozenPatience - time.Millisecond)
		if ctx.Err() != nil {
			t.Errorf("it ended before its time: %v", context.Cause(ctx))
		}
		time.Sleep(2 * time.Millisecond)
		if !errors.Is(context.Cause(ctx), errFrozenLong) {
			t.Errorf("the cause is %v", context.Cause(ctx))
		}
		if err := sealed(); !errors.Is(err, errFrozenLong) {
			t.Errorf("sealed late: %v", err)
		}
		if err := thaw(); err != nil {
			t.Error(err)
		}
	})
}

func TestVolumeSealedInTimeMayTakeLongToUpload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &app{stderr: io.Discard, state: "/"}
		ctx, sealed, thaw, err := a.freezeForCut(t.Context(), unfreezable())
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // daemons tell of it twice
			if err := sealed(); err != nil {
				t.Errorf("sealed at once: %v", err)
			}
		}
		time.Sleep(time.Hour)
		if ctx.Err() != nil {
			t.Errorf("it ended: %v", context.Cause(ctx))
		}
		if err := thaw(); err != nil {
			t.Error(err)
		}
	})
}

// The daemon then only knows that its client went away, which is no interruption.
func TestSnapshotThatWasFrozenTooLongSaysSo(t *testing.T) {
	dir := t.TempDir()
	serveControl(t, dir, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/status" {
			_, _ = io.WriteString(w, "{}") // the client may be gone
			return
		}
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			t.Error(err)
		}
		<-r.Context().Done()
		if err := json.NewEncoder(w).Encode(snapshotEvent{report: failure(errInterrupted)}); err != nil {
			t.Error(err)
		}
	}))
	ctx, tooLong := context.WithCancelCause(t.Context())
	defer tooLong(nil)
	asked := make(chan error, 1)
	a := &app{stderr: io.Discard, stdout: io.Discard, progress: progressNone}
	go func() {
		asked <- frozenLong(ctx, a.askSnapshot(ctx, dir, &createFlags{}, nil, func() error { return nil }, &readiness{}))
	}()
	tooLong(errFrozenLong)
	if err := <-asked; !errors.Is(err, errFrozenLong) || exitCode(err) != exitFailed {
		t.Errorf("%v, exit %d", err, exitCode(err))
	}
}
