package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// mountable are the filesystems that attach is tested with, and what a read-only
// mount of each says in /proc/mounts.
var mountable = map[string]struct {
	mkfs     []string
	size     string
	readOnly string
}{
	"ext4":  {[]string{"mkfs.ext4", "-q"}, "64MiB", "norecovery"},
	"xfs":   {[]string{"mkfs.xfs", "-q"}, "320MiB", "norecovery"},
	"btrfs": {[]string{"mkfs.btrfs", "-q"}, "128MiB", "rescue=nologreplay"},
}

// newMountable makes a volume with a filesystem on it, which is not attached.
func (h *host) newMountable(name string) (vol string) {
	h.t.Helper()
	f := mountable[name]
	vol = h.ok("volume", "create", "--size", f.size)
	device := h.attach(vol)
	makeFilesystem(h.t, append(f.mkfs, device)...)
	h.ok("detach", device)
	return vol
}

// makeFilesystem runs a mkfs. That of btrfs looks at the backing file of every loop
// device that is mounted, and fails while another test has killed a daemon under one.
func makeFilesystem(t testing.TB, mkfs ...string) {
	t.Helper()
	for end := time.Now().Add(commandTimeout); ; time.Sleep(100 * time.Millisecond) {
		out, err := exec.Command(mkfs[0], mkfs[1:]...).CombinedOutput()
		if err == nil {
			return
		}
		if !strings.Contains(string(out), "cannot check mount status") || time.Now().After(end) {
			t.Fatalf("%s: %v\n%s", strings.Join(mkfs, " "), err, out)
		}
	}
}

// attachMount attaches a snapshot or volume and mounts the filesystem in it on a new
// folder, until the test ends.
func (h *host) attachMount(target string, flags ...string) (device, dir string) {
	h.t.Helper()
	dir = h.mountDir()
	return h.attach(target, append(flags, "--mount", dir)...), dir
}

// mountDir makes a folder to mount on; what is left on it at the end of the test is
// taken away.
func (h *host) mountDir() string {
	h.t.Helper()
	dir, err := os.MkdirTemp(h.dir, "fs-")
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		for isMountpoint(h.t, dir) {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				h.t.Error(err)
				return
			}
		}
	})
	return dir
}

// mountedAs returns the device and options of what is mounted on a folder, "" for
// nothing.
func mountedAs(t testing.TB, dir string) (device, options string) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 3 && f[1] == dir {
			device, options = f[0], f[3]
		}
	}
	return device, options
}

// keep writes a file that a sync puts on the disk.
func keep(t testing.TB, dir, name string, data []byte) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func wantFile(t testing.TB, dir, name string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	sameBytes(t, filepath.Join(dir, name), got, want)
}

// wantNothingAttached checks that nothing is left of attach, in the mount table, of loop
// devices, in the state directory.
func (h *host) wantNothingAttached() {
	h.t.Helper()
	mounts, err := mountsUnder(h.dir)
	if err != nil || len(mounts) > 0 {
		h.t.Errorf("mounts are left: %v, %v", mounts, err)
	}
	if loops, err := loopDevicesUnder(h.dir); err != nil || len(loops) > 0 {
		h.t.Errorf("loop devices are left: %v, %v", loops, err)
	}
	if left := entries(h.t, filepath.Join(h.state, "attached")); len(left) > 0 {
		h.t.Errorf("in the state directory are left: %v", left)
	}
}

