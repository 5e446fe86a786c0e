package integration

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// createSet makes snapshots of volumes at one moment, and returns them with for how
// many milliseconds writers were held.
func (h *host) createSet(args ...string) (snaps []string, held float64) {
	h.t.Helper()
	r := h.run(append([]string{"snapshot", "create"}, args...)...)
	if r.code != 0 {
		h.t.Fatalf("%s", r)
	}
	told := regexp.MustCompile(`held for (\S+) ms`).FindStringSubmatch(r.stderr)
	if told == nil {
		h.t.Fatalf("nothing is said of the cut: %s", r)
	}
	held, err := strconv.ParseFloat(told[1], 64)
	if err != nil {
		h.t.Fatal(err)
	}
	return strings.Fields(r.stdout), held
}

// A filesystem that stripes over two volumes is, in a set that was made while it
// was written, as after a power cut: it mounts on another host, and all that it
// has checks.
func TestSetOfAStripedFilesystemUnderLoadIsWhole(t *testing.T) {
	h := newHost(t, newDirStore(t))
	var vols, devices []string
	for range 2 {
		vols = append(vols, h.ok("volume", "create", "--size", "256MiB"))
		devices = append(devices, h.attach(vols[len(vols)-1]))
	}
	tool(t, "mkfs.btrfs", append([]string{"-q", "-d", "raid0", "-m", "raid0"}, devices...)...)
	tool(t, "btrfs", append([]string{"device", "scan"}, devices...)...)
	dir := mountFS(t, devices[0], "noatime")
	realFiles(t, dir, "strings") // stays the same
	tool(t, "sync", "-f", dir)

	end := churn(t, dir)
	var sets [][]string
	for i := range 3 {
		flags := slices.Clone(vols)
		if i == 1 {
			h.delayOrder(vols[0], "cut", 60*time.Millisecond)
		}
		if i == 2 {
			flags = append(flags, "--freeze", dir)
		}
		set, held := h.createSet(flags...)
		t.Logf("under load, set %d of 2 volumes: writers were held for %.1f ms", i, held)
		sets = append(sets, set)
	}
	end()
	want := t.TempDir()
	tool(t, "cp", "-a", filepath.Join(dir, "strings"), want)
	// Two filesystems with one UUID cannot be mounted at a time.
	umount(t, dir)
	for _, vol := range vols {
		h.ok("detach", vol)
	}
	tool(t, "btrfs", "device", "scan", "--forget")

	other := newHost(t, h.store)
	for _, set := range sets {
		var copies []string
		for _, snap := range set {
			copies = append(copies, other.attachCopy(snap))
		}
		tool(t, "btrfs", append([]string{"device", "scan"}, copies...)...)
		restored := mountFS(t, copies[0], "noatime")
		// A cut, as a power cut, may lie between the copies of the superblock: the next
		// commit writes them all.
		if err := os.WriteFile(filepath.Join(restored, "more"), []byte("more"), 0o600); err != nil {
			t.Fatal(err)
		}
		tool(t, "sync", "-f", restored)
		if out := tool(t, "btrfs", "scrub", "start", "-B", restored); !strings.Contains(out, "no errors found") {
			t.Errorf("scrub: %s", out)
		}
		sameFiles(t, filepath.Join(restored, "strings"), filepath.Join(want, "strings"))
		umount(t, restored)
		tool(t, "btrfs", append([]string{"check", "--readonly"}, copies[0])...)
		for _, device := range copies {
			other.ok("detach", device)
		}
		tool(t, "btrfs", "device", "scan", "--forget")
	}
}

