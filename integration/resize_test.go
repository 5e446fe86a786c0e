package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// grown returns a disk with zeros after it.
func grown(disk []byte, size int) []byte {
	return append(disk[:len(disk):len(disk)], make([]byte, size-len(disk))...)
}

// deviceSize is the size of a block device in bytes.
func deviceSize(t testing.TB, device string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(strings.TrimSpace(tool(t, "blockdev", "--getsize64", device)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// growFS makes a mounted filesystem as large as its device. That of ext4 has to be
// unmounted for it where the kernel does not let us do it online, which takes
// CAP_SYS_RESOURCE, and then what writes to it has ended.
func growFS(t testing.TB, name, device, dir string, writer *exec.Cmd) {
	t.Helper()
	online := name != "ext4" || capable(t, unix.CAP_SYS_RESOURCE)
	if !online {
		endWriter(t, writer)
		umount(t, dir)
		tool(t, "e2fsck", "-f", "-p", device)
	}
	if name == "ext4" {
		tool(t, "resize2fs", device)
	} else {
		tool(t, "xfs_growfs", dir)
	}
	if online {
		endWriter(t, writer)
	} else if err := unix.Mount(device, dir, name, 0, ""); err != nil {
		t.Fatal(err)
	}
}

// endWriter ends a program that must not have ended by itself.
func endWriter(t testing.TB, writer *exec.Cmd) {
	t.Helper()
	if err := writer.Process.Signal(os.Interrupt); err != nil {
		t.Fatalf("fio ended too early: %v", err)
	}
	_ = writer.Wait() // interrupted
}

// capable reports whether this process has a capability.
func capable(t testing.TB, capability int) bool {
	t.Helper()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		t.Fatal(err)
	}
	return data[capability/32].Effective>>(capability%32)&1 != 0
}

// A disk that grows under a filesystem in use: the device is larger at once, the
// filesystem grows into it, and what is written there is in the next snapshot.
func TestFilesystemGrowsWhileItIsWritten(t *testing.T) {
	t.Parallel()
	for name, f := range filesystems {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testGrowingFilesystem(t, name, f.check, f.options)
		})
	}
}

func testGrowingFilesystem(t *testing.T, name string, check []string, options string) {
	h := newHost(t, newDirStore(t))
	vol, device, dir := h.newFilesystem(name)
	size := deviceSize(t, device)
	realFiles(t, dir, "strings")
	before := h.ok("snapshot", "create", "--freeze", dir, vol)
	writer := exec.Command("fio", "--name=load", "--directory="+dir, "--size=32M", "--rw=randrw", "--bs=16k",
		"--verify=crc32c", "--fsync=32", "--runtime=60", "--time_based", "--minimal")
	if err := writer.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = writer.Process.Kill() }) // should the test fail
	h.ok("volume", "resize", vol, fmt.Sprint(2*size+512))
	if n := deviceSize(t, device); n != 2*size+512 {
		t.Errorf("%s has %d bytes after the resize", device, n)
	}
	growFS(t, name, device, dir, writer)
	big := randomBytes(1, int(size)) // more than the filesystem could hold
	if err := os.WriteFile(filepath.Join(dir, "big"), big, 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, "sync", "-f", dir)
	after := h.ok("snapshot", "create", "--freeze", dir, vol)

	other := newHost(t, h.store)
	restored := other.attachCopy(after)
	copied := mountFS(t, restored, options) // writable: frozen, it has a log to replay
	sameFiles(t, copied, dir)
	umount(t, copied)
	tool(t, check[0], append(check[1:], restored)...)
	if n := deviceSize(t, other.attach(before)); n != size {
		t.Errorf("the snapshot from before has %d bytes", n)
	}
	umount(t, dir)
	tool(t, check[0], append(check[1:], device)...)
	h.ok("detach", device)
}

