package integration

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// smallHost returns a host whose state directory is a filesystem of its own.
func smallHost(t *testing.T, s *store, size int64) *host {
	t.Helper()
	h := newHost(t, s)
	image := sparse(t, filepath.Join(h.dir, "state.img"), size)
	tool(t, "mkfs.ext4", "-q", "-m", "0", image)
	h.state = mountFS(t, image, "loop")
	return h
}

// fillDisk writes a file that leaves only so many bytes of a filesystem.
func fillDisk(t *testing.T, path string, leave int64) {
	t.Helper()
	var st syscall.Statfs_t
	if err := syscall.Statfs(filepath.Dir(path), &st); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-leave); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestHydrationStopsBeforeTheDiskIsFullAndReadsGoOn(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	maker := newHost(t, s)
	disk := randomBytes(1, 160*mib)
	snap := maker.ok("snapshot", "create", maker.image(disk))
	h := smallHost(t, s, 96*mib)
	m := h.mount(snap)
	m.waitState("cache-full", 30*time.Second)
	waitFor(t, "what fits is counted", 10*time.Second, func() bool {
		n := m.status().HydratedBytes
		return n >= 40*mib && n <= 90*mib
	})
	r := h.run("hydrate", "--wait", m.dir)
	if r.code != 1 || !strings.Contains(r.stderr, "full") {
		t.Errorf("%s\nwant exit 1 and why", r)
	}
	m.equals(disk) // more than the disk can hold
	m.equals(disk)
}

func TestCacheSizeIsALimit(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := randomBytes(1, 96*mib)
	m := h.mount(h.ok("snapshot", "create", h.image(disk)), "--cache-size", "32MiB")
	m.waitState("cache-full", 30*time.Second)
	// A pack may be under way when the limit is reached.
	waitFor(t, "what fits is counted", 10*time.Second, func() bool { return m.status().HydratedBytes >= 16*mib })
	if st := m.status(); st.HydratedBytes > 80*mib {
		t.Errorf("status: %+v", st)
	}
	m.equals(disk)
}

func TestWritesToAFullDiskFailAndNothingAcknowledgedIsLost(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	maker := newHost(t, s)
	disk := randomBytes(1, 24*mib)
	snap := maker.ok("snapshot", "create", maker.image(disk))
	h := smallHost(t, s, 128*mib)
	disk = append(disk, make([]byte, 232*mib)...)
	vol := h.ok("volume", "create", "--snapshot", snap, "--size", "256MiB")
	m := h.mount(vol)
	ballast := filepath.Join(h.state, "ballast")
	h.ok("hydrate", "--wait", vol)
	fillDisk(t, ballast, 24*mib)

	f := m.open(os.O_RDWR)
	p := make([]byte, mib)
	r := newRand(3)
	off := 40 * mib
	var err error
	for ; off < len(disk) && err == nil; off += len(p) {
		fill(r, p)
		if _, err = f.WriteAt(p, int64(off)); err == nil {
			copy(disk[off:], p)
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("writing to a full disk: %v, want ENOSPC", err)
	}
	failed := off - len(p)
	if failed < 50*mib {
		t.Errorf("only %d bytes were written into the room there was", failed-40*mib)
	}
	check := func() {
		t.Helper()
		got := m.read(0, len(disk))
		copy(got[failed:failed+len(p)], disk[failed:]) // failed: it may be there in part
		sameBytes(t, m.image, got, disk)
	}
	check()
	if err := f.Sync(); err != nil {
		t.Errorf("sync of what was acknowledged: %v", err)
	}
	m.kill()
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	m = m.again(vol)
	check()
	fill(r, p)
	m.write(p, int64(failed))
	copy(disk[failed:], p)
	m.equals(disk)
	sameBytes(t, "the snapshot", newHost(t, s).exported(h.ok("snapshot", "create", vol)), disk)
}
