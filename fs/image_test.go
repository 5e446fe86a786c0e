package fs_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/lazyvol/lazyvol/fs"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// oddSize is a multiple of neither block, page nor sector.
const oddSize = 3<<20 + 5*512 + 17

func readAt(t *testing.T, f *os.File, n int, off int64) []byte {
	t.Helper()
	p := make([]byte, n)
	got, err := f.ReadAt(p, off)
	if err != nil && err != io.EOF {
		t.Fatalf("read %d at %d: %v", n, off, err)
	}
	return p[:got]
}

func writeAt(t *testing.T, f *os.File, p []byte, off int64) {
	t.Helper()
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatalf("write %d at %d: %v", len(p), off, err)
	}
}

func wantErrno(t *testing.T, what string, err error, want syscall.Errno) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %s", what, err, unix.ErrnoName(want))
	}
}

// Whatever mix of handles, offsets and lengths is used, the image holds what was
// written last.
func TestImageIsAByteArray(t *testing.T) {
	d := start(t, daemonConfig{Size: oddSize, Seed: 1})
	handles := []*os.File{d.open(unix.O_RDWR), d.open(unix.O_RDWR | unix.O_DIRECT), d.open(unix.O_RDWR)}
	model := content(oddSize, 1)
	rapid.Check(t, func(r *rapid.T) {
		handle := rapid.SampledFrom(handles)
		offset := rapid.OneOf(
			rapid.Int64Range(0, oddSize-1),
			rapid.Map(rapid.Int64Range(0, oddSize/4096), func(page int64) int64 { return page * 4096 }))
		length := rapid.SampledFrom([]int{1, 100, 512, 4095, 4096, 4097, 65536, 200000, 1<<20 + 1})
		r.Repeat(map[string]func(*rapid.T){
			"read": func(r *rapid.T) {
				off, n := offset.Draw(r, "off"), length.Draw(r, "n")
				p := make([]byte, n)
				got, err := handle.Draw(r, "handle").ReadAt(p, off)
				want := model[off:min(off+int64(n), oddSize)]
				if err != nil && err != io.EOF || !bytes.Equal(p[:got], want) {
					r.Fatalf("read %d at %d: %d bytes, %v, want %d bytes that were written", n, off, got, err, len(want))
				}
			},
			"write": func(r *rapid.T) {
				off := offset.Draw(r, "off")
				p := bytes.Repeat([]byte{rapid.Byte().Draw(r, "byte")}, int(min(int64(length.Draw(r, "n")), oddSize-off)))
				if _, err := handle.Draw(r, "handle").WriteAt(p, off); err != nil {
					r.Fatalf("write %d at %d: %v", len(p), off, err)
				}
				copy(model[off:], p)
			},
			"zero": func(r *rapid.T) {
				off, n := offset.Draw(r, "off"), int64(length.Draw(r, "n"))
				mode := rapid.SampledFrom([]uint32{
					unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE,
					unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE,
				}).Draw(r, "mode")
				if err := unix.Fallocate(int(handle.Draw(r, "handle").Fd()), mode, off, n); err != nil {
					r.Fatalf("fallocate %#x %d at %d: %v", mode, n, off, err)
				}
				clear(model[off:min(off+n, oddSize)])
			},
		})
	})
}

func TestReadsEndAtTheEnd(t *testing.T) {
	d := start(t, daemonConfig{Size: oddSize, Seed: 2})
	want := content(oddSize, 2)
	for name, flags := range map[string]int{"buffered": 0, "direct": unix.O_DIRECT} {
		f := d.open(flags)
		if got := readAt(t, f, 8192, oddSize-100); !bytes.Equal(got, want[oddSize-100:]) {
			t.Errorf("%s: %d bytes across the end, want the last 100", name, len(got))
		}
		for _, off := range []int64{oddSize, oddSize + 1, 1 << 40} {
			if got := readAt(t, f, 100, off); len(got) != 0 {
				t.Errorf("%s: %d bytes at %d, beyond the end", name, len(got), off)
			}
		}
	}
}

func TestWritesEndAtTheEnd(t *testing.T) {
	d := start(t, daemonConfig{Size: oddSize})
	for name, flags := range map[string]int{"buffered": 0, "direct": unix.O_DIRECT} {
		f := d.open(unix.O_RDWR | flags)
		n, err := unix.Pwrite(int(f.Fd()), bytes.Repeat([]byte{7}, 5000), oddSize-100)
		if n != 100 || err != nil {
			t.Errorf("%s: write across the end: %d, %v, want 100 bytes", name, n, err)
		}
		_, err = f.WriteAt([]byte{1}, oddSize)
		wantErrno(t, name+" write at the end", err, unix.ENOSPC)
		_, err = f.WriteAt([]byte{1}, 1<<40)
		wantErrno(t, name+" write far beyond the end", err, unix.ENOSPC)
		if st, err := f.Stat(); err != nil || st.Size() != oddSize {
			t.Errorf("%s: size is %d, %v after writes at the end", name, st.Size(), err)
		}
	}
}

