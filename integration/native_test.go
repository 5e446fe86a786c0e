package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// waitMoved waits until a loop device reads a local file instead of the mount.
func (h *host) waitMoved(device string) {
	h.t.Helper()
	waitFor(h.t, device+" reads the local file", time.Minute, func() bool {
		return strings.HasPrefix(sysfs(h.t, filepath.Base(device), "loop/backing_file"), filepath.Join(h.state, "mounts"))
	})
}

// directlyEquals compares a device with what it should be, past its page cache.
func directlyEquals(t testing.TB, device string, want []byte) {
	t.Helper()
	f := openDirect(t, device, os.O_RDONLY)
	p := aligned(len(want))
	if _, err := f.ReadAt(p, 0); err != nil {
		t.Fatal(err)
	}
	sameBytes(t, device, p, want)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// fuseRequests returns how many requests a daemon has taken: each is a read of
// /dev/fuse, and it reads little else while nothing goes on.
func fuseRequests(t testing.TB, pid int) int64 {
	t.Helper()
	return procIO(t, pid, "syscr")
}

// procIO returns one of the counters that the kernel has of a process's I/O.
func procIO(t testing.TB, pid int, name string) (n int64) {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if _, err := fmt.Sscanf(line, name+": %d", &n); err == nil {
			return n
		}
	}
	t.Fatalf("no %s in:\n%s", name, data)
	return 0
}

func TestLoopDeviceOfACompleteSnapshotNeedsNoDaemon(t *testing.T) {
	t.Parallel()
	for _, before := range []bool{true, false} { // complete before it is attached, or after
		h := newHost(t, newDirStore(t))
		disk := diskBytes(1, 32*mib)
		clear(disk[8*mib : 12*mib]) // a hole
		snap := h.ok("snapshot", "create", h.image(disk))
		flags := []string{"--hydrate-rate=16MiB"}
		if before {
			m := h.mount(snap)
			m.waitState("hydrated", time.Minute)
			m.unmount()
			flags = nil
		}
		device := h.attach(snap, flags...)
		if backing := sysfs(t, filepath.Base(device), "loop/backing_file"); before != strings.HasPrefix(backing, filepath.Join(h.state, "mounts")) {
			t.Errorf("complete before it was attached: %t, and the device reads %s", before, backing)
		}
		inUse := openDirect(t, device, os.O_RDONLY)
		first := aligned(mib)
		if _, err := inUse.ReadAt(first, 20*mib); err != nil || !bytes.Equal(first, disk[20*mib:21*mib]) {
			t.Fatalf("before: %v", err)
		}
		h.waitMoved(device)
		m := h.attached(snap)
		name := filepath.Base(device)
		for file, want := range map[string]string{"loop/dio": "1", "ro": "1", "queue/read_ahead_kb": "4096"} {
			if got := sysfs(t, name, file); got != want {
				t.Errorf("%s of %s is %s, want %s", file, device, got, want)
			}
		}
		if again := h.ok("attach", snap); again != device {
			t.Errorf("attached again as %s, not %s", again, device)
		}
		asked := fuseRequests(t, m.pid)
		for off := range int64(len(disk) / mib) {
			if _, err := inUse.ReadAt(first, off*mib); err != nil || !bytes.Equal(first, disk[off*mib:(off+1)*mib]) {
				t.Fatalf("at %d MiB: %v", off, err)
			}
		}
		if n := fuseRequests(t, m.pid) - asked; n > 4 {
			t.Errorf("the daemon took %d requests meanwhile", n)
		}
		h.fails(4, []string{"in use", device}, "unmount", m.dir)
		h.fails(4, []string{"in use"}, "detach", device)
		m.kill()
		directlyEquals(t, device, disk)
		if err := inUse.Close(); err != nil {
			t.Fatal(err)
		}
		if again := h.ok("attach", snap); again != device {
			t.Errorf("attached again after its daemon was killed as %s, not %s", again, device)
		}
		h.ok("detach", map[bool]string{true: snap, false: device}[before])
		if _, err := os.Stat(filepath.Join("/sys/block", name, "loop")); err == nil {
			if backing := sysfs(t, name, "loop/backing_file"); strings.HasPrefix(backing, h.dir) {
				t.Errorf("%s is attached to %s", device, backing)
			}
		}
		if _, err := os.Stat(m.dir); err == nil {
			t.Errorf("%s is there", m.dir)
		}
		again := h.attach(snap) // and all of it once more, from the same base
		h.waitMoved(again)
		directlyEquals(t, again, disk)
		h.ok("detach", again)
	}
}

