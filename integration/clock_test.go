package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// direct returns the store as hosts see it that do not come through its gate.
func (s *store) direct() *store {
	d := *s
	d.env, d.endpoint = s.server.Env(), s.server.Endpoint
	return &d
}

// A host that is suspended in the middle of a snapshot, for so long that others
// take it for lost, delete what it builds on and collect, either has committed or
// fails cleanly: it keeps its changes, and nothing of a committed snapshot is
// missing.
func TestSuspendedHostCommitsOrFailsCleanly(t *testing.T) {
	t.Parallel()
	for _, source := range []string{"image", "volume"} {
		for _, at := range []side{requests, replies} {
			for _, kind := range []string{"intents", "packs", "leaves", "outcomes"} {
				t.Run(fmt.Sprintf("%s, side %d of %s", source, at, kind), func(t *testing.T) {
					t.Parallel()
					suspendAt(t, source, at, kind)
				})
			}
		}
	}
}

func suspendAt(t *testing.T, source string, at side, kind string) {
	s, gate := newGatedStore(t)
	h, other := newHost(t, s), newHost(t, s.direct())
	disk := diskBytes(1, 6*mib)
	parent := h.ok("snapshot", "create", h.image(disk))
	vol := h.ok("volume", "create", "--snapshot", parent)
	m := h.mount(vol, "--no-hydrate")
	fill(newRand(2), disk[2*mib:4*mib+100])
	m.write(disk[2*mib:4*mib+100], 2*mib)
	args := map[string][]string{"image": {"snapshot", "create", "--parent", parent, h.image(disk)}, "volume": {"snapshot", "create", vol}}[source]

	gate.close(at, puts(kind))
	create := h.begin(args...)
	gate.waitHolding(t)
	pid := create.cmd.Process.Pid
	if source == "volume" {
		pid = m.pid
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	other.ok("snapshot", "delete", parent)
	s.age(t, 26*time.Hour, "intents", "progress")
	other.ok("gc")
	other.ok("gc") // what was aborted is dead now
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	gate.open()
	r := create.wait()
	// Before its intent is there, nobody can take it for lost.
	switch committed := at == replies && kind == "outcomes"; {
	case committed && r.code != 0:
		t.Errorf("the store had committed it: %s", r)
	case r.code == 0:
		if !committed && !(source == "volume" && at == requests && kind == "intents") {
			t.Errorf("it was given up, and then committed: %s", r)
		}
		sameBytes(t, "the snapshot", other.exported(strings.TrimSpace(r.stdout)), disk)
	default:
		r.failed(t, 3)
	}
	other.ok("snapshot", "verify", "--all")

	// Of the volume's changes none is lost, and it can go on.
	m.equals(disk)
	fill(newRand(3), disk[:100])
	m.write(disk[:100], 0)
	next := h.ok("snapshot", "create", vol)
	sameBytes(t, "the next snapshot", other.exported(next), disk)
	m.equals(disk)
	h.takeAllAway(m, vol)
}

// The clock of a host says nothing: whatever times an attempt's records bear,
// only for how long the store has had them decides when its owner is taken for
// lost.
func TestAttemptOfAHostWhoseClockIsOffIsLeftAlone(t *testing.T) {
	t.Parallel()
	for name, off := range map[string]time.Duration{"behind": -26 * time.Hour, "ahead": 26 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, gate := newGatedStore(t)
			h, other := newHost(t, s), newHost(t, s.direct())
			disk := diskBytes(1, 4*mib)
			gate.close(requests, puts("packs"))
			create := h.begin("snapshot", "create", h.image(disk))
			gate.waitHolding(t)
			then := time.Now().Add(off).UTC().Format(time.RFC3339)
			for key := range s.objects(t, "intents") {
				s.edit(t, key, func(record map[string]any) { record["start"] = then })
				snap := filepath.Base(key)
				progress := fmt.Sprintf(`{"version":1,"snapshot":%q,"percent":1,"heartbeat":%q}`, snap, then)
				file := filepath.Join(s.files, "progress", snap)
				if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(progress), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			other.ok("gc")
			// Nor does a store whose records come from the future give it up.
			s.age(t, -26*time.Hour, "intents", "progress")
			other.ok("gc")
			gate.open()
			r := create.wait()
			if r.code != 0 {
				t.Fatal(r)
			}
			snap := strings.TrimSpace(r.stdout)
			sameBytes(t, snap, other.exported(snap), disk)
			other.ok("snapshot", "delete", snap)
			other.ok("gc")
			s.isEmpty(t)
		})
	}
}
