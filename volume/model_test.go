package volume

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A model is what a volume should hold.
type model struct {
	id   manifest.VolumeID
	v    *Volume
	data []byte

	// unsynced has, of each sector written since the last sync, all contents
	// that a power cut may leave: the synced one first.
	unsynced map[int64][][]byte
}

func (m *model) set(off int64, p []byte) {
	for at := off / manifest.SectorSize; at*manifest.SectorSize < off+int64(len(p)); at++ {
		if m.unsynced[at] == nil {
			m.unsynced[at] = [][]byte{m.sector(at)}
		}
	}
	copy(m.data[off:], p)
	for at := off / manifest.SectorSize; at*manifest.SectorSize < off+int64(len(p)); at++ {
		m.unsynced[at] = append(m.unsynced[at], m.sector(at))
	}
}

func (m *model) sector(at int64) []byte {
	return bytes.Clone(m.data[at*manifest.SectorSize:][:manifest.SectorSize])
}

// grow makes the device larger, durably.
func (m *model) grow(size int64) {
	m.data = append(m.data, make([]byte, size-int64(len(m.data)))...)
}

func (m *model) synced() { m.unsynced = make(map[int64][][]byte) }

// A simulation does random things to volumes of one process and compares.
type simulation struct {
	*world
	pick      func(what string, n int) int // a number below n
	volumes   []*model
	snapshots map[manifest.SnapshotID][]byte // committed, not deleted
	cuts      map[manifest.SnapshotID][]byte // attempts of which we do not know what became
	seed      uint64
	trace     []string
}

const maxVolumes = 2

func simulate(t tester, seed uint64, steps int, pick func(what string, n int) int) {
	s := &simulation{
		world: newWorld(t, seed), pick: pick,
		snapshots: make(map[manifest.SnapshotID][]byte), cuts: make(map[manifest.SnapshotID][]byte),
	}
	s.tester = tracing{t, &s.trace}
	defer func() { s.abandon() }() // the process that lives then
	s.addVolume(nil)
	for range steps {
		s.step()
	}
	s.conclude()
}

// tracing tells what was done when something is wrong.
type tracing struct {
	tester
	trace *[]string
}

func (t tracing) Fatalf(format string, args ...any) {
	t.tester.Helper()
	t.tester.Fatalf("%s\nafter:\n%s", fmt.Sprintf(format, args...), strings.Join(*t.trace, "\n"))
}

func (s *simulation) note(format string, args ...any) {
	s.trace = append(s.trace, fmt.Sprintf(format, args...))
}

func (s *simulation) step() {
	m := s.volumes[s.pick("volume", len(s.volumes))]
	type op struct {
		weight int
		do     func(*model)
	}
	ops := []op{
		{6, s.read}, {12, s.write}, {4, s.zero}, {3, s.sync}, {5, s.takeSnapshot}, {5, s.failSnapshot},
		{2, s.warm}, {2, s.evict}, {2, s.seek}, {1, s.reopen}, {2, s.settle}, {1, s.deleteSnapshot}, {1, s.replaceVolume},
		{2, s.fillUp}, {2, func(*model) { s.killAll() }}, {2, func(*model) { s.cutPower() }}, {2, s.failWrite}, {2, s.resize}, {1, s.failResize},
	}
	total := 0
	for _, o := range ops {
		total += o.weight
	}
	n := s.pick("op", total)
	for _, o := range ops {
		if n -= o.weight; n < 0 {
			o.do(m)
			return
		}
	}
}

func (s *simulation) addVolume(from *manifest.SnapshotID) *model {
	m := &model{}
	var size int64
	if from == nil {
		sizes := []int64{blockSize*3 + pageSize*3 + 512, blockSize * 4, 512, pageSize + 1024, blockSize + 512}
		size = sizes[s.pick("size", len(sizes))]
		m.data = make([]byte, size)
	} else {
		m.data = bytes.Clone(s.snapshots[*from])
		if s.pick("larger", 2) == 0 {
			size = int64(len(m.data)) + 512*int64(1+s.pick("sectors", 600))
			m.data = append(m.data, make([]byte, size-int64(len(m.data)))...)
		}
	}
	m.id = s.create(from, size)
	s.note("%s created from %v with %d bytes", m.id, from, len(m.data))
	m.v = s.open(m.id)
	m.synced()
	s.volumes = append(s.volumes, m)
	return m
}

// replaceVolume makes a volume of a snapshot, and deletes the oldest if there
// are too many.
func (s *simulation) replaceVolume(*model) {
	if len(s.snapshots) == 0 {
		return
	}
	id := s.pickSnapshot()
	m := s.addVolume(&id)
	s.equal(m.v.Device, m.data, "new volume")
	if len(s.volumes) > maxVolumes {
		old := s.volumes[0]
		s.volumes = s.volumes[1:]
		s.note("%s delete", old.id)
		s.must(old.v.Close())
		s.must(s.host.Delete(s.ctx, old.id))
	}
}

func (s *simulation) pickSnapshot() manifest.SnapshotID {
	ids := slices.SortedFunc(maps.Keys(s.snapshots), func(a, b manifest.SnapshotID) int { return strings.Compare(a.String(), b.String()) })
	return ids[s.pick("snapshot", len(ids))]
}

func (s *simulation) deleteSnapshot(*model) {
	if len(s.snapshots) == 0 {
		return
	}
	id := s.pickSnapshot()
	s.note("delete %s", id)
	s.remove(id)
	delete(s.snapshots, id)
}

// conclude compares everything, makes a last snapshot of each volume, and
// leaves no pin behind.
func (s *simulation) conclude() {
	s.note("conclude")
	s.resolveCuts()
	for _, m := range s.volumes {
		s.takeSnapshot(m)
		s.must(m.v.Close())
	}
	for id, data := range s.snapshots {
		s.equalSnapshot(id, data, "in the end")
	}
	for _, m := range s.volumes {
		s.must(s.host.Delete(s.ctx, m.id))
	}
	s.wantNonePending()
	err := s.mem.List(s.ctx, "pins/", func(info blockstore.Info) error {
		return fmt.Errorf("pin %s was left behind", info.Key)
	})
	s.must(err)
	for id := range s.snapshots {
		s.remove(id)
	}
	err = s.mem.List(s.ctx, "data/", func(info blockstore.Info) error {
		return fmt.Errorf("object %s was left behind", info.Key)
	})
	s.must(err)
}

var seeds = flag.Uint64("seeds", max(2, 12/thinning), "how many simulations TestVolumeIsAByteArray runs")

// TestVolumeIsAByteArray does random things to volumes: whatever happens they
// hold what was written, and their snapshots what they held.
func TestVolumeIsAByteArray(t *testing.T) {
	for seed := range *seeds {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(seed, 1))
			simulate(t, seed, 100, func(_ string, n int) int { return rng.IntN(n) })
		})
	}
}

// TestVolumeIsAByteArrayShrinking is the same with fewer steps that shrink.
func TestVolumeIsAByteArrayShrinking(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		steps := rapid.IntRange(1, 12).Draw(t, "steps")
		seed := rapid.Uint64().Draw(t, "seed")
		simulate(t, seed, steps, func(what string, n int) int { return rapid.IntRange(0, n-1).Draw(t, what) })
	})
}