// churn writes files on a filesystem, and commits that all the time, until the
// function returned is called. It has begun to on return.
func churn(t *testing.T, dir string) (end func()) {
	t.Helper()
	var stop atomic.Bool
	var commits atomic.Int64
	var churning sync.WaitGroup
	failed := make(chan error, 3)
	until := func(work func(n int) error) {
		churning.Go(func() {
			for n := 0; !stop.Load(); n++ {
				if err := work(n); err != nil {
					failed <- err
					return
				}
			}
		})
	}
	for i := range 2 {
		until(func(n int) error {
			return os.WriteFile(filepath.Join(dir, fmt.Sprintf("churn-%d-%d", i, n%64)), randomBytes(uint64(n), 96*kib), 0o600)
		})
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	until(func(int) error {
		commits.Add(1)
		return unix.Syncfs(int(f.Fd()))
	})
	end = sync.OnceFunc(func() {
		stop.Store(true)
		churning.Wait()
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		select {
		case err := <-failed:
			t.Error(err)
		default:
		}
	})
	t.Cleanup(end)
	waitFor(t, "a few commits", 20*time.Second, func() bool { return commits.Load() > 5 })
	return end
}

// What was written to one volume after another one had taken it is in a set only
// with that.
func TestSetKeepsTheOrderOfWritesAcrossVolumes(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	a, b := h.ok("volume", "create", "--size", "1MiB"), h.ok("volume", "create", "--size", "1MiB")
	aside := h.ok("volume", "create", "--size", "1MiB") // not mounted
	files := []*os.File{h.mount(a).open(os.O_RDWR | unix.O_DIRECT), h.mount(b).open(os.O_RDWR | unix.O_DIRECT)}
	var stop atomic.Bool
	failed := make(chan error, 1)
	go func() {
		page := aligned(pageSize)
		for n := uint64(1); !stop.Load(); n++ {
			binary.LittleEndian.PutUint64(page, n)
			for _, f := range files {
				_, err := f.WriteAt(page, 0)
				if err = errors.Join(err, f.Sync()); err != nil {
					failed <- err
					return
				}
			}
		}
		failed <- nil
	}()
	var sets [][]string
	for i := range 10 {
		if i == 6 {
			// From here on the second volume is cut long after the first, as far as
			// it depends on the orders.
			h.delayOrder(b, "cut", 30*time.Millisecond)
		}
		set, held := h.createSet(a, aside, b)
		t.Logf("set %d: writers of 3 volumes were held for %.1f ms", i, held)
		sets = append(sets, set)
	}
	stop.Store(true)
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	other := newHost(t, h.store)
	last := uint64(0)
	for i, set := range sets {
		inA, inB := binary.LittleEndian.Uint64(other.exported(set[0])), binary.LittleEndian.Uint64(other.exported(set[2]))
		if inB > inA || inA > inB+1 {
			t.Errorf("set %d has %d in the first volume, and %d in the second, where it was written after", i, inA, inB)
		}
		if inA <= last {
			t.Errorf("set %d has %d, and the one before %d", i, inA, last)
		}
		last = inA
	}
}

// Writers that are held for a second go on by themselves, and the set is not: the
// volumes may be of several moments.
func TestSetOfAHesitatingCoordinatorIsAborted(t *testing.T) {
	t.Parallel()
	for _, order := range []string{"cut", "release"} {
		t.Run(order, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, nil)
			a, b := h.ok("volume", "create", "--size", "1MiB"), h.ok("volume", "create", "--size", "1MiB")
			h.mount(a)
			m := h.mount(b)
			m.write(randomBytes(1, 4096), 0)
			h.delayOrder(b, order, 1500*time.Millisecond)
			h.fails(1, []string{b, "held for too long"}, "snapshot", "create", a, b)
			m.write(randomBytes(2, 4096), 0)
			m.equals(append(randomBytes(2, 4096), make([]byte, mib-4096)...))
			if list := h.list("--all"); len(list) > 0 {
				t.Errorf("the store has heard of %+v", list)
			}
		})
	}
}

// delayOrder makes a volume's daemon hear one of a set's orders later.
func (h *host) delayOrder(vol, order string, by time.Duration) {
	h.t.Helper()
	dir, err := os.Open(filepath.Join(h.state, "volumes", vol))
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = dir.Close() })
	path := filepath.Join("/proc/self/fd", strconv.Itoa(int(dir.Fd())), "control") // which is not too long
	if err := os.Rename(path, path+".daemon"); err != nil {
		h.t.Fatal(err)
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		h.t.Fatal(err)
	}
	var serving sync.WaitGroup
	h.t.Cleanup(serving.Wait)
	h.t.Cleanup(func() { _ = listener.Close() })
	serving.Go(func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return // closed
			}
			far, err := net.Dial("unix", path+".daemon")
			if err != nil {
				_ = near.Close()
				continue
			}
			serving.Go(func() {
				defer far.Close()
				p := make([]byte, 64*kib)
				for {
					n, err := near.Read(p)
					if bytes.Contains(p[:n], []byte(`"`+order+`"`)) {
						time.Sleep(by)
					}
					if _, writeErr := far.Write(p[:n]); err != nil || writeErr != nil {
						return
					}
				}
			})
			serving.Go(func() {
				defer near.Close()
				_, _ = io.Copy(near, far)
			})
		}
	})
}

