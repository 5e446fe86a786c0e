package integration

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A daemon is replaced, as by an upgrade, while a filesystem on its loop device
// is mounted: told to end, it serves that to its end, and nobody else gets the
// volume before.
func TestDaemonThatIsToldToEndServesItsLoopDevice(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	vol, device, dir := h.newFilesystem("ext4")
	want := t.TempDir()
	add := func(name string, seed uint64) {
		t.Helper()
		data := randomBytes(seed, mib)
		for _, d := range []string{dir, want} {
			if err := os.WriteFile(filepath.Join(d, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		tool(t, "sync", "-f", dir)
	}
	add("before", 1)
	old := h.attached(vol)
	old.terminate()
	add("while it ends", 2)
	sameFiles(t, dir, want)
	for _, args := range [][]string{
		{"mount", vol, t.TempDir()}, {"attach", vol}, {"detach", vol}, {"detach", device}, {"unmount", vol}, {"volume", "delete", vol},
	} {
		h.fails(4, []string{"in use"}, args...)
	}
	add("after the refusals", 3)
	umount(t, dir)
	h.ok("detach", device)
	old.waitEnd()

	device = h.attach(vol)
	if now := parse[status](t, h.ok("status", "--json", vol)).PID; now == old.pid {
		t.Errorf("the daemon is still %d", now)
	}
	tool(t, "e2fsck", "-f", "-n", device)
	sameFiles(t, mountFS(t, device, "ro"), want)
}

// A daemon is killed while a filesystem on its loop device is mounted: that
// fails loudly, and a new daemon takes over as soon as it is unmounted, not
// before.
func TestLoopDeviceOfAKilledDaemonFailsUntilItIsFree(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	vol, device, dir := h.newFilesystem("ext4")
	synced := randomBytes(1, mib)
	if err := os.WriteFile(filepath.Join(dir, "synced"), synced, 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "sync", "-f", dir)
	h.attached(vol).kill()
	raw := openDirect(t, device, os.O_RDWR)
	if _, err := raw.ReadAt(aligned(pageSize), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("a read of the device: %v, want EIO", err)
	}
	if _, err := raw.WriteAt(aligned(pageSize), 0); !errors.Is(err, syscall.EIO) {
		t.Errorf("a write of the device: %v, want EIO", err)
	}
	if err := raw.Close(); err != nil {
		t.Fatal(err)
	}
	h.fails(4, []string{"in use"}, "attach", vol)
	if err := unix.Unmount(dir, 0); err != nil { // which cannot write its last
		t.Fatal(err)
	}
	device = h.attach(vol)
	tool(t, "e2fsck", "-p", device)
	tool(t, "e2fsck", "-f", "-n", device)
	dir = mountFS(t, device, "ro")
	sameBytes(t, "the file that was synced", readAt(t, filepath.Join(dir, "synced"), 0, mib), synced)
}
