package integration

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
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

// patience is how long anything may take that is bound to happen, on a machine that
// is ten times slower than ours.
const patience = 2 * time.Minute

// diskUse returns the space that the files in a folder take, and in its folders.
// Some may come and go meanwhile.
func diskUse(t testing.TB, dir string) (total int64) {
	t.Helper()
	for _, n := range fileSizes(t, dir) {
		total += n
	}
	return total
}

// fileSizes returns the space that each file in a folder takes, and in its folders.
// Some may come and go meanwhile.
func fileSizes(t testing.TB, dir string) map[string]int64 {
	t.Helper()
	sizes := map[string]int64{}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		var st syscall.Stat_t
		if err == nil {
			err = syscall.Lstat(path, &st)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if st.Mode&syscall.S_IFMT == syscall.S_IFREG {
			sizes[path] = st.Blocks * 512
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return sizes
}

// bases is the folder of the host's bases.
func (h *host) bases() string { return filepath.Join(h.state, "bases") }

// watchBases measures the bases of a host all the time, until the function returned
// is called, which returns the most there ever was.
func (h *host) watchBases() (most func() int64) {
	stop, result := make(chan struct{}), make(chan int64)
	go func() {
		for most := int64(0); ; time.Sleep(5 * time.Millisecond) {
			most = max(most, h.basesAtOnce())
			select {
			case <-stop:
				if most == 0 {
					h.t.Error("the bases were never found to be the same twice")
				}
				result <- most
				return
			default:
			}
		}
	}()
	return func() int64 {
		close(stop)
		return <-result
	}
}

// basesAtOnce returns the space that all bases took at one time, or 0. Looking twice
// and finding the same tells that: what is evicted from one file while another one
// gets it, between the looks at the two, would count for both.
func (h *host) basesAtOnce() (total int64) {
	for last, tries := fileSizes(h.t, h.bases()), 0; tries < 100; tries++ {
		now := fileSizes(h.t, h.bases())
		if maps.Equal(last, now) {
			for _, n := range now {
				total += n
			}
			return total
		}
		last = now
	}
	return 0
}

// limitSlack is by how much a host may be over its limit for each daemon: a
// sixty-fourth of the limit, here less than a block, and the leaves of an index, which
// do not count.
const limitSlack = 2 * mib

func TestHydrationStopsBeforeTheDiskIsFullAndGoesOnWhenThereIsRoom(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	maker := newHost(t, s)
	disk := randomBytes(1, 160*mib)
	snap := maker.ok("snapshot", "create", maker.image(disk))
	h := smallHost(t, s, 256*mib)
	ballast := filepath.Join(h.state, "ballast")
	fillDisk(t, ballast, 96*mib)
	m := h.mount(snap)
	m.waitState("cache-full", patience)
	waitFor(t, "what fits is counted", patience, func() bool {
		n := m.status().HydratedBytes
		return n >= 40*mib && n <= 90*mib
	})
	r := h.run("hydrate", "--wait", m.dir)
	if r.code != 1 || !strings.Contains(r.stderr, "full") {
		t.Errorf("%s\nwant exit 1 and why", r)
	}
	m.equals(disk) // more than there is room for
	m.equals(disk)
	var st syscall.Statfs_t
	if err := syscall.Statfs(h.state, &st); err != nil {
		t.Fatal(err)
	}
	if st.Bavail < st.Blocks/10-mib/uint64(st.Bsize) {
		t.Errorf("%d of %d blocks of the filesystem are free, less than a tenth", st.Bavail, st.Blocks)
	}
	if st := m.status(); st.State != "cache-full" {
		t.Errorf("after reads at the limit: %+v", st)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	m.waitState("hydrated", patience)
	if st := m.status(); st.HydratedBytes != int64(len(disk)) {
		t.Errorf("with room again: %+v", st)
	}
}

func TestCacheSizeIsALimit(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := randomBytes(1, 96*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	most := h.watchBases()
	m := h.mount(snap, "--cache-size", "32MiB")
	m.waitState("cache-full", patience)
	waitFor(t, "what fits is counted", patience, func() bool { return m.status().HydratedBytes >= 28*mib })
	if st := m.status(); st.HydratedBytes > 32*mib {
		t.Errorf("status: %+v", st)
	}
	fetched := m.status().FetchedBytes
	m.equals(disk) // three times the limit
	if n := m.status().FetchedBytes - fetched; n < 60*mib {
		t.Errorf("%d bytes were fetched for reads of %d that were not cached", n, 64*mib)
	}
	if st := m.status(); st.State != "cache-full" || st.HydratedBytes > 32*mib {
		t.Errorf("after reading three times the limit: %+v", st)
	}
	if n := most(); n > 32*mib+limitSlack {
		t.Errorf("the bases had up to %d bytes", n)
	}
	if n := diskUse(t, h.bases()); n < 24*mib {
		t.Errorf("%d bytes are cached, the limit is %d", n, 32*mib)
	}
	m.equals(disk)
}

func TestUnusedBaseIsEvictedBeforeWhatIsInUse(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	before := h.ok("snapshot", "create", h.image(randomBytes(1, 24*mib)))
	m := h.mount(before)
	m.waitState("hydrated", patience)
	m.unmount()
	disk := randomBytes(2, 40*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	most := h.watchBases()
	m = h.mount(snap, "--cache-size", "48MiB")
	m.waitState("hydrated", patience)
	if n := most(); n > 48*mib+limitSlack {
		t.Errorf("the bases had up to %d bytes", n)
	}
	left, err := filepath.Glob(filepath.Join(h.bases(), "*", "snap-*"))
	if err != nil || len(left) != 1 || filepath.Base(left[0]) != snap {
		t.Errorf("bases %v are left, %v; want that in use", left, err)
	}
	m.equals(disk)
}

func TestDaemonsThatShareABaseKeepTheLimitTogether(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := randomBytes(1, 64*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	vol := h.ok("volume", "create", "--snapshot", snap)
	most := h.watchBases()
	mounts := []*mount{h.mount(snap, "--cache-size", "16MiB"), h.mount(vol, "--cache-size", "16MiB")}
	files := []*os.File{mounts[0].open(os.O_RDONLY), mounts[1].open(os.O_RDWR)}
	done := make(chan error, 2*len(files))
	for i, f := range files {
		for j := range 2 {
			go func() {
				r := newRand(uint64(10*i + j))
				p := make([]byte, mib)
				for range 80 {
					off := r.IntN(len(disk) - len(p))
					if _, err := f.ReadAt(p, int64(off)); err != nil {
						done <- err
						return
					}
					if !bytes.Equal(p, disk[off:][:len(p)]) {
						done <- fmt.Errorf("mount %d: wrong bytes at %d", i, off)
						return
					}
				}
				done <- nil
			}()
		}
	}
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if n := most(); n > 16*mib+2*limitSlack {
		t.Errorf("the base had up to %d bytes", n)
	}
	p := randomBytes(3, 3*mib)
	mounts[1].write(p, 5*mib)
	mine := append([]byte{}, disk...)
	copy(mine[5*mib:], p)
	sameBytes(t, "the snapshot of the volume", h.exported(h.ok("snapshot", "create", vol)), mine)
	mounts[0].equals(disk)
	mounts[1].equals(mine)
}

// TestWritesToAFullDiskTakeTheSpaceOfCleanBytes, and only then fail. Nothing that was
// acknowledged is lost, and when there is room again all goes on, hydration too.
func TestWritesToAFullDiskTakeTheSpaceOfCleanBytes(t *testing.T) {
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
	if n := diskUse(t, h.bases()); n < 24*mib {
		t.Fatalf("%d bytes were hydrated", n)
	}
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
	if failed < (40+44)*mib {
		t.Errorf("only %d bytes were written into 24 MiB of room, and 24 that were clean", failed-40*mib)
	}
	if n := diskUse(t, h.bases()); n > mib {
		t.Errorf("a write was refused, and %d bytes of the base are clean", n)
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
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	m.waitState("hydrated", patience)
	if st := m.status(); st.HydratedBytes != 24*mib {
		t.Errorf("with room again: %+v", st)
	}
	check()
	fill(r, p)
	m.write(p, int64(failed))
	copy(disk[failed:], p)
	m.equals(disk)
	m.kill()
	m = m.again(vol)
	m.equals(disk)
	sameBytes(t, "the snapshot", newHost(t, s).exported(h.ok("snapshot", "create", vol)), disk)
}
