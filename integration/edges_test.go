package integration

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

const tib = 1 << 40

// ext4Limit is the largest file that ext4 can hold with its usual blocks of
// 4 KiB: 2³² blocks but one.
const ext4Limit = 16*tib - 4*kib

// A hugeDisk is a device of which only a few pages hold data: those around what
// a size or an offset could be cut off to.
type hugeDisk struct {
	size  int64
	pages map[int64][]byte
}

func newHugeDisk(size int64) hugeDisk {
	d := hugeDisk{size, make(map[int64][]byte)}
	for _, at := range []int64{0, 2 * gib, 4 * gib, 2 * tib, 16 * tib, 32 * tib, size} {
		for _, off := range []int64{at - pageSize, at} {
			if off >= 0 && off < size {
				d.pages[off] = randomBytes(uint64(off), pageSize)
			}
		}
	}
	return d
}

// isOn checks that a file or device holds the pages, and zeros between them.
func (d hugeDisk) isOn(t testing.TB, path string) {
	t.Helper()
	for off, page := range d.pages {
		sameBytes(t, path+" at "+strconv.FormatInt(off, 10), readAt(t, path, off, pageSize), page)
	}
	for _, off := range []int64{gib, d.size / 3 &^ 511, d.size - 2*mib} {
		sameBytes(t, path+" at "+strconv.FormatInt(off, 10), readAt(t, path, off, mib), make([]byte, mib))
	}
}

