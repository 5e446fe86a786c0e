package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func newEmission(objects blockstore.Store) emission {
	store := snapshot.New(objects)
	return emission{store, store.VolumeCreated("vol-0123456789abcdef0", nil)}
}

func newHook(command string) hook {
	return hook{command: command, timeout: time.Minute, pause: time.Millisecond, log: slog.New(slog.DiscardHandler)}
}

func TestHookIsTriedAgainUntilItTakesTheEvent(t *testing.T) {
	t.Chdir(t.TempDir())
	e := newEmission(blockstore.NewMem())
	if err := newHook("echo x >> tries; test $(wc -l < tries) -ge 3 && cat > taken").deliver(t.Context(), e); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("taken")
	if err != nil {
		t.Fatal(err)
	}
	var got snapshot.Event
	if err := json.Unmarshal(data, &got); err != nil || got.ID != e.event.ID {
		t.Errorf("%s: %v", data, err)
	}
}

func TestFailingHookIsGivenUp(t *testing.T) {
	t.Chdir(t.TempDir())
	err := newHook("echo x >> tries; yes no | head -c 100000; echo the last word >&2; exit 7").deliver(t.Context(), newEmission(blockstore.NewMem()))
	if err == nil || !strings.Contains(err.Error(), "exit status 7") || !strings.Contains(err.Error(), "the last word") || len(err.Error()) > 2*maxTail {
		t.Errorf("failed with %v", err)
	}
	if tries, err := os.ReadFile("tries"); len(tries) != 2*hookTries || err != nil {
		t.Errorf("tried %d times: %v", len(tries)/2, err)
	}
}

func TestHangingHookIsEndedWithWhatItStarted(t *testing.T) {
	t.Chdir(t.TempDir())
	if err := unix.Mkfifo("alive", 0o600); err != nil {
		t.Fatal(err)
	}
	closed := make(chan error, 1)
	go func() {
		f, err := os.Open("alive") // until the hook opens it
		if err == nil {
			_, err = io.Copy(io.Discard, f) // and until nobody has it open any more
			err = errors.Join(err, f.Close())
		}
		closed <- err
	}()
	h := newHook("exec 3> alive; sleep 1000 & wait")
	h.timeout = 500 * time.Millisecond
	if err := h.run(t.Context(), nil); err == nil {
		t.Error("it ended by itself")
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

func TestHookNeitherInheritsItselfNorWaitsForItsChildren(t *testing.T) {
	t.Setenv(onEventEnv, "false")
	if err := newHook(`test -z "$`+onEventEnv+`" && sleep 2 &`).run(t.Context(), nil); err != nil {
		t.Error(err)
	}
	if err := newHook(`test -z "$`+onEventEnv+`"`).run(t.Context(), nil); err != nil {
		t.Error(err)
	}
}

// A lockedBuffer is a log.
type lockedBuffer struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// Nobody who offers an event waits, and who closes the outlet waits for no longer
// than its patience. What is dropped is logged.
func TestSlowOutletHoldsUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log lockedBuffer
		delivered := 0
		o := newOutlet("somebody", time.Minute, slog.New(slog.NewTextHandler(&log, nil)), func(ctx context.Context, _ emission) error {
			select {
			case <-time.After(45 * time.Second):
				delivered++
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		begin := time.Now()
		e := newEmission(blockstore.NewMem())
		o.offer(e)
		synctest.Wait() // it is being delivered
		for range maxPendingEvents + 3 {
			o.offer(e)
		}
		if took := time.Since(begin); took > 0 {
			t.Errorf("offering took %v", took)
		}
		if n := strings.Count(log.String(), "too many"); n != 3 {
			t.Errorf("%d are logged as too many, want 3:\n%s", n, log.String())
		}
		o.close()
		if took := time.Since(begin); took != time.Minute {
			t.Errorf("closing took %v", took)
		}
		// One was delivered, another was under way, and the rest waited.
		if n := strings.Count(log.String(), "somebody"); delivered != 1 || n != 3+maxPendingEvents {
			t.Errorf("%d were delivered and %d are logged as dropped", delivered, n)
		}
	})
}

// What cannot be stored is logged, unless it was never to be: credentials that may
// only read.
func TestReadersEmitNothingAndQuietly(t *testing.T) {
	for failure, logged := range map[error]bool{blockstore.ErrDenied: false, blockstore.ErrNoStore: true} {
		faults := blockstoretest.NewFaulty(blockstore.NewMem())
		faults.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Err: failure})
		var log lockedBuffer
		a := &app{stderr: &log}
		e := newEmission(faults)
		a.event(e.store, e.event)
		a.events.finish()
		if (log.String() != "") != logged || faults.Count(blockstoretest.OpPut) != 1 {
			t.Errorf("%v: logged %q", failure, log.String())
		}
		a.event(e.store, e.event) // too late, and no harm
		if faults.Count(blockstoretest.OpPut) != 1 {
			t.Error("emitted after the end")
		}
	}
}

