package integration

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMountedSnapshotIsTheImage(t *testing.T) {
	t.Parallel()
	disk := diskBytes(1, 37*mib+3*512)
	for name, newStore := range map[string]func(testing.TB) *store{"folder": newDirStore, "S3": newS3Store} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t)
			a, b := newHost(t, s), newHost(t, s)
			snap := a.ok("snapshot", "create", "--description", "the first", "--tag", "env=test", a.image(disk))

			m := b.mount(snap)
			t.Run("random direct reads", func(t *testing.T) {
				r, f := newRand(2), m.open(os.O_RDONLY|unix.O_DIRECT)
				for range 100 {
					off := r.Int64N(int64(len(disk))) &^ 511
					n := min(512+r.IntN(2*mib)&^511, len(disk)-int(off))
					sameBytes(t, "a direct read", readDirect(t, f, off, n), disk[off:int(off)+n])
				}
			})
			m.equals(disk)
			m.waitState("hydrated", time.Minute)
			m.equals(disk)
			m.unmount()

			if got := b.exported(snap); !bytes.Equal(got, disk) {
				sameBytes(t, "the export", got, disk)
			}
		})
	}
}

func TestMountedSnapshotRefusesWrites(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	m := h.mount(h.ok("snapshot", "create", h.image(diskBytes(1, 3*mib))))
	for _, flags := range []int{os.O_WRONLY, os.O_RDWR, os.O_RDWR | unix.O_DIRECT} {
		if _, err := os.OpenFile(m.image, flags, 0); !errors.Is(err, syscall.EROFS) {
			t.Errorf("open with flags %x: %v, want EROFS", flags, err)
		}
	}
	for what, err := range map[string]error{
		"truncate": os.Truncate(m.image, 0),
		"create":   os.WriteFile(filepath.Join(m.dir, "new"), nil, 0o644),
		"remove":   os.Remove(m.image),
	} {
		if !errors.Is(err, syscall.EROFS) {
			t.Errorf("%s: %v, want EROFS", what, err)
		}
	}
}

func TestStatusOfAMountIsAsTheContractSays(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	disk := diskBytes(3, 9*mib+512)
	snap := h.ok("snapshot", "create", h.image(disk))
	m := h.mount(snap, "--no-hydrate")

	data, err := os.ReadFile(filepath.Join(m.dir, "status.json"))
	if err != nil {
		t.Fatal(err)
	}
	fields := parse[map[string]any](t, string(data))
	for _, name := range []string{
		"id", "root", "size", "blockSize", "state", "hydratedBytes", "totalBytes", "dirtyBytes", "demandFetches", "fetchedBytes", "etaSeconds", "errors",
	} {
		if _, ok := fields[name]; !ok {
			t.Errorf("status.json has no %q:\n%s", name, data)
		}
	}
	total := int64(0)
	for off := 0; off < len(disk); off += blockSize {
		if len(bytes.Trim(disk[off:min(off+blockSize, len(disk))], "\x00")) > 0 {
			total += blockSize
		}
	}
	s := m.status()
	if s.ID != snap || s.Root != snap || s.Size != int64(len(disk)) || s.BlockSize != blockSize || s.State != "paused" ||
		s.HydratedBytes != 0 || s.TotalBytes != total || s.DirtyBytes != 0 || s.DemandFetches != 0 || len(s.Errors) != 0 {
		t.Errorf("cold: status is %+v, want a total of %d", s, total)
	}
	m.read(0, 1)
	waitFor(t, "what was read is counted", 10*time.Second, func() bool { return m.status().HydratedBytes > 0 })
	if s := m.status(); s.DemandFetches != 1 || s.HydratedBytes > total || s.State != "paused" {
		t.Errorf("after one read: status is %+v", s)
	}
	h.ok("hydrate", "--wait", m.dir)
	if s := m.status(); s.State != "hydrated" || s.HydratedBytes != total || s.ETASeconds == nil || *s.ETASeconds != 0 {
		t.Errorf("hydrated: status is %+v, want %d bytes", s, total)
	}
	if s := parse[status](t, h.ok("status", "--json", m.dir)); s.ID != snap || s.State != "hydrated" || s.PID != m.pid {
		t.Errorf("'status --json DIR' is %+v", s)
	}
	all := parse[struct{ Volumes []status }](t, h.ok("status", "--json")).Volumes
	if len(all) != 1 || all[0].ID != snap {
		t.Errorf("'status --json' is %+v", all)
	}
}

func TestSnapshotDescribesItself(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	disk := randomBytes(1, 3*mib)
	before := time.Now().Add(-time.Second)
	first := h.ok("snapshot", "create", "--description", "nightly", "--tag", "env=test", "--tag", "a=b=c", h.image(disk))
	copy(disk[mib:], "changed")
	second := h.ok("snapshot", "create", "--parent", first, h.image(disk))

	one, two := h.show(first), h.show(second)
	if one.SnapshotId != first || one.State != "completed" || one.Progress != "100%" || one.Description != "nightly" ||
		one.VolumeSize != 1 || one.VolumeSizeBytes != 3*mib || one.FullSnapshotSizeInBytes != 3*mib || one.Encrypted ||
		one.ParentSnapshotId != "" || one.StartTime.Before(before) || one.CompletionTime == nil || one.CompletionTime.Before(one.StartTime) {
		t.Errorf("the first: %+v", one)
	}
	if len(one.Tags) != 2 || one.Tags[0].Key != "a" || one.Tags[0].Value != "b=c" || one.Tags[1].Key != "env" {
		t.Errorf("tags: %+v", one.Tags)
	}
	// One block of random bytes does not compress; the rest is overhead.
	if two.ParentSnapshotId != first || two.StoredBytes < blockSize || two.StoredBytes > blockSize+64*kib {
		t.Errorf("the second: %+v", two)
	}
	if one.UniqueBytes < blockSize || one.UniqueBytes > blockSize+128*kib || two.UniqueBytes < blockSize || two.UniqueBytes > blockSize+128*kib {
		t.Errorf("unique bytes are %d and %d, want about a block each", one.UniqueBytes, two.UniqueBytes)
	}
	listed := h.list()
	if len(listed) != 2 || listed[0].SnapshotId != first || listed[1].SnapshotId != second {
		t.Errorf("list: %+v", listed)
	}
	if got, want := h.ok("snapshot", "diff", first, second), "1048576 524288"; got != want {
		t.Errorf("diff: %q, want %q", got, want)
	}

	h.ok("snapshot", "tag", first, "env=prod", "--remove", "a")
	if tags := h.show(first).Tags; len(tags) != 1 || tags[0].Value != "prod" {
		t.Errorf("tags after the change: %+v", tags)
	}
}

