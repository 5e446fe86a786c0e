package snapshot_test

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A museum is a store with a record and an object in every state there is.
type museum struct {
	*world
	base, child, kept, pinned, swept, pending, aborted, halfDead manifest.SnapshotID
}

func newMuseum(t testing.TB, newWorld func(testing.TB) *world) *museum {
	m := &museum{world: newWorld(t)}
	d := newDevice(leafBytes+20*testBlock).random(1, 0, 1, 2).tiny(1, 3, 4, 5, 1030)
	base := m.create(nil, nil, d)
	d2 := d.tiny(2, 3, 1031).random(2, 1)
	child := m.create(base, d, d2)
	if err := m.store.SetTags(m.ctx, child.ID(), map[string]string{"a": "b"}, nil); err != nil {
		t.Fatal(err)
	}
	m.base, m.child = base.ID(), child.ID()

	// Deleted, with a child that keeps a part of its packs: rewritten.
	k := newDevice(10*testBlock).tiny(7, span(0, 6)...)
	halfDead := m.create(nil, nil, k)
	kept := m.create(halfDead, k, k.tiny(8, 0, 1))
	m.halfDead, m.kept = halfDead.ID(), kept.ID()
	swept := m.create(nil, nil, k)
	m.swept = swept.ID()
	m.delete(m.halfDead, m.swept)
	m.reclaim()

	// Deleted and pinned.
	pinned := m.create(nil, nil, newDevice(5*testBlock).tiny(9, 0, 4))
	m.pinned = pinned.ID()
	if err := m.store.Pin(m.ctx, m.pinned, snapshot.Holder{ID: "vol-1", Host: "here"}); err != nil {
		t.Fatal(err)
	}
	m.delete(m.pinned)

	// Under way, and given up with what it uploaded.
	m.pending = m.begin(m.plan(child, d2), d2, d2.tiny(3, 9)).ID()
	m.put(manifest.ProgressKey(m.pending), manifest.Progress{Version: 1, Snapshot: m.pending, Percent: 3, Heartbeat: base.Outcome.End})
	plan := m.plan(base, d)
	m.aborted = m.begin(plan, d, d.tiny(4, 9)).ID()
	if _, _, err := m.store.Resolve(m.ctx, m.aborted, plan.Nonce, "a test"); err != nil {
		t.Fatal(err)
	}
	return m
}

// check verifies all of it, as it is when the pin is older than the tombstone.
func (m *museum) check(share float64) *snapshot.Report {
	m.t.Helper()
	report, err := m.tryCheck(share)
	if err != nil {
		m.t.Fatal(err)
	}
	return report
}

// tryCheck is check where the key may not be had.
func (m *museum) tryCheck(share float64) (*snapshot.Report, error) {
	return storeIn(pinnedLongAgo{m.faults}).Check(m.ctx, snapshot.Check{Share: share, Seed: 1})
}

// pinnedLongAgo is a store in which an hour has passed since anything was pinned.
type pinnedLongAgo struct{ blockstore.Store }

func (s pinnedLongAgo) List(ctx context.Context, prefix string, fn func(blockstore.Info) error) error {
	return s.Store.List(ctx, prefix, func(info blockstore.Info) error {
		if isOf(manifest.KindPins, info.Key) {
			info.Age += time.Hour
		}
		return fn(info)
	})
}

// A sound store is found sound, whatever states its snapshots are in, and what
// is in it besides is told.
func TestCheckOfASoundStoreRaisesNoAlarm(t *testing.T) {
	plainAndSealed(t, testCheckOfASoundStoreRaisesNoAlarm)
}