func TestEventsReachTheStoreAndTheHook(t *testing.T) {
	out := filepath.Join(t.TempDir(), "out")
	var log lockedBuffer
	a := &app{stderr: &log, onEvent: "cat >> " + out}
	store := snapshot.New(blockstore.NewMem())
	const n = 20
	for range n {
		a.event(store, store.VolumeCreated("vol-0123456789abcdef0", nil))
	}
	a.events.finish()
	var stored []string
	err := store.Events(t.Context(), time.Time{}, func(e snapshot.Event, damaged error) error {
		stored = append(stored, e.ID)
		return damaged
	})
	if err != nil {
		t.Fatal(err)
	}
	handed, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(handed)), "\n")
	if len(lines) != n || len(stored) != n {
		t.Fatalf("%d were handed to the hook, and %d stored: %s", len(lines), len(stored), log.String())
	}
	for i, line := range lines {
		if !strings.Contains(line, stored[i]) {
			t.Errorf("%s is not %s", line, stored[i])
		}
	}
}

func TestSinceIsWhatPeopleMean(t *testing.T) {
	now := time.Date(2026, 11, 22, 13, 14, 15, 0, time.Local)
	for s, want := range map[string]time.Time{
		"": {}, "0s": now, "90m": now.Add(-90 * time.Minute), "7d": now.AddDate(0, 0, -7),
		"2026-11-20": time.Date(2026, 11, 20, 0, 0, 0, 0, time.Local), "2026-11-20 01:02:03": time.Date(2026, 11, 20, 1, 2, 3, 0, time.Local),
		"2026-11-20T01:02:03Z": time.Date(2026, 11, 20, 1, 2, 3, 0, time.UTC), "2026-11-20T01:02:03.5+02:00": time.Date(2026, 11, 19, 23, 2, 3, 5e8, time.UTC),
	} {
		if got, err := parseSince(s, now); err != nil || !got.Equal(want) {
			t.Errorf("%q is %v, want %v: %v", s, got, want, err)
		}
	}
	for _, s := range []string{"x", "-1h", "1", "-3d", "999999d", "2026-13-01", "2026-11-22T13"} {
		if got, err := parseSince(s, now); exitCode(err) != exitUsage {
			t.Errorf("%q is %v: %v", s, got, err)
		}
	}
}

func TestEventIsPrintedOnOneLine(t *testing.T) {
	store := snapshot.New(blockstore.NewMem())
	e := store.SnapshotCreated(manifest.SnapshotID{}, "vol-0123456789abcdef0", time.Now(), errors.New("the disk\nis gone"))
	var out bytes.Buffer
	if err := printEvent(&out, e); err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("%s  createSnapshot    failed     -  from vol-0123456789abcdef0  the disk is gone\n", e.Time.Local().Format(time.DateTime)); out.String() != want {
		t.Errorf("%q, want %q", out.String(), want)
	}
}
