package integration

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// volumeInfo is what 'volume show --json' and 'volume list --json' print.
type volumeInfo struct {
	VolumeId        string
	SnapshotId      string
	RootSnapshotId  string
	SizeBytes       int64
	PendingSnapshot string
}

func (h *host) showVolume(vol string) volumeInfo {
	h.t.Helper()
	return parse[volumeInfo](h.t, h.ok("volume", "show", "--json", vol))
}

func TestVolumeFromASnapshotReadsAndTakesWrites(t *testing.T) {
	t.Parallel()
	h := newHost(t, newS3Store(t))
	disk := diskBytes(1, 20*mib+512)
	snap := h.ok("snapshot", "create", h.image(disk))
	vol := h.ok("volume", "create", "--snapshot", snap)
	if info := h.showVolume(vol); info.SnapshotId != snap || info.RootSnapshotId != snap || info.SizeBytes != int64(len(disk)) {
		t.Errorf("volume show: %+v", info)
	}
	m := h.mount(vol)
	r, f := newRand(2), m.open(os.O_RDWR)
	for range 200 {
		off := r.IntN(len(disk))
		p := disk[off : off+min(1+r.IntN(64*kib), len(disk)-off)]
		fill(r, p)
		if _, err := f.WriteAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	m.equals(disk)
	m.unmount()
	m = m.again(vol)
	m.equals(disk)

	second := h.ok("snapshot", "create", vol)
	m.equals(disk)
	if s := m.status(); s.Root != second || s.DirtyBytes != 0 {
		t.Errorf("after the snapshot: %+v", s)
	}
	if info := h.show(second); info.ParentSnapshotId != snap || info.VolumeId != vol {
		t.Errorf("the snapshot: %+v", info)
	}
	sameBytes(t, "the export on another host", newHost(t, h.store).exported(second), disk)
}

func TestVolumeMayBeLargerThanItsSnapshot(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	disk := randomBytes(1, 5*mib+512) // ends within a block, and within a page
	snap := h.ok("snapshot", "create", h.image(disk))
	h.fails(4, []string{"smaller"}, "volume", "create", "--snapshot", snap, "--size", "1MiB")
	vol := h.ok("volume", "create", "--snapshot", snap, "--size", "13MiB")
	disk = append(disk, make([]byte, 13*mib-len(disk))...)

	m := h.mount(vol)
	m.equals(disk)
	for _, off := range []int{5 * mib, 5*mib + 4*kib, 12*mib + 100} {
		copy(disk[off:], "beyond the end of the snapshot")
		m.write(disk[off:off+30], int64(off))
	}
	m.equals(disk)
	second := h.ok("snapshot", "create", vol)
	m.unmount()
	sameBytes(t, "the export", h.exported(second), disk)
	h.ok("volume", "delete", vol)
	m = h.mount(h.ok("volume", "create", "--snapshot", second))
	m.equals(disk)
}

func TestBlankVolumeIsZerosAndNothingInTheStore(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	vol := h.ok("volume", "create", "--size", "1TiB")
	m := h.mount(vol)
	sameBytes(t, "a blank volume", m.read(700*gib, 4*mib), make([]byte, 4*mib))
	m.write([]byte("deep"), 700*gib+5)
	if n := h.store.dataBytes(t); n != 0 {
		t.Errorf("%d bytes are in the store before any snapshot", n)
	}
	snap := h.ok("snapshot", "create", vol)
	m.unmount()
	if info := h.show(snap); info.FullSnapshotSizeInBytes != blockSize || info.VolumeSize != 1024 || info.StoredBytes > 64*kib {
		t.Errorf("the snapshot: %+v", info)
	}
	other := newHost(t, h.store)
	m = other.mount(other.ok("volume", "create", "--snapshot", snap))
	if got := m.read(700*gib+5, 4); string(got) != "deep" {
		t.Errorf("restored %q", got)
	}
}

func TestEachSnapshotOfAVolumeStoresOnlyWhatChanged(t *testing.T) {
	t.Parallel()
	h := newHost(t, newS3Store(t))
	vol := h.ok("volume", "create", "--size", "64MiB")
	m := h.mount(vol)
	disk := make([]byte, 64*mib)
	r := newRand(1)
	states := []struct{ off, n int }{{0, 20 * mib}, {4 * mib, 8 * mib}, {40 * mib, 4 * mib}} // 10, 4 and 2 GiB, as it were
	var snaps []string
	var contents [][]byte
	for _, s := range states {
		before := h.store.dataBytes(t)
		fill(r, disk[s.off:s.off+s.n])
		m.write(disk[s.off:s.off+s.n], int64(s.off))
		if dirty := m.status().DirtyBytes; dirty != int64(s.n) {
			t.Errorf("%d bytes are dirty, want %d", dirty, s.n)
		}
		snaps = append(snaps, h.ok("snapshot", "create", vol))
		contents = append(contents, bytes.Clone(disk))
		if grown := h.store.dataBytes(t) - before; grown < int64(s.n) || grown > int64(s.n)+128*kib {
			t.Errorf("a snapshot of %d changed bytes added %d to the store", s.n, grown)
		}
	}
	before := h.store.dataBytes(t)
	nothing := h.ok("snapshot", "create", vol)
	if grown := h.store.dataBytes(t) - before; grown > 8*kib {
		t.Errorf("a snapshot without changes added %d bytes", grown)
	}
	m.unmount()
	other := newHost(t, h.store)
	for i, snap := range snaps {
		sameBytes(t, "export of "+snap, other.exported(snap), contents[i])
	}
	sameBytes(t, "export of the last", other.exported(nothing), disk)
}

func TestUnmountedVolumeIsSnapshottedByTheCommand(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.ok("volume", "create", "--size", "8MiB")
	disk := randomBytes(1, 8*mib)
	m := h.mount(vol)
	m.write(disk, 0)
	m.unmount()
	snap := h.ok("snapshot", "create", vol)
	sameBytes(t, "the export", h.exported(snap), disk)
	m = m.again(vol)
	m.equals(disk)
	if s := m.status(); s.State != "hydrated" || s.DirtyBytes != 0 || s.FetchedBytes > 4*kib { // a leaf
		t.Errorf("a volume that uploaded all it has fetched again: %+v", s)
	}
}

func TestVolumeOfNoUsableSizeIsRefused(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	for _, size := range []string{"0", "513", "100TiB", "-1", "lots"} {
		h.fails(2, nil, "volume", "create", "--size", size)
	}
	h.fails(2, []string{"--snapshot", "--size"}, "volume", "create")
	if out := h.ok("volume", "list"); out != "" {
		t.Errorf("the refusals left %q", out)
	}
}

func TestVolumesAreListedUntilDeleted(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	first := h.ok("volume", "create", "--size", "1MiB")
	second := h.ok("volume", "create", "--size", "2MiB")
	listed := parse[struct{ Volumes []volumeInfo }](t, h.ok("volume", "list", "--json")).Volumes
	if len(listed) != 2 || listed[0].VolumeId != first || listed[1].VolumeId != second || listed[1].SizeBytes != 2*mib {
		t.Errorf("list: %+v", listed)
	}
	m := h.mount(first)
	h.fails(4, []string{"in use"}, "volume", "delete", first)
	m.unmount()
	h.ok("volume", "delete", first)
	if out := h.ok("volume", "list"); strings.Contains(out, first) || !strings.Contains(out, second) {
		t.Errorf("list after the delete: %s", out)
	}
	if _, err := os.Stat(filepath.Join(h.state, "volumes", first)); !os.IsNotExist(err) {
		t.Errorf("the deleted volume's folder: %v", err)
	}
	h.fails(3, []string{first}, "volume", "show", first)
	h.fails(3, []string{first}, "volume", "delete", first)
	h.fails(3, []string{first}, "mount", first, t.TempDir())
	h.fails(3, []string{first}, "snapshot", "create", first)
	h.fails(3, []string{first}, "status", first)
}

func TestSecondSnapshotOfAVolumeWhileOneRunsIsRefused(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	vol := h.ok("volume", "create", "--size", "8MiB")
	m := h.mount(vol)
	disk := randomBytes(1, 8*mib)
	m.write(disk, 0)

	gate.close(requests, puts("packs"))
	create := h.begin("snapshot", "create", vol)
	gate.waitHolding(t)
	h.fails(4, []string{"being made"}, "snapshot", "create", vol)
	m.write([]byte("written meanwhile"), 3*mib) // into the next one
	gate.open()
	r := create.wait()
	if r.code != 0 {
		t.Fatal(r)
	}
	sameBytes(t, "the snapshot", h.exported(strings.TrimSpace(r.stdout)), disk)
	copy(disk[3*mib:], "written meanwhile")
	m.equals(disk)
	sameBytes(t, "the next snapshot", h.exported(h.ok("snapshot", "create", vol)), disk)
}

func TestInterruptedSnapshotGivesTheChangesBack(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	disk := diskBytes(1, 12*mib)
	vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
	m := h.mount(vol)
	fill(newRand(2), disk[2*mib:6*mib])
	m.write(disk[2*mib:6*mib], 2*mib)
	for _, hold := range []string{"packs", "outcomes"} {
		gate.close(requests, puts(hold))
		create := h.begin("snapshot", "create", vol)
		gate.waitHolding(t)
		copy(disk[4*mib:], "written after the cut")
		m.write(disk[4*mib:4*mib+100], 4*mib)
		create.signal(syscall.SIGINT)
		gate.waitLeft(t)
		gate.open()
		create.wait().failed(t, 130)
	}
	m.equals(disk)
	if found := h.list(); len(found) != 1 {
		t.Errorf("list: %+v", found)
	}
	sameBytes(t, "the next snapshot", h.exported(h.ok("snapshot", "create", vol)), disk)
}
