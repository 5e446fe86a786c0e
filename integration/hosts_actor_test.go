package integration

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// An actor does at random on one host what its users do, one thing after the
// other, and checks what it sees.
type actor struct {
	t *testing.T
	h *host
	r *rand.Rand
	g *registry

	name   string
	twins  []*twin  // its volumes
	parked []*mount // of snapshots
	made   int      // snapshots, or attempts at them
	kills  int      // of commands and daemons
}

const (
	mostTwins     = 3
	mostSnapshots = 16 // of all hosts; then deleting goes first
	fewSnapshots  = 4
)

func newActor(t *testing.T, s *store, g *registry, n int, seed uint64) *actor {
	a := &actor{t: t, h: newHost(t, s), r: newRand(seed<<8 + uint64(n)), g: g, name: fmt.Sprintf("host %d", n)}
	a.h.env = append(slices.Clone(a.h.env), appID(a.name))
	return a
}

// step does one thing.
func (a *actor) step() {
	switch n := a.r.IntN(100); {
	case a.g.known() > mostSnapshots || n < 14:
		a.deleteSnapshot()
	case n < 16:
		a.deletePending()
	case n < 21:
		a.collect()
	case n < 31:
		a.createVolume()
	case n < 45:
		a.snapshotImage()
	case n < 51:
		a.export()
	case n < 56:
		a.mountSnapshot()
	default:
		if len(a.twins) == 0 {
			a.createVolume()
			return
		}
		a.use(a.twins[a.r.IntN(len(a.twins))])
	}
}

func (a *actor) did(format string, args ...any) { a.g.did(a.name, format, args...) }

// chance is true once in n times.
func (a *actor) chance(n int) bool { return a.r.IntN(n) == 0 }

// run runs a command to its end or, once in a while, kills it before.
func (a *actor) run(args ...string) result {
	var r result
	if a.chance(6) {
		c := a.h.begin(args...)
		time.Sleep(time.Duration(a.r.IntN(120)) * time.Millisecond)
		c.signal(syscall.SIGKILL)
		r = c.wait()
		a.kills++
	} else {
		r = a.h.run(args...)
	}
	a.did("%s: %d %q %q", strings.Join(args, " "), r.code, strings.TrimSpace(r.stdout), strings.TrimSpace(r.stderr))
	if r.code == 1 && strings.Contains(r.stderr, "store is unavailable") {
		r.code = killed // the machine is so busy that requests time out: likewise, nobody knows what they did
	}
	if r.code == killed {
		a.g.cutShort(args)
	}
	return r
}

// killed is the exit code of a command that was killed.
const killed = -1

// must fails the test unless a command did what it should, was killed, or was
// refused as somebody deleted one of snaps. It reports whether it was done.
func (a *actor) must(r result, snaps ...string) bool {
	a.t.Helper()
	if r.code == 0 || r.code == killed {
		return r.code == 0
	}
	if !a.g.excuses(r, snaps...) {
		a.t.Fatalf("%s\nwhich nobody's deletion explains", r)
	}
	return false
}

func (a *actor) deleteSnapshot() {
	if a.g.known() < fewSnapshots {
		return
	}
	snap, ok := a.g.pickVictim(a.r)
	if !ok {
		return
	}
	a.g.end(snap)
	r := a.run("snapshot", "delete", snap) // killed, it is done or not: the last check does it again
	if !a.must(r, snap) && r.code != killed && a.g.enders(snap) == 1 {
		a.t.Fatalf("%s\nand nobody else deleted it", r)
	}
}

// deletePending deletes what somebody is making, has given up, or has just made.
func (a *actor) deletePending() {
	for _, info := range a.h.list() {
		if info.State == "pending" {
			a.g.end(info.SnapshotId)
			a.must(a.run("snapshot", "delete", info.SnapshotId), info.SnapshotId)
			return
		}
	}
}

func (a *actor) collect() { a.must(a.run("gc")) }

// describe returns the flag that a snapshot can be found by.
func (a *actor) describe() string {
	a.made++
	return fmt.Sprintf("--description=%s, %d", a.name, a.made)
}

// find looks for a snapshot whose maker cannot tell.
func (a *actor) find(description string) (snapshotInfo, bool) {
	found := a.h.list()
	i := slices.IndexFunc(found, func(s snapshotInfo) bool { return "--description="+s.Description == description })
	if i < 0 {
		return snapshotInfo{}, false
	}
	return found[i], true
}