func testCheckOfASoundStoreRaisesNoAlarm(t *testing.T, newWorld func(testing.TB) *world) {
	m := newMuseum(t, newWorld)
	for _, share := range []float64{0, 0.3, 1} {
		report := m.check(share)
		if report.Problems != 0 || report.Strange.Objects != 0 {
			t.Errorf("share %v: %v, strange %v", share, report.Findings, report.StrangeKeys)
		}
		if !slices.Equal(report.Pending, []manifest.SnapshotID{m.pending}) {
			t.Errorf("pending: %v", report.Pending)
		}
		if len(report.Pins) != 1 || report.Pins[0].Holder != "vol-1" || report.Pins[0].Host != "here" || !report.Pins[0].Deleted {
			t.Errorf("pins: %+v", report.Pins)
		}
		var kept []manifest.SnapshotID
		for _, v := range report.Snapshots {
			if v.Deleted {
				kept = append(kept, v.Snapshot)
			}
		}
		if len(report.Snapshots) != 4 || !slices.Equal(kept, []manifest.SnapshotID{m.pinned}) {
			t.Errorf("snapshots: %+v", report.Snapshots)
		}
	}
}

// What is told to be garbage is what reclaim then frees.
func TestCheckForetellsWhatReclaimFrees(t *testing.T) {
	plainAndSealed(t, testCheckForetellsWhatReclaimFrees)
}

func testCheckForetellsWhatReclaimFrees(t *testing.T, newWorld func(testing.TB) *world) {
	m := newMuseum(t, newWorld)
	m.delete(m.base) // its child needs most of it
	told := m.check(0)
	r := m.reclaim()
	if told.Garbage.Objects != int64(r.Objects) || r.Rewritten == 0 {
		t.Errorf("told of %+v, and reclaim did %+v", told.Garbage, r)
	}
	// A table entry of a dead slot behind the last live one counts as dead, and stays.
	if over := told.Garbage.Bytes + told.DeadBytes - r.Bytes; over < 0 || over > 24*int64(r.Rewritten)*manifest.MaxPackSlots {
		t.Errorf("told of %d bytes and %d dead ones, and reclaim freed %d", told.Garbage.Bytes, told.DeadBytes, r.Bytes)
	}
	if left := m.check(1); left.Garbage.Objects != 0 || left.DeadBytes > 24*manifest.MaxPackSlots || left.Problems != 0 {
		t.Errorf("left: %+v", left)
	}
}

// Objects that no rule explains are told, and are no damage.
func TestCheckTellsOfStrangeObjects(t *testing.T) {
	m := newMuseum(t, newWorld)
	never := manifest.NewSnapshotID(m.lineage)
	elsewhere := manifest.NewSnapshotID(m.lineage ^ 1)
	strange := []string{
		"readme", "data/readme", "data/" + m.base.String() + "/more", manifest.PackKey(m.base, 77), "intents/x", "pins/" + m.base.String() + "/UPPER",
		manifest.PackKey(never, 0), manifest.LeavesKey(elsewhere, 0), manifest.RootKey(elsewhere), "outcomes/snap-1", "lineages/xyz",
	}
	for _, key := range strange {
		m.overwrite(key, "?")
	}
	m.overwrite("events/1-2", "reserved")
	report := m.check(1)
	slices.Sort(strange)
	if !slices.Equal(report.StrangeKeys, strange) || report.Strange.Objects != int64(len(strange)) {
		t.Errorf("strange: %v, want %v", report.StrangeKeys, strange)
	}
	for _, f := range report.Findings {
		// The lineage has objects, and no record; and packs are counted.
		if f.Object != manifest.LineageKey(elsewhere.Lineage) && f.Object != manifest.OutcomeKey(m.base) {
			t.Errorf("found %v", f)
		}
	}
}

