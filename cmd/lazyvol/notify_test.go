package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// supervised runs keepTelling in a bubble for a time, and returns when the watchdog was
// told, counted from the beginning, and the last status.
func supervised(t *testing.T, watchdog, during time.Duration, alive func(context.Context) error, status func() string) (told []time.Duration, last string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		n := &notifier{watchdog: watchdog, log: slog.New(slog.DiscardHandler), send: func(state string) error {
			for line := range strings.SplitSeq(state, "\n") {
				if line == "WATCHDOG=1" {
					told = append(told, time.Since(begin))
				}
				if s, ok := strings.CutPrefix(line, "STATUS="); ok {
					last = s
				}
			}
			return nil
		}}
		ctx, cancel := context.WithTimeout(t.Context(), during)
		defer cancel()
		n.keepTelling(ctx, alive, status)
	})
	return told, last
}

func wantTold(t *testing.T, what string, got []time.Duration, seconds ...float64) {
	t.Helper()
	var want []time.Duration
	for _, s := range seconds {
		want = append(want, time.Duration(s*float64(time.Second)))
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s: the watchdog was told at %v, want %v", what, got, want)
	}
}

func TestWatchdogIsToldTwiceInItsIntervalAndOnlyByWhoServes(t *testing.T) {
	idle := func() string { return "" }
	serves := func(context.Context) error { return nil }
	told, _ := supervised(t, 10*time.Second, 22*time.Second, serves, idle)
	wantTold(t, "serving", told, 5, 10, 15, 20)

	told, _ = supervised(t, 0, time.Hour, serves, idle)
	wantTold(t, "without a watchdog", told)

	fails := func(context.Context) error { return errors.New("no") }
	told, _ = supervised(t, 10*time.Second, 22*time.Second, fails, idle)
	wantTold(t, "not serving", told)

	asked := 0
	hangs := func(context.Context) error {
		if asked++; asked == 2 {
			time.Sleep(17 * time.Second)
		}
		return nil
	}
	told, _ = supervised(t, 10*time.Second, 41*time.Second, hangs, idle)
	// What answers late is alive from then on; the tick that it slept through comes at once.
	wantTold(t, "hanging for 17 seconds", told, 5, 27, 27, 30, 35, 40)
}

func TestStatusIsToldWhenItChanges(t *testing.T) {
	calls := 0
	status := func() string {
		calls++
		return strings.Repeat("x", min(calls, 3))
	}
	for _, watchdog := range []time.Duration{0, time.Minute} {
		calls = 0
		if _, last := supervised(t, watchdog, 10*time.Minute, func(context.Context) error { return nil }, status); last != "xxx" {
			t.Errorf("watchdog %s: the last status is %q", watchdog, last)
		}
	}
}

func TestStatusDoesNotAnswerTheWatchdog(t *testing.T) {
	changes := 0
	told, last := supervised(t, 10*time.Second, 22*time.Second, func(context.Context) error { return errors.New("no") }, func() string {
		changes++
		return strings.Repeat("x", changes)
	})
	wantTold(t, "not serving", told)
	if last != "xxxx" {
		t.Errorf("the last status is %q", last)
	}
}

func TestSystemdIsAskedOnlyInTheForeground(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	t.Setenv("NOTIFY_SOCKET", "/nowhere")
	t.Setenv("WATCHDOG_USEC", "5000000")
	if n := newNotifier(false, log); n.send == nil || n.watchdog != 5*time.Second {
		t.Errorf("in the foreground: %+v", n)
	}
	if n := newNotifier(true, log); n.send != nil || n.watchdog != 0 {
		t.Errorf("in the background: %+v", n)
	}
	t.Setenv("WATCHDOG_PID", "1") // somebody else's
	if n := newNotifier(false, log); n.send == nil || n.watchdog != 0 {
		t.Errorf("with another's watchdog: %+v", n)
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if n := newNotifier(false, log); n.send != nil {
		t.Errorf("without a supervisor: %+v", n)
	}
}

// What reads our own mount is another process: as long as it waits for our answer it may
// hang, and we may still be killed.
func TestOurMountIsReadByAProcessThatCanBeLeft(t *testing.T) {
	file := filepath.Join(t.TempDir(), "status.json")
	if err := readByOther(t.Context(), file); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("not there: %v", err)
	}
	if err := unix.Mkfifo(file, 0o600); err != nil { // nobody answers
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := readByOther(ctx, file); err == nil || ctx.Err() == nil {
		t.Errorf("hanging: %v, %v", err, ctx.Err())
	}
	if err := errors.Join(os.Remove(file), os.WriteFile(file, []byte("{}"), 0o600), readByOther(t.Context(), file)); err != nil {
		t.Error(err)
	}
}