// TestWhatALoopDeviceReadsIsNotEvicted whoever wants the room, and whatever became of
// its daemon.
func TestWhatALoopDeviceReadsIsNotEvicted(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := randomBytes(1, 24*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	otherDisk := randomBytes(2, 24*mib)
	other := h.ok("snapshot", "create", h.image(otherDisk))
	device := h.attach(snap)
	h.waitMoved(device)
	m := h.attached(snap)
	base := glob(t, filepath.Join(h.state, "bases", "*", snap, "data"))[0]

	press := func(how string) {
		t.Helper()
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil && !os.IsPermission(err) && !strings.Contains(err.Error(), "read-only") {
			t.Fatal(err)
		}
		tight := h.mount(other, "--cache-size=4MiB")
		tight.equals(otherDisk)
		tight.unmount()
		if n := allocated(t, base); n < int64(len(disk)) {
			t.Errorf("%s: %d of %d bytes are left", how, n, len(disk))
		}
		directlyEquals(t, device, disk)
	}
	press("with its daemon")
	if err := unix.Unmount(m.dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the daemon ends", time.Minute, func() bool { return syscall.Kill(m.pid, 0) != nil })
	press("after its mount went")
	h.ok("detach", device)
	tight := h.mount(other, "--cache-size=4MiB")
	tight.equals(otherDisk)
	tight.unmount()
	if _, err := os.Stat(base); err == nil && allocated(t, base) >= int64(len(disk)) {
		t.Error("it is kept although nothing reads it any more")
	}
}

// To the kernel a device that is moved has another medium, which shuts down the
// filesystem that is mounted on it.
func TestLoopDeviceIsNotMovedUnderAFilesystem(t *testing.T) {
	t.Parallel()
	for name, f := range filesystems {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, newDirStore(t))
			vol, volDevice, original := h.newFilesystem(name)
			realFiles(t, original, "strings", "net")
			tool(t, "sync", "-f", original)
			umount(t, original)
			snap := h.ok("snapshot", "create", vol)
			original = mountFS(t, volDevice, "ro")

			other := newHost(t, h.store)
			device := other.attach(snap, "--no-hydrate")
			dir := mountFS(t, device, "ro,"+f.options)
			m := other.attached(snap)
			other.ok("hydrate", "--resume", m.dir)
			m.waitState("hydrated", time.Minute)
			const looks = 3 // of the daemon, for devices to move
			time.Sleep(looks * 2 * time.Second)
			sameFiles(t, dir, original)
			umount(t, dir)
			other.waitMoved(device)
			dir = mountFS(t, device, "ro,"+f.options)
			sameFiles(t, dir, original)
			umount(t, dir)
			other.ok("detach", device)
		})
	}
}

// TestFileThatCannotBeGivenAwayIsReadOnce to see that it could be: not again every two
// seconds.
func TestFileThatCannotBeGivenAwayIsReadOnce(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	bases := filepath.Join(h.state, "bases")
	if err := os.MkdirAll(bases, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", bases, "tmpfs", 0, "size=128m"); err != nil { // no second names in the rest of the state directory
		t.Fatal(err)
	}
	t.Cleanup(func() { umount(t, bases) })
	disk := randomBytes(1, 48*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	device := h.attach(snap)
	m := h.attached(snap)
	m.waitState("hydrated", time.Minute)
	const looks = 5
	time.Sleep(looks * 2 * time.Second)
	if n := procIO(t, m.pid, "rchar"); n > int64(3*len(disk)) { // from the store, and to verify
		t.Errorf("the daemon read %d bytes of a base of %d", n, len(disk))
	}
	directlyEquals(t, device, disk)
	h.ok("detach", device)
}