// snapshotImage makes a snapshot of an image that is a child of somebody's
// snapshot, or of none.
func (a *actor) snapshotImage() {
	parent, content, ok := a.g.pick(a.r)
	if !ok {
		return
	}
	defer a.g.use(parent)()
	disk := bytes.Clone(content)
	for range 1 + a.r.IntN(4) {
		off := a.r.IntN(len(disk))
		fill(a.r, disk[off:min(len(disk), off+1+a.r.IntN(mib))])
	}
	file := writeImage(a.t, filepath.Join(a.h.dir, "disk.img"), disk)
	description := a.describe()
	args := []string{"snapshot", "create", description, "--parent", parent, file}
	if a.chance(12) {
		args = []string{"snapshot", "create", description, file}
	}
	r := a.run(args...)
	if r.code != killed {
		if a.must(r, parent) {
			a.g.publish(strings.TrimSpace(r.stdout), disk)
		}
		return
	}
	switch found, ok := a.find(description); {
	case ok && found.State == "completed":
		a.g.publish(found.SnapshotId, disk)
	case ok && a.chance(2): // else the last check does it
		a.g.end(found.SnapshotId)
		a.must(a.run("snapshot", "delete", found.SnapshotId), found.SnapshotId)
	}
}

// exported returns the content of a snapshot, unless somebody deletes it.
func (a *actor) exported(snap string) ([]byte, bool) {
	file := filepath.Join(a.h.dir, "out.img")
	r := a.run("snapshot", "export", "--force", snap, file)
	if r.code == killed {
		r = a.h.run("snapshot", "export", "--force", snap, file)
	}
	if !a.must(r, snap) {
		return nil, false
	}
	data, err := os.ReadFile(file)
	if err != nil {
		a.t.Fatal(err)
	}
	return data, true
}

// export compares a snapshot with what it must hold.
func (a *actor) export() {
	snap, want, ok := a.g.pick(a.r)
	if !ok {
		return
	}
	defer a.g.use(snap)()
	if got, ok := a.exported(snap); ok {
		sameBytes(a.t, "the export of "+snap, got, want)
	}
}

// mountSnapshot reads a snapshot through a mount, which may stay a while and may
// be killed.
func (a *actor) mountSnapshot() {
	if len(a.parked) > 0 {
		m := a.parked[0]
		a.parked = a.parked[1:]
		if a.chance(2) {
			a.did("unmount %s", m.dir)
			m.unmount()
			return
		}
		a.did("kill the daemon on %s", m.dir)
		a.kills++
		m.kill()
		a.h.ok("unmount", m.dir)
		return
	}
	snap, want, ok := a.g.pick(a.r)
	if !ok {
		return
	}
	defer a.g.use(snap)()
	dir, err := os.MkdirTemp(a.h.dir, "snap-")
	if err != nil {
		a.t.Fatal(err)
	}
	r := a.h.run("mount", "--no-hydrate", snap, dir)
	a.did("mount %s %s: %d %q", snap, dir, r.code, r.stderr)
	if !a.must(r, snap) {
		return
	}
	m := a.h.mounted(dir)
	off := a.r.IntN(len(want) / 2)
	sameBytes(a.t, "a part of "+snap, m.read(int64(off), len(want)/2), want[off:off+len(want)/2])
	a.parked = append(a.parked, m)
}

// finish checks all volumes and takes them away; a lost host leaves their pins.
func (a *actor) finish(lost bool) {
	for len(a.parked) > 0 {
		a.mountSnapshot()
	}
	for _, w := range slices.Clone(a.twins) {
		if w.mount == nil {
			w.attach()
		}
		w.checkAll()
		root := w.mount.status().Root
		w.detach()
		switch {
		case !lost:
			a.did("delete %s", w.vol)
			a.h.ok("volume", "delete", w.vol)
		case root != "":
			a.g.lose(w.vol)
		}
	}
	a.h.sweepSessions()
	a.h.ok("volume", "delete", a.h.ok("volume", "create", "--size", "1MiB")) // which sweeps up, too
	a.t.Logf("survived %d kills", a.kills)
	if lost {
		return
	}
	for _, folder := range []string{"mounts", "volumes"} {
		if left := entries(a.t, filepath.Join(a.h.state, folder)); len(left) != 0 {
			a.t.Errorf("%s: left in %s: %v", a.name, folder, left)
		}
	}
}