// Sizes that end within a page and a block: what is new is zeros, also where it
// shares a page with what is old, whatever of that is cached.
func TestVolumeGrowsWithoutTouchingWhatItHolds(t *testing.T) {
	t.Parallel()
	h := newHost(t, newS3Store(t))
	disk := randomBytes(1, 5*mib+512)
	snap := h.ok("snapshot", "create", h.image(disk))
	vol := h.ok("volume", "create", "--snapshot", snap)
	m := h.mount(vol, "--no-hydrate")
	f := m.open(os.O_RDWR) // stays open, with pages cached
	sameBytes(t, "the end", m.read(5*mib, 512), disk[5*mib:])

	disk = grown(disk, 7*mib+1024)
	h.ok("volume", "resize", vol, fmt.Sprint(len(disk)))
	if st, err := os.Stat(m.image); err != nil || st.Size() != int64(len(disk)) {
		t.Errorf("volume.img: %v, %v", st, err)
	}
	m.equals(disk)
	p := make([]byte, 64)
	if _, err := f.ReadAt(p, 7*mib); err != nil {
		t.Errorf("read of the new part by who had the file open: %v", err)
	}
	for _, off := range []int{5*mib + 100, 5*mib + 600, 7*mib + 1000} {
		copy(disk[off:], "over the former end")
		if _, err := f.WriteAt(disk[off:min(off+19, len(disk))], int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	m.closeFiles()
	second := h.ok("snapshot", "create", vol)
	disk2 := grown(disk, 9*mib)
	h.ok("volume", "resize", vol, "9MiB")
	h.ok("volume", "resize", vol, "9MiB") // has it already
	m.equals(disk2)
	h.fails(4, []string{"cannot shrink", "InvalidParameterValue"}, "volume", "resize", vol, "8MiB")
	h.fails(2, []string{"not a size"}, "volume", "resize", vol, "large")
	h.fails(2, []string{"multiple of 512"}, "volume", "resize", vol, fmt.Sprint(9*mib+1))
	h.fails(2, []string{"70368744177664"}, "volume", "resize", vol, "65TiB")
	h.fails(3, nil, "volume", "resize", "vol-00000000000000000", "1GiB")
	m.equals(disk2)
	third := h.ok("snapshot", "create", vol)
	m.unmount()

	disk3 := grown(disk2, 12*mib+512)
	h.ok("volume", "resize", vol, fmt.Sprint(len(disk3))) // nobody has it mounted
	if info := h.showVolume(vol); info.SizeBytes != int64(len(disk3)) {
		t.Errorf("volume show: %+v", info)
	}
	m = h.mount(vol)
	copy(disk3[12*mib:], "the last page")
	m.write(disk3[12*mib:12*mib+13], 12*mib)
	m.kill()
	m = m.again(vol)
	m.equals(disk3)
	fourth := h.ok("snapshot", "create", vol)
	if info := h.show(fourth); info.VolumeSize != 1 || info.ParentSnapshotId != third {
		t.Errorf("the last snapshot: %+v", info)
	}
	other := newHost(t, h.store)
	for snap, want := range map[string][]byte{second: disk, third: disk2, fourth: disk3} {
		sameBytes(t, "the export of "+snap, other.exported(snap), want)
		other.mount(snap).equals(want)
	}
	h.ok("snapshot", "verify", "--all")
}

// A snapshot has the size of its cut, however long it takes.
func TestSnapshotUnderWayKeepsTheSizeOfItsCut(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	disk := randomBytes(1, 6*mib+512)
	vol := h.ok("volume", "create", "--size", fmt.Sprint(len(disk)))
	device := h.attach(vol)
	m := h.attached(vol)
	m.write(disk, 0)

	gate.close(requests, puts("packs"))
	defer gate.open()
	create := h.begin("snapshot", "create", vol)
	gate.waitHolding(t)
	h.ok("volume", "resize", vol, "10MiB")
	after := grown(disk, 10*mib)
	copy(after[6*mib+500:], "written meanwhile, over the end")
	m.write(after[6*mib+500:6*mib+531], 6*mib+500)
	m.closeFiles()
	f := openDirect(t, device, os.O_RDONLY)
	sameBytes(t, "the device", readDirect(t, f, 0, 10*mib), after)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	gate.open()
	r := create.wait()
	if r.code != 0 {
		t.Fatal(r)
	}
	sameBytes(t, "the snapshot", h.exported(strings.TrimSpace(r.stdout)), disk)
	m.equals(after)
	sameBytes(t, "the next snapshot", h.exported(h.ok("snapshot", "create", vol)), after)
	h.ok("detach", vol)
}