func TestSnapshotOfAnySizeRestores(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	for _, size := range []int{0, 512, pageSize - 512, pageSize + 512, blockSize, blockSize + 512, 2*blockSize - 512, 3 * mib} {
		t.Run(strconv.Itoa(size), func(t *testing.T) {
			h := h.in(t)
			disk := randomBytes(uint64(size), size)
			snap := h.ok("snapshot", "create", h.image(disk))
			sameBytes(t, "the export", h.exported(snap), disk)
			m := h.mount(snap)
			m.equals(disk)
			m.unmount()
		})
	}
}

func TestSnapshotOfTheLargestSparseFileTakesSeconds(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	const size = 16<<40 - pageSize // the most that ext4 can
	path := sparse(t, filepath.Join(h.dir, "huge.img"), size)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	want := map[int64][]byte{0: nil, 5 << 40: nil, 5<<40 + 700*mib: nil, size - pageSize: nil}
	for off := range want {
		want[off] = randomBytes(uint64(off), pageSize)
		if _, err := f.WriteAt(want[off], off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}

	start := time.Now()
	snap := h.ok("snapshot", "create", path)
	m := h.mount(snap)
	for off, page := range want {
		sameBytes(t, "a page at "+strconv.FormatInt(off, 10), m.read(off, pageSize), page)
	}
	sameBytes(t, "a hole", m.read(9<<40, pageSize), make([]byte, pageSize))
	img := m.open(os.O_RDONLY)
	if off, err := unix.Seek(int(img.Fd()), 6<<40, unix.SEEK_DATA); err != nil || off != (size-1)&^(blockSize-1) {
		t.Errorf("the data after 6 TiB is at %d: %v", off, err)
	}
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}
	m.unmount()
	file := h.export(snap)
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("it took %s", took)
	}
	if n := allocated(t, file); n > 8*blockSize {
		t.Errorf("the export takes %d bytes on disk", n)
	}
	for off, page := range want {
		sameBytes(t, "a page of the export", readAt(t, file, off, pageSize), page)
	}
}

// readAt reads n bytes of a file.
func readAt(t testing.TB, path string, off int64, n int) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, n)
	if _, err := io.ReadFull(io.NewSectionReader(f, off, int64(n)), p); err != nil {
		t.Fatalf("read %s at %d: %v", path, off, err)
	}
	return p
}

func TestImageThatIsNotInSectorsIsRefused(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	h.fails(1, []string{"512"}, "snapshot", "create", h.image(make([]byte, 1000)))
	if found := h.list("--all"); len(found) != 0 {
		t.Errorf("it left %+v", found)
	}
}

func TestImageSnapshotWithParentStoresOnlyWhatDiffers(t *testing.T) {
	t.Parallel()
	h := newHost(t, newS3Store(t))
	disk := randomBytes(1, 24*mib)
	first := h.ok("snapshot", "create", h.image(disk))
	stored := h.store.dataBytes(t)

	r := newRand(5)
	for _, block := range []int{3, 17, 40} {
		fill(r, disk[block*blockSize+1000:block*blockSize+2000])
	}
	clear(disk[20*blockSize : 22*blockSize]) // becomes a hole, which costs nothing
	second := h.ok("snapshot", "create", "--parent", first, h.image(disk))
	if grown := h.store.dataBytes(t) - stored; grown < 3*blockSize || grown > 3*blockSize+128*kib {
		t.Errorf("the second snapshot added %d bytes to the store, want three blocks", grown)
	}
	if info := h.show(second); info.StoredBytes < 3*blockSize || info.StoredBytes > 3*blockSize+64*kib || info.FullSnapshotSizeInBytes != 23*mib {
		t.Errorf("the second snapshot: %+v", info)
	}
	sameBytes(t, "the export of the second", h.exported(second), disk)

	grown := append(disk, randomBytes(6, mib+512)...) // a larger image of the same lineage
	third := h.ok("snapshot", "create", "--parent", second, h.image(grown))
	if info := h.show(third); info.StoredBytes > 3*blockSize+64*kib {
		t.Errorf("the third snapshot stored %d bytes", info.StoredBytes)
	}
	sameBytes(t, "the export of the third", h.exported(third), grown)
	var lines []string
	for line := range strings.Lines(h.ok("snapshot", "diff", second, third)) {
		lines = append(lines, strings.TrimSpace(line))
	}
	if len(lines) != 1 || !strings.HasPrefix(lines[0], strconv.Itoa(24*mib)+" ") {
		t.Errorf("diff of the grown image: %q", lines)
	}
}
