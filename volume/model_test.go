package volume

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
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
		{2, func(*model) { s.killAll() }}, {2, func(*model) { s.cutPower() }}, {2, s.failWrite},
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

// extent picks a range of a device, never empty.
func (s *simulation) extent(size int64) (off, n int64) {
	unit := []int64{1, manifest.SectorSize, pageSize, pageSize, blockSize}[s.pick("unit", 5)]
	units := (size + unit - 1) / unit
	first := int64(s.pick("first", int(units)))
	count := 1 + int64(s.pick("count", int(min(units-first, 40))))
	off = first * unit
	n = min(count*unit, size-off)
	if s.pick("to the end", 8) == 0 {
		off = max(0, size-n)
		n = size - off
	}
	return off, n
}

func (s *simulation) read(m *model) {
	off, n := s.extent(m.v.Size())
	s.note("%s read %d+%d", m.id, off, n)
	got := make([]byte, n)
	if k, err := m.v.ReadAt(s.ctx, got, off); int64(k) != n || err != nil {
		s.Fatalf("read %d+%d: %d, %v", off, n, k, err)
	}
	if i := firstDifference(got, m.data[off:off+n]); i >= 0 {
		s.Fatalf("read %d+%d: wrong at %d", off, n, off+int64(i))
	}
}

func (s *simulation) content(n int64) []byte {
	s.seed++
	if s.pick("zeros", 6) == 0 {
		return make([]byte, n)
	}
	return noise(int(n), s.seed)
}

func (s *simulation) write(m *model) {
	off, n := s.extent(m.v.Size())
	p := s.content(n)
	s.note("%s write %d+%d", m.id, off, n)
	s.world.write(m.v, p, off)
	m.set(off, p)
}

func (s *simulation) zero(m *model) {
	off, n := s.extent(m.v.Size())
	s.note("%s zero %d+%d", m.id, off, n)
	s.must(m.v.Zero(s.ctx, off, n))
	m.set(off, make([]byte, n))
}

// failWrite writes while a call of the filesystem fails.
func (s *simulation) failWrite(m *model) {
	off, n := s.extent(m.v.Size())
	p := s.content(n)
	call := s.pick("call", 6)
	s.note("%s write %d+%d failing at call %d", m.id, off, n, call)
	s.crash.FailCall(call, errInjected)
	_, err := m.v.WriteAt(s.ctx, p, off)
	s.crash.ClearFault()
	if err == nil {
		m.set(off, p)
		return
	}
	if !errors.Is(err, errInjected) {
		s.Fatalf("write: %v, not the filesystem's error", err)
	}
	// Any part of it may be there, but nothing else.
	got := make([]byte, n)
	if _, err := m.v.ReadAt(s.ctx, got, off); err != nil {
		s.Fatalf("read after a failed write: %v", err)
	}
	for i := range got {
		if got[i] != p[i] && got[i] != m.data[off+int64(i)] {
			s.Fatalf("a failed write left a third content at %d", off+int64(i))
		}
	}
	m.set(off, p)
	m.set(off, got)
}

func (s *simulation) sync(m *model) {
	s.note("%s sync", m.id)
	s.must(m.v.Sync(s.ctx))
	m.synced()
}

func (s *simulation) takeSnapshot(m *model) {
	s.note("%s snapshot", m.id)
	outcome, err := m.v.Snapshot(s.ctx, SnapshotOptions{})
	s.must(err)
	s.committed(m, outcome, bytes.Clone(m.data))
}

func (s *simulation) committed(m *model, outcome manifest.Outcome, data []byte) {
	id := outcome.Snapshot
	s.note("  committed %s", id)
	s.snapshots[id] = data
	delete(s.cuts, id)
	m.synced()
	s.equalSnapshot(id, data, "new snapshot")
	s.equal(m.v.Device, m.data, "device after its snapshot")
	if stats := m.v.Stats(); stats.Root != id.String() {
		s.Fatalf("root is %s after committing %s", stats.Root, id)
	}
}

// failSnapshot makes a snapshot while calls of the store fail, lose their reply,
// or the caller gives up.
func (s *simulation) failSnapshot(m *model) {
	skip := s.pick("skip", 20)
	times := 1 + s.pick("times", 4)
	if s.pick("down", 3) == 0 {
		times = 0 // from then on
	}
	rule := blockstoretest.Rule{Skip: skip, Times: times}
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	fault := blockstoretest.Fault{Err: blockstore.ErrUnavailable}
	kind := s.pick("fault", 3)
	switch kind {
	case 1:
		fault = blockstoretest.Fault{LoseReply: true}
	case 2:
		fault = blockstoretest.Fault{Before: func(context.Context, blockstoretest.Call) { cancel() }}
	}
	s.note("%s snapshot with fault %d from call %d on %d times", m.id, kind, skip, times)
	s.store.Inject(rule, fault)
	data := bytes.Clone(m.data)
	var began manifest.SnapshotID
	outcome, err := m.v.Snapshot(ctx, SnapshotOptions{Cut: func(a *snapshot.Attempt) {
		began = a.ID()
		s.note("  begun %s", began)
		if s.pick("write after the cut", 2) == 0 {
			s.store.Heal()
			s.write(m)
			s.store.Inject(rule, fault)
		}
	}})
	s.store.Heal()
	if err == nil {
		if len(m.unsynced) > 0 { // what was written after the cut
			after := m.unsynced
			s.committed(m, outcome, data)
			m.unsynced = after
			return
		}
		s.committed(m, outcome, data)
		return
	}
	s.note("  failed: %v", err)
	if !began.IsZero() {
		s.cuts[began] = data
	}
	s.equal(m.v.Device, m.data, "device after a failed snapshot")
}