// Of each lineage the pending snapshots are told, though several are looked at at
// once.
func TestCheckTellsOfThePendingOfAllLineages(t *testing.T) {
	w := newWorld(t)
	d := newDevice(2*testBlock).tiny(1, 0)
	var pending []manifest.SnapshotID
	for range 32 {
		lineage, err := w.store.CreateLineage(w.ctx, testBlock, "")
		if err != nil {
			t.Fatal(err)
		}
		plan := snapshot.NewPlan(lineage.ID)
		plan.Geometry = d.geometry
		pending = append(pending, w.begin(plan, nil, d).ID())
	}
	slices.SortFunc(pending, func(a, b manifest.SnapshotID) int { return strings.Compare(a.String(), b.String()) })
	report, err := w.store.Check(w.ctx, snapshot.Check{})
	if err != nil || !slices.Equal(report.Pending, pending) {
		t.Errorf("told of %v (%v), want %v", report.Pending, err, pending)
	}
}

// What an outcome copied from its intent is compared with it, field by field.
func TestCheckComparesIntentsWithOutcomes(t *testing.T) {
	w := newWorld(t)
	d := newDevice(4*testBlock).tiny(1, 0, 1)
	parent := w.create(nil, nil, d)
	plan := w.plan(parent, d)
	plan.Owner, plan.Description, plan.Tags = "someone", "of a test", map[string]string{"a": "b"}
	plan.Volume, plan.CopiedFrom = manifest.NewVolumeID(), &manifest.CopySource{Store: manifest.NewNonce(), Snapshot: manifest.NewSnapshotID(w.lineage)}
	outcome, err := w.store.Create(w.ctx, plan, d.since(d), nil)
	if err != nil {
		t.Fatal(err)
	}
	id := outcome.Snapshot
	key := manifest.IntentKey(id)
	good := w.contents()[key]
	for field, change := range map[string]func(*manifest.Intent){
		"nonce":         func(i *manifest.Intent) { i.Nonce = manifest.NewNonce() },
		"parent":        func(i *manifest.Intent) { i.Parent = nil },
		"volume":        func(i *manifest.Intent) { i.Volume = "" },
		"size":          func(i *manifest.Intent) { i.Size += manifest.SectorSize },
		"block size":    func(i *manifest.Intent) { i.BlockSize *= 2 },
		"start":         func(i *manifest.Intent) { i.Start = i.Start.Add(time.Second) },
		"owner":         func(i *manifest.Intent) { i.Owner = "another" },
		"description":   func(i *manifest.Intent) { i.Description = "" },
		"tags":          func(i *manifest.Intent) { i.Tags = nil },
		"source":        func(i *manifest.Intent) { i.CopiedFrom.Store = manifest.NewNonce() },
		"source at all": func(i *manifest.Intent) { i.CopiedFrom = nil },
		"set":           func(i *manifest.Intent) { i.Set = manifest.NewSetID() },
		"nothing":       func(*manifest.Intent) {},
	} {
		intent, err := manifest.DecodeRecord[manifest.Intent](good)
		if err != nil {
			t.Fatal(err)
		}
		change(&intent)
		w.put(key, intent)
		report, err := w.reopen().Check(w.ctx, snapshot.Check{})
		if err != nil {
			t.Fatal(err)
		}
		found := slices.ContainsFunc(report.Findings, func(f snapshot.Finding) bool { return f.Object == key })
		if found != (field != "nothing") {
			t.Errorf("another %s: %v", field, report.Findings)
		}
	}
}

// immaterial are the fields of records that nothing depends on, by kind: they
// are for people, or nobody else knows them.
var immaterial = map[string][]string{
	"store.json":              {"id"},
	manifest.KindLineages:     {"created"},
	manifest.KindOutcomes:     {"end", "storedBytes"},
	manifest.KindTombstones:   {"deleted"},
	manifest.KindPins:         {"host", "mounted", "unchecked"},
	manifest.KindMeta:         {"tags", "lock", "bin", "shares"},
	manifest.KindProgress:     {"percent", "heartbeat"},
	"pending intents":         {"size", "nonce", "volume", "start", "description", "tags", "parent"},
	"aborted " + "outcomes":   {"end", "why", "nonce", "parent", "volume", "size", "blockSize", "start", "description", "tags"},
	"intents of aborted ones": {"size", "nonce", "volume", "start", "description", "tags", "parent", "blockSize"},
}

