package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A lost host's pin keeps a deleted snapshot whole until a person names its
// holder, whatever the clocks of store and hosts say.
func TestPinOfALostHostStandsUntilItIsForgotten(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	lost, h := newHost(t, s), newHost(t, s)
	disk := randomBytes(1, 4*mib)
	snap := lost.ok("snapshot", "create", lost.image(disk))
	vol := lost.ok("volume", "create", "--snapshot", snap)
	// The volume moved on: its pin is on the snapshot that it reads through now.
	m := lost.mount(vol, "--no-hydrate")
	fill(newRand(2), disk[:mib])
	m.write(disk[:mib], 0)
	root := lost.ok("snapshot", "create", vol)
	// A mount and an export were under way, too.
	image := lost.mount(snap, "--no-hydrate")
	session := strings.TrimPrefix(glob(t, filepath.Join(lost.state, "mounts", "mount-*"))[0], filepath.Join(lost.state, "mounts")+"/")
	for _, holder := range []string{vol, session} { // they are not lost there
		lost.fails(4, []string{holder}, "volume", "forget", holder)
	}
	image.kill()
	h.ok("unmount", image.dir)
	m.kill()
	h.ok("unmount", m.dir)
	for _, dir := range []string{"volumes", "mounts", "bases"} { // the disk is gone
		if err := os.RemoveAll(filepath.Join(lost.state, dir)); err != nil {
			t.Fatal(err)
		}
	}
	h.ok("snapshot", "delete", snap, root)
	kept := s.objects(t, "data")

	// Clocks that went wrong, forward and back, move nothing.
	for _, by := range []time.Duration{0, 26 * time.Hour, 4000 * 24 * time.Hour, -26 * time.Hour, -4000 * 24 * time.Hour} {
		s.age(t, by, "pins", "intents", "outcomes", "tombstones", "data")
		shown := pinsShown(t, h.ok("gc"))
		if p := shown[vol]; p.snapshot != root || !p.deleted || by > 0 && p.age < by-time.Minute || by > 0 && p.age > by+time.Minute {
			t.Errorf("%s later, the volume's pin is shown as %+v", by, p)
		}
		if p := shown[session]; p.snapshot != snap || !p.deleted {
			t.Errorf("%s later, the mount's pin is shown as %+v", by, p)
		}
		if now := s.objects(t, "data"); len(now) != len(kept) {
			t.Fatalf("%s later, of\n%v\nthere is left\n%v", by, kept, now)
		}
	}

	// Each pin keeps what it is on, and no more.
	if out := h.ok("volume", "forget", session); out != snap {
		t.Errorf("forget printed %q, want %q", out, snap)
	}
	h.ok("gc")
	if n := s.dataBytes(t); n < 4*mib || n > 4*mib+64*kib {
		t.Errorf("%d bytes are left, want those of the volume's root", n)
	}
	h.fails(3, []string{session}, "volume", "forget", session)
	if out := h.ok("volume", "forget", vol); out != root {
		t.Errorf("forget printed %q, want %q", out, root)
	}
	h.fails(3, []string{vol}, "volume", "forget", vol)
	h.fails(2, nil, "volume", "forget", "mount-1")
	h.ok("gc")
	s.isEmpty(t)
}

// shownPin is a line of gc.
type shownPin struct {
	snapshot, host string
	age            time.Duration
	deleted        bool
}

// pinsShown returns the pins that gc printed, by holder.
func pinsShown(t testing.TB, out string) map[string]shownPin {
	t.Helper()
	pins := make(map[string]shownPin)
	for line := range strings.Lines(out) {
		fields := strings.Fields(line)
		if len(fields) < 4 {
			t.Fatalf("gc printed %q", line)
		}
		age, err := time.ParseDuration(fields[3])
		if err != nil {
			t.Fatalf("gc printed %q: %v", line, err)
		}
		pins[fields[1]] = shownPin{snapshot: fields[0], host: fields[2], age: age, deleted: len(fields) > 4 && fields[4] == "deleted"}
	}
	return pins
}

func TestForgetRemovesThePinsOfALostHost(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	lost, h := newHost(t, s), newHost(t, s)
	snap := lost.ok("snapshot", "create", lost.image(randomBytes(1, 4*mib)))
	vol := lost.ok("volume", "create", "--snapshot", snap)

	lost.fails(4, []string{"volume delete"}, "volume", "forget", vol) // it is not lost there
	h.ok("snapshot", "delete", snap)
	if s.dataBytes(t) == 0 {
		t.Fatal("the pinned snapshot's data is gone")
	}
	if out := h.ok("volume", "forget", vol); out != snap {
		t.Errorf("forget printed %q, want %q", out, snap)
	}
	h.fails(3, []string{vol}, "volume", "forget", vol)
	h.ok("gc")
	s.isEmpty(t)

	// Should the host come back it says so, and reads no nonsense.
	r := lost.run("mount", vol, t.TempDir())
	if r.code == 0 {
		m := lost.mounted(r.args[len(r.args)-1])
		if !strings.Contains(r.stderr, "warning") {
			t.Errorf("no warning of the lost pin: %s", r)
		}
		f := m.open(0)
		if _, err := f.ReadAt(make([]byte, 100), 0); err == nil {
			t.Error("a read of what is gone succeeded")
		}
	}
}
