package integration

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30

	blockSize = 512 * kib
	pageSize  = 4 * kib
)

// newRand returns a source of random numbers that is the same in every run.
func newRand(seed uint64) *rand.Rand {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return rand.New(rand.NewChaCha8(key))
}

// fill fills p with random bytes, which do not compress.
func fill(r *rand.Rand, p []byte) {
	for len(p) >= 8 {
		binary.NativeEndian.PutUint64(p, r.Uint64())
		p = p[8:]
	}
	for i := range p {
		p[i] = byte(r.Uint32())
	}
}

// randomBytes returns n random bytes.
func randomBytes(seed uint64, n int) []byte {
	p := make([]byte, n)
	fill(newRand(seed), p)
	return p
}

// diskBytes returns the content of a disk of n bytes: stretches of random
// bytes, of text and of zeros, which begin and end anywhere.
func diskBytes(seed uint64, n int) []byte {
	r := newRand(seed)
	disk := make([]byte, n)
	for rest := disk; len(rest) > 0; {
		part := rest[:min(len(rest), 1+r.IntN(1500*kib))]
		switch r.IntN(4) {
		case 0: // zeros
		case 1:
			for i := range part {
				part[i] = "the quick brown fox "[i%20]
			}
		default:
			fill(r, part)
		}
		rest = rest[len(part):]
	}
	return disk
}

// writeImage writes a disk into a file, sparse where it has pages of zeros.
func writeImage(t testing.TB, path string, disk []byte) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(int64(len(disk))); err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, pageSize)
	for off := 0; off < len(disk); off += pageSize {
		page := disk[off:min(off+pageSize, len(disk))]
		if bytes.Equal(page, zeros[:len(page)]) {
			continue
		}
		if _, err := f.WriteAt(page, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

// image writes a disk into a new file of the host.
func (h *host) image(disk []byte) string {
	h.t.Helper()
	return writeImage(h.t, filepath.Join(h.t.TempDir(), "disk.img"), disk)
}

// sparse makes a file of a size without any data.
func sparse(t testing.TB, path string, size int64) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	return path
}

// aligned returns n bytes that O_DIRECT accepts.
func aligned(n int) []byte {
	p := make([]byte, n+pageSize)
	skip := int(-uintptr(unsafe.Pointer(&p[0])) & (pageSize - 1))
	return p[skip : skip+n : skip+n]
}

// readDirect reads n bytes at off from a file that was opened with O_DIRECT.
func readDirect(t testing.TB, f *os.File, off int64, n int) []byte {
	t.Helper()
	p := aligned(n)
	got, err := f.ReadAt(p, off)
	if err != nil && !errors.Is(err, io.EOF) {
		t.Fatalf("read %s directly at %d: %v", f.Name(), off, err)
	}
	return p[:got]
}

// tool runs a program, which must succeed, and returns what it printed.
func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// loopDevice attaches a file to a loop device, until the test ends.
func loopDevice(t testing.TB, file string) string {
	t.Helper()
	device := tool(t, "losetup", "--find", "--show", file)
	t.Cleanup(func() {
		if err := detachLoop(device); err != nil {
			t.Error(err)
		}
	})
	return device
}

// mountFS mounts the filesystem on a device on a new directory, until umount,
// or the test ends.
func mountFS(t testing.TB, device, options string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	tool(t, "mount", "-o", options, device, dir)
	t.Cleanup(func() {
		if isMountpoint(t, dir) {
			umount(t, dir)
		}
	})
	return dir
}

// isMountpoint reports whether something is mounted on a directory, if only by
// a daemon that was killed.
func isMountpoint(t testing.TB, dir string) bool {
	t.Helper()
	mounts, err := mountsUnder(filepath.Dir(dir))
	if err != nil {
		t.Fatal(err)
	}
	return slices.Contains(mounts, dir)
}

// umount takes a filesystem away, which may be in use for a moment: see
// mount.tryUnmount.
func umount(t testing.TB, dir string) {
	t.Helper()
	const patience = 10 * time.Second
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		err := unix.Unmount(dir, 0)
		if err == nil {
			return
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			t.Fatalf("unmount %s: %v", dir, err)
		}
	}
}

// realFiles copies a few thousand real files into a folder: packages of Go's
// own source.
func realFiles(t testing.TB, dir string, packages ...string) {
	t.Helper()
	root := tool(t, "go", "env", "GOROOT")
	for _, p := range packages {
		tool(t, "cp", "-a", filepath.Join(root, "src", p), dir)
	}
}

// sameFiles checks that two folders hold the same files.
func sameFiles(t testing.TB, got, want string) {
	t.Helper()
	tool(t, "diff", "--recursive", "--no-dereference", "--exclude=lost+found", want, got)
}

// allocated returns how much disk space a file takes.
func allocated(t testing.TB, file string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}
