package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// eventJSON is what the tests look at of an event.
type eventJSON struct {
	ID        string    `json:"id"`
	Time      time.Time `json:"time"`
	Resources []string  `json:"resources"`
	Detail    struct {
		Event  string `json:"event"`
		Result string `json:"result"`
		Cause  string `json:"cause"`
		Source string `json:"source"`
	} `json:"detail"`
}

// parseEvents decodes events, one a line.
func parseEvents(t testing.TB, lines string) (events []eventJSON) {
	t.Helper()
	for line := range strings.Lines(lines) {
		var e eventJSON
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		events = append(events, e)
	}
	return events
}

// String says what happened to what.
func (e eventJSON) String() string {
	of := "-"
	if len(e.Resources) > 0 {
		of = e.Resources[0][strings.LastIndexByte(e.Resources[0], '/')+1:]
	}
	return fmt.Sprintf("%s %s %s", e.Detail.Event, e.Detail.Result, of)
}

// Everything that happens in a store is told of, once and in order, whoever asks
// and however: all at once, as it happens, or by a command.
func TestEventsTellTheStory(t *testing.T) {
	t.Parallel()
	t.Run("dir", func(t *testing.T) {
		t.Parallel()
		s := newDirStore(t)
		tellStory(t, s, func(h *host, image string) (cause string) {
			intents := filepath.Join(s.files, "intents")
			if err := os.Rename(intents, intents+"-away"); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(intents, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			h.fails(1, []string{"cannot both exist"}, "snapshot", "create", image)
			if err := os.Remove(intents); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(intents+"-away", intents); err != nil {
				t.Fatal(err)
			}
			return "cannot both exist"
		})
	})
	t.Run("S3", func(t *testing.T) {
		t.Parallel()
		s, gate := newGatedStore(t)
		tellStory(t, s, func(h *host, image string) (cause string) {
			gate.close(requests, puts("packs"))
			create := h.begin("snapshot", "create", image)
			gate.waitHolding(t)
			create.signal(syscall.SIGINT)
			create.wait().failed(t, 130, "interrupted")
			gate.open()
			return "interrupted"
		})
	})
}

func tellStory(t *testing.T, s *store, fail func(h *host, image string) (cause string)) {
	h := newHost(t, s)
	image := h.image(randomBytes(1, 4*mib))
	h.env = slices.Concat(h.env, []string{"LAZYVOL_ON_EVENT=cat >> " + h.dir + "/handed"})
	seen, err := os.Create(filepath.Join(h.dir, "followed"))
	if err != nil {
		t.Fatal(err)
	}
	defer seen.Close()
	ctx, cancel := context.WithTimeout(t.Context(), commandTimeout)
	defer cancel()
	follow := newHost(t, s).command(ctx, "events", "--follow", "--json", "--since", "1h")
	var complaints strings.Builder
	follow.Stdout, follow.Stderr = seen, &complaints
	if err := follow.Start(); err != nil {
		t.Fatal(err)
	}

	var want []string
	happened := func(event, result, of string) { want = append(want, fmt.Sprintf("%s %s %s", event, result, of)) }
	snap := h.ok("snapshot", "create", image)
	happened("createSnapshot", "succeeded", snap)
	vol := h.ok("volume", "create", "--snapshot", snap)
	happened("createVolume", "available", vol)
	m := h.mount(vol)
	m.waitState("hydrated", time.Minute)
	happened("initializeVolume", "succeeded", vol)
	handed := func() string {
		data, err := os.ReadFile(filepath.Join(h.dir, "handed"))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	// The daemon tells in the background: wait, that the next one is later.
	toldOf := func(n int) {
		waitFor(t, fmt.Sprintf("%d events", n), time.Minute, func() bool { return len(s.objects(t, "events")) == n })
		waitFor(t, fmt.Sprintf("%d events handed over", n), time.Minute, func() bool { return strings.Count(handed(), "\n") == n })
	}
	toldOf(3)
	m.write(randomBytes(2, 64*kib), mib)
	second := h.ok("snapshot", "create", vol)
	happened("createSnapshot", "succeeded", second)
	toldOf(4)
	m.unmount()
	m = h.mount(vol) // hydrated again, and not told again
	m.waitState("hydrated", time.Minute)
	m.unmount()
	h.fails(2, nil, "snapshot", "create", "--parent", "snap", image)
	h.fails(3, nil, "snapshot", "delete", "snap-00000001000000001") // refused: nothing happened
	h.fails(3, nil, "volume", "create", "--snapshot", "snap-00000001000000001")
	cause := fail(h, image)
	h.ok("snapshot", "delete", snap, second)
	happened("createSnapshot", "failed", "?")
	happened("deleteSnapshot", "succeeded", snap)
	happened("deleteSnapshot", "succeeded", second)
	h.ok("gc") // they are young

	check := func(who, lines string) {
		t.Helper()
		events := parseEvents(t, lines)
		var got []string
		for _, e := range events {
			if e.Detail.Result == "failed" && strings.Contains(e.Detail.Cause, cause) && len(e.Resources) == 1 {
				got = append(got, e.Detail.Event+" failed ?")
				continue
			}
			got = append(got, e.String())
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s tells\n%s\nwant\n%s\nof\n%s", who, strings.Join(got, "\n"), strings.Join(want, "\n"), lines)
		}
	}
	check("events", h.ok("events", "--json")+"\n")
	check("--on-event", handed())
	followed := func() string {
		data, err := os.ReadFile(seen.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	waitFor(t, "all events to be followed", time.Minute, func() bool { return strings.Count(followed(), "\n") >= len(want) })
	if err := follow.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if err := follow.Wait(); follow.ProcessState.ExitCode() != 130 || complaints.String() != "" {
		t.Errorf("--follow ended with %v: %s", err, complaints.String())
	}
	check("events --follow", followed())

	all := parseEvents(t, h.ok("events", "--json"))
	last := all[len(all)-1]
	if got := h.ok("events", "--json", "--since", last.Time.Format(time.RFC3339Nano)); !strings.Contains(got, last.ID) || strings.Count(got, "\n") > 0 {
		t.Errorf("since the last one: %s", got)
	}
	if text := h.ok("events"); strings.Count(text, "\n")+1 != len(want) || !strings.Contains(text, second+"  from "+vol) {
		t.Errorf("events prints\n%s", text)
	}
	h.fails(2, []string{"--since"}, "events", "--since", "yesterday")
	if verified := h.run("snapshot", "verify", "--all"); verified.code != 0 || strings.Contains(verified.stdout+verified.stderr, "strange") {
		t.Errorf("%s", verified)
	}
}

// A command that fails is run again, given up, and named; what it was told of has
// happened all the same.
func TestFailingEventCommandFailsNoJob(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	r := h.run("--on-event", "cat >> handed; echo cannot be reached; exit 3", "volume", "create", "--size", "1MiB")
	if r.code != 0 || !strings.HasPrefix(r.stdout, "vol-") {
		t.Fatalf("%s", r)
	}
	for _, part := range []string{"createVolume", "exit status 3", "cannot be reached"} {
		if !strings.Contains(r.stderr, part) {
			t.Errorf("%s\nwant %q on stderr", r, part)
		}
	}
	data, err := os.ReadFile(filepath.Join(h.dir, "handed"))
	if err != nil {
		t.Fatal(err)
	}
	handed := parseEvents(t, string(data))
	stored := parseEvents(t, h.ok("events", "--json"))
	if len(handed) < 2 || len(stored) != 1 {
		t.Fatalf("handed over %v, stored %v", handed, stored)
	}
	for _, e := range handed {
		if e.ID != stored[0].ID {
			t.Errorf("handed over %v, stored %v", handed, stored)
		}
	}
}

// A store that takes no events takes snapshots.
func TestEventThatCannotBeStoredFailsNoJob(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	h := newHost(t, s)
	if err := os.WriteFile(filepath.Join(s.files, "events"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := h.run("snapshot", "create", h.image(randomBytes(1, mib)))
	if r.code != 0 || !strings.Contains(r.stderr, "an event did not reach the store") {
		t.Errorf("%s", r)
	}
	if err := os.Remove(filepath.Join(s.files, "events")); err != nil {
		t.Fatal(err)
	}
}