// A snapshot of a filesystem in use has a journal that a read-only device cannot
// replay. It is mounted all the same, next to its original; and in a volume made of
// it everything is there that was synced.
func TestSnapshotOfAFilesystemInUseIsMounted(t *testing.T) {
	t.Parallel()
	for name, f := range mountable {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, nil)
			vol := h.newMountable(name)
			_, dir := h.attachMount(vol)
			settled, synced := randomBytes(1, mib), randomBytes(2, mib)
			keep(t, dir, "settled", settled)
			h.ok("detach", dir) // empties the journal
			device := h.attach(vol, "--mount", dir)
			keep(t, dir, "synced", synced)
			snap := h.ok("snapshot", "create", vol)

			frozen, old := h.attachMount(snap, "--mount-options", "noatime")
			at, options := mountedAs(t, old)
			if at != frozen || !strings.HasPrefix(options, "ro,nosuid,nodev,noatime,") || !strings.Contains(options, f.readOnly) {
				t.Errorf("%s is mounted with %s, want %s read-only with noatime and %s", at, options, frozen, f.readOnly)
			}
			wantFile(t, old, "settled", settled)
			if err := os.WriteFile(filepath.Join(old, "new"), nil, 0o600); err == nil {
				t.Error("it could be written to")
			}
			h.ok("detach", old)
			bare := h.attach(snap)
			if err := unix.Mount(bare, old, name, unix.MS_RDONLY, ""); err == nil {
				t.Error("its journal was clean: the test shows nothing")
			}
			h.ok("detach", bare)

			restored := h.ok("volume", "create", "--snapshot", snap)
			_, copied := h.attachMount(restored)
			wantFile(t, copied, "settled", settled)
			wantFile(t, copied, "synced", synced)
			keep(t, copied, "more", settled)
			wantFile(t, dir, "synced", synced)
			if _, err := os.Stat(filepath.Join(dir, "more")); err == nil {
				t.Error("the original and its copy are one")
			}
			h.ok("detach", copied)
			h.ok("detach", device)
			h.wantNothingAttached()
		})
	}
}

func TestAttachMountIsIdempotentAndDetachUndoesIt(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	dir := h.mountDir()
	bare := h.attach(vol)
	device := h.attach(vol, "--mount", dir) // mounts only
	if device != bare {
		t.Errorf("attached as %s, and to be mounted as %s", bare, device)
	}
	daemon := h.attached(vol).pid
	keep(t, dir, "file", []byte("kept"))
	table, err := mountsUnder("/")
	if err != nil {
		t.Fatal(err)
	}
	if again := h.ok("attach", "--mount", dir, vol); again != device {
		t.Errorf("attached again as %s, not %s", again, device)
	}
	if now, err := mountsUnder("/"); err != nil || len(now) != len(table) {
		t.Errorf("attached again, %d mounts became %d: %v", len(table), len(now), err)
	}
	if s := parse[status](t, h.ok("status", "--json", vol)); s.PID != daemon {
		t.Errorf("the daemon is %d, not %d", s.PID, daemon)
	}
	if out := h.ok("status", vol); !strings.Contains(out, dir) {
		t.Errorf("the status does not tell that it is on %s: %s", dir, out)
	}
	second := h.mountDir() // the same filesystem once more, as mount has it
	h.ok("attach", "--mount", second, vol)
	wantFile(t, second, "file", []byte("kept"))
	for _, by := range []string{vol, "device", dir, filepath.Base(dir)} { // commands run in h.dir
		if by == "device" {
			h.ok("detach", device)
		} else {
			h.ok("detach", by)
			h.fails(3, []string{"not"}, "detach", by)
		}
		h.wantNothingAttached()
		device = h.ok("attach", "--mount", dir, vol)
		wantFile(t, dir, "file", []byte("kept"))
	}
	umount(t, dir) // by hand
	h.ok("attach", "--mount", dir, vol)
	umount(t, dir)
	h.ok("detach", dir)
	h.wantNothingAttached()
}

