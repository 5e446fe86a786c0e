package integration

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// A verdict is what verify --json prints, as far as tests look.
type verdict struct {
	Sampled *struct {
		Percent float64
		Seed    uint64
	}
	Blocks   int64
	Problems []struct {
		Object    string
		Snapshots []struct {
			SnapshotId string
			Ranges     []struct{ Offset, Length int64 }
		}
	}
	Snapshots      []struct{ SnapshotId string }
	Pending        []string
	Pins           []struct{ SnapshotId, Holder string }
	GarbageObjects int64
	DeadBytes      int64
	StrangeKeys    []string
}

func (h *host) verifyAll(code int, flags ...string) (v verdict) {
	h.t.Helper()
	r := h.run(append([]string{"snapshot", "verify", "--all", "--json"}, flags...)...)
	if r.code != code {
		h.t.Fatalf("%s\nwant exit %d", r, code)
	}
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil {
		h.t.Fatalf("%s\n%v", r, err)
	}
	return v
}

// harm changes an object of the store behind everybody's back, or removes it if
// change is nil.
func (s *store) harm(t testing.TB, key string, change func([]byte) []byte) {
	t.Helper()
	s.damaged()
	path := filepath.Join(s.files, key)
	data, err := os.ReadFile(path)
	if err == nil && change == nil {
		err = os.Remove(path)
	} else if err == nil {
		err = os.WriteFile(path, change(data), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// flipAt returns a change that flips a bit.
func flipAt(off int) func([]byte) []byte {
	return func(data []byte) []byte {
		data[off] ^= 1
		return data
	}
}

// Verify names each damaged object, the snapshots that need it, and where.
func TestVerifyAllNamesObjectsSnapshotsAndRanges(t *testing.T) {
	t.Parallel()
	h := newHost(t, newS3Store(t))
	disk := randomBytes(1, 8*mib)
	vol := h.ok("volume", "create", "--size", "8MiB")
	m := h.mount(vol)
	m.write(disk, 0)
	one := h.ok("snapshot", "create", vol)
	m.write(randomBytes(2, mib), 4*mib)
	two := h.ok("snapshot", "create", vol)
	m.unmount()

	if v := h.verifyAll(0); len(v.Problems) != 0 || len(v.Snapshots) != 2 || v.Blocks != 18 || len(v.Pins) != 1 || v.Pins[0].Holder != vol || len(v.StrangeKeys) != 0 {
		t.Errorf("a sound store: %+v", v)
	}
	if v := h.verifyAll(0, "--sample", "0%"); v.Sampled == nil || v.Blocks != 0 {
		t.Errorf("no sample: %+v", v)
	}
	h.fails(2, []string{"150%"}, "snapshot", "verify", "--all", "--sample", "150%")
	h.fails(2, []string{"--sample"}, "snapshot", "verify", "--all", "--repair", "--sample", "5%")
	h.fails(2, nil, "snapshot", "verify", one, "--all")

	pack := "data/" + one + "/packs/00000000"
	h.store.harm(t, pack, flipAt(mib+mib/2)) // in the third or fourth block
	v := h.verifyAll(1)
	if len(v.Problems) != 1 || v.Problems[0].Object != pack || len(v.Problems[0].Snapshots) != 2 {
		t.Fatalf("a flipped bit: %+v", v.Problems)
	}
	for _, s := range v.Problems[0].Snapshots {
		if (s.SnapshotId != one && s.SnapshotId != two) || len(s.Ranges) != 1 || s.Ranges[0].Length != 512*kib || s.Ranges[0].Offset/mib != 1 {
			t.Errorf("harm: %+v", s)
		}
	}
	for _, what := range []string{"--all", two} {
		r := h.run("snapshot", "verify", what)
		if r.code != 1 || !strings.Contains(r.stdout, two+" 1 problems\n") || !strings.Contains(r.stderr, pack+": ") || !strings.Contains(r.stderr, "+524288\n") {
			t.Errorf("%s\nwant exit 1, and the object and the range on one line", r)
		}
	}
}

// Verify writes nothing, not even a pin, unless it is to repair; and a repair on
// a host that has nothing changes nothing.
func TestVerifyAndAVainRepairChangeNothing(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	h, stranger := newHost(t, s), newHost(t, s)
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, 4*mib)))
	s.harm(t, "data/"+snap+"/packs/00000000", flipAt(mib))
	before := s.contents(t)
	stranger.run("snapshot", "verify", "--all")
	stranger.run("snapshot", "verify", snap)
	r := stranger.run("snapshot", "verify", "--all", "--repair")
	if r.code != 1 || !strings.Contains(r.stderr, "not repaired") {
		t.Errorf("%s\nwant exit 1, and why", r)
	}
	after := s.contents(t)
	for key, data := range before {
		if !bytes.Equal(after[key], data) {
			t.Errorf("%s was changed", key)
		}
	}
	if len(after) != len(before) {
		t.Errorf("%d objects, and there were %d", len(after), len(before))
	}
}