// material returns what of a record matters, for comparing.
func (m *museum) material(key string, data []byte) any {
	kind, _, _ := strings.Cut(key, "/")
	fields := immaterial[kind]
	switch key {
	case manifest.IntentKey(m.pending):
		fields = immaterial["pending intents"]
	case manifest.IntentKey(m.aborted):
		fields = immaterial["intents of aborted ones"]
	case manifest.OutcomeKey(m.aborted):
		fields = immaterial["aborted outcomes"]
	}
	record := map[string]func([]byte) (any, error){
		"store.json":            decoded[manifest.StoreRecord],
		manifest.KindLineages:   decoded[manifest.LineageRecord],
		manifest.KindIntents:    decoded[manifest.Intent],
		manifest.KindOutcomes:   decoded[manifest.Outcome],
		manifest.KindTombstones: decoded[manifest.Tombstone],
		manifest.KindPins:       decoded[manifest.Pin],
		manifest.KindMeta:       decoded[manifest.Meta],
		manifest.KindProgress:   decoded[manifest.Progress],
	}[kind]
	v, err := record(data)
	if err != nil {
		return err.Error()
	}
	encoded, err := json.Marshal(v)
	if err != nil {
		m.t.Fatal(err)
	}
	var all map[string]any
	if err := json.Unmarshal(encoded, &all); err != nil {
		m.t.Fatal(err)
	}
	for _, field := range fields {
		delete(all, field)
	}
	return all
}

func decoded[T any](data []byte) (any, error) { return manifest.DecodeRecord[T](data) }

// matters reports whether anything depends on an object: not on what was
// uploaded in vain, or is still being uploaded, nor on the records of what is
// deleted and not needed.
func (m *museum) matters(key string) bool {
	for _, id := range []manifest.SnapshotID{m.swept, m.halfDead} {
		if key == manifest.IntentKey(id) || key == manifest.OutcomeKey(id) {
			return false
		}
	}
	for _, id := range []manifest.SnapshotID{m.pending, m.aborted} {
		if strings.HasPrefix(key, manifest.DataPrefix(id)) {
			return false
		}
	}
	return true
}

// Every byte on which a byte of a snapshot depends, or a decision, is guarded:
// flipped, it is found, and the object named.
func TestCheckFindsEveryFlippedByte(t *testing.T) { plainAndSealed(t, testCheckFindsEveryFlippedByte) }

func testCheckFindsEveryFlippedByte(t *testing.T, newWorld func(testing.TB) *world) {
	t.Parallel()
	m := newMuseum(t, newWorld)
	rng := rand.New(rand.NewPCG(1, 1))
	flips := 4
	if stressed() {
		flips = 1000
	}
	objects := m.contents()
	for _, key := range slices.Sorted(maps.Keys(objects)) {
		good := objects[key]
		isData := strings.HasPrefix(key, "data/")
		places := rng.Perm(len(good))[:min(flips, len(good))]
		if isData { // headers and tables are small beside the data
			for range flips {
				places = append(places, rng.IntN(min(len(good), 200)))
			}
		}
		for _, at := range places {
			bad := bytes.Clone(good)
			bad[at] ^= 1 << rng.IntN(8)
			m.overwrite(key, string(bad))
			report, err := m.tryCheck(1)
			if err != nil && key == manifest.LineageKey(m.lineage) && strings.Contains(err.Error(), m.lineage.String()) {
				continue // the key cannot be had any more, which is told
			}
			if err != nil {
				t.Fatalf("%s, byte %d: %v", key, at, err)
			}
			found := report.Findings
			named := slices.ContainsFunc(found, func(f snapshot.Finding) bool { return strings.HasPrefix(f.Object, key) })
			switch {
			case isData && m.matters(key) && !named, isData && !m.matters(key) && len(found) > 0:
				t.Errorf("%s, byte %d of %d: %v", key, at, len(good), found)
			case !isData && m.matters(key) && len(found) == 0 && !reflect.DeepEqual(m.material(key, bad), m.material(key, good)):
				t.Errorf("%s, byte %d: nothing found\n%s\n%s", key, at, good, bad)
			}
		}
		m.overwrite(key, string(good))
	}
}

