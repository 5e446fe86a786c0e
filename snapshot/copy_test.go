package snapshot_test

import (
	"cmp"
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A copier copies snapshots of one world into another store, and keeps what the
// command keeps in its state directory.
type copier struct {
	from        *world
	to          *world
	key         string
	memory      int64                // 0: plenty
	record      *snapshot.CopyRecord // of the copy that is not ended
	incremental bool                 // what the last copy said
}

func newCopier(t testing.TB) *copier { return &copier{from: newWorld(t), to: newWorld(t)} }

func (c *copier) plan(id manifest.SnapshotID) *snapshot.Copy {
	record := c.record
	if record != nil {
		loaded := *record // only what is saved stays
		record = &loaded
	}
	return &snapshot.Copy{
		From: c.from.store, Image: c.from.open(id), To: c.to.store, KeyURI: c.key, Record: record,
		Memory: cmp.Or(c.memory, 1<<30), // for several packs on their way at once
		Save:   func(r snapshot.CopyRecord) error { c.record = &r; return nil },
		Begun:  func(_ *snapshot.Attempt, incremental bool) { c.incremental = incremental },
	}
}

// run copies a snapshot, or goes on with that.
func (c *copier) run(ctx context.Context, id manifest.SnapshotID) (manifest.SnapshotID, error) {
	outcome, err := c.plan(id).Run(ctx)
	if err == nil {
		c.record = nil
	}
	return outcome.Snapshot, err
}

// copy copies a snapshot, and opens the copy.
func (c *copier) copy(id manifest.SnapshotID) *snapshot.Image {
	c.to.t.Helper()
	made, err := c.run(c.to.ctx, id)
	if err != nil {
		c.to.t.Fatal(err)
	}
	return c.to.open(made)
}

// mustBeWhole checks all of the store, with what nothing refers to.
func (w *world) mustBeWhole() {
	w.t.Helper()
	if report := w.check(1); len(report.Findings) > 0 || report.Garbage.Objects > 0 {
		w.t.Fatalf("%v, %d objects of garbage", report.Findings, report.Garbage.Objects)
	}
}

func TestCopyIsEqualToItsSource(t *testing.T) {
	c := newCopier(t)
	d := newDevice(3*leafBytes+512).random(1, 0, 1, 5, 1000, 1023, 1024, 3072).tiny(2, 2, 7, 2047)
	source := c.from.create(nil, nil, d)
	made := c.copy(source.ID())
	c.to.mustHold(made, d)
	c.to.mustVerify(made.ID())
	if c.incremental || made.Outcome.Parent != nil || made.ID().Lineage == source.ID().Lineage {
		t.Errorf("incremental %v, parent %v, %s", c.incremental, made.Outcome.Parent, made.ID())
	}
	id, err := c.from.store.ID(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := &manifest.CopySource{Store: id, Snapshot: source.ID()}
	if diff := gocmp.Diff(want, made.Outcome.CopiedFrom); diff != "" {
		t.Error(diff)
	}
}

// asked counts the calls whose key has a part.
func (w *world) asked(op blockstoretest.Op, part string) (n int) {
	for _, call := range w.faults.Calls() {
		if call.Op == op && strings.Contains(call.Keys[0], part) {
			n++
		}
	}
	return n
}

func TestCopyOfADescendantSendsOnlyWhatDiffers(t *testing.T) {
	c := newCopier(t)
	first := newDevice(20*leafBytes).random(1, span(0, 20)...).tiny(1, 3*1024, 9*1024, 10*1024)
	one := c.from.create(nil, nil, first)
	second := first.random(2, 5, 6).punched(7, 9*1024)
	two := c.from.create(one, first, second)
	third := second.grown(21*leafBytes).random(3, 5, 20*1024)
	three := c.from.create(two, second, third)
	full := c.copy(one.ID())
	for _, test := range []struct {
		name   string
		id     manifest.SnapshotID
		device *device
		gone   []manifest.SnapshotID // from the source, before
		blocks int64
		leaves int // of the source, read
	}{
		{name: "grandchild", id: three.ID(), device: third, blocks: 3, leaves: 4}, // 0, 9, and 19 and 20 where it grew
		{name: "the same", id: one.ID(), device: first},
		{name: "child, whose parent is deleted there", id: two.ID(), device: second, gone: []manifest.SnapshotID{one.ID()}, blocks: 2, leaves: 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := &copier{from: c.from.in(t), to: c.to.in(t)}
			c.from.delete(test.gone...)
			if len(test.gone) > 0 {
				c.from.reclaim()
			}
			c.from.faults.Reset()
			made := c.copy(test.id)
			if leaves := c.from.asked(blockstoretest.OpReadRange, "/leaves/"); leaves > test.leaves {
				t.Errorf("read %d leaves: %v", leaves, c.from.faults.Calls())
			}
			c.to.mustHold(made, test.device)
			if o := made.Outcome; !c.incremental || o.Parent == nil || o.UploadedBlocks != test.blocks || made.ID().Lineage != full.ID().Lineage {
				t.Errorf("%+v", o)
			}
			c.to.mustBeWhole()
		})
	}
}

func TestCopyBuildsOnTheEarlierCopyThatIsNearest(t *testing.T) {
	c := newCopier(t)
	d := newDevice(8*leafBytes).random(1, 0)
	trunk := c.from.create(nil, nil, d)
	left := d.tiny(1, 1024, 2048, 3072, 4096)
	leftImage := c.from.create(trunk, d, left)
	right := d.tiny(2, 5, 1025)
	rightImage := c.from.create(trunk, d, right)
	near := left.tiny(3, 1025)
	nearImage := c.from.create(leftImage, left, near)
	c.copy(trunk.ID())
	want := c.copy(leftImage.ID())
	c.copy(rightImage.ID())
	made := c.copy(nearImage.ID())
	if made.Outcome.Parent == nil || *made.Outcome.Parent != want.ID() {
		t.Errorf("%v instead of %s", made.Outcome.Parent, want.ID())
	}
	c.to.mustHold(made, near)
}

func TestCopyOfWhichTheSourceHasNoBaseAnyMoreStoresOnlyWhatDiffers(t *testing.T) {
	c := newCopier(t)
	d := newDevice(3*leafBytes).random(1, 0, 1024, 2048)
	one := c.from.create(nil, nil, d)
	c.copy(one.ID())
	changed := d.random(2, 1024).punched(0)
	two := c.from.create(one, d, changed)
	if err := c.from.faults.Delete(t.Context(), manifest.OutcomeKey(one.ID()), manifest.IntentKey(one.ID())); err != nil {
		t.Fatal(err)
	}
	made := c.copy(two.ID())
	c.to.mustHold(made, changed)
	if made.Outcome.UploadedBlocks != 1 || made.Outcome.Parent == nil {
		t.Errorf("%+v", made.Outcome)
	}
}

func TestCopyDoesNotBuildOnADeletedCopy(t *testing.T) {
	c := newCopier(t)
	d := newDevice(leafBytes).random(1, span(0, 9)...)
	source := c.from.create(nil, nil, d)
	for _, when := range []string{"before", "between choice and intent", "reclaimed too"} {
		t.Run(when, func(t *testing.T) {
			c := &copier{from: c.from.in(t), to: c.to.in(t)}
			earlier := c.copy(source.ID())
			w := &world{t: t, ctx: t.Context(), faults: c.to.faults, store: c.to.store, lineage: earlier.ID().Lineage}
			switch when {
			case "before":
				w.delete(earlier.ID())
			case "reclaimed too":
				w.delete(earlier.ID())
				w.reclaim()
			default:
				w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "intents/", Times: 1}, blockstoretest.Fault{
					Before: func(context.Context, blockstoretest.Call) {
						w.delete(earlier.ID())
						w.reclaim()
					},
				})
			}
			made := c.copy(source.ID())
			if made.Outcome.Parent != nil {
				t.Errorf("its parent is %s", made.Outcome.Parent)
			}
			c.to.mustHold(made, d)
			w.delete(made.ID())
			w.reclaim()
			w.wantNone("data/")
		})
	}
}