// contents returns all objects of a store.
func (s *store) contents(t testing.TB) map[string][]byte {
	t.Helper()
	all := make(map[string][]byte)
	for key := range s.objects(t, "") {
		data, err := os.ReadFile(filepath.Join(s.files, key))
		if err != nil {
			t.Fatal(err)
		}
		all[key] = data
	}
	return all
}

// What is damaged or missing comes back from the base of a mounted snapshot, and
// from a volume's clean layer and copy of the root, byte for byte; and who has
// it mounted reads on.
func TestRepairFromBasesAndVolumes(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	h, reader := newHost(t, s), newHost(t, s)
	disk := randomBytes(1, 40*mib)
	one := h.ok("snapshot", "create", h.image(disk))
	vol := h.ok("volume", "create", "--snapshot", one)
	m := h.mount(vol)
	m.waitState("hydrated", 2*time.Minute)
	fill(newRand(2), disk[4*mib:12*mib])
	m.write(disk[4*mib:12*mib], 4*mib)
	two := h.ok("snapshot", "create", vol)
	sound := s.contents(t)

	all := s.objects(t, "data")
	for key := range all {
		if filepath.Base(key) == "00000000" && strings.Contains(key, "/packs/") {
			s.harm(t, key, flipAt(mib))
		} else {
			s.harm(t, key, nil)
		}
	}
	if len(all) < 8 {
		t.Fatalf("objects: %v", all)
	}
	r := h.run("snapshot", "verify", "--all", "--repair")
	if r.code != 0 || strings.Count(r.stderr, "repaired data/") != len(all) {
		t.Fatalf("%s\nwant exit 0, and %d objects repaired", r, len(all))
	}
	for key, data := range s.contents(t) {
		if strings.HasPrefix(key, "data/") && !bytes.Equal(data, sound[key]) {
			t.Errorf("%s is not as it was", key)
		}
	}
	for _, pin := range h.verifyAll(0).Pins {
		if pin.Holder != vol {
			t.Errorf("a pin is left: %+v", pin)
		}
	}
	m.equals(disk)
	sameBytes(t, "the second, restored elsewhere", reader.exported(two), disk)
	m.unmount()
}

// A pack of which a deleted snapshot's children need a part is repaired in its
// place, and made anew only while its owner is not deleted.
func TestRepairBringsNothingOfADeletedSnapshotBack(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	h := newHost(t, s)
	disk := randomBytes(1, 8*mib)
	one := h.ok("snapshot", "create", h.image(disk))
	changed := bytes.Clone(disk)
	fill(newRand(2), changed[:2*mib])
	two := h.ok("snapshot", "create", "--parent", one, h.image(changed))
	m := h.mount(two)
	m.waitState("hydrated", time.Minute)
	h.ok("snapshot", "delete", one) // rewrites the pack
	pack := "data/" + one + "/packs/00000000"
	sound := s.contents(t)[pack]

	s.harm(t, pack, flipAt(3*mib))
	h.ok("snapshot", "verify", two, "--repair")
	if !bytes.Equal(s.contents(t)[pack], sound) {
		t.Error("the pack is not as it was")
	}
	s.harm(t, pack, nil)
	if r := h.run("snapshot", "verify", "--all", "--repair"); r.code != 1 || !strings.Contains(r.stderr, "not repaired: "+pack+": its snapshot is deleted") {
		t.Errorf("%s\nwant exit 1, and why", r)
	}
	if _, there := s.objects(t, "data")[pack]; there {
		t.Error("it was made anew")
	}
	m.unmount()
}

// A repair that was killed leaves a pin, which a later command removes.
func TestPinOfAKilledRepairIsRemoved(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, 4*mib)))
	m := h.mount(snap)
	m.waitState("hydrated", time.Minute)
	m.unmount()
	s.harm(t, "data/"+snap+"/packs/00000000", nil)
	gate.close(requests, puts("packs"))
	r := h.begin("snapshot", "verify", snap, "--repair")
	waitFor(t, "it is about to write", time.Minute, func() bool { return len(s.objects(t, "pins")) == 1 })
	if err := r.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	r.wait()
	gate.open()
	h.ok("gc")
	if pins := slices.Collect(keysOf(s.objects(t, "pins"))); len(pins) != 0 {
		t.Errorf("pins: %v", pins)
	}
	h.ok("snapshot", "verify", snap, "--repair")
}

func keysOf(m map[string]int64) func(func(string) bool) {
	return func(yield func(string) bool) {
		for key := range m {
			if !yield(key) {
				return
			}
		}
	}
}