// So is every object: removed, cut off anywhere, or replaced by another of its
// kind.
func TestCheckFindsEveryObjectThatIsMissingShortOrAnother(t *testing.T) {
	plainAndSealed(t, testCheckFindsEveryObjectThatIsMissingShortOrAnother)
}

func testCheckFindsEveryObjectThatIsMissingShortOrAnother(t *testing.T, newWorld func(testing.TB) *world) {
	t.Parallel()
	m := newMuseum(t, newWorld)
	rng := rand.New(rand.NewPCG(2, 2))
	objects := m.contents()
	// Their absence is a state like any other.
	spared := []string{
		manifest.IntentKey(m.pending), manifest.IntentKey(m.aborted), manifest.IntentKey(m.swept), manifest.OutcomeKey(m.aborted), manifest.ProgressKey(m.pending),
		manifest.MetaKey(m.child), manifest.MetaKey(m.pinned), manifest.PinKey(m.pinned, "vol-1"), manifest.TombstoneKey(m.pinned), manifest.RootKey(m.pinned),
	}
	for _, key := range slices.Sorted(maps.Keys(objects)) {
		good := objects[key]
		kind, _, _ := strings.Cut(key, "/")
		try := func(what string, wanted bool) {
			t.Helper()
			report := m.check(1)
			// Whose outcome is gone is pending, as far as anybody knows.
			pending := kind == manifest.KindOutcomes && len(report.Pending) > 1
			if wanted != (report.Problems > 0) && !pending {
				t.Errorf("%s %s: %v", key, what, report.Findings)
			}
		}
		if err := m.faults.Delete(m.ctx, key); err != nil {
			t.Fatal(err)
		}
		try("removed", m.matters(key) && !slices.Contains(spared, key))
		m.overwrite(key, string(good[:rng.IntN(len(good))]))
		try("cut off", m.matters(key))
		for _, other := range slices.Sorted(maps.Keys(objects)) {
			if otherKind, _, _ := strings.Cut(other, "/"); otherKind == kind && other != key && rng.IntN(6) == 0 && !bytes.Equal(objects[other], good) {
				m.overwrite(key, string(objects[other]))
				try("replaced by "+other, m.matters(key))
			}
		}
		m.overwrite(key, string(good))
	}
	if report := m.check(1); report.Problems != 0 {
		t.Errorf("mended: %v", report.Findings)
	}
}

// A sample reads as many blocks as were asked for, the same ones for a seed, and
// looks at what a listing shows to be missing whatever was drawn.
func TestCheckOfASample(t *testing.T) { plainAndSealed(t, testCheckOfASample) }

func testCheckOfASample(t *testing.T, newWorld func(testing.TB) *world) {
	w := newWorld(t)
	img := w.create(nil, nil, newDevice(2000*testBlock).tiny(1, span(0, 2000)...))
	check := func(share float64, seed uint64) *snapshot.Report {
		report, err := w.reopen().Check(w.ctx, snapshot.Check{Share: share, Seed: seed})
		if err != nil {
			t.Fatal(err)
		}
		return report
	}
	some := check(0.1, 1)
	if some.Blocks < 120 || some.Blocks > 280 || check(0.1, 1).Bytes != some.Bytes || check(0.1, 2).Bytes == some.Bytes {
		t.Errorf("a tenth of 2000 is %d", some.Blocks)
	}
	if none := check(0, 1); none.Blocks != 0 || none.Problems != 0 {
		t.Errorf("none: %+v", none)
	}
	if err := w.faults.Delete(w.ctx, manifest.PackKey(img.ID(), 1)); err != nil {
		t.Fatal(err)
	}
	lost := check(0, 1)
	if lost.Problems != 1 || lost.Findings[0].Object != manifest.PackKey(img.ID(), 1) || len(lost.Findings[0].Harm) != 1 ||
		!slices.Equal(lost.Findings[0].Harm[0].Ranges, []snapshot.Range{{Offset: 1024 * testBlock, Length: 976 * testBlock}}) {
		t.Errorf("a missing pack: %v", lost.Findings)
	}
}