// Snapshots of a set are shown as one, in the order of the volumes; one of them can
// be deleted without the others.
func TestSetIsDescribedAndItsMembersAreIndependent(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	var vols []string
	for range 3 {
		vols = append(vols, h.ok("volume", "create", "--size", "8MiB"))
	}
	m := h.mount(vols[1])
	want := randomBytes(1, mib)
	m.write(want, 3*mib)
	set, _ := h.createSet(append(vols, "--description", "all", "--tag", "env=prod")...)
	if len(set) != len(vols) {
		t.Fatalf("printed %v", set)
	}
	ids := make(map[string]bool)
	for i, snap := range set {
		s := h.show(snap)
		if s.VolumeId != vols[i] || s.Description != "all" || len(s.Tags) != 1 || s.State != "completed" || !strings.HasPrefix(s.SetId, "set-") {
			t.Errorf("show: %+v", s)
		}
		ids[s.SetId] = true
	}
	if len(ids) != 1 {
		t.Errorf("sets %v", ids)
	}
	h.ok("snapshot", "delete", set[0])
	h.ok("gc")
	sameBytes(t, set[1], h.exported(set[1])[3*mib:4*mib], want)
	h.fails(3, nil, "snapshot", "show", set[0])

	// Without waiting the ids come while the snapshots are pending, or just done.
	again := strings.Fields(h.ok(append([]string{"snapshot", "create", "--no-wait"}, vols...)...))
	if len(again) != len(vols) {
		t.Fatalf("printed %v", again)
	}
	waitFor(t, "the set to be completed", 20*time.Second, func() bool {
		return !slices.ContainsFunc(again, func(snap string) bool { return h.show(snap).State != "completed" })
	})
}

// What cannot be a set is refused before anything changes.
func TestWhatCannotBeASetIsRefused(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	a, b := h.ok("volume", "create", "--size", "8MiB"), h.ok("volume", "create", "--size", "8MiB")
	m := h.mount(b)
	var many []string
	for range 129 {
		many = append(many, a)
	}
	h.fails(2, []string{a, "twice"}, "snapshot", "create", a, b, a)
	h.fails(2, []string{"129", "128"}, append([]string{"snapshot", "create"}, many...)...)
	h.fails(2, []string{"each must be a volume"}, "snapshot", "create", a, "/etc/hostname")
	h.fails(2, []string{"--parent"}, "snapshot", "create", a, b, "--parent", "snap-1a2b3c4d567890abc")
	h.fails(3, []string{"vol-00000000000000001"}, "snapshot", "create", a, "vol-00000000000000001")
	h.fails(4, []string{"state directory"}, "snapshot", "create", a, b, "--freeze", h.dir)

	m.write(randomBytes(1, mib), 0)
	gate.close(requests, puts("data"))
	running := h.begin("snapshot", "create", b)
	gate.waitHolding(t)
	h.fails(4, []string{b, "being made"}, "snapshot", "create", a, b)
	gate.open()
	if r := running.wait(); r.code != 0 {
		t.Fatalf("%s", r)
	}
	if list := h.list("--all"); len(list) != 1 {
		t.Errorf("the refusals made %+v", list)
	}
	for _, vol := range []string{a, b} {
		if layers, err := os.ReadDir(filepath.Join(h.state, "volumes", vol, "layers")); err != nil || len(layers) != 1 {
			t.Errorf("%s has layers %v, %v", vol, layers, err)
		}
	}
}

// Whoever is killed, and when: a set is committed or it is not, and the volumes
// lose nothing.
func TestSetIsAllOrNothingWhoeverIsKilled(t *testing.T) {
	t.Parallel()
	for _, victim := range []string{"coordinator", "daemon", "all"} {
		for _, at := range []string{"intents", "data", "sets", "outcomes"} {
			for _, answered := range []bool{false, true} {
				if answered != (at == "data") && at != "sets" && at != "outcomes" {
					continue // of little news
				}
				t.Run(fmt.Sprintf("%s at %s, answered %t", victim, at, answered), func(t *testing.T) {
					t.Parallel()
					killInSet(t, victim, at, answered)
				})
			}
		}
	}
}

