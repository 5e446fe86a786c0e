package integration

import (
	"strings"
	"testing"
)

func TestDeletedSnapshotLeavesItsVolumeAndChildrenWhole(t *testing.T) {
	t.Parallel()
	h := newHost(t, newS3Store(t))
	disk := randomBytes(1, 32*mib)
	parent := h.ok("snapshot", "create", h.image(disk))
	vol := h.ok("volume", "create", "--snapshot", parent)
	m := h.mount(vol, "--no-hydrate")

	// The pin of the volume keeps all of the deleted snapshot.
	h.ok("snapshot", "delete", parent)
	h.fails(3, []string{parent}, "snapshot", "show", parent)
	h.fails(3, []string{parent}, "snapshot", "delete", parent)
	h.fails(3, []string{parent}, "mount", parent, t.TempDir())
	h.fails(3, []string{parent}, "volume", "create", "--snapshot", parent)
	h.fails(3, []string{parent}, "snapshot", "create", "--parent", parent, h.image(disk))
	if found := h.list(); len(found) != 0 {
		t.Errorf("list: %+v", found)
	}
	if n := h.store.dataBytes(t); n < 32*mib {
		t.Fatalf("only %d bytes of the pinned snapshot are left", n)
	}
	pins := h.ok("gc")
	if !strings.Contains(pins, parent) || !strings.Contains(pins, vol) || !strings.Contains(pins, "deleted") {
		t.Errorf("gc shows the pins %q", pins)
	}
	sameBytes(t, "a cold read", m.read(20*mib, mib), disk[20*mib:21*mib])

	// Its child inherits what it did not change, and frees the rest.
	fill(newRand(2), disk[:16*mib])
	m.write(disk[:16*mib], 0)
	child := h.ok("snapshot", "create", vol)
	h.ok("gc")
	if n := h.store.dataBytes(t); n < 32*mib || n > 33*mib {
		t.Errorf("%d bytes are in the store, want the child's 32 MiB alone", n)
	}
	m.equals(disk)
	sameBytes(t, "the child", newHost(t, h.store).exported(child), disk)

	m.unmount()
	h.ok("snapshot", "delete", child)
	h.ok("volume", "delete", vol)
	h.ok("gc")
	h.store.isEmpty(t)
}

// isEmpty checks that no data and no pin is left in the store.
func (s *store) isEmpty(t testing.TB) {
	t.Helper()
	for _, folder := range []string{"data", "pins", "progress"} {
		if left := s.objects(t, folder); len(left) != 0 {
			t.Errorf("left in the store: %v", left)
		}
	}
}

func TestDeleteFreesOnlyWhatNoOtherSnapshotUses(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	vol := h.ok("volume", "create", "--size", "24MiB")
	m := h.mount(vol)
	disk := make([]byte, 24*mib)
	r := newRand(1)
	contents := make(map[string][]byte)
	var snaps []string
	for i := range 4 {
		off, n := i*4*mib, 8*mib // each overwrites half of the one before
		fill(r, disk[off:off+n])
		m.write(disk[off:off+n], int64(off))
		snap := h.ok("snapshot", "create", vol)
		snaps = append(snaps, snap)
		contents[snap] = append([]byte(nil), disk...)
	}
	for _, victim := range []int{1, 3, 0} {
		unique := h.show(snaps[victim]).UniqueBytes
		before := h.store.dataBytes(t)
		if victim == 3 {
			m.unmount()
			h.ok("volume", "delete", vol) // else its pin keeps the last one
			h.ok("gc")
		}
		h.ok("snapshot", "delete", snaps[victim])
		delete(contents, snaps[victim])
		if freed := before - h.store.dataBytes(t); freed < unique-64*kib || freed > unique+64*kib {
			t.Errorf("deleting snapshot %d freed %d bytes, and it had %d of its own", victim, freed, unique)
		}
		h.ok("snapshot", "verify", "--all")
		for snap, want := range contents {
			sameBytes(t, snap, h.exported(snap), want)
		}
	}
	h.ok("snapshot", "delete", snaps[2])
	h.store.isEmpty(t)
}

func TestDeleteOfAMountedSnapshotWaitsForItsMount(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := randomBytes(1, 12*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	m := h.mount(snap, "--no-hydrate")
	m.read(0, 1)
	h.ok("snapshot", "delete", snap)
	m.equals(disk)
	m.unmount()
	h.ok("gc")
	h.store.isEmpty(t)
}

func TestPinOfAKilledMountIsRemovedByALaterCommand(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, 4*mib)))
	m := h.mount(snap)
	m.kill()
	h.ok("unmount", m.dir) // the dead mountpoint
	if pins := h.store.objects(t, "pins"); len(pins) != 1 {
		t.Fatalf("pins after the kill: %v", pins)
	}
	h.ok("snapshot", "delete", snap)
	h.store.isEmpty(t)
}

func TestForgetRemovesThePinsOfALostHost(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	lost, h := newHost(t, s), newHost(t, s)
	snap := lost.ok("snapshot", "create", lost.image(randomBytes(1, 4*mib)))
	vol := lost.ok("volume", "create", "--snapshot", snap)

	lost.fails(4, []string{"volume delete"}, "volume", "forget", vol) // it is not lost there
	h.ok("snapshot", "delete", snap)
	if s.dataBytes(t) == 0 {
		t.Fatal("the pinned snapshot's data is gone")
	}
	if out := h.ok("volume", "forget", vol); out != snap {
		t.Errorf("forget printed %q, want %q", out, snap)
	}
	h.fails(3, []string{vol}, "volume", "forget", vol)
	h.ok("gc")
	s.isEmpty(t)

	// Should the host come back it says so, and reads no nonsense.
	r := lost.run("mount", vol, t.TempDir())
	if r.code == 0 {
		m := lost.mounted(r.args[len(r.args)-1])
		if !strings.Contains(r.stderr, "warning") {
			t.Errorf("no warning of the lost pin: %s", r)
		}
		f := m.open(0)
		if _, err := f.ReadAt(make([]byte, 100), 0); err == nil {
			t.Error("a read of what is gone succeeded")
		}
	}
}

func TestDeleteOfSeveralTellsWhichFailed(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	unknown := "snap-00000001000000001"
	r := h.run("snapshot", "delete", unknown, snap)
	if r.code != 3 || r.stdout != snap+"\n" || !strings.Contains(r.stderr, unknown) {
		t.Errorf("%s\nwant exit 3, with %s deleted and %s not found", r, snap, unknown)
	}
}