func TestDetachOfWhatIsInUseIsRefusedAndChangesNothing(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	device, idle := h.attachMount(vol)
	dir := h.mountDir()
	h.ok("attach", "--mount", dir, vol)
	f, err := os.Create(filepath.Join(dir, "open"))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // asked again it is not done either
		for _, by := range []string{vol, device, dir, idle} {
			h.fails(4, []string{dir, "in use"}, "detach", by)
		}
	}
	for _, d := range []string{dir, idle} {
		if at, _ := mountedAs(t, d); at != device {
			t.Errorf("%s is mounted on %s", at, d)
		}
	}
	if _, err := f.WriteString("still"); err != nil {
		t.Error(err)
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}

	raw, err := os.Open(device) // what unmounting does not show
	if err != nil {
		t.Fatal(err)
	}
	h.fails(4, []string{device, "in use"}, "detach", vol)
	if err := raw.Close(); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{dir, idle} {
		wantFile(t, d, "open", []byte("still"))
	}

	byHand := mountFS(t, device, "rw")
	h.fails(4, []string{byHand, "in use"}, "detach", vol)
	wantFile(t, dir, "open", []byte("still"))
	umount(t, byHand)
	h.ok("detach", idle)
	h.wantNothingAttached()
}

func TestWhatCannotBeMountedIsRefusedAndLeavesNothing(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	dir := h.mountDir()
	missing, file := filepath.Join(h.dir, "missing"), filepath.Join(h.dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h.fails(1, []string{missing, "does not exist"}, "attach", "--mount", missing, vol)
	h.fails(1, []string{file, "not a directory"}, "attach", "--mount", file, vol)
	h.fails(1, []string{"frobnicate"}, "attach", "--mount", dir, "--mount-options", "frobnicate", vol)
	blank := h.ok("volume", "create", "--size", "8MiB")
	h.fails(4, []string{"no filesystem"}, "attach", "--mount", dir, blank)
	h.fails(3, []string{"no partitions"}, "attach", "--mount", dir, "--partition", "1", vol)
	for _, args := range [][]string{
		{"--partition", "1"}, {"--mount-options", "noatime"}, {"--mount", dir, "--partition", "-3"}, {"--mount", dir, "--mount-options", "noatime,remount"}, {"--mount", ""},
	} {
		h.fails(2, nil, append(append([]string{"attach"}, args...), vol)...)
	}
	snap := h.ok("snapshot", "create", vol)
	h.fails(2, []string{"read-only"}, "attach", "--mount", dir, "--mount-options", "rw", snap)
	h.wantNothingAttached()

	if err := unix.Mount("taken", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	h.fails(4, []string{dir, "already", "tmpfs"}, "attach", "--mount", dir, vol)
	h.fails(3, nil, "detach", dir)
	device := h.attach(vol)
	h.fails(4, []string{dir, "already", "tmpfs"}, "attach", "--mount", dir, vol)
	if again := h.ok("attach", vol); again != device {
		t.Errorf("the refusal took %s away", device)
	}
	h.ok("detach", vol)
	umount(t, dir)
	h.wantNothingAttached()
}

// partitioned makes a volume with a partition table and returns it. Each partition
// is a size and the program that makes something in it, "" for nothing.
func (h *host) partitioned(label string, partitions [][2]string) (vol string) {
	h.t.Helper()
	vol = h.ok("volume", "create", "--size", "160MiB")
	device := h.attach(vol)
	table := "label: " + label + "\n"
	for _, p := range partitions {
		table += "size=" + p[0] + "\n"
	}
	script := filepath.Join(h.dir, "table")
	if err := os.WriteFile(script, []byte(table), 0o600); err != nil {
		h.t.Fatal(err)
	}
	tool(h.t, "sh", "-c", "sfdisk -q "+device+" < "+script)
	h.ok("detach", device)
	device = h.attach(vol) // which looks for partitions
	for i, p := range partitions {
		if make := strings.Fields(p[1]); len(make) > 0 {
			tool(h.t, make[0], append(make[1:], fmt.Sprintf("%sp%d", device, i+1))...)
		}
	}
	h.ok("detach", device)
	return vol
}

func TestPartitionWithTheFilesystemIsMounted(t *testing.T) {
	t.Parallel()
	for _, label := range []string{"gpt", "dos"} {
		t.Run(label, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, nil)
			vol := h.partitioned(label, [][2]string{{"8MiB", ""}, {"16MiB", "mkswap"}, {"64MiB", "mkfs.ext4 -q"}})
			device, dir := h.attachMount(vol)
			if at, _ := mountedAs(t, dir); at != device+"p3" {
				t.Errorf("%s is mounted", at)
			}
			keep(t, dir, "file", []byte("kept"))
			h.fails(4, []string{"swap"}, "attach", "--mount", h.mountDir(), "--partition", "2", vol)
			h.fails(3, []string{"no partition 7", "64 MiB", "ext4"}, "attach", "--mount", h.mountDir(), "--partition", "7", vol)
			h.fails(4, []string{"already"}, "attach", "--mount", dir, "--partition", "2", vol)
			snap := h.ok("snapshot", "create", "--freeze-mounted", vol)
			h.ok("detach", device+"p3")
			_, old := h.attachMount(snap)
			wantFile(t, old, "file", []byte("kept"))
			h.ok("detach", snap)
			h.wantNothingAttached()
		})
	}
}

