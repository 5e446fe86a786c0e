package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// filesystems are those that volumes are tested with.
var filesystems = map[string]struct {
	mkfs    []string
	check   []string // of an unmounted one, which it must not change
	options string   // to mount a copy beside the original
	size    string
}{
	"ext4": {[]string{"mkfs.ext4", "-q"}, []string{"e2fsck", "-f", "-n"}, "noatime", "192MiB"},
	"xfs":  {[]string{"mkfs.xfs", "-q"}, []string{"xfs_repair", "-n"}, "noatime,nouuid", "320MiB"}, // 300 MiB is the least that it makes
}

// newFilesystem makes a volume with one of the filesystems on it, and mounts that
// until the test ends.
func (h *host) newFilesystem(name string) (vol, device, dir string) {
	h.t.Helper()
	f := filesystems[name]
	vol = h.ok("volume", "create", "--size", f.size)
	device = h.attach(vol)
	tool(h.t, f.mkfs[0], append(f.mkfs[1:], device)...)
	return vol, device, mountFS(h.t, device, "rw")
}

func TestFilesystemOnAVolumeIsRestoredOnAnotherHost(t *testing.T) {
	t.Parallel()
	for name, f := range filesystems {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, newS3Store(t))
			vol, device, dir := h.newFilesystem(name)
			realFiles(t, dir, "runtime", "net")
			tool(t, "sync", "-f", dir)
			umount(t, dir)
			tool(t, f.check[0], append(f.check[1:], device)...)
			first := h.ok("snapshot", "create", vol)

			dir = mountFS(t, device, "rw")
			original := t.TempDir() // what the first snapshot holds
			tool(t, "cp", "-a", dir+"/.", original)
			realFiles(t, dir, "fmt", "strings")
			if err := os.RemoveAll(filepath.Join(dir, "net")); err != nil {
				t.Fatal(err)
			}
			second := h.ok("snapshot", "create", "--freeze", dir, vol)
			if a, b := h.show(first), h.show(second); b.StoredBytes == 0 || b.StoredBytes > a.StoredBytes/2 {
				t.Errorf("the first snapshot stored %d bytes, the second %d", a.StoredBytes, b.StoredBytes)
			}

			other := newHost(t, h.store)
			restored := other.attach(first)
			tool(t, f.check[0], append(f.check[1:], restored)...)
			sameFiles(t, mountFS(t, restored, "ro,"+f.options), original)
			sameFiles(t, mountFS(t, other.attachCopy(second), f.options), dir) // writable: frozen, it has a log to replay
			umount(t, dir)
			tool(t, f.check[0], append(f.check[1:], device)...)
			h.ok("detach", device)
		})
	}
}

func TestSnapshotWhileAFilesystemIsWrittenIsConsistent(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	vol, _, dir := h.newFilesystem("ext4")
	realFiles(t, dir, "strings") // stays the same
	tool(t, "sync", "-f", dir)

	writer := exec.Command("fio", "--name=load", "--directory="+dir, "--size=32M", "--rw=randwrite", "--bs=16k",
		"--fsync=32", "--runtime=8", "--time_based", "--minimal")
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	var snaps []string
	for range 3 {
		snaps = append(snaps, h.ok("snapshot", "create", vol))
		time.Sleep(300 * time.Millisecond)
	}
	if err := writer.Process.Signal(os.Interrupt); err != nil {
		t.Fatalf("fio ended before the snapshots did: %v", err)
	}
	_ = writer.Wait() // interrupted

	other := newHost(t, h.store)
	for _, snap := range snaps {
		// As after a power cut: the journal makes it whole.
		copied := other.attachCopy(snap)
		tool(t, "e2fsck", "-p", copied)
		tool(t, "e2fsck", "-f", "-n", copied)
		restored := mountFS(t, copied, "ro")
		sameFiles(t, filepath.Join(restored, "strings"), filepath.Join(dir, "strings"))
	}
}

// attachCopy makes a volume of a snapshot and attaches it.
func (h *host) attachCopy(snap string) string {
	h.t.Helper()
	return h.attach(h.ok("volume", "create", "--snapshot", snap))
}

