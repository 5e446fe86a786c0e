package snapshot_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// lineageModel is a lineage of which everything is known.
type lineageModel struct {
	w *world

	content map[manifest.SnapshotID]*device // of every snapshot ever committed
	live    map[manifest.SnapshotID]bool
	pins    map[manifest.SnapshotID]map[string]bool
	images  map[manifest.SnapshotID]*snapshot.Image
	serial  int // of the last change made to a device
}

// readable lists the snapshots that must read as they are: live, or pinned.
func (m *lineageModel) readable() []manifest.SnapshotID {
	var ids []manifest.SnapshotID
	for id := range m.content {
		if m.live[id] || len(m.pins[id]) > 0 {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, func(a, b manifest.SnapshotID) int { return int(int64(a.Serial) - int64(b.Serial)) })
	return ids
}

func (m *lineageModel) draw(t *rapid.T) manifest.SnapshotID {
	ids := m.readable()
	if len(ids) == 0 {
		t.Skip("no snapshot to use")
	}
	return rapid.SampledFrom(ids).Draw(t, "snapshot")
}

// change draws a device that differs from another in a few blocks.
func (m *lineageModel) change(t *rapid.T, d *device) *device {
	if rapid.IntRange(0, 9).Draw(t, "grow") == 0 {
		d = d.grown(d.geometry.Size + rapid.Int64Range(1, 40).Draw(t, "blocks")*testBlock)
	}
	// Where leaves and their ends are.
	near := []int64{0, 1, 2, 1023, 1024, 2047, 2048, d.geometry.Blocks() - 1}
	for range rapid.IntRange(0, 6).Draw(t, "changes") {
		m.serial++
		block := rapid.SampledFrom(near).Draw(t, "block")
		if block >= d.geometry.Blocks() {
			continue
		}
		if rapid.IntRange(0, 3).Draw(t, "kind") == 0 {
			d = d.punched(block)
		} else {
			d = d.tiny(m.serial, block)
		}
	}
	return d
}

func (m *lineageModel) snapshot(t *rapid.T) {
	var parent *snapshot.Image
	before := newDevice(rapid.SampledFrom([]int64{512, 5 * testBlock, leafBytes + 512, 2*leafBytes - 512}).Draw(t, "size"))
	plan := m.w.plan(nil, before)
	if ids := m.readable(); len(ids) > 0 && rapid.IntRange(0, 9).Draw(t, "first") > 0 {
		id := rapid.SampledFrom(ids).Draw(t, "parent")
		parent, before = m.images[id], m.content[id]
		for holder := range m.pins[id] {
			plan.Holder.ID = holder // what lets it inherit from a deleted one
		}
	}
	d := m.change(t, before)
	plan.Parent, plan.Geometry = parent, d.geometry
	src := d.since(before)
	if parent == nil || rapid.Bool().Draw(t, "whole") {
		src = d.whole()
	}
	stored := m.w.stored()
	outcome, err := m.w.store.Create(m.w.ctx, plan, src, nil)
	if err != nil {
		t.Fatalf("snapshot: %v", err)
	}
	if grew := m.w.stored() - stored; grew != outcome.StoredBytes {
		t.Fatalf("the store grew by %d bytes, and StoredBytes is %d", grew, outcome.StoredBytes)
	}
	m.content[plan.ID], m.live[plan.ID] = d, true
	if m.images[plan.ID], err = m.w.store.Load(m.w.ctx, outcome); err != nil {
		t.Fatalf("load: %v", err)
	}
	if plan.Holder.ID != "" {
		m.pins[plan.ID] = map[string]bool{plan.Holder.ID: true}
	}
}

func (m *lineageModel) delete(t *rapid.T) {
	id := m.draw(t)
	err := m.w.store.Delete(m.w.ctx, id)
	if m.live[id] && err != nil || !m.live[id] && !errors.Is(err, snapshot.ErrNotFound) {
		t.Fatalf("delete %s, live %v: %v", id, m.live[id], err)
	}
	delete(m.live, id)
}

func (m *lineageModel) pin(t *rapid.T) {
	id := m.draw(t)
	holder := fmt.Sprintf("vol-%d", rapid.IntRange(0, 3).Draw(t, "holder"))
	if m.pins[id][holder] {
		t.Skip("it holds it already")
	}
	_, err := m.w.store.Open(m.w.ctx, id, snapshot.Holder{ID: holder})
	if m.live[id] != (err == nil) || err != nil && !errors.Is(err, snapshot.ErrNotFound) {
		t.Fatalf("pin %s, live %v: %v", id, m.live[id], err)
	}
	if err == nil {
		if m.pins[id] == nil {
			m.pins[id] = make(map[string]bool)
		}
		m.pins[id][holder] = true
	}
}

func (m *lineageModel) unpin(t *rapid.T) {
	id := m.draw(t)
	if len(m.pins[id]) == 0 {
		t.Skip("no pin")
	}
	holder := rapid.SampledFrom(slices.Sorted(maps.Keys(m.pins[id]))).Draw(t, "holder")
	if err := m.w.store.Unpin(m.w.ctx, id, holder); err != nil {
		t.Fatalf("unpin: %v", err)
	}
	delete(m.pins[id], holder)
}

func (m *lineageModel) reclaim(t *rapid.T) {
	before := m.w.stored()
	r, err := m.w.store.Reclaim(m.w.ctx, m.w.lineage)
	if err != nil {
		t.Fatalf("reclaim: %v", err)
	}
	if freed := before - m.w.stored(); freed != r.Bytes || r.Roots != len(m.readable()) {
		t.Fatalf("reclaim freed %d bytes, with %d roots, and says %+v", freed, len(m.readable()), r)
	}
}

// deleteAndMeasure deletes a snapshot that is not pinned, after a reclaim.
func (m *lineageModel) deleteAndMeasure(t *rapid.T) {
	id := m.draw(t)
	if !m.live[id] || len(m.pins[id]) > 0 {
		t.Skip("deleting it frees nothing")
	}
	m.reclaim(t)
	unique, err := m.w.store.UniqueBytes(m.w.ctx, id)
	if err != nil {
		t.Fatalf("unique bytes: %v", err)
	}
	before := m.w.stored()
	m.remove(t, id)
	m.reclaim(t)
	if freed := before - m.w.stored(); freed != unique {
		t.Fatalf("deleting %s freed %d bytes, and %d were said to be unique", id, freed, unique)
	}
}

func (m *lineageModel) remove(t *rapid.T, id manifest.SnapshotID) {
	if err := m.w.store.Delete(m.w.ctx, id); err != nil {
		t.Fatalf("delete: %v", err)
	}
	delete(m.live, id)
}

// abort uploads a snapshot and gives it up, or leaves that to a delete.
func (m *lineageModel) abort(t *rapid.T) {
	d := m.change(t, newDevice(2*leafBytes))
	a, err := m.w.store.Begin(m.w.ctx, m.w.plan(nil, d))
	if err == nil {
		err = a.Upload(m.w.ctx, d.whole())
	}
	if err == nil && rapid.Bool().Draw(t, "by a delete") {
		err = m.w.store.Delete(m.w.ctx, a.ID())
	} else if err == nil {
		err = a.Abort(m.w.ctx, "test")
	}
	if err != nil {
		t.Fatalf("abort: %v", err)
	}
}

// together makes two snapshots of a set, and commits it or not. It records what
// became of them, or leaves that to whoever needs to know.
func (m *lineageModel) together(t *rapid.T) {
	set := manifest.NewSetID()
	var members []manifest.Outcome
	var devices []*device
	for range 2 {
		plan, before := m.w.plan(nil, newDevice(0)), newDevice(leafBytes+512)
		plan.Set = set
		if ids := m.readable(); len(ids) > 0 && rapid.Bool().Draw(t, "has parent") {
			id := rapid.SampledFrom(ids).Draw(t, "parent")
			plan.Parent, before = m.images[id], m.content[id]
			for holder := range m.pins[id] {
				plan.Holder.ID = holder
			}
		}
		d := m.change(t, before)
		plan.Geometry = d.geometry
		a, err := m.w.store.Begin(m.w.ctx, plan)
		if err == nil {
			err = a.Upload(m.w.ctx, d.whole())
		}
		var o manifest.Outcome
		if err == nil {
			o, err = a.Prepare(m.w.ctx)
		}
		if err != nil {
			t.Fatalf("prepare: %v", err)
		}
		if plan.Holder.ID != "" {
			m.pins[plan.ID] = map[string]bool{plan.Holder.ID: true}
		}
		members, devices = append(members, o), append(devices, d)
	}
	var err error
	switch rapid.IntRange(0, 3).Draw(t, "end") {
	case 0:
		_, err = m.w.store.AbortSet(m.w.ctx, set, "test")
	case 1:
		err = m.w.store.Delete(m.w.ctx, members[1].Snapshot)
	case 2:
		err = m.w.store.CommitSet(m.w.ctx, set, members)
	case 3:
		if err = m.w.store.CommitSet(m.w.ctx, set, members); err == nil {
			err = m.w.store.RecordMembers(m.w.ctx, members)
		}
	}
	if err != nil {
		t.Fatalf("end of the set: %v", err)
	}
	for i, o := range members {
		img, err := m.w.store.Open(m.w.ctx, o.Snapshot, snapshot.Holder{})
		switch {
		case err == nil:
			m.content[o.Snapshot], m.live[o.Snapshot], m.images[o.Snapshot] = devices[i], true, img
		case errors.Is(err, snapshot.ErrAborted), errors.Is(err, snapshot.ErrNotFound):
			delete(m.pins, o.Snapshot)
		default:
			t.Fatalf("open: %v", err)
		}
	}
	if m.live[members[0].Snapshot] != m.live[members[1].Snapshot] {
		t.Fatalf("half a set: %v", members)
	}
}

// check reads one snapshot, of those that must be whole, every now and then.
func (m *lineageModel) check(t *rapid.T) {
	if ids := m.readable(); len(ids) > 0 && rapid.IntRange(0, 3).Draw(t, "check") == 0 {
		id := rapid.SampledFrom(ids).Draw(t, "read")
		if err := holds(m.w.ctx, m.images[id], m.content[id]); err != nil {
			t.Fatal(err)
		}
	}
}

// finish checks everything, and that nothing is left when all is deleted.
func (m *lineageModel) finish(t *rapid.T) {
	for _, id := range m.readable() {
		if err := holds(m.w.ctx, m.images[id], m.content[id]); err != nil {
			t.Fatal(err)
		}
		if !m.live[id] {
			continue
		}
		report, err := m.w.store.Verify(m.w.ctx, id, func(err error) { t.Errorf("verify: %v", err) })
		if err != nil || report.Blocks != int64(len(m.content[id].blocks)) {
			t.Fatalf("verify: %+v, %v", report, err)
		}
	}
	for id, holders := range m.pins {
		for holder := range holders {
			if err := m.w.store.Unpin(m.w.ctx, id, holder); err != nil {
				t.Fatal(err)
			}
		}
	}
	clear(m.pins)
	for id := range m.live {
		m.remove(t, id)
	}
	m.reclaim(t)
	if left := m.w.objects("data/"); len(left) > 0 {
		t.Fatalf("left: %v", left)
	}
}

// Whatever happens to the snapshots of a lineage, one after the other, each
// that is live or pinned reads as the device did, and when none is, nothing is
// left.
func TestLineageIsAsItsModel(t *testing.T) { plainAndSealed(t, testLineageIsAsItsModel) }

func testLineageIsAsItsModel(t *testing.T, newWorld func(testing.TB) *world) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		m := &lineageModel{
			w:       newWorld(t),
			content: make(map[manifest.SnapshotID]*device),
			live:    make(map[manifest.SnapshotID]bool),
			pins:    make(map[manifest.SnapshotID]map[string]bool),
			images:  make(map[manifest.SnapshotID]*snapshot.Image),
		}
		rt.Repeat(map[string]func(*rapid.T){
			"":         m.check,
			"snapshot": m.snapshot,
			"delete":   m.delete,
			"measure":  m.deleteAndMeasure,
			"pin":      m.pin,
			"unpin":    m.unpin,
			"reclaim":  m.reclaim,
			"abort":    m.abort,
			"together": m.together,
		})
		m.finish(rt)
	})
}
