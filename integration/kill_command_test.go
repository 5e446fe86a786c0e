package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A killing is a command that is killed at one of its requests to the store, and
// what must be so afterwards.
type killing struct {
	args []string

	// ready reports that the command has come as far as it goes by itself; nil:
	// that is when it ends.
	ready func() bool

	// victim returns the process to be killed; nil: the command's.
	victim func() int

	// after checks what the command left, does it again, and takes what that
	// made away.
	after func(r result)
}

// A scene is a host with one snapshot in a store of its own, where commands are
// killed one after the other. After each, nothing but that snapshot may be left.
type scene struct {
	*host
	gate    *gate
	disk    []byte
	base    string // a snapshot of disk
	objects map[string]int64
	killed  int
}

func newScene(t testing.TB) *scene {
	s, gate := newGatedStore(t)
	k := &scene{host: newHost(t, s), gate: gate, disk: diskBytes(1, 3*mib)}
	k.base = k.ok("snapshot", "create", k.image(k.disk))
	k.objects = s.objects(t, "data")
	return k
}

// killings are the commands to be killed, each made ready anew for every time.
var killings = map[string]func(*scene) killing{
	"snapshot create IMAGE":            func(k *scene) killing { return k.killImage() },
	"snapshot create --parent IMAGE":   func(k *scene) killing { return k.killImage("--parent", k.base) },
	"snapshot create of a volume":      (*scene).killVolumeSnapshot,
	"snapshot create through a daemon": (*scene).killDaemonAtSnapshot,
	"snapshot delete":                  (*scene).killDelete,
	"snapshot export":                  (*scene).killExport,
	"volume create":                    (*scene).killVolumeCreate,
	"volume delete":                    (*scene).killVolumeDelete,
	"volume forget":                    (*scene).killForget,
	"gc":                               (*scene).killCollect,
	"mount SNAP":                       (*scene).killSnapshotMount,
	"mount VOL":                        (*scene).killVolumeMount,
}

// Killed at any of its requests, before it reaches the store or before the reply
// comes back, a command leaves nothing half made that can be seen, can be done
// again, and leaks no pin, folder, session or object.
func TestCommandKilledAtAnyRequestCanBeDoneAgain(t *testing.T) {
	t.Parallel()
	const samples = 3 // of each side's requests, unless stressed
	for name, ready := range killings {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRand(modelSeed(t, 4))
			k := newScene(t)
			total := k.killAt(t, ready, requests, 1<<30)
			for _, at := range []side{requests, replies} {
				points := r.Perm(total)
				if !stressed() {
					points = points[:min(samples, total)]
				}
				for _, n := range points {
					k.killAt(t, ready, at, n+1)
				}
			}
			t.Logf("%d requests; survived %d kills", total, k.killed)
		})
	}
}

// killAt runs a command and kills it when one side of its nth request is
// reached, if it is. It returns how many there were.
func (k *scene) killAt(t testing.TB, ready func(*scene) killing, at side, n int) int {
	t.Helper()
	c := ready(k)
	var seen atomic.Int64
	k.gate.close(at, func(*http.Request) bool { return seen.Add(1) >= int64(n) })
	command := k.begin(c.args...)
	ended := make(chan result, 1)
	go func() { ended <- command.wait() }()
	var r result
	waitFor(t, "the command is held, ready or done", time.Minute, func() bool {
		select {
		case r = <-ended:
			ended <- r
			return true
		default:
			return k.gate.holding() > 0 || c.ready != nil && c.ready()
		}
	})
	if k.gate.holding() > 0 {
		k.killed++
	}
	pid := command.cmd.Process.Pid
	if c.victim != nil {
		pid = c.victim()
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
		t.Fatal(err)
	}
	r = <-ended
	k.gate.open()
	t.Logf("killed at %d of side %d: %s", n, at, r)
	c.after(r)
	k.nothingLeaked(t)
	return int(seen.Load())
}