func TestOfSeveralPartitionsOneIsToBeChosen(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.partitioned("gpt", [][2]string{{"32MiB", "mkfs.ext4 -q -L first"}, {"16MiB", "mkswap"}, {"48MiB", "mkfs.ext4 -q"}})
	dir := h.mountDir()
	h.fails(4, []string{"--partition N", "1  32 MiB  ext4", `"first"`, "2  16 MiB  swap", "3  48 MiB  ext4"}, "attach", "--mount", dir, vol)
	h.wantNothingAttached()
	device := h.attach(vol, "--mount", dir, "--partition", "3")
	other := h.mountDir()
	h.ok("attach", "--mount", other, "--partition", "1", vol)
	for d, want := range map[string]string{dir: device + "p3", other: device + "p1"} {
		if at, _ := mountedAs(t, d); at != want {
			t.Errorf("on %s is %s, want %s", d, at, want)
		}
	}
	// Both come back after a kill, each on its folder.
	keep(t, dir, "third", []byte("3"))
	keep(t, other, "first", []byte("1"))
	h.attached(vol).kill()
	h.ok("attach", vol)
	wantFile(t, dir, "third", []byte("3"))
	wantFile(t, other, "first", []byte("1"))
	h.ok("detach", other)
	h.wantNothingAttached()
}

// What was synced to a filesystem is there again after its daemon was killed under it,
// also while somebody has a file of it open.
func TestFilesystemOfAKilledDaemonIsMountedAgain(t *testing.T) {
	t.Parallel()
	for name := range mountable {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, nil)
			vol := h.newMountable(name)
			_, dir := h.attachMount(vol)
			data := randomBytes(1, 4*mib)
			keep(t, dir, "before", data)

			h.attached(vol).kill()
			h.ok("attach", "--mount", dir, vol)
			wantFile(t, dir, "before", data)
			keep(t, dir, "after", data)

			held, err := os.Open(filepath.Join(dir, "after"))
			if err != nil {
				t.Fatal(err)
			}
			h.attached(vol).kill()
			r := h.run("attach", "--mount", dir, vol)
			if r.code != 0 || !strings.Contains(r.stderr, dir+" is dead") {
				t.Errorf("%s\nwant exit 0 and a warning", r)
			}
			wantFile(t, dir, "before", data)
			wantFile(t, dir, "after", data)
			keep(t, dir, "at last", data)
			if err := held.Close(); err != nil {
				t.Fatal(err)
			}

			h.attached(vol).kill()
			h.ok("detach", dir)
			h.wantNothingAttached()
			h.ok("attach", "--mount", dir, vol)
			wantFile(t, dir, "at last", data)
			h.ok("detach", vol)
			h.wantNothingAttached()
		})
	}
}

// What others mounted on the device of a killed daemon is theirs to unmount.
func TestOthersMountOnADeadDeviceIsLeftToThem(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	device, dir := h.attachMount(vol)
	keep(t, dir, "file", []byte("kept"))
	byHand := mountFS(t, device, "rw")
	h.attached(vol).kill()
	for _, args := range [][]string{{"attach", "--mount", dir, vol}, {"detach", vol}, {"detach", dir}} {
		h.fails(4, []string{"killed", "in use", byHand}, args...)
	}
	if at, _ := mountedAs(t, dir); at != device {
		t.Errorf("%s is mounted: the refusal changed it", at)
	}
	umount(t, byHand)
	h.ok("attach", "--mount", dir, vol)
	wantFile(t, dir, "file", []byte("kept"))
	h.ok("detach", vol)
	h.wantNothingAttached()
}

