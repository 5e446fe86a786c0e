package volume

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// What a simulation does, each time to one of its volumes.

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
			if s.pick("grow after the cut", 2) == 0 {
				s.resize(m)
			}
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
		d, err := storeIn(s.mem).Describe(s.ctx, id)
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

// fillUp changes how many clean bytes the host may have: none, some blocks, or any.
func (s *simulation) fillUp(*model) {
	limit := int64(noLimit)
	if blocks := s.pick("limit", 8); blocks < 6 {
		limit = 1 + int64(blocks)*blockSize
	}
	s.setLimit(limit)
	s.note("limit: %d", limit)
}

func (s *simulation) warm(m *model) {
	s.note("%s hydrate", m.id)
	err := s.hydrate(m.v.Device)
	if s.limit != noLimit && errors.Is(err, ErrFull) {
		return
	}
	s.must(err)
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
	if data < off || !manifest.IsZero(m.data[off:data]) {
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
	s.sized(m)
	s.equal(m.v.Device, m.data, "reopened device")
}

func (s *simulation) killAll() {
	s.note("kill")
	s.kill()
	for _, m := range s.volumes {
		m.v = s.open(m.id)
		s.sized(m)
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
		s.sized(m)
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

// larger picks what a device grows to.
func (s *simulation) larger(size int64) int64 {
	unit := []int64{manifest.SectorSize, pageSize, blockSize}[s.pick("unit to grow by", 3)]
	return size + unit*int64(s.pick("units to grow by", 4))
}

// largest bounds what devices grow to.
const largest = 8 * blockSize

func (s *simulation) resize(m *model) {
	size := s.larger(m.v.Size())
	if size > largest {
		return
	}
	s.note("%s resize to %d", m.id, size)
	s.must(m.v.Resize(size))
	m.grow(size)
	s.sized(m)
	s.equal(m.v.Device, m.data, "device that has grown")
}

// failResize resizes while a call of the filesystem fails, and opens the volume
// again: some of those calls lose durability.
func (s *simulation) failResize(m *model) {
	size := s.larger(m.v.Size())
	if size > largest {
		return
	}
	s.sync(m)
	call := s.pick("call", 12)
	s.note("%s resize to %d failing at call %d", m.id, size, call)
	s.crash.FailCall(call, errInjected)
	err := m.v.Resize(size)
	s.crash.ClearFault()
	if err != nil && !errors.Is(err, errInjected) {
		s.Fatalf("resize: %v, not the filesystem's error", err)
	}
	if err != nil {
		s.sized(m)
		s.equal(m.v.Device, m.data, "device that could not grow")
	}
	_ = m.v.Close() // may not be able to make all durable
	m.v = s.open(m.id)
	if err == nil || m.v.Size() == size {
		m.grow(size)
	}
	s.sized(m)
	s.equal(m.v.Device, m.data, "reopened after a resize")
}

func (s *simulation) sized(m *model) {
	if got, recorded := m.v.Size(), m.v.Record().Size; got != int64(len(m.data)) || recorded < got {
		s.Fatalf("%s has %d bytes, and %d on record, want %d", m.id, got, recorded, len(m.data))
	}
}