// nothingLeaked checks that only the scene's own snapshot is left, here and in
// the store.
func (k *scene) nothingLeaked(t testing.TB) {
	t.Helper()
	k.sweepSessions()
	if listed := k.list(); len(listed) != 1 || listed[0].SnapshotId != k.base {
		t.Errorf("list: %+v", listed)
	}
	if left := k.store.objects(t, "data"); !maps.Equal(left, k.objects) {
		t.Errorf("in the store are\n%v\nwant\n%v", left, k.objects)
	}
	for _, folder := range []string{"pins", "progress"} {
		if left := k.store.objects(t, folder); len(left) != 0 {
			t.Errorf("left in the store: %v", left)
		}
	}
	for _, folder := range []string{"volumes", "mounts"} {
		if left := entries(t, filepath.Join(k.state, folder)); len(left) != 0 {
			t.Errorf("left in %s: %v", folder, left)
		}
	}
	sameBytes(t, "the snapshot that was there all the time", k.exported(k.base), k.disk)
}

// sweepSessions collects, and with it what killed commands left on this host so
// long ago that none of their requests is under way any more.
func (h *host) sweepSessions() {
	h.t.Helper()
	long := time.Now().Add(-time.Hour)
	for _, record := range glob(h.t, filepath.Join(h.state, "mounts", "*", "session.json")) {
		if err := os.Chtimes(record, long, long); err != nil && !errors.Is(err, fs.ErrNotExist) {
			h.t.Fatal(err)
		}
	}
	h.ok("gc")
}

// again does a command again, which may find that all is done.
func (k *scene) again(args ...string) {
	k.t.Helper()
	if r := k.run(args...); r.code != 0 && r.code != 3 {
		k.t.Fatalf("done again: %s", r)
	}
}

// others returns the snapshots besides the scene's own.
func (k *scene) others() []snapshotInfo {
	return slices.DeleteFunc(k.list(), func(s snapshotInfo) bool { return s.SnapshotId == k.base })
}

// newVolume makes a volume of the scene's snapshot in which something was
// written, and returns its content.
func (k *scene) newVolume() (vol string, disk []byte, m *mount) {
	vol = k.ok("volume", "create", "--snapshot", k.base)
	disk = bytes.Clone(k.disk)
	fill(newRand(2), disk[mib:2*mib+100])
	m = k.mount(vol, "--no-hydrate")
	m.write(disk[mib:2*mib+100], mib)
	return vol, disk, m
}

// takeAway deletes snapshots and a volume.
func (k *scene) takeAway(vol string, snaps ...string) {
	for _, snap := range snaps {
		k.ok("snapshot", "delete", snap)
	}
	if vol != "" {
		k.ok("volume", "delete", vol)
	}
}

func (k *scene) killImage(flags ...string) killing {
	disk := bytes.Clone(k.disk)
	fill(newRand(3), disk[:mib])
	args := append([]string{"snapshot", "create"}, append(flags, k.image(disk))...)
	return killing{args: args, after: func(r result) {
		for _, s := range k.others() {
			switch {
			case s.State == "completed":
				sameBytes(k.t, s.SnapshotId, k.exported(s.SnapshotId), disk)
				k.ok("snapshot", "delete", s.SnapshotId)
			case k.killed%2 == 0:
				k.fails(4, []string{"pending"}, "mount", s.SnapshotId, k.t.TempDir())
				k.ok("snapshot", "delete", s.SnapshotId)
			default: // nobody deletes it, but its owner was not heard of for long
				k.store.age(k.t, time.Hour, "intents", "progress")
				k.ok("gc")
			}
		}
		snap := k.ok(args...)
		sameBytes(k.t, snap, k.exported(snap), disk)
		k.takeAway("", snap)
	}}
}