// A daemon that is told to end serves the filesystem that attach mounted, and detach
// ends that as it would any.
func TestDetachOfWhatIsOutOfSight(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	for _, byDir := range []bool{false, true} {
		_, dir := h.attachMount(vol)
		m := h.attached(vol)
		m.terminate()
		keep(t, dir, "file", []byte("kept"))
		f, err := os.Open(filepath.Join(dir, "file"))
		if err != nil {
			t.Fatal(err)
		}
		by := map[bool]string{true: dir, false: vol}[byDir]
		h.fails(4, []string{dir, "in use"}, "detach", by)
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		h.ok("detach", by)
		m.waitEnd()
		h.wantNothingAttached()
	}
}

// A snapshot that is complete is read from the local file, without its daemon: the
// filesystem on it outlives that.
func TestFilesystemOfACompleteSnapshotOutlivesItsDaemon(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	vol := h.newMountable("ext4")
	_, dir := h.attachMount(vol)
	data := randomBytes(1, 8*mib)
	keep(t, dir, "file", data)
	h.ok("detach", dir)
	snap := h.ok("snapshot", "create", vol)
	m := h.mount(snap)
	h.ok("hydrate", "--wait", m.dir)
	m.unmount()
	device, old := h.attachMount(snap)
	inUse, err := os.Open(filepath.Join(old, "file"))
	if err != nil {
		t.Fatal(err)
	}
	h.attached(snap).kill()
	wantFile(t, old, "file", data)
	if r := h.run("attach", "--mount", old, snap); r.code != 0 || r.stdout != device+"\n" || r.stderr != "" {
		t.Errorf("%s\nwant exit 0, %s, and nothing on stderr", r, device)
	}
	if err := inUse.Close(); err != nil {
		t.Fatal(err)
	}
	wantFile(t, old, "file", data)
	h.attached(snap).kill()
	h.ok("detach", old)
	h.wantNothingAttached()
}

// Served in the foreground, it is taken down in order by a signal, and not under
// those who use it.
func TestAttachInTheForegroundEndsWithItsUsers(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.newMountable("ext4")
	dir := h.mountDir()
	for _, busy := range []bool{false, true} {
		daemon := h.begin("attach", "--foreground", "--mount", dir, vol)
		waitFor(t, "it is mounted", commandTimeout, func() bool { return isMountpoint(t, dir) })
		h.fails(4, []string{"another process"}, "attach", "--foreground", vol)
		var f *os.File
		var err error
		if busy {
			if f, err = os.Create(filepath.Join(dir, "busy")); err != nil {
				t.Fatal(err)
			}
		}
		waitFor(t, "it is attached", commandTimeout, func() bool { return h.run("attach", vol).code == 0 })
		daemon.signal(syscall.SIGTERM)
		if busy {
			fuse := filepath.Join(h.state, "attached", vol)
			waitFor(t, "it is out of sight", commandTimeout, func() bool { return !isMountpoint(t, fuse) })
			if _, err := f.WriteString("served"); err != nil {
				t.Error(err)
			}
			if err := f.Sync(); err != nil {
				t.Error(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
			umount(t, dir) // nothing else is to be done
		}
		if r := daemon.wait(); r.code != 0 || !strings.HasPrefix(r.stdout, "/dev/loop") {
			t.Errorf("%s\nwant exit 0, and a device", r)
		}
		if isMountpoint(t, dir) {
			t.Errorf("%s is mounted", dir)
		}
	}
	h.ok("attach", "--mount", dir, vol)
	wantFile(t, dir, "busy", []byte("served"))
	h.ok("detach", dir)
	h.wantNothingAttached()
}