// writeTo writes each page in two parts, the second first.
func (d hugeDisk) writeTo(t testing.TB, f *os.File) {
	t.Helper()
	const part = 1000
	for off, page := range d.pages {
		_, err := f.WriteAt(page[part:], off+part)
		if err == nil {
			_, err = f.WriteAt(page[:part], off)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
}

// xfsHost returns a host whose state directory is on XFS, which holds files of
// any size.
func xfsHost(t *testing.T, s *store) *host {
	t.Helper()
	h := newHost(t, s)
	image := sparse(t, filepath.Join(h.dir, "state.img"), 320*mib) // the least that mkfs makes, and a little
	tool(t, "mkfs.xfs", "-q", image)
	h.state = mountFS(t, image, "loop")
	return h
}

// ext4Host returns a host whose state directory is on ext4.
func ext4Host(t *testing.T, s *store) *host {
	t.Helper()
	h := newHost(t, s)
	image := sparse(t, filepath.Join(h.dir, "state.img"), 256*mib)
	tool(t, "mkfs.ext4", "-q", "-b", "4096", image)
	h.state = mountFS(t, image, "loop")
	return h
}

// On ext4 a volume can be as large as a file, to the page; it is discarded whole
// in a moment, and what does not fit is refused with the reason before anything
// is made.
func TestVolumeAsLargeAsExt4Allows(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	h := ext4Host(t, s)
	disk := newHugeDisk(ext4Limit)
	vol := h.ok("volume", "create", "--size", strconv.FormatInt(disk.size, 10))
	device := h.attach(vol)
	if got := sysfs(t, filepath.Base(device), "size"); got != strconv.FormatInt(disk.size/512, 10) {
		t.Errorf("%s has %s sectors", device, got)
	}
	f := openDirect(t, device, os.O_RDWR)
	page := aligned(pageSize)
	for off, data := range disk.pages {
		copy(page, data)
		if _, err := f.WriteAt(page, off); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := f.WriteAt(page, disk.size); err == nil || n != 0 {
		t.Errorf("a write at the end: %d, %v", n, err)
	}
	disk.isOn(t, device)
	full := h.ok("snapshot", "create", vol)
	discard := [2]uint64{0, uint64(disk.size)}
	if err := ioctlRange(f, unix.BLKDISCARD, &discard); err != nil {
		t.Errorf("discard all: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	empty := h.ok("snapshot", "create", vol)
	if info := h.show(empty); info.FullSnapshotSizeInBytes != 0 || info.VolumeSizeBytes != disk.size {
		t.Errorf("after the discard: %+v", info)
	}
	hugeDisk{size: disk.size}.isOn(t, device)
	h.ok("detach", vol)

	other := ext4Host(t, s)
	m := other.mount(full)
	disk.isOn(t, m.image)
	m.unmount()
	disk.isOn(t, other.attachCopy(full))

	for _, size := range []int64{ext4Limit + 512, 16 * tib, 64 * tib} {
		h.fails(1, []string{"filesystem", strconv.FormatInt(size, 10)}, "volume", "create", "--size", strconv.FormatInt(size, 10))
	}
	h.fails(1, []string{"filesystem"}, "volume", "create", "--snapshot", full, "--size", "20TiB")
	if left := glob(t, filepath.Join(h.state, "volumes", "vol-*")); len(left) != 1 {
		t.Errorf("the refusals left %v", left)
	}
	if pins := s.objects(t, "pins"); len(pins) != 2 { // of the two volumes
		t.Errorf("the refusals left %v", pins)
	}
}

// XFS holds any volume. What was made there cannot be opened where the state
// directory's filesystem cannot hold it, and is told so.
func TestLargestVolumeNeedsAFilesystemThatHoldsIt(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	h := xfsHost(t, s)
	disk := newHugeDisk(64 * tib)
	vol := h.ok("volume", "create", "--size", "64TiB")
	h.fails(2, []string{"70368744177664"}, "volume", "create", "--size", strconv.FormatInt(disk.size+512, 10))
	m := h.mount(vol)
	f := m.open(os.O_RDWR)
	disk.writeTo(t, f)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	disk.isOn(t, m.image)
	snap := h.ok("snapshot", "create", vol)
	m.unmount()
	disk.isOn(t, xfsHost(t, s).attachCopy(snap))

	small := ext4Host(t, s)
	for _, args := range [][]string{{"mount", snap, t.TempDir()}, {"volume", "create", "--snapshot", snap}} {
		small.fails(1, []string{"filesystem"}, args...)
	}
	if left := glob(t, filepath.Join(small.state, "volumes", "vol-*")); len(left) != 0 {
		t.Errorf("the refusals left %v", left)
	}
	if pins := s.objects(t, "pins"); len(pins) != 2 {
		t.Errorf("the refusals left %v", pins)
	}
}

// Reads and writes of any alignment and length, through the page cache and past
// it, up to the end of a device that ends within a page, and no further.
func TestAnyAlignmentUpToTheEnd(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	disk := diskBytes(1, 2*blockSize+3*pageSize+512)
	vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
	m := h.mount(vol, "--no-hydrate")
	r := newRand(2)
	m.write([]byte("a part of the last page, which is cold"), int64(len(disk)-100))
	copy(disk[len(disk)-100:], "a part of the last page, which is cold")
	for name, flags := range map[string]int{"buffered": 0, "direct": unix.O_DIRECT} {
		f := m.open(os.O_RDWR | flags)
		for range 150 {
			off := r.IntN(len(disk))
			if r.IntN(2) == 0 {
				off = len(disk) + pageSize - r.IntN(3*pageSize) // around the end
			}
			n := 1 + r.IntN(3*pageSize)
			p := aligned(n + 8)[r.IntN(8):][:n] // memory of any alignment, too
			inside := max(0, min(n, len(disk)-off))
			if r.IntN(2) == 0 {
				fill(r, p)
				got, err := syscall.Pwrite(int(f.Fd()), p, int64(off))
				if inside == 0 && !errors.Is(err, syscall.ENOSPC) || inside > 0 && (got != inside || err != nil) {
					t.Fatalf("%s write of %d at %d: %d, %v", name, n, off, got, err)
				}
				copy(disk[min(off, len(disk)):], p[:inside])
				continue
			}
			got, err := syscall.Pread(int(f.Fd()), p, int64(off))
			if got != inside || err != nil {
				t.Fatalf("%s read of %d at %d: %d, %v", name, n, off, got, err)
			}
			sameBytes(t, name+" read", p[:got], disk[min(off, len(disk)):][:inside])
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	m.equals(disk)
	sameBytes(t, "the snapshot", h.exported(h.ok("snapshot", "create", vol)), disk)
}

// ioctlRange is an ioctl on a byte range: offset and length.
func ioctlRange(f *os.File, request uint, r *[2]uint64) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), uintptr(request), uintptr(unsafe.Pointer(r))); errno != 0 {
		return errno
	}
	return nil
}
