package loopdev

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"
	"unsafe"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/internal/loopdev/loopdevtest"
)

func TestMain(m *testing.M) {
	loopdevtest.Lock()
	goleak.VerifyTestMain(m)
}

const size = 4 << 20

// backing makes a file of size bytes, all b.
func backing(t *testing.T, b byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "backing")
	if err := os.WriteFile(path, bytes.Repeat([]byte{b}, size), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// attach attaches a file until the test is over.
func attach(t *testing.T, path string, o Options) string {
	t.Helper()
	dev, err := Attach(path, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Detach(dev); err != nil && !errors.Is(err, ErrNotAttached) {
			t.Errorf("cleanup: %v", err)
		}
	})
	return dev
}

// run runs a program.
func run(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
}

// mount puts an ext4 filesystem on a device and mounts it until the test is
// over.
func mount(t *testing.T, dev string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	run(t, "mkfs.ext4", "-q", "-O", "^has_journal", dev)
	if err := unix.Mount(dev, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil && err != unix.EINVAL {
			t.Errorf("cleanup: %v", err)
		}
	})
	return dir
}

func wantAttribute(t *testing.T, dev, name, want string) {
	t.Helper()
	if got, err := attribute(dev, name); got != want || err != nil {
		t.Errorf("%s of %s is %q, %v, want %q", name, dev, got, err, want)
	}
}

func wantError(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

func wantContent(t *testing.T, path string, want []byte) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s holds %d other bytes, %v", path, len(got), err)
	}
}

func TestDeviceIsTheFile(t *testing.T) {
	path := backing(t, 1)
	dev := attach(t, path, Options{ReadAheadKB: 2048})
	wantAttribute(t, dev, "loop/dio", "1")
	wantAttribute(t, dev, "loop/autoclear", "0")
	wantAttribute(t, dev, "loop/partscan", "0")
	wantAttribute(t, dev, "ro", "0")
	wantAttribute(t, dev, "queue/read_ahead_kb", "2048")
	wantAttribute(t, dev, "queue/logical_block_size", "512")
	wantContent(t, dev, bytes.Repeat([]byte{1}, size))

	if err := os.WriteFile(dev, bytes.Repeat([]byte{2}, size/2), 0); err != nil {
		t.Fatal(err)
	}
	if err := Detach(dev); err != nil { // writes back what is in the page cache
		t.Fatal(err)
	}
	wantContent(t, path, slices.Concat(bytes.Repeat([]byte{2}, size/2), bytes.Repeat([]byte{1}, size/2)))
	wantError(t, "detached twice", Detach(dev), ErrNotAttached)
}

func TestReadOnlyDevice(t *testing.T) {
	path := backing(t, 3)
	dev := attach(t, path, Options{ReadOnly: true, SectorSize: 4096})
	wantAttribute(t, dev, "loop/dio", "1")
	wantAttribute(t, dev, "ro", "1")
	wantAttribute(t, dev, "queue/logical_block_size", "4096")
	wantContent(t, dev, bytes.Repeat([]byte{3}, size))
	if f, err := os.OpenFile(dev, os.O_RDWR, 0); err == nil {
		if _, err := f.WriteAt(make([]byte, 4096), 0); err == nil && f.Sync() == nil {
			t.Error("it can be written")
		}
		f.Close()
	}
	if err := Detach(dev); err != nil {
		t.Fatal(err)
	}
}

// addPartition makes /dev/loopNp1 of a device, as the kernel does by itself if
// it was built to know the kind of table.
func addPartition(t *testing.T, dev string) (part string) {
	t.Helper()
	f, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	partition := unix.BlkpgPartition{Start: 1 << 20, Length: 1 << 20, Pno: 1}
	arg := unix.BlkpgIoctlArg{
		Op:      unix.BLKPG_ADD_PARTITION,
		Datalen: int32(unsafe.Sizeof(partition)),
		Data:    (*byte)(unsafe.Pointer(&partition)),
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKPG, uintptr(unsafe.Pointer(&arg))); errno != 0 {
		t.Fatal(errno)
	}
	return dev + "p1"
}