func TestCopyDoesNotBuildOnALargerCopy(t *testing.T) {
	c := newCopier(t)
	d := newDevice(leafBytes).random(1, span(0, 9)...)
	small := c.from.create(nil, nil, d)
	large := c.from.create(small, d, d.grown(2*leafBytes))
	c.copy(large.ID())
	made := c.copy(small.ID())
	if made.Outcome.Parent != nil {
		t.Errorf("its parent is %s", made.Outcome.Parent)
	}
	c.to.mustHold(made, d)
}

func TestCopyWithinAStoreHasALineageOfItsOwn(t *testing.T) {
	w := newWorld(t)
	c := &copier{from: w, to: w}
	d := newDevice(leafBytes).random(1, 1, 2)
	source := w.create(nil, nil, d)
	made := c.copy(source.ID())
	if made.ID().Lineage == source.ID().Lineage || made.Outcome.UploadedBlocks != 2 {
		t.Errorf("%+v", made.Outcome)
	}
	w.delete(source.ID())
	w.reclaim()
	w.mustHold(made, d)
	again := c.copy(made.ID()) // of a copy: in another lineage again
	if again.ID().Lineage == made.ID().Lineage {
		t.Errorf("%s is of the lineage of %s", again.ID(), made.ID())
	}
	w.mustHold(again, d)
}