func TestEveryFsyncReachesTheDevice(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20})
	for _, flags := range []int{0, unix.O_DIRECT} {
		f := d.open(unix.O_RDWR | flags)
		for range 3 {
			before := d.operation("sync").Calls
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
			if err := unix.Fdatasync(int(f.Fd())); err != nil {
				t.Fatal(err)
			}
			if got := d.operation("sync").Calls - before; got != 2 {
				t.Errorf("fsync and fdatasync reached the device %d times", got)
			}
		}
	}
	for _, flags := range []int{unix.O_SYNC, unix.O_DSYNC, unix.O_DIRECT | unix.O_SYNC, unix.O_DIRECT | unix.O_DSYNC} {
		f := d.open(unix.O_RDWR | flags)
		before := d.operation("sync").Calls
		writeAt(t, f, []byte("durable"), 0)
		if got := d.operation("sync").Calls - before; got == 0 {
			t.Errorf("a write with the flags %#x did not reach Sync", flags)
		}
	}
}

// An ENOSYS that got out would make the kernel report success for each further
// fsync without asking.
func TestFailedFsyncFailsEveryTime(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20})
	f := d.open(unix.O_RDWR)
	for _, how := range []string{"plain", "ENOSYS", "expired", "panic"} {
		d.set(Change{Op: "sync", Failing: how})
		for range 2 {
			wantErrno(t, "fsync with "+how, f.Sync(), unix.EIO)
		}
	}
	d.set(Change{Op: "sync", Failing: "ENOSPC"})
	wantErrno(t, "fsync without space", f.Sync(), unix.ENOSPC)
	d.set(Change{Op: "sync"})
	if err := f.Sync(); err != nil {
		t.Errorf("fsync of a device that works again: %v", err)
	}
}

func TestFailuresAreErrorsNotZeros(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20, Seed: 3})
	for name, flags := range map[string]int{"buffered": 0, "direct": unix.O_DIRECT} {
		f := d.open(unix.O_RDWR | flags)
		for _, how := range []string{"plain", "half", "expired", "ENOSYS", "panic"} {
			d.set(Change{Op: "read", Failing: how})
			for range 2 {
				_, err := f.ReadAt(make([]byte, 8192), 65536)
				wantErrno(t, name+" read with "+how, err, unix.EIO)
			}
		}
		d.set(Change{Op: "read"})
		if got := readAt(t, f, 8192, 65536); !bytes.Equal(got, content(1<<20, 3)[65536:65536+8192]) {
			t.Errorf("%s: other bytes after the device recovered", name)
		}
		d.set(Change{Op: "write", Failing: "ENOSPC"})
		_, err := f.WriteAt(make([]byte, 4096), 0)
		wantErrno(t, name+" write", err, unix.ENOSPC)
		d.set(Change{Op: "write"})
		if got := readAt(t, f, 4096, 0); !bytes.Equal(got, content(1<<20, 3)[:4096]) {
			t.Errorf("%s: a write that failed can be read", name)
		}
		d.set(Change{Op: "zero", Failing: "plain"})
		wantErrno(t, name+" punch", unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096), unix.EIO)
		d.set(Change{Op: "zero"})
	}
	log := d.log()
	for _, want := range []string{"the store said no", "panic while answering", "memory_test.go", "op=zero"} {
		if !strings.Contains(log, want) {
			t.Errorf("log does not say %q:\n%s", want, log)
		}
	}
	for _, kind := range []string{"op=read", "op=write", "panic while"} {
		if n := strings.Count(log, kind); n != 1 {
			t.Errorf("%d lines with %q, want one:\n%s", n, kind, log)
		}
	}
}