func TestPartitionsAreDevices(t *testing.T) {
	dev := attach(t, backing(t, 4), Options{PartScan: true})
	wantAttribute(t, dev, "loop/partscan", "1")
	part := addPartition(t, dev)
	f, err := os.OpenFile(part, os.O_RDWR|unix.O_EXCL, 0) // as a mount does
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, "its partition in use", Detach(dev), ErrBusy)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Detach(dev); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join("/sys/class/block", filepath.Base(part))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the partition is still there: %v", err)
	}
}

func TestMissingFileIsAnError(t *testing.T) {
	_, err := Attach(filepath.Join(t.TempDir(), "missing"), Options{})
	wantError(t, "no file", err, os.ErrNotExist)
	_, err = Attach(t.TempDir(), Options{})
	if err == nil {
		t.Error("a directory was attached")
	}
}

// A device without direct I/O would look right and be slow.
func TestRefusedDirectIOAttachesNothing(t *testing.T) {
	// A filesystem on 4,096 byte sectors cannot do direct I/O of 512.
	dir := mount(t, attach(t, backing(t, 0), Options{SectorSize: 4096}))
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	if dev, err := Attach(file, Options{SectorSize: 512}); err == nil {
		wantAttribute(t, dev, "loop/dio", "1")
		t.Errorf("attached as %s", dev)
	}
	if devs, err := FindByBacking(file); len(devs) != 0 || err != nil {
		t.Errorf("left behind: %v, %v", devs, err)
	}
}

func TestDetachRefusesAMountedDevice(t *testing.T) {
	dev := attach(t, backing(t, 0), Options{})
	dir := mount(t, dev)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantError(t, "mounted", Detach(dev), ErrBusy)
	wantAttribute(t, dev, "loop/autoclear", "0")
	wantContent(t, file, []byte("kept"))
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := Detach(dev); err != nil {
		t.Errorf("unmounted: %v", err)
	}
}

// The kernel would detach it as soon as the other one closes it.
func TestDetachRefusesAnOpenDevice(t *testing.T) {
	dev := attach(t, backing(t, 5), Options{})
	f, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, "open", Detach(dev), ErrBusy)
	wantAttribute(t, dev, "loop/autoclear", "0")
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	wantContent(t, dev, bytes.Repeat([]byte{5}, size))
	if err := Detach(dev); err != nil {
		t.Errorf("closed: %v", err)
	}
}

// Whatever looks at every new device, such as udev, must not make detaching
// fail.
func TestDetachWaitsForThoseWhoOnlyLook(t *testing.T) {
	dev := attach(t, backing(t, 6), Options{})
	f, err := os.Open(dev)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		time.Sleep(detachTime / 10)
		f.Close()
	})
	if err := Detach(dev); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