// A lineage whose id a copy's follows from may be another's by chance.
func TestCopyPassesOverLineagesThatAreNotItsOwn(t *testing.T) {
	c := newCopier(t)
	d := newDevice(leafBytes).random(1, 1)
	source := c.from.create(nil, nil, d)
	taken := c.copy(source.ID()).ID().Lineage
	own, err := c.to.store.Lineage(t.Context(), taken)
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*manifest.LineageRecord, *manifest.LineageOrigin){
		"of no copies":     func(r *manifest.LineageRecord, _ *manifest.LineageOrigin) { r.CopyOf = nil },
		"of other copies":  func(_ *manifest.LineageRecord, of *manifest.LineageOrigin) { of.Lineage++ },
		"of another store": func(_ *manifest.LineageRecord, of *manifest.LineageOrigin) { of.Store = manifest.NewNonce() },
		"other blocks":     func(r *manifest.LineageRecord, _ *manifest.LineageOrigin) { r.BlockSize *= 2 },
	} {
		t.Run(name, func(t *testing.T) {
			record, origin := own, *own.CopyOf
			record.CopyOf = &origin
			change(&record, &origin)
			c := &copier{from: c.from.in(t), to: newWorld(t)}
			c.to.put(manifest.LineageKey(taken), record)
			if made := c.copy(source.ID()); made.ID().Lineage == taken {
				t.Errorf("%s is of a lineage that is another's", made.ID())
			}
		})
	}
}

func TestCopiesAtOnceAreAllRight(t *testing.T) {
	c := newCopier(t)
	d := newDevice(4*leafBytes).random(1, span(0, 40)...)
	one := c.from.create(nil, nil, d)
	changed := d.random(2, 3, 2048)
	two := c.from.create(one, d, changed)
	made := make([]manifest.SnapshotID, 6)
	var wg sync.WaitGroup
	for i := range made {
		wg.Go(func() {
			id := []manifest.SnapshotID{one.ID(), two.ID()}[i%2]
			other := &copier{from: c.from, to: &world{t: t, ctx: t.Context(), faults: c.to.faults, store: c.to.reopen()}}
			var err error
			if made[i], err = other.run(t.Context(), id); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i, id := range made {
		c.to.mustHold(c.to.open(id), []*device{d, changed}[i%2])
		if id.Lineage != made[0].Lineage {
			t.Errorf("%s is of another lineage than %s", id, made[0])
		}
	}
	c.to.mustBeWhole()
}

func TestCopyOfADamagedSnapshotIsGivenUp(t *testing.T) {
	c := newCopier(t)
	source := c.from.create(nil, nil, newDevice(leafBytes).random(1, span(0, 30)...))
	pack, _, err := c.from.faults.Get(t.Context(), manifest.PackKey(source.ID(), 0), 1<<25)
	if err != nil {
		t.Fatal(err)
	}
	pack[len(pack)/2] ^= 1
	c.from.overwrite(manifest.PackKey(source.ID(), 0), string(pack))
	if _, err := c.run(t.Context(), source.ID()); !snapshot.IsDamage(err) {
		t.Fatalf("copied: %v", err)
	}
	c.to.wantNone("data/", "progress/")
	if list, err := c.to.store.List(t.Context(), false); err != nil || len(list) > 0 {
		t.Errorf("%v, %v", list, err)
	}
	pack[len(pack)/2] ^= 1
	c.from.overwrite(manifest.PackKey(source.ID(), 0), string(pack))
	if _, err := c.run(t.Context(), source.ID()); err != nil { // with the record of the one that was given up
		t.Error(err)
	}
}

// Nothing of a copy goes on when that has failed.
func TestFailedCopyStopsWhatItHasBegun(t *testing.T) {
	c := newCopier(t)
	before := newDevice(2*leafBytes).tiny(1, 0, 1024)
	one := c.from.create(nil, nil, before)
	middle := before.random(2, span(0, 40)...)
	two := c.from.create(one, before, middle)
	three := c.from.create(two, middle, middle.tiny(2, 1024))
	c.copy(one.ID())
	var reading atomic.Int64
	began := make(chan struct{}, 100)
	c.from.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpReadRange, Match: func(call blockstoretest.Call) bool {
		return strings.Contains(call.Keys[0], "/packs/")
	}}, blockstoretest.Fault{Before: func(ctx context.Context, _ blockstoretest.Call) {
		reading.Add(1)
		began <- struct{}{}
		<-ctx.Done()
		time.Sleep(20 * time.Millisecond) // whoever does not wait for it is gone by then
		reading.Add(-1)
	}})
	c.from.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpReadRange, Prefix: manifest.LeavesPrefix(three.ID())}, blockstoretest.Fault{Before: func(context.Context, blockstoretest.Call) { <-began }, Err: blockstore.ErrDenied})
	if _, err := c.run(t.Context(), three.ID()); !errors.Is(err, blockstore.ErrDenied) {
		t.Error(err)
	}
	if n := reading.Load(); n > 0 {
		t.Errorf("%d reads go on", n)
	}
}

func TestCopyThatIsDeletedWhilePendingIsAborted(t *testing.T) {
	c := newCopier(t)
	source := c.from.create(nil, nil, newDevice(leafBytes).random(1, 1))
	c.to.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "outcomes/", Times: 1}, blockstoretest.Fault{
		Before: func(context.Context, blockstoretest.Call) { c.to.delete(c.record.Snapshot) },
	})
	if _, err := c.run(t.Context(), source.ID()); !errors.Is(err, snapshot.ErrAborted) {
		t.Fatal(err)
	}
	before := c.record.Snapshot
	made, err := c.run(t.Context(), source.ID())
	if err != nil || made == before {
		t.Errorf("%s, %v", made, err)
	}
}