func TestFallocate(t *testing.T) {
	const size = 1 << 20
	d := start(t, daemonConfig{Size: size, Seed: 4})
	fd := int(d.open(unix.O_RDWR).Fd())
	for _, c := range []struct {
		name   string
		mode   uint32
		off, n int64
		want   syscall.Errno
		zeroes bool
	}{
		{"punch", unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, 10, 5000, 0, true},
		{"punch across the end", unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, size - 10, 5000, 0, true},
		{"punch beyond the end", unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, size, 5000, 0, false},
		{"zero", unix.FALLOC_FL_ZERO_RANGE, 4096, 4096, 0, true},
		{"zero, keeping size", unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE, 4096, 4096, 0, true},
		{"zero and grow", unix.FALLOC_FL_ZERO_RANGE, size - 10, 5000, unix.ENOSPC, false},
		{"preallocate", 0, 0, size, 0, false},
		{"preallocate, keeping size", unix.FALLOC_FL_KEEP_SIZE, 5, size - 5, 0, false},
		{"preallocate and grow", 0, 0, size + 1, unix.ENOSPC, false},
		{"collapse", unix.FALLOC_FL_COLLAPSE_RANGE, 0, 4096, unix.EOPNOTSUPP, false},
	} {
		before := d.operation("zero").Calls
		err := unix.Fallocate(fd, c.mode, c.off, c.n)
		if !errors.Is(err, c.want) && !(c.want == 0 && err == nil) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
		if got := d.operation("zero").Calls-before == 1; got != c.zeroes {
			t.Errorf("%s: reached the device: %t", c.name, got)
		}
	}
}

func TestSeekFindsDataAndHoles(t *testing.T) {
	const size = 1<<20 + 100
	d := start(t, daemonConfig{Size: size})
	f := d.open(unix.O_RDWR)
	writeAt(t, f, []byte("data"), 65536)
	for _, c := range []struct {
		off    int64
		whence int
		want   int64
	}{
		{0, unix.SEEK_DATA, 65536},
		{65537, unix.SEEK_DATA, 65537},
		{0, unix.SEEK_HOLE, 0},
		{65536, unix.SEEK_HOLE, 65536 + 4096},
		{0, unix.SEEK_END, size},
	} {
		if got, err := f.Seek(c.off, c.whence); got != c.want || err != nil {
			t.Errorf("seek %d of kind %d: %d, %v, want %d", c.off, c.whence, got, err, c.want)
		}
	}
	_, err := f.Seek(65536+4096, unix.SEEK_DATA)
	wantErrno(t, "seek data where only zeros follow", err, unix.ENXIO)
	_, err = f.Seek(size, unix.SEEK_HOLE)
	wantErrno(t, "seek from the end", err, unix.ENXIO)
	writeAt(t, f, []byte("data"), size-4)
	if got, err := f.Seek(size-2, unix.SEEK_HOLE); got != size || err != nil {
		t.Errorf("the hole at the end is at %d, %v", got, err)
	}
	d.set(Change{Op: "seek", Failing: "plain"})
	_, err = f.Seek(0, unix.SEEK_DATA)
	wantErrno(t, "seek that fails", err, unix.EIO)
}

// The loop driver reads statfs of its file for the granularity of discards.
func TestStatfsOfTheImage(t *testing.T) {
	d := start(t, daemonConfig{Size: oddSize})
	for _, path := range []string{d.image, d.dir} {
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err != nil || st.Bsize != 4096 {
			t.Errorf("statfs %s: block size %d, %v", path, st.Bsize, err)
		}
	}
}

func TestBlockDeviceSize(t *testing.T) {
	d := start(t, daemonConfig{Size: oddSize})
	f := d.open(unix.O_RDONLY)
	var size [8]byte
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size))); errno != 0 {
		t.Fatal(errno)
	}
	if got := binary.NativeEndian.Uint64(size[:]); got != oddSize {
		t.Errorf("BLKGETSIZE64 says %d", got)
	}
	_, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKSSZGET)
	wantErrno(t, "another ioctl", err, unix.ENOTTY)
}