// age sets back the times of a store's records, as its server knows them.
func (s *store) age(t testing.TB, by time.Duration, kinds ...string) {
	t.Helper()
	for _, kind := range kinds {
		for key := range s.objects(t, kind) {
			then := time.Now().Add(-by)
			if err := os.Chtimes(filepath.Join(s.files, key), then, then); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func (k *scene) killVolumeSnapshot() killing {
	vol, disk, m := k.newVolume()
	m.unmount()
	return killing{args: []string{"snapshot", "create", vol}, after: func(result) { k.checkVolume(vol, disk) }}
}

// checkVolume checks a volume whose snapshot was interrupted, and the next one.
func (k *scene) checkVolume(vol string, disk []byte) {
	m := k.mount(vol)
	m.equals(disk)
	m.unmount()
	k.ok("snapshot", "create", vol)
	var snaps []string
	for _, s := range k.others() {
		sameBytes(k.t, s.SnapshotId, k.exported(s.SnapshotId), disk)
		snaps = append(snaps, s.SnapshotId)
	}
	k.takeAway(vol, snaps...)
}

func (k *scene) killDaemonAtSnapshot() killing {
	vol, disk, m := k.newVolume()
	return killing{
		args: []string{"snapshot", "create", vol}, victim: func() int { return m.pid },
		after: func(result) {
			m.waitEnd()
			m = m.again(vol)
			m.equals(disk)
			m.unmount()
			k.checkVolume(vol, disk)
		},
	}
}

func (k *scene) killDelete() killing {
	disk := bytes.Clone(k.disk)
	fill(newRand(3), disk[:mib])
	snap := k.ok("snapshot", "create", "--parent", k.base, k.image(disk))
	args := []string{"snapshot", "delete", snap}
	return killing{args: args, after: func(result) { k.again(args...) }}
}

func (k *scene) killExport() killing {
	file := filepath.Join(k.t.TempDir(), "out.img")
	return killing{args: []string{"snapshot", "export", k.base, file}, after: func(r result) {
		switch got, err := os.ReadFile(file); {
		case err == nil: // under its name it is whole
			sameBytes(k.t, "the export", got, k.disk)
		case r.code == 0 || !errors.Is(err, fs.ErrNotExist):
			k.t.Errorf("%s\nbut the file: %v", r, err)
		}
		k.ok("snapshot", "export", "--force", k.base, file)
	}}
}

func (k *scene) killVolumeCreate() killing {
	args := []string{"volume", "create", "--snapshot", k.base}
	return killing{args: args, after: func(result) {
		for _, v := range parse[struct{ Volumes []volumeInfo }](k.t, k.ok("volume", "list", "--json")).Volumes {
			k.ok("volume", "delete", v.VolumeId)
		}
		k.takeAway(k.ok(args...))
	}}
}

func (k *scene) killVolumeDelete() killing {
	vol, _, m := k.newVolume()
	m.unmount()
	args := []string{"volume", "delete", vol}
	return killing{args: args, after: func(result) {
		if r := k.run("mount", vol, k.t.TempDir()); r.code == 0 { // it had not begun
			k.mounted(r.args[len(r.args)-1]).unmount()
		}
		k.again(args...)
	}}
}

func (k *scene) killForget() killing {
	lost := newHost(k.t, k.store)
	vol := lost.ok("volume", "create", "--snapshot", k.base)
	args := []string{"volume", "forget", vol}
	return killing{args: args, after: func(result) { k.again(args...) }}
}

func (k *scene) killCollect() killing {
	disk := bytes.Clone(k.disk)
	fill(newRand(3), disk[:2*mib])
	first := k.ok("snapshot", "create", k.image(disk))
	fill(newRand(4), disk[:mib])
	second := k.ok("snapshot", "create", "--parent", first, k.image(disk))
	// Deleted, and killed before any space was freed: a pack is to be rewritten.
	k.gate.close(replies, puts("tombstones"))
	deletion := k.begin("snapshot", "delete", first)
	k.gate.waitHolding(k.t)
	deletion.signal(syscall.SIGKILL)
	deletion.wait()
	k.gate.open()
	return killing{args: []string{"gc"}, after: func(result) {
		k.ok("gc")
		sameBytes(k.t, second, k.exported(second), disk)
		k.takeAway("", second)
	}}
}

func (k *scene) killSnapshotMount() killing { return k.killMount(k.base, "", k.disk) }

func (k *scene) killVolumeMount() killing {
	vol, disk, m := k.newVolume()
	m.unmount()
	return k.killMount(vol, vol, disk)
}

// killMount mounts in the foreground, so that the command is the daemon.
func (k *scene) killMount(target, vol string, disk []byte) killing {
	dir := k.t.TempDir()
	return killing{
		args:  []string{"mount", "--foreground", "--no-hydrate", target, dir},
		ready: func() bool { return isMountpoint(k.t, dir) },
		after: func(result) {
			m := k.mountOn(dir, target)
			m.equals(disk)
			m.unmount()
			k.takeAway(vol)
		},
	}
}

// A mount whose command was killed before it was ready is taken away by its
// daemon; if it was ready, it is served.
func TestMountWhoseCommandWasKilledCanBeDoneAgain(t *testing.T) {
	t.Parallel()
	k := newScene(t)
	vol, disk, m := k.newVolume()
	m.unmount()
	for target, want := range map[string][]byte{k.base: k.disk, vol: disk} {
		for _, at := range []side{requests, replies} {
			dir := t.TempDir()
			k.gate.close(at, func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/pins/") })
			command := k.begin("mount", target, dir)
			k.gate.waitHolding(t)
			command.signal(syscall.SIGKILL)
			command.wait()
			k.gate.open()
			m := k.mountAfterKill(target, dir)
			m.equals(want)
			m.unmount()
		}
	}
	k.takeAway(vol)
	k.nothingLeaked(t)
}

// mountAfterKill mounts a target on a directory on which a command that was
// killed may have mounted it, or be about to.
func (h *host) mountAfterKill(target, dir string) *mount {
	h.t.Helper()
	const inUse = 4
	var r result
	if isMountpoint(h.t, dir) {
		waitFor(h.t, "what was mounted is unmounted", time.Minute, func() bool {
			r = h.run("unmount", dir)
			return r.code != inUse
		})
	}
	waitFor(h.t, "a daemon without a command lets go of "+target, time.Minute, func() bool {
		r = h.run("mount", target, dir)
		return r.code != inUse
	})
	if r.code != 0 {
		h.t.Fatal(r)
	}
	return h.mounted(dir)
}

// A request that outlives the export that made it pins the snapshot after the
// export was swept up; the next sweep finds that, too.
func TestLatePinOfAKilledCommandIsRemoved(t *testing.T) {
	t.Parallel()
	k := newScene(t)
	pins := filepath.Join(k.store.files, "pins", k.base)
	k.gate.close(replies, puts("pins"))
	export := k.begin("snapshot", "export", k.base, filepath.Join(t.TempDir(), "out.img"))
	k.gate.waitHolding(t)
	export.signal(syscall.SIGKILL)
	export.wait()
	k.gate.open()
	made := entries(t, pins)
	if len(made) != 1 {
		t.Fatalf("pins: %v", made)
	}
	pin, err := os.ReadFile(filepath.Join(pins, made[0]))
	if err != nil {
		t.Fatal(err)
	}
	k.ok("gc")
	if left := entries(t, pins); len(left) != 0 {
		t.Fatalf("pins after the first sweep: %v", left)
	}
	if err := errors.Join(os.MkdirAll(pins, 0o755), os.WriteFile(filepath.Join(pins, made[0]), pin, 0o600)); err != nil {
		t.Fatal(err)
	}
	k.nothingLeaked(t)
}

// Who was killed before its folder had a record, or when that was gone again,
// leaves a folder without one. Later commands remove it, unless somebody holds
// its lock.
func TestFoldersWithoutARecordAreRemoved(t *testing.T) {
	t.Parallel()
	k := newScene(t)
	for kind, sweep := range map[string][]string{"mounts": {"gc"}, "volumes": {"volume", "create", "--size", "1MiB"}} {
		prefix := map[string]string{"mounts": "mount-", "volumes": "vol-"}[kind]
		var held *os.File
		for i, files := range [][]string{{}, {"lock"}, {"lock", "daemon.log"}, {"lock"}} {
			dir := filepath.Join(k.state, kind, fmt.Sprintf("%s%017x", prefix, i))
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			for _, name := range files {
				f, err := os.Create(filepath.Join(dir, name))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				held = f
			}
		}
		if err := syscall.Flock(int(held.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
			t.Fatal(err)
		}
		made := k.ok(sweep...)
		left := slices.DeleteFunc(entries(t, filepath.Join(k.state, kind)), func(name string) bool { return name == made })
		if want := fmt.Sprintf("%s%017x", prefix, 3); len(left) != 1 || left[0] != want {
			t.Errorf("in %s are %v, want only %s, which somebody is making", kind, left, want)
		}
		if err := held.Close(); err != nil {
			t.Fatal(err)
		}
		if made != "" {
			k.ok("volume", "delete", made)
		}
	}
	k.nothingLeaked(t)
}