// resolveCuts looks what became of attempts that failed.
func (s *simulation) resolveCuts() {
	for id, data := range s.cuts {
		d, err := snapshot.New(s.mem).Describe(s.ctx, id)
		if err == nil && d.State == snapshot.Completed {
			s.note("%s was committed after all", id)
			s.snapshots[id] = data
			s.equalSnapshot(id, data, "snapshot that was taken for failed")
		}
		if err != nil || d.State != snapshot.Pending {
			delete(s.cuts, id)
		}
	}
}

func (s *simulation) warm(m *model) {
	s.note("%s hydrate", m.id)
	s.must(s.hydrate(m.v.Device))
	stats := m.v.Stats()
	if stats.HydratedBytes != stats.TotalBytes && !m.v.hasSealed() {
		s.Fatalf("%d of %d bytes are there after hydration", stats.HydratedBytes, stats.TotalBytes)
	}
}

func (s *simulation) evict(m *model) {
	block := int64(s.pick("block", int(m.v.geometry.Blocks())))
	s.note("%s evict %d", m.id, block)
	s.must(m.v.writes.clean.Evict(block))
	if m.v.base != nil && block*blockSize < m.v.base.size {
		s.must(m.v.base.Evict(block))
	}
}

func (s *simulation) seek(m *model) {
	off := int64(s.pick("off", int(m.v.Size())))
	s.note("%s seek %d", m.id, off)
	data, err := m.v.NextData(s.ctx, off)
	if err == io.EOF {
		data = m.v.Size()
	} else if err != nil {
		s.Fatalf("next data: %v", err)
	}
	if data < off || !allZero(m.data[off:data]) {
		s.Fatalf("next data at %d is %d, but there is some before", off, data)
	}
	hole, err := m.v.NextHole(s.ctx, off)
	if err != nil || hole < off || hole > m.v.Size() {
		s.Fatalf("next hole at %d is %d, %v", off, hole, err)
	}
	if hole < m.v.Size() && m.data[hole] != 0 {
		s.Fatalf("next hole at %d is %d, where there is data", off, hole)
	}
}

func allZero(p []byte) bool { return len(p) == 0 || isZero(p) }

func (s *simulation) settle(m *model) {
	s.note("%s settle", m.id)
	s.must(m.v.Settle(s.ctx))
	if m.v.hasSealed() || len(m.v.Record().Layers) != 1 {
		s.Fatalf("settled, with layers %v", m.v.Record().Layers)
	}
	s.equal(m.v.Device, m.data, "device after Settle")
	s.resolveCuts()
}

func (s *simulation) reopen(m *model) {
	s.note("%s close, open", m.id)
	s.must(m.v.Close())
	m.synced()
	m.v = s.open(m.id)
	s.equal(m.v.Device, m.data, "reopened device")
}

func (s *simulation) killAll() {
	s.note("kill")
	s.kill()
	for _, m := range s.volumes {
		m.v = s.open(m.id)
		s.equal(m.v.Device, m.data, "device after a kill")
		s.maybeSettle(m)
	}
}

func (s *simulation) maybeSettle(m *model) {
	if s.pick("settle", 2) == 0 {
		s.settle(m)
	}
}

func (s *simulation) cutPower() {
	s.note("power cut")
	s.powerCut()
	for _, m := range s.volumes {
		m.v = s.open(m.id)
		got := make([]byte, len(m.data))
		if _, err := m.v.ReadAt(s.ctx, got, 0); err != nil {
			s.Fatalf("read after a power cut: %v", err)
		}
		for at := range int64(len(got) / manifest.SectorSize) {
			sector := got[at*manifest.SectorSize:][:manifest.SectorSize]
			allowed := m.unsynced[at]
			if allowed == nil {
				allowed = [][]byte{m.sector(at)}
			}
			if !slices.ContainsFunc(allowed, func(p []byte) bool { return bytes.Equal(p, sector) }) {
				s.Fatalf("sector %d has after a power cut none of the %d contents it may have", at, len(allowed))
			}
		}
		m.data = got
		m.synced() // what the disk has now, it has
		s.maybeSettle(m)
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