func TestSizeModeAndOwnerAreFixed(t *testing.T) {
	d := start(t, daemonConfig{Size: oddSize, Status: "{}"})
	f := d.open(unix.O_RDWR)
	for what, err := range map[string]error{
		"truncate to 0":       f.Truncate(0),
		"grow":                f.Truncate(oddSize + 1),
		"chmod":               f.Chmod(0o777),
		"chown":               f.Chown(1, -1),
		"chgrp":               f.Chown(-1, 1),
		"remove":              unix.Unlink(d.image),
		"rmdir":               unix.Rmdir(d.image),
		"chmod of the status": os.Chmod(d.status, 0o777),
		"O_TRUNC":             func() error { _, err := os.OpenFile(d.image, os.O_RDWR|os.O_TRUNC, 0); return err }(),
		"writing the status":  func() error { _, err := os.OpenFile(d.status, os.O_RDWR, 0); return err }(),
	} {
		if what == "rmdir" {
			wantErrno(t, what, err, unix.ENOTDIR)
			continue
		}
		wantErrno(t, what, err, unix.EPERM)
	}
	if err := os.Mkdir(filepath.Join(d.dir, "new"), 0o700); err == nil {
		t.Error("a directory was made")
	}
	if f, err := os.Create(filepath.Join(d.dir, "new")); err == nil {
		f.Close()
		t.Error("a file was made")
	}
	for what, err := range map[string]error{
		"truncate to the size it has": f.Truncate(oddSize),
		"chmod to the mode it has":    f.Chmod(0o600),
		"chown to the owner it has":   f.Chown(0, 0),
	} {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if st, err := os.Stat(d.image); err != nil || st.Size() != oddSize || st.Mode() != 0o600 {
		t.Errorf("stat after all that: %v, %v", st, err)
	}
}

func TestStatSaysWhatIsAllocated(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20})
	var st unix.Stat_t
	if err := unix.Stat(d.image, &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks != 1<<10 || st.Blksize != 4096 { // half of it, says memory.Allocated
		t.Errorf("%d blocks of 512 bytes, block size %d", st.Blocks, st.Blksize)
	}
}

func TestTimesFollowWritesAndCanBeSet(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20})
	past := time.Unix(1_000_000_000, 123_456_789)
	for name, flags := range map[string]int{"buffered": 0, "direct": unix.O_DIRECT} {
		f := d.open(unix.O_RDWR | flags)
		if err := os.Chtimes(d.image, past, past); err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(d.image); err != nil || !st.ModTime().Equal(past) {
			t.Errorf("%s: time set to %v is %v, %v", name, past, st.ModTime(), err)
		}
		before := time.Now().Add(-time.Second)
		writeAt(t, f, []byte("now"), 0)
		if st, err := os.Stat(d.image); err != nil || st.ModTime().Before(before) {
			t.Errorf("%s: written at %v, %v, says stat", name, st.ModTime(), err)
		}
	}
}

func TestReadOnlyImage(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20, Seed: 5, ReadOnly: true})
	_, err := os.OpenFile(d.image, os.O_RDWR, 0)
	wantErrno(t, "open for writing", err, unix.EROFS)
	_, err = os.OpenFile(d.image, os.O_WRONLY, 0)
	wantErrno(t, "open for writing only", err, unix.EROFS)
	wantErrno(t, "touch", os.Chtimes(d.image, time.Now(), time.Now()), unix.EROFS)
	f := d.open(unix.O_RDONLY)
	if got := readAt(t, f, 1<<20, 0); !bytes.Equal(got, content(1<<20, 5)) {
		t.Error("other bytes")
	}
	if err := f.Sync(); err != nil {
		t.Errorf("fsync: %v", err)
	}
	if st, err := f.Stat(); err != nil || st.Mode() != 0o400 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
}

// A buffered read between the kernel's dropping of the page cache for a direct
// write and the write itself caches bytes that are about to be old.
func TestDirectWriteReplacesWhatARacingReadCached(t *testing.T) {
	for _, c := range []struct {
		name         string
		loop, reopen bool
	}{
		{"write, open handle", false, false},
		{"write, later handle", false, true},
		{"asynchronous write, open handle", true, false},
		{"asynchronous write, later handle", true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := start(t, daemonConfig{Size: 1 << 20, Seed: 6})
			var direct *os.File
			if c.loop {
				direct = d.attachLoop()
			} else {
				direct = d.open(unix.O_RDWR | unix.O_DIRECT)
			}
			buffered := d.open(unix.O_RDONLY)
			d.set(Change{Op: "write", Hold: true})
			ones := alignedBuffer(8192)
			for i := range ones {
				ones[i] = 1
			}
			written := make(chan error)
			go func() {
				_, err := direct.WriteAt(ones, 4096)
				written <- err
			}()
			d.waitRunning("write", 1)
			if got := readAt(t, buffered, 1<<16, 0); !bytes.Equal(got, content(1<<20, 6)[:1<<16]) {
				t.Error("the write can be read before it was done")
			}
			if c.reopen {
				if err := buffered.Close(); err != nil {
					t.Fatal(err)
				}
			}
			d.set(Change{Op: "write"})
			if err := <-written; err != nil {
				t.Fatal(err)
			}
			if c.reopen {
				buffered = d.open(unix.O_RDONLY)
			}
			d.eventually("buffered reader sees the write", func() bool {
				return bytes.Equal(readAt(t, buffered, 8192, 4096), ones)
			})
		})
	}
}