// What other hosts do meanwhile, before whichever call, is no damage.
func TestCheckBesideOtherHosts(t *testing.T) {
	t.Parallel()
	type change func(m *museum, pending *snapshot.Attempt)
	for name, does := range map[string]change{
		"delete":           func(m *museum, _ *snapshot.Attempt) { m.delete(m.base); m.reclaim() },
		"delete the child": func(m *museum, _ *snapshot.Attempt) { m.delete(m.child, m.kept); m.reclaim() },
		"unpin": func(m *museum, _ *snapshot.Attempt) {
			if err := m.store.Unpin(m.ctx, m.pinned, "vol-1"); err != nil {
				m.t.Error(err)
			}
			m.reclaim()
		},
		"abort": func(m *museum, a *snapshot.Attempt) {
			if err := a.Abort(m.ctx, "a test"); err != nil {
				m.t.Error(err)
			}
		},
		"commit, and delete the parent": func(m *museum, a *snapshot.Attempt) {
			if _, err := a.Commit(m.ctx); err != nil {
				m.t.Error(err)
			}
			m.delete(m.child, m.base)
			m.reclaim()
		},
		"begin": func(m *museum, _ *snapshot.Attempt) {
			m.begin(m.plan(nil, newDevice(testBlock)), nil, newDevice(testBlock).tiny(1, 0))
		},
		"all": func(m *museum, a *snapshot.Attempt) { m.delete(m.base, m.child, m.kept, a.ID()); m.reclaim() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			step := 5
			if stressed() {
				step = 1
			}
			for n, more := len(name)%step, true; more; n += step {
				m := newMuseum(t, newWorld)
				d := newDevice(3*testBlock).tiny(1, 0)
				pending := m.begin(m.plan(nil, d), nil, d)
				faults := blockstoretest.NewFaulty(m.faults)
				more = false
				faults.Inject(blockstoretest.Rule{Skip: n, Times: 1}, blockstoretest.Fault{Before: func(context.Context, blockstoretest.Call) {
					more = true
					does(m, pending)
				}})
				report, err := storeIn(faults).Check(m.ctx, snapshot.Check{Share: 1})
				if err != nil || report.Problems > 0 || report.Strange.Objects > 0 {
					t.Fatalf("before call %d: %v, %v, strange %v", n, err, report.Findings, report.StrangeKeys)
				}
				for _, c := range faults.Calls() {
					if c.Op == blockstoretest.OpPut || c.Op == blockstoretest.OpDelete {
						t.Fatalf("a check makes the call %v", c)
					}
				}
				if n > 500 {
					t.Fatal("too many calls")
				}
			}
		})
	}
}

// Roots are passed through in windows; which ones makes no difference.
func TestCheckInWindows(t *testing.T) {
	w := newWorld(t)
	d := sparse(9)
	one := w.create(nil, nil, d)
	d2 := d.tiny(2, 0, 3*manifest.LeafBlocks, 8*manifest.LeafBlocks)
	w.create(one, d, d2)
	for window := 1; window < 30; window += 3 {
		report, err := snapshot.CheckInWindows(w.ctx, w.reopen(), window)
		if err != nil || report.Problems != 0 || report.Blocks != 12 {
			t.Errorf("windows of %d: %+v, %v", window, report, err)
		}
	}
}