func TestDetachSaysWhenWritesAreLost(t *testing.T) {
	dir := mount(t, attach(t, backing(t, 0), Options{}))
	file := filepath.Join(dir, "larger than its filesystem")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(file, 4*size); err != nil {
		t.Fatal(err)
	}
	dev := attach(t, file, Options{})
	f, err := os.OpenFile(dev, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(bytes.Repeat([]byte{1}, 3*size)); err != nil {
		t.Fatal(err) // it is in the page cache only
	}
	detached := make(chan error)
	go func() {
		time.Sleep(50 * time.Millisecond)
		detached <- Detach(dev)
	}()
	// The last close would write it, and tell nobody: so Detach must be first.
	time.Sleep(200 * time.Millisecond)
	f.Close()
	wantError(t, "writes lost", <-detached, ErrFlush)
	if _, err := Backing(dev); !errors.Is(err, ErrNotAttached) {
		t.Errorf("still attached: %v", err)
	}
}

func TestAttachesDoNotRace(t *testing.T) {
	var wg sync.WaitGroup
	var mu sync.Mutex // guards devs
	devs := make(map[string]string)
	for i := range 8 {
		path := backing(t, byte(i))
		wg.Go(func() {
			dev, err := Attach(path, Options{})
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			devs[dev] = path
		})
	}
	wg.Wait()
	for dev, path := range devs {
		if got, err := Backing(dev); got != path || err != nil {
			t.Errorf("%s has %s, %v, want %s", dev, got, err, path)
		}
		wg.Go(func() {
			if err := Detach(dev); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(devs) != 8 {
		t.Errorf("%d devices for 8 files", len(devs))
	}
}

func TestFindByBacking(t *testing.T) {
	path := backing(t, 7)
	if devs, err := FindByBacking(path); len(devs) != 0 || err != nil {
		t.Errorf("before: %v, %v", devs, err)
	}
	dev := attach(t, path, Options{})
	if got, err := Backing(dev); got != path || err != nil {
		t.Errorf("backing is %s, %v", got, err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Dir(path), link); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{path, filepath.Join(link, "backing"), filepath.Dir(path) + "/./backing"} {
		if devs, err := FindByBacking(name); !slices.Equal(devs, []string{dev}) || err != nil {
			t.Errorf("%s is the backing of %v, %v", name, devs, err)
		}
	}
	second := attach(t, path, Options{ReadOnly: true})
	if devs, err := FindByBacking(path); len(devs) != 2 || !slices.Contains(devs, second) || err != nil {
		t.Errorf("of two: %v, %v", devs, err)
	}
	_, err := Backing("/dev/null")
	wantError(t, "no loop device", err, ErrNotAttached)
}

// A device outlives the daemon of its file, and must be found for cleaning up.
func TestPathsOnADeadMountResolve(t *testing.T) {
	dead, link := t.TempDir(), filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Dir(dead), link); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("dead", dead, "fuse.dead", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dead, unix.MNT_DETACH)
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	through := filepath.Join(link, filepath.Base(dead), "volume.img")
	if got, err := resolve(through); got != filepath.Join(dead, "volume.img") || err != nil {
		t.Errorf("%s is %s, %v", through, got, err)
	}
	if devs, err := FindByBacking(through); len(devs) != 0 || err != nil {
		t.Errorf("devices: %v, %v", devs, err)
	}
}

func TestNodesAreMadeWhereNobodyElseMakesThem(t *testing.T) {
	dev := attach(t, backing(t, 8), Options{})
	var n int
	if _, err := fmt.Sscanf(filepath.Base(dev), "loop%d", &n); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for range 2 { // made, and found
		made, err := node(dir, n)
		if err != nil {
			t.Fatal(err)
		}
		var want, got unix.Stat_t
		if err := errors.Join(unix.Stat(dev, &want), unix.Stat(made, &got)); err != nil {
			t.Fatal(err)
		}
		if got.Rdev != want.Rdev || got.Mode&unix.S_IFMT != unix.S_IFBLK {
			t.Errorf("%s is device %#x, want %#x", made, got.Rdev, want.Rdev)
		}
	}
	if _, err := node(dir, 1<<19); err == nil {
		t.Error("a node for a device the kernel does not have")
	}
}

func TestChangeMovesADeviceInUse(t *testing.T) {
	before, after := backing(t, 9), backing(t, 10)
	dev := attach(t, before, Options{ReadOnly: true})
	fd, err := unix.Open(dev, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), dev)
	first := make([]byte, size/2)
	if _, err := io.ReadFull(f, first); err != nil {
		t.Fatal(err)
	}
	if err := Change(dev, after); err != nil {
		t.Fatal(err)
	}
	wantAttribute(t, dev, "loop/dio", "1")
	if got, err := Backing(dev); got != after || err != nil {
		t.Errorf("backing is %s, %v", got, err)
	}
	rest, err := io.ReadAll(f)
	if err != nil || !bytes.Equal(rest[len(rest)-4096:], bytes.Repeat([]byte{10}, 4096)) {
		t.Errorf("open readers get %d other bytes, %v", len(rest), err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	smaller := filepath.Join(t.TempDir(), "smaller")
	if err := os.WriteFile(smaller, make([]byte, size/2), 0o600); err != nil {
		t.Fatal(err)
	}
	wantError(t, "another size", Change(dev, smaller), unix.EINVAL)
	claimed, err := os.OpenFile(dev, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, "a claimed device", Change(dev, before), ErrBusy)
	if err := claimed.Close(); err != nil {
		t.Fatal(err)
	}
	wantError(t, "a writable device", Change(attach(t, backing(t, 0), Options{}), after), unix.EINVAL)
	if got, err := Backing(dev); got != after || err != nil {
		t.Errorf("after failures backing is %s, %v", got, err)
	}
}