func killInSet(t *testing.T, victim, at string, answered bool) {
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	var vols []string
	var mounts []*mount
	var disks [][]byte
	for i := range 2 {
		vols = append(vols, h.ok("volume", "create", "--size", "4MiB"))
		mounts = append(mounts, h.mount(vols[i]))
		disks = append(disks, make([]byte, 4*mib))
		copy(disks[i][mib:], randomBytes(uint64(i), mib))
		mounts[i].write(disks[i][mib:2*mib], mib)
	}
	side := requests
	if answered {
		side = replies
	}
	gate.close(side, puts(at))
	making := h.begin("snapshot", "create", vols[0], vols[1])
	gate.waitHolding(t)
	if victim != "daemon" {
		making.signal(syscall.SIGKILL)
	}
	if victim != "coordinator" {
		mounts[1].kill()
	}
	if victim == "all" {
		mounts[0].kill()
	}
	gate.open()
	making.wait()
	for i, vol := range vols {
		if victim == "all" || victim == "daemon" && i == 1 {
			mounts[i] = mounts[i].again(vol)
		}
		mounts[i].equals(disks[i])
	}
	completed := 0
	waitFor(t, "the set to be settled", 30*time.Second, func() bool {
		completed = 0
		for _, s := range h.list("--all") {
			if s.State == "pending" {
				return false
			}
			if s.State == "completed" {
				completed++
			}
		}
		return true
	})
	if completed != 0 && completed != 2 || completed == 0 && (at == "sets" && answered || at == "outcomes") {
		t.Errorf("%d snapshots are completed", completed)
	}
	var again result
	waitFor(t, "daemons to have settled", 30*time.Second, func() bool {
		again = h.run("snapshot", "create", vols[0], vols[1])
		return again.code != 4 // in the middle of that
	})
	if again.code != 0 {
		t.Fatalf("%s", again)
	}
	for i, snap := range strings.Fields(again.stdout) {
		sameBytes(t, snap, newHost(t, s).exported(snap), disks[i])
		mounts[i].equals(disks[i])
	}
}

// Filesystems are frozen for the cut, all of them, and whatever comes of it thawed.
func TestSetThawsWhatItHasFrozen(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	var vols, dirs []string
	for range 2 {
		vol, _, dir := h.newFilesystem("ext4")
		vols, dirs = append(vols, vol), append(dirs, dir)
	}
	write := func() {
		t.Helper()
		for _, dir := range dirs { // waits while it is frozen
			if err := os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	write()
	h.fails(1, []string{"/proc"}, "snapshot", "create", vols[0], vols[1], "--freeze", dirs[0], "--freeze", "/proc")
	write()
	h.fails(1, []string{"busy"}, "snapshot", "create", vols[0], vols[1], "--freeze", dirs[0], "--freeze", dirs[0])
	write()
	set, _ := h.createSet(vols[0], vols[1], "--freeze", dirs[0], "--freeze", dirs[1])
	write()
	other := newHost(t, h.store)
	for _, snap := range set {
		device := other.attach(snap) // read-only: nothing to replay
		tool(t, "e2fsck", "-f", "-n", device)
		if data, err := os.ReadFile(filepath.Join(mountFS(t, device, "ro,noload"), "file")); string(data) != "content" {
			t.Errorf("%s: %q, %v", snap, data, err)
		}
	}
}

// Interrupted, nothing is left of a set but the changes.
func TestInterruptedSetGivesTheChangesBack(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	var vols []string
	for range 2 {
		vols = append(vols, h.ok("volume", "create", "--size", "4MiB"))
	}
	m := h.mount(vols[0])
	want := append(randomBytes(1, mib), make([]byte, 3*mib)...)
	m.write(want[:mib], 0)
	gate.close(requests, puts("data"))
	making := h.begin("snapshot", "create", vols[0], vols[1])
	gate.waitHolding(t)
	making.signal(syscall.SIGINT)
	if r := making.wait(); r.code != 130 || r.stdout != "" {
		t.Errorf("interrupted: %s", r)
	}
	gate.open()
	m.equals(want)
	for _, s := range h.list("--all") {
		if s.State != "error" {
			t.Errorf("left: %+v", s)
		}
	}
	set, _ := h.createSet(vols...)
	sameBytes(t, set[0], h.exported(set[0]), want)
}
