package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Two loop devices on one volume have two page caches: a filesystem mounted from both
// is soon damaged.
func TestAttachesAtOnceGetOneDevice(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	served := h.mount(vol)
	for range 6 {
		var attaching sync.WaitGroup
		results := make([]result, 24)
		for i := range results {
			attaching.Go(func() { results[i] = h.run("attach", vol) })
		}
		attaching.Wait()
		for _, r := range results {
			if r.code != 0 || r.stdout != results[0].stdout {
				t.Errorf("%s\nwant exit 0, and the device of the others: %s", r, results[0].stdout)
			}
		}
		if loops, err := loopDevicesUnder(h.dir); err != nil || len(loops) != 1 {
			t.Fatalf("attached are %v, %v", loops, err)
		}
		h.ok("detach", vol)
	}
	served.unmount()
	h.wantNothingAttached()
}

// What hides the filesystem that attach mounted is not unmounted in its place.
func TestDetachLeavesWhatIsMountedOverItsFilesystem(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	device, dir := h.attachMount(vol)
	keep(t, dir, "file", []byte("kept"))
	if err := unix.Mount("over", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	keep(t, dir, "theirs", []byte("kept too"))
	h.fails(4, []string{dir, "over"}, "detach", vol)
	h.fails(4, []string{dir, "over"}, "detach", device)
	wantFile(t, dir, "theirs", []byte("kept too"))
	h.fails(4, []string{dir, "over"}, "snapshot", "create", "--freeze-mounted", vol)

	h.attached(vol).kill()
	h.fails(4, []string{dir, "over"}, "attach", vol)
	wantFile(t, dir, "theirs", []byte("kept too"))
	umount(t, dir)
	h.ok("attach", vol)
	wantFile(t, dir, "file", []byte("kept"))
	h.ok("detach", vol)
	h.wantNothingAttached()
}

// An old snapshot may have programs with a set-user-id bit and a hole, or be somebody
// else's.
func TestSnapshotIsMountedWithoutPrivileges(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	snap := h.ok("snapshot", "create", vol)
	_, dir := h.attachMount(snap)
	if _, options := mountedAs(t, dir); !strings.HasPrefix(options, "ro,nosuid,nodev,") {
		t.Errorf("it is mounted with %s", options)
	}
	h.ok("detach", dir)
	_, dir = h.attachMount(snap, "--mount-options", "suid,dev")
	if _, options := mountedAs(t, dir); strings.Contains(options, "nosuid") || strings.Contains(options, "nodev") {
		t.Errorf("asked for both, it is mounted with %s", options)
	}
	h.ok("detach", dir)
	h.wantNothingAttached()
}

// Linux cannot freeze squashfs, vfat, exfat and what FUSE serves. That must not keep a
// timer from making snapshots.
func TestFilesystemThatCannotBeFrozenIsSnapshotted(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.ok("volume", "create", "--size", "8MiB")
	files := t.TempDir()
	keep(t, files, "file", []byte("packed"))
	tool(t, "mksquashfs", files, h.attach(vol), "-noappend", "-quiet", "-no-progress")
	dir := h.mountDir()
	h.ok("attach", "--mount", dir, vol)
	r := h.run("snapshot", "create", "--freeze-mounted", vol)
	if r.code != 0 || !strings.Contains(r.stderr, dir+" cannot be frozen") {
		t.Fatalf("%s\nwant exit 0 and a warning", r)
	}
	_, old := h.attachMount(strings.TrimSpace(r.stdout))
	wantFile(t, old, "file", []byte("packed"))
	h.ok("detach", old)
	h.fails(1, []string{dir, "not supported"}, "snapshot", "create", "--freeze", dir, vol)
	h.ok("detach", dir)
	h.wantNothingAttached()
}

// What a supervisor starts anew mounts again all that was mounted, not only what its
// own command line says.
func TestForegroundAttachMountsAgainWhatWasMounted(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	dirs := []string{h.mountDir(), h.mountDir()}
	daemon := h.begin("attach", "--foreground", "--mount", dirs[0], vol)
	waitFor(t, "it is mounted", commandTimeout, func() bool { return isMountpoint(t, dirs[0]) })
	h.ok("attach", "--mount", dirs[1], vol)
	keep(t, dirs[1], "file", []byte("kept"))
	daemon.signal(syscall.SIGKILL)
	if r := daemon.wait(); r.code != -1 {
		t.Error(r)
	}
	daemon = h.begin("attach", "--foreground", "--mount", dirs[0], vol)
	fuse := filepath.Join(h.state, "attached", vol, "status.json")
	waitFor(t, "it is served again", commandTimeout, func() bool { _, err := os.Stat(fuse); return err == nil })
	h.ok("attach", vol) // when the other one has done so
	wantFile(t, dirs[1], "file", []byte("kept"))
	daemon.signal(syscall.SIGTERM)
	if r := daemon.wait(); r.code != 0 {
		t.Error(r)
	}
	h.wantNothingAttached()
}

// Any user may have FUSE say that what they mounted is from a device. That must neither
// be frozen nor keep a device from being detached.
func TestWhatAUserSaysIsMountedFromADeviceIsNotBelieved(t *testing.T) {
	// Not in parallel: mkfs.btrfs looks at all mounts, and fails at this one.
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	device, dir := h.attachMount(vol)
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	said := h.mountDir()
	if err := unix.Mount(device, said, "fuse.theirs", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(fd); err != nil { // nobody answers
		t.Fatal(err)
	}
	h.ok("snapshot", "create", "--freeze-mounted", vol)
	h.ok("detach", dir)
	if err := unix.Unmount(said, 0); err != nil {
		t.Error(err)
	}
	h.wantNothingAttached()
}

// The filesystem of a volume is frozen for the cut alone. That a store is away when a
// timer makes a snapshot must not stop whoever writes.
func TestFilesystemIsNotFrozenWhileTheStoreIsAway(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	h := newHost(t, s)
	vol := h.newMountable("ext4")
	_, dir := h.attachMount(vol, "--read-deadline", "20s")
	keep(t, dir, "before", []byte("kept"))
	s.server.Freeze(t)
	ended := make(chan result, 1)
	making := h.begin("snapshot", "create", "--freeze-mounted", vol)
	go func() { ended <- making.wait() }()
	record := filepath.Join(h.state, "volumes", vol, "volume.json")
	waitFor(t, "it is cut", commandTimeout, func() bool {
		var r struct{ Layers []int64 }
		data, err := os.ReadFile(record)
		if err == nil {
			err = json.Unmarshal(data, &r)
		}
		return err == nil && len(r.Layers) == 2
	})
	keep(t, dir, "after", []byte("written while the store is away"))
	select {
	case r := <-ended:
		s.server.Thaw(t)
		t.Fatalf("%s\nthe filesystem took no write before", r)
	default:
	}
	s.server.Thaw(t)
	r := <-ended
	if r.code != 0 {
		t.Fatal(r)
	}
	_, old := h.attachMount(strings.TrimSpace(r.stdout))
	wantFile(t, old, "before", []byte("kept"))
	if _, err := os.Stat(filepath.Join(old, "after")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was written after the cut is in the snapshot: %v", err)
	}
	h.ok("detach", old)
	h.ok("detach", dir)
	h.wantNothingAttached()
}

// Of a partitioned disk, or of one disk on two folders, one filesystem may be mounted in
// another: that is no use that keeps detach from unmounting both.
func TestDetachUnmountsOneFilesystemInAnother(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	_, dir := h.attachMount(vol)
	inner := filepath.Join(dir, "inner")
	if err := os.Mkdir(inner, 0o700); err != nil {
		t.Fatal(err)
	}
	h.ok("attach", "--mount", inner, vol)
	held, err := os.Create(filepath.Join(dir, "held"))
	if err != nil {
		t.Fatal(err)
	}
	h.fails(4, []string{dir, "in use"}, "detach", vol)
	if !isMountpoint(t, inner) {
		t.Errorf("%s is not mounted any more: the refusal changed it", inner)
	}
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	h.ok("detach", inner)
	h.wantNothingAttached()
}

// What others mounted in a filesystem that is dead would go out of sight with it.
func TestWhatIsMountedInADeadFilesystemIsLeft(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	_, dir := h.attachMount(vol)
	inner := filepath.Join(dir, "inner")
	if err := os.Mkdir(inner, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("theirs", inner, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	keep(t, inner, "file", []byte("theirs"))
	h.fails(4, []string{inner, "unmount it first"}, "detach", vol)
	h.attached(vol).kill()
	h.fails(4, []string{inner, "unmount it first"}, "attach", vol)
	h.fails(4, []string{inner, "unmount it first"}, "detach", vol)
	wantFile(t, inner, "file", []byte("theirs"))
	umount(t, inner)
	h.ok("attach", vol)
	if !isMountpoint(t, dir) {
		t.Errorf("%s is not mounted again", dir)
	}
	h.ok("detach", vol)
	h.wantNothingAttached()
}

// An attach that could not mount again what a killed daemon lost must not be the last to
// try: what is written to the folder then goes to another disk.
func TestWhatIsLostIsMountedAgainByTheNextAttach(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	_, first := h.attachMount(vol)
	_, second := h.attachMount(vol)
	keep(t, first, "file", []byte("kept"))
	fail := func() {
		h.attached(vol).kill()
		toolless := *h
		toolless.env = append(slices.Clone(h.env), "PATH="+t.TempDir()) // no mount(8)
		toolless.fails(1, []string{first, "again"}, "attach", vol)
		toolless.fails(1, []string{first, "again"}, "attach", vol)
	}
	fail()
	h.ok("attach", vol)
	wantFile(t, first, "file", []byte("kept"))
	wantFile(t, second, "file", []byte("kept"))
	h.ok("detach", second)
	h.wantNothingAttached()

	h.ok("attach", "--mount", first, vol)
	fail()
	h.ok("detach", vol)
	h.wantNothingAttached()
	h.ok("attach", vol)
	if isMountpoint(t, first) {
		t.Errorf("%s is mounted, which was given up", first)
	}
	h.ok("detach", vol)
}

// A daemon that hangs must not make hang who wants to take it down.
func TestDetachFromADaemonThatHangsFails(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	device, dir := h.attachMount(vol)
	keep(t, dir, "file", []byte("kept"))
	daemon := h.attached(vol)
	daemon.stop(true)
	waitFor(t, "all of its threads have stopped", commandTimeout, func() bool {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", daemon.pid))
		if err != nil || len(threads) == 0 {
			t.Fatalf("its threads are %v, %v", threads, err)
		}
		return !slices.ContainsFunc(threads, func(file string) bool {
			stat, err := os.ReadFile(file)
			return err == nil && !strings.Contains(string(stat), ") T ")
		})
	})
	var asking []*running
	for _, args := range [][]string{{"detach", device}, {"detach", dir}, {"detach", vol}, {"attach", vol}, {"unmount", vol}} {
		asking = append(asking, h.begin(args...))
	}
	for _, r := range asking {
		if r := r.wait(); r.code != 1 || !strings.Contains(r.stderr, "hangs") {
			t.Errorf("%s\nwant exit 1, and that it hangs", r)
		}
	}
	daemon.stop(false)
	wantFile(t, dir, "file", []byte("kept"))
	h.ok("detach", device)
	h.wantNothingAttached()
}

// Where a killed daemon's loop device is left, only detach and attach know how to clean
// up: without the volume, or its mountpoint, they would not find it.
func TestWhatADeadDeviceIsOnStays(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	served := h.mount(vol)
	_, dir := h.attachMount(vol)
	keep(t, dir, "file", []byte("kept"))
	served.kill()
	h.fails(4, []string{"killed", "detach"}, "unmount", served.dir)
	h.fails(4, []string{"killed", "detach"}, "unmount", vol)
	h.fails(4, []string{"killed", "detach"}, "mount", vol, served.dir)
	h.fails(4, []string{"killed", "detach"}, "volume", "delete", "--yes", vol)
	h.ok("detach", dir)
	h.wantNothingAttached()
	served = h.mount(vol)
	h.ok("attach", "--mount", dir, vol)
	wantFile(t, dir, "file", []byte("kept"))
	h.ok("detach", vol)
	served.kill()
	h.ok("unmount", vol)
	h.fails(3, []string{"not mounted"}, "unmount", vol)
	h.ok("volume", "delete", "--yes", vol)
	h.wantNothingAttached()
}

// A filesystem over the state directory would hide what commands need to take it away.
func TestStateDirectoryIsNotMountedOver(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(h.dir, link); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{h.state, filepath.Join(h.state, "volumes"), h.dir, link, filepath.Join(link, "state")} {
		h.fails(4, []string{dir, "state directory"}, "mount", vol, dir)
		r := h.run("attach", "--mount", dir, vol)
		r.failed(t, 4, "state directory")
	}
	h.wantNothingAttached()
}

func TestDetachOfAFolderThatIsGone(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	h.state = filepath.Join(h.dir, "st[at]e*") // which is no pattern
	vol := h.newMountable("ext4")
	_, dir := h.attachMount(vol)
	umount(t, dir)
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	h.ok("detach", dir)
	h.wantNothingAttached()
	h.fails(3, []string{dir}, "detach", dir)
}