// The page cache is worth keeping: a second reader costs the device nothing,
// whatever was written elsewhere meanwhile.
func TestPageCacheOutlivesHandles(t *testing.T) {
	d := start(t, daemonConfig{Size: 2 << 20, Seed: 7})
	throughTheCache(t, func() (reads int) {
		f := d.open(unix.O_RDWR)
		readAt(t, f, 1<<20, 0)
		writeAt(t, f, make([]byte, 4096), 1<<20)
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(d.image); err != nil {
			t.Fatal(err)
		}
		before := d.operation("read").Calls
		if got := readAt(t, d.open(unix.O_RDONLY), 1<<20, 0); !bytes.Equal(got, content(2<<20, 7)[:1<<20]) {
			t.Error("other bytes")
		}
		return d.operation("read").Calls - before
	})
}

// throughTheCache fails unless there is a time when again, which returns how many reads
// of the device it took, takes none. The kernel may drop what it has in its page cache
// whenever it likes, and on some machines often does.
func throughTheCache(t *testing.T, again func() (reads int)) {
	t.Helper()
	const tries = 10
	reads := 0
	for range tries {
		if reads = again(); reads == 0 {
			return
		}
	}
	t.Errorf("reading again took %d reads of the device, and no less in %d tries", reads, tries)
}

func TestSharedMapping(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20, Seed: 8})
	buffered, direct := d.open(unix.O_RDWR), d.open(unix.O_RDWR|unix.O_DIRECT)
	m, err := unix.Mmap(int(buffered.Fd()), 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	copy(m[5000:], "through the mapping")
	if err := unix.Msync(m, unix.MS_SYNC); err != nil {
		t.Fatal(err)
	}
	if got := readAt(t, direct, 19, 5000); string(got) != "through the mapping" {
		t.Errorf("direct read gives %q", got)
	}
	writeAt(t, direct, []byte("around the mapping!"), 5000)
	if got := m[5000:5019]; string(got) != "around the mapping!" {
		t.Errorf("the mapping shows %q", got)
	}
}

// Requests in the device at once, buffers bounded: MaxInflight holds back what
// it must and nothing is lost.
func TestMaxInflightBoundsWritesInTheDevice(t *testing.T) {
	const writers, room = 16, 6
	d := start(t, daemonConfig{Size: 1 << 20, Options: mountOptions{MaxInflight: room << 20}})
	d.set(Change{Op: "write", Hold: true})
	f := d.open(unix.O_RDWR | unix.O_DIRECT)
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			if _, err := f.WriteAt(bytes.Repeat([]byte{byte(i)}, 4096), int64(i)*4096); err != nil {
				t.Errorf("write %d: %v", i, err)
			}
		})
	}
	d.eventually("writes arrive", func() bool { return d.operation("write").Running >= room-3 })
	time.Sleep(50 * time.Millisecond)
	d.set(Change{Op: "write"})
	wg.Wait()
	if op := d.operation("write"); op.Calls != writers || op.Peak > room {
		t.Errorf("%d writes, %d at once, want %d and at most %d", op.Calls, op.Peak, writers, room)
	}
}

func TestStatusIsAsItWasWhenOpened(t *testing.T) {
	first := `{"state":"hydrating","errors":[` + strings.Repeat(`"long",`, 3000) + `""]}`
	d := start(t, daemonConfig{Size: 1 << 20, Status: first})
	f, err := os.Open(d.status)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	head := make([]byte, 100)
	if _, err := io.ReadFull(f, head); err != nil {
		t.Fatal(err)
	}
	d.call("SetStatus", `{"state":"hydrated"}`, new(struct{}))
	rest, err := io.ReadAll(f)
	if got := string(head) + string(rest); err != nil || got != first {
		t.Errorf("the open file changed: %d bytes, %v, want %d", len(got), err, len(first))
	}
	if got, err := os.ReadFile(d.status); err != nil || string(got) != `{"state":"hydrated"}` {
		t.Errorf("a new reader gets %.50s, %v", got, err)
	}
	if st, err := os.Stat(d.status); err != nil || st.Size() != int64(len(`{"state":"hydrated"}`)) {
		t.Errorf("size %d, %v", st.Size(), err)
	}
	names, err := os.ReadDir(d.dir)
	if err != nil || len(names) != 2 || names[0].Name() != fs.StatusName || names[1].Name() != fs.ImageName {
		t.Errorf("the mountpoint shows %v, %v", names, err)
	}
}
