package fs_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// attachLoop puts a loop device with direct I/O on the image, as package
// loopdev does, and opens it without the page cache of its own.
func (d *daemon) attachLoop() *os.File {
	t := d.t
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	backing := d.open(unix.O_RDWR | unix.O_DIRECT)
	for range 100 {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatal(err)
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR|unix.O_DIRECT, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &unix.LoopConfig{
			Fd:   uint32(backing.Fd()),
			Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_DIRECT_IO | unix.LO_FLAGS_AUTOCLEAR},
		})
		if err == nil {
			t.Cleanup(func() { loop.Close() }) // and so detach
			if err := backing.Close(); err != nil {
				t.Fatal(err)
			}
			return loop
		}
		loop.Close()
		if err != unix.EBUSY {
			t.Fatal(err)
		}
	}
	t.Fatal("no loop device to be had")
	return nil
}

// alignedBuffer returns n bytes that a block device reads into directly.
func alignedBuffer(n int) []byte {
	const align = 4096
	b := make([]byte, n+align)
	skip := align - int(uintptr(unsafe.Pointer(&b[0]))%align)
	return b[skip : skip+n]
}

// ioctlRange is an ioctl on a byte range: offset and length.
func ioctlRange(f *os.File, request uint, r *[2]uint64) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(unsafe.Pointer(r))); errno != 0 {
		return errno
	}
	return nil
}

// queueSetting returns a number from a loop device's folder in sysfs.
func queueSetting(t *testing.T, loop *os.File, name string) int {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(loop.Name()), name))
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// What makes a volume usable while its blocks are fetched: one slow read must
// not keep others waiting, through a loop device either.
func TestLoopReadsReachTheDeviceInParallel(t *testing.T) {
	const depth = 64
	d := start(t, daemonConfig{Size: 4 << 20, Seed: 14})
	loop := d.attachLoop()
	if queueSetting(t, loop, "loop/dio") != 1 {
		t.Error("the loop device has no direct I/O")
	}
	want := content(4<<20, 14)
	d.set(Change{Op: "read", Hold: true})
	var wg sync.WaitGroup
	for i := range depth {
		wg.Go(func() {
			buf := alignedBuffer(4096)
			off := int64(i) * 65536
			if _, err := loop.ReadAt(buf, off); err != nil || !bytes.Equal(buf, want[off:off+4096]) {
				t.Errorf("read at %d: wrong or %v", off, err)
			}
		})
	}
	d.eventually("all reads are in the device at once", func() bool { return d.operation("read").Running == depth })
	d.set(Change{Op: "read"})
	wg.Wait()
}

// Cold reads that fill the queue of a loop device must not keep a write out.
func TestWritesPassReadsThatWait(t *testing.T) {
	const depth = 100
	d := start(t, daemonConfig{Size: 4 << 20})
	loop := d.attachLoop()
	d.set(Change{Op: "read", Hold: true})
	var wg sync.WaitGroup
	for i := range depth {
		wg.Go(func() {
			if _, err := loop.ReadAt(alignedBuffer(4096), int64(i)*8192); err != nil {
				t.Errorf("read %d: %v", i, err)
			}
		})
	}
	d.waitRunning("read", depth)
	began := time.Now()
	if _, err := loop.WriteAt(alignedBuffer(4096), 1<<20); err != nil {
		t.Error(err)
	}
	if err := loop.Sync(); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("writing took %v", took)
	}
	d.set(Change{Op: "read"})
	wg.Wait()
}

func TestLoopDiscardAndFlush(t *testing.T) {
	d := start(t, daemonConfig{Size: 4 << 20, Seed: 15})
	loop := d.attachLoop()
	if got := queueSetting(t, loop, "queue/discard_granularity"); got != 4096 {
		t.Errorf("discard granularity is %d", got)
	}
	want := content(4<<20, 15)
	for _, request := range []uint{unix.BLKDISCARD, unix.BLKZEROOUT} {
		r := [2]uint64{1 << 20, 1 << 16}
		if err := ioctlRange(loop, request, &r); err != nil {
			t.Fatal(err)
		}
		clear(want[r[0] : r[0]+r[1]])
		d.eventually("zeroed", func() bool { return d.operation("zero").Calls > 0 })
		got := alignedBuffer(1 << 20)
		if _, err := loop.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, want[1<<20:2<<20]) {
			t.Errorf("request %#x: other bytes, %v", request, err)
		}
	}
	d.set(Change{Op: "sync", Failing: "plain"})
	for range 2 {
		writeAt(t, loop, alignedBuffer(4096), 0)
		wantErrno(t, "fsync of the loop device", loop.Sync(), unix.EIO)
	}
	d.set(Change{Op: "sync"})
}