// attach attaches a snapshot or volume to a loop device, until the test ends.
func (h *host) attach(target string, flags ...string) string {
	h.t.Helper()
	args := append([]string{"attach"}, flags...)
	device := h.ok(append(args, target)...)
	if !strings.HasPrefix(device, "/dev/loop") || strings.Contains(device, "\n") {
		h.t.Fatalf("attach printed %q, want a loop device", device)
	}
	h.t.Cleanup(func() {
		if r := h.run("detach", target); r.code != 0 && r.code != 3 { // 3: the test did it
			h.t.Errorf("at the end of the test: %s", r)
			_ = detachLoop(device)
			h.run("unmount", filepath.Join(h.state, "attached", target))
		}
	})
	return device
}

// attached returns the mount behind the loop device of a snapshot or volume, whose
// daemon is to end before the test does.
func (h *host) attached(target string) *mount {
	h.t.Helper()
	return h.mounted(filepath.Join(h.state, "attached", target))
}

func TestAttachIsIdempotentAndDetachUndoesIt(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	disk := diskBytes(1, 9*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	vol := h.ok("volume", "create", "--snapshot", snap)
	for _, target := range []string{snap, vol} {
		device := h.attach(target)
		if again := h.ok("attach", target); again != device {
			t.Errorf("attached again as %s, not %s", again, device)
		}
		sameBytes(t, device, readAt(t, device, 0, len(disk)), disk)
		name := filepath.Base(device)
		for file, want := range map[string]string{"loop/dio": "1", "ro": map[bool]string{true: "1", false: "0"}[target == snap]} {
			if got := sysfs(t, name, file); got != want {
				t.Errorf("%s of %s is %s, want %s", file, device, got, want)
			}
		}

		f, err := os.Open(device)
		if err != nil {
			t.Fatal(err)
		}
		h.fails(4, []string{"in use"}, "detach", device)
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		h.ok("detach", device)
		if _, err := os.Stat(filepath.Join("/sys/block", name, "loop/backing_file")); err == nil {
			if backing := sysfs(t, name, "loop/backing_file"); strings.HasPrefix(backing, h.dir) {
				t.Errorf("%s is still attached to %s", device, backing)
			}
		}
		h.fails(3, nil, "detach", target)
	}
	if s := parse[struct{ Volumes []status }](t, h.ok("status", "--json")).Volumes; len(s) != 1 || s[0].PID != 0 {
		t.Errorf("a daemon is left: %+v", s)
	}
}

// sysfs returns an attribute of a block device.
func sysfs(t testing.TB, device, file string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("/sys/block", device, file))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

func TestAttachOfAMountedVolumeUsesItsMount(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.ok("volume", "create", "--size", "8MiB")
	m := h.mount(vol)
	device := h.attach(vol)
	want := randomBytes(1, mib)
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(want, 2*mib); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	sameBytes(t, "the file under the device", m.read(2*mib, mib), want)
	h.fails(4, []string{"in use", "detach " + device}, "unmount", m.dir)
	h.ok("detach", device)
	m.equals(append(append(make([]byte, 2*mib), want...), make([]byte, 5*mib)...)) // still mounted
	m.unmount()
}

func TestAttachRecoversFromAKilledDaemon(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.ok("volume", "create", "--size", "8MiB")
	device := h.attach(vol)
	want := randomBytes(1, mib)
	if err := os.WriteFile(device, want, 0); err != nil { // the device stays 8 MiB
		t.Fatal(err)
	}
	tool(t, "blockdev", "--flushbufs", device)
	m := h.attached(vol)
	m.kill()
	device = h.attach(vol)
	sameBytes(t, "the device after the kill", readAt(t, device, 0, mib), want)
}

func TestDiscardThroughALoopDeviceFreesTheSnapshot(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	disk := randomBytes(1, 16*mib)
	vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
	device := h.attach(vol)
	tool(t, "blkdiscard", "--offset", fmt.Sprint(4*mib), "--length", fmt.Sprint(8*mib), device)
	tool(t, "blkdiscard", "--zeroout", "--offset", fmt.Sprint(13*mib), "--length", fmt.Sprint(mib), device)
	clear(disk[4*mib : 12*mib])
	clear(disk[13*mib : 14*mib])
	sameBytes(t, device, readAt(t, device, 0, len(disk)), disk)
	snap := h.ok("snapshot", "create", vol)
	if info := h.show(snap); info.FullSnapshotSizeInBytes != 7*mib || info.StoredBytes > 16*kib {
		t.Errorf("the snapshot after the discard: %+v", info)
	}
	sameBytes(t, "the export", h.exported(snap), disk)
}
