package integration

import (
	"bytes"
	"fmt"
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

	h.takeAllAway(m, vol)
}

// takeAllAway unmounts a volume, deletes it and all snapshots of the store, and
// checks that nothing of them is left there.
func (h *host) takeAllAway(m *mount, vol string) {
	h.t.Helper()
	m.unmount()
	for _, info := range h.list() {
		h.ok("snapshot", "delete", info.SnapshotId)
	}
	h.ok("volume", "delete", vol)
	h.ok("gc")
	h.store.isEmpty(h.t)
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

// States of ten units, then four changed, then two added store sixteen, and
// deleting the first frees four: what is stored is what lies in the bucket.
func TestStatesShareWhatTheyHaveInCommonAndDeleteFreesTheRest(t *testing.T) {
	t.Parallel()
	const unit = 8 * mib
	about := func(what string, n int64, units int64) {
		t.Helper()
		if want := units * unit; n < want*97/100 || n > want*103/100 {
			t.Errorf("%s is %.2f units, want %d", what, float64(n)/unit, units)
		}
	}
	s := newS3Store(t)
	h, other := newHost(t, s), newHost(t, s)
	vol := h.ok("volume", "create", "--size", "96MiB")
	m := h.mount(vol)
	disk := make([]byte, 12*unit)
	r := newRand(9)
	var snaps []string
	var states [][]byte
	for _, change := range [][2]int{{0, 10}, {3, 7}, {10, 12}} {
		from, to := change[0]*unit, change[1]*unit
		fill(r, disk[from:to])
		m.write(disk[from:to], int64(from))
		snaps = append(snaps, h.ok("snapshot", "create", vol))
		states = append(states, bytes.Clone(disk))
	}
	about("what three states store", s.dataBytes(t), 16)
	for i, units := range []int64{10, 4, 2} {
		about(fmt.Sprintf("what state %d stored", i), h.show(snaps[i]).StoredBytes, units)
	}
	for i, units := range []int64{4, 0, 2} {
		if unique := h.show(snaps[i]).UniqueBytes; units > 0 {
			about(fmt.Sprintf("what only state %d uses", i), unique, units)
		} else if unique > 256*kib {
			t.Errorf("only state %d uses %d bytes", i, unique)
		}
	}

	// Who reads through the packs before they are rewritten has hints that do
	// not fit afterwards: the leaves of the second state, and of a volume of the
	// first, are known by one read each.
	reader := other.mount(snaps[1], "--no-hydrate")
	reader.read(0, 1)
	restored := other.ok("volume", "create", "--snapshot", snaps[0])
	held := other.mount(restored, "--no-hydrate")
	held.read(0, 1)

	before := s.dataBytes(t)
	h.ok("snapshot", "delete", snaps[0])
	h.fails(3, []string{snaps[0]}, "snapshot", "delete", snaps[0])
	if freed := before - s.dataBytes(t); freed > 64*kib {
		t.Errorf("%d bytes were freed under a volume that reads them", freed)
	}
	sameBytes(t, "cold, of the deleted state", held.read(4*unit, unit), states[0][4*unit:5*unit])

	// A snapshot of that volume inherits what it has not changed.
	fill(r, states[0][:unit])
	held.write(states[0][:unit], 0)
	child := other.ok("snapshot", "create", restored)
	about("what the child stored", other.show(child).StoredBytes, 1)
	about("what only the child uses", other.show(child).UniqueBytes, 5)
	held.equals(states[0])
	held.unmount()
	other.ok("volume", "delete", restored)
	sameBytes(t, "the child", h.exported(child), states[0])
	before = s.dataBytes(t)
	h.ok("snapshot", "delete", child)
	about("what deleting the child of the first state freed", before-s.dataBytes(t), 5)
	about("what is left", s.dataBytes(t), 12)

	// All of it cold, by hints from before.
	reader.equals(states[1])
	sameBytes(t, "the second state", h.exported(snaps[1]), states[1])
	sameBytes(t, "the third state", h.exported(snaps[2]), states[2])
	m.equals(disk)
	m.unmount()
	reader.unmount()
	h.ok("volume", "delete", vol)
	before = s.dataBytes(t)
	h.ok("snapshot", "delete", snaps[2])
	about("what deleting the third state freed", before-s.dataBytes(t), 2)
	h.ok("snapshot", "delete", snaps[1])
	s.isEmpty(t)
}
