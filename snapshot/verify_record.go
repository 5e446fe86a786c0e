package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// A lineageCheck is the check of one lineage, or of one snapshot of it.
type lineageCheck struct {
	*checker
	*survey
	stored []manifest.SnapshotID                   // that have data
	roots  []*rootCheck                            // that must be whole, in the order of their ids
	begun  map[manifest.SnapshotID]manifest.Intent // intents of those that must be whole
	key    *crypt.Key                              // nil: not encrypted, or the lineage's record is lost

	suspicions []Finding // guarded by checker.mu; to be looked at again at the end

}

func newLineageCheck(c *checker, lineage manifest.LineageID, stored []manifest.SnapshotID) *lineageCheck {
	return &lineageCheck{
		checker: c, stored: stored,
		survey: &survey{
			store: c.at, lineage: lineage, swept: make(sweptSet),
			pinned:   make(map[manifest.SnapshotID]bool),
			outcomes: make(map[manifest.SnapshotID]manifest.Outcome),
			damaged:  make(map[manifest.SnapshotID]error),
			pending:  make(map[manifest.SnapshotID]manifest.Intent),
		},
		begun: make(map[manifest.SnapshotID]manifest.Intent),
	}
}

func (c *lineageCheck) run(ctx context.Context) error {
	if err := c.listRecords(ctx); err != nil {
		return err
	}
	if err := c.records(ctx); err != nil {
		return err
	}
	for _, id := range c.survey.roots() {
		if c.Snapshot.IsZero() || id == c.Snapshot {
			c.roots = append(c.roots, &rootCheck{id: id, outcome: c.outcomes[id]})
		}
	}
	if err := c.indexes(ctx); err != nil {
		return err
	}
	return c.lookAgain(ctx)
}

// suspect notes what is to be looked at again when all else was.
func (c *lineageCheck) suspect(f Finding) {
	if _, data, _ := explain(f.Object); !data.IsZero() && errors.Is(f.Err, blockstore.ErrNotExist) {
		f.Err = blockstore.ErrNotExist // whoever asked for it, and in which words the store says so
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.suspicions = append(c.suspicions, f)
}

// listRecords lists what there is of records. Those of one snapshot it does not
// list, but looks for.
func (c *lineageCheck) listRecords(ctx context.Context) (err error) {
	if id := c.Snapshot; !id.IsZero() {
		c.tombstones = make(map[manifest.SnapshotID]bool)
		c.outcomes[id] = manifest.Outcome{}
		c.intents = map[manifest.SnapshotID]time.Duration{id: 0}
		return nil
	}
	// In the order of survey.
	if c.tombstones, err = c.store.listKind(ctx, manifest.KindTombstones, c.lineage.String()); err != nil {
		return err
	}
	err = c.store.objects.List(ctx, manifest.LineagePrefix(manifest.KindPins, c.lineage), func(info blockstore.Info) error {
		if id, holder, err := manifest.ParsePinKey(info.Key); err == nil {
			c.pinned[id] = true
			c.pins = append(c.pins, PinInfo{Pin: manifest.Pin{Snapshot: id, Holder: holder}, Age: info.Age, Deleted: c.tombstones[id]})
		}
		return nil
	})
	if err != nil {
		return err
	}
	if c.intents, err = c.listAges(ctx, manifest.KindIntents); err != nil {
		return err
	}
	ended, err := c.store.listKind(ctx, manifest.KindOutcomes, c.lineage.String())
	if err != nil {
		return err
	}
	for id := range ended {
		c.outcomes[id] = manifest.Outcome{}
	}
	c.progress, err = c.listAges(ctx, manifest.KindProgress)
	return err
}

// records checks that every record can be decoded, and agrees with the others.
func (c *lineageCheck) records(ctx context.Context) error {
	for _, check := range []func(context.Context) error{
		c.checkOutcomes, c.checkIntents, c.checkLineage, c.checkTombstones, c.checkPins, c.checkProgress, c.checkMeta,
	} {
		if err := check(ctx); err != nil {
			return err
		}
	}
	return nil
}

// eachRecord reads records of one kind, and calls use for each, one at a time.
// It is told what is the matter with a record that is damaged or missing.
func eachRecord[T any](ctx context.Context, c *lineageCheck, keys []string, use func(i int, record T, err error)) error {
	var mu sync.Mutex // guards the calls of use
	g, gctx := newGroup(ctx)
	g.SetLimit(parallel)
	for i, key := range keys {
		g.Go(func() error {
			record, _, err := getRecord[T](gctx, c.store.objects, key)
			if err != nil && !isDamage(err) {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			use(i, record, err)
			return nil
		})
	}
	return g.Wait()
}

// keysOf returns the keys of the records of some snapshots.
func keysOf(ids []manifest.SnapshotID, key func(manifest.SnapshotID) string) []string {
	keys := make([]string, len(ids))
	for i, id := range ids {
		keys[i] = key(id)
	}
	return keys
}

// disagrees is the error of a record that decodes, and contradicts another.
func disagrees(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{manifest.ErrCorrupt}, args...)...)
}

func (c *lineageCheck) checkOutcomes(ctx context.Context) error {
	ids := sorted(c.outcomes)
	return eachRecord(ctx, c, keysOf(ids, manifest.OutcomeKey), func(i int, o manifest.Outcome, err error) {
		id := ids[i]
		switch {
		case errors.Is(err, blockstore.ErrNotExist) && id == c.Snapshot:
			delete(c.outcomes, id) // its set's may be the one that one has seen
			return
		case err != nil:
		case o.Snapshot != id:
			err = disagrees("it is that of %s", o.Snapshot)
		case o.State == manifest.StateCommitted && len(o.Root) == 0 && o.RootLength <= manifest.InlineRootMax:
			err = disagrees("it lacks its copy of the root, of %d bytes", o.RootLength)
		}
		if err != nil {
			c.damaged[id] = err
			delete(c.outcomes, id)
			return
		}
		o.Root = nil // of all snapshots they would take too much memory
		c.outcomes[id] = o
	})
}

// checkIntents checks intents against the outcomes that copied them, and what
// is damaged of these.
func (c *lineageCheck) checkIntents(ctx context.Context) error {
	for id := range c.outcomes {
		if _, listed := c.intents[id]; !listed && c.committed(id) {
			c.intents[id] = 0 // for reading it to say that it is missing
		}
	}
	ids := sorted(c.intents)
	members := make(map[manifest.SetID][]manifest.SnapshotID)
	err := eachRecord(ctx, c, keysOf(ids, manifest.IntentKey), func(i int, intent manifest.Intent, err error) {
		id := ids[i]
		if err == nil && intent.Snapshot != id {
			err = disagrees("it is that of %s", intent.Snapshot)
		}
		o, ended := c.outcomes[id]
		if err == nil && ended && o.State == manifest.StateCommitted {
			err = copied(intent, o)
		}
		if err == nil && intent.Set != "" {
			members[intent.Set] = append(members[intent.Set], id)
		}
		if err != nil {
			c.suspectRecord(manifest.IntentKey(id), err, id)
		}
		switch {
		case ended || c.damaged[id] != nil:
		case err == nil:
			c.pending[id] = intent
			if intent.Parent != nil {
				c.checkParent(id, *intent.Parent)
			}
		default:
			c.pending[id] = manifest.Intent{}
		}
		if c.damaged[id] != nil && err == nil {
			c.begun[id] = intent
		}
	})
	if err != nil {
		return err
	}
	if err := c.checkSets(ctx, members); err != nil {
		return err
	}
	for id, o := range c.outcomes {
		if o.State == manifest.StateCommitted && o.Parent != nil {
			c.checkParent(id, *o.Parent)
		}
	}
	for id, err := range c.damaged {
		c.judgeOutcome(id, err)
	}
	if c.Snapshot.IsZero() {
		c.report.add(c.pending)
	}
	return nil
}

// add lists the pending snapshots.
func (r *Report) add(pending map[manifest.SnapshotID]manifest.Intent) {
	r.Pending = append(r.Pending, slices.Collect(maps.Keys(pending))...)
}

// copied compares an intent with the outcome that says the same.
func copied(i manifest.Intent, o manifest.Outcome) error {
	parent := func(p *manifest.SnapshotID) manifest.SnapshotID {
		if p == nil {
			return manifest.SnapshotID{}
		}
		return *p
	}
	for _, field := range []struct {
		name string
		same bool
	}{
		{"nonce", i.Nonce == o.Nonce}, {"parent", parent(i.Parent) == parent(o.Parent)}, {"volume", i.Volume == o.Volume},
		{"size", i.Size == o.Size}, {"block size", i.BlockSize == o.BlockSize}, {"start", i.Start.Equal(o.Start)},
		{"owner", i.Owner == o.Owner}, {"set", i.Set == o.Set}, {"description", i.Description == o.Description}, {"tags", maps.Equal(i.Tags, o.Tags)},
	} {
		if !field.same {
			return disagrees("the intent and the outcome have another %s", field.name)
		}
	}
	return nil
}

// checkParent checks that a snapshot was made from one that was committed. Its
// outcome came before the child's intent, and never goes.
func (c *lineageCheck) checkParent(child, parent manifest.SnapshotID) {
	if !c.Snapshot.IsZero() || c.damaged[parent] != nil || c.committed(parent) {
		return
	}
	c.suspectRecord(manifest.OutcomeKey(parent), disagrees("%s was made from a snapshot that is not committed", child), parent)
}

// judgeOutcome tells of an outcome that cannot be used. It does no harm if the
// snapshot is deleted, and nobody keeps it.
func (c *lineageCheck) judgeOutcome(id manifest.SnapshotID, err error) {
	kept := !c.tombstones[id] || c.pinned[id]
	for _, intent := range c.pending {
		kept = kept || intent.Parent != nil && *intent.Parent == id
	}
	if !kept {
		c.note("%s, of a deleted snapshot that nobody needs, is damaged: %v", manifest.OutcomeKey(id), err)
		return
	}
	harm := Harm{Snapshot: id}
	if intent, ok := c.begun[id]; ok && intent.Size > 0 {
		harm.Ranges = []Range{{0, intent.Size}}
	}
	c.suspect(Finding{Object: manifest.OutcomeKey(id), Err: err, Harm: []Harm{harm}})
}

// suspectRecord tells of a record that is damaged, and harms some snapshots.
func (c *lineageCheck) suspectRecord(key string, err error, ids ...manifest.SnapshotID) {
	f := Finding{Object: key, Err: err}
	for _, id := range ids {
		f.Harm = append(f.Harm, Harm{Snapshot: id})
	}
	c.suspect(f)
}

// unlock gets the lineage's key. That it cannot be had is no damage.
func (c *lineageCheck) unlock(ctx context.Context) (err error) {
	c.key, err = c.survey.store.Key(ctx, c.lineage)
	if errors.Is(err, ErrNotFound) || isDamage(err) {
		return nil // which checkLineage tells
	}
	return err
}

func (c *lineageCheck) checkLineage(ctx context.Context) error {
	key := manifest.LineageKey(c.lineage)
	return eachRecord(ctx, c, []string{key}, func(_ int, record manifest.LineageRecord, err error) {
		switch {
		case err != nil:
		case record.ID != c.lineage:
			err = disagrees("it is that of %s", record.ID)
		}
		if err != nil {
			c.suspectRecord(key, err, c.survey.roots()...)
			return
		}
		for id, o := range c.outcomes {
			if o.State == manifest.StateCommitted && o.BlockSize != record.BlockSize {
				c.suspectRecord(key, disagrees("it has blocks of %d bytes, the outcome of %s %d", record.BlockSize, id, o.BlockSize), id)
			}
		}
		for id, intent := range c.pending {
			if intent.BlockSize != 0 && intent.BlockSize != record.BlockSize {
				c.suspectRecord(key, disagrees("it has blocks of %d bytes, the intent of %s %d", record.BlockSize, id, intent.BlockSize), id)
			}
		}
	})
}

func (c *lineageCheck) checkTombstones(ctx context.Context) error {
	ids := sorted(c.tombstones)
	return eachRecord(ctx, c, keysOf(ids, manifest.TombstoneKey), func(i int, t manifest.Tombstone, err error) {
		id := ids[i]
		if err == nil && t.Snapshot != id {
			err = disagrees("it is that of %s", t.Snapshot)
		}
		if err != nil {
			c.suspectRecord(manifest.TombstoneKey(id), err)
		}
		// Only what has an outcome is deleted by a tombstone, and outcomes stay.
		if _, ended := c.outcomes[id]; !ended && c.damaged[id] == nil {
			c.suspectRecord(manifest.OutcomeKey(id), fmt.Errorf("the snapshot is deleted: %w", blockstore.ErrNotExist))
		}
	})
}

func (c *lineageCheck) checkPins(ctx context.Context) error {
	keys := make([]string, len(c.pins))
	for i, pin := range c.pins {
		keys[i] = manifest.PinKey(pin.Snapshot, pin.Holder)
	}
	var gone []int
	err := eachRecord(ctx, c, keys, func(i int, pin manifest.Pin, err error) {
		listed := &c.pins[i]
		switch {
		case errors.Is(err, blockstore.ErrNotExist):
			gone = append(gone, i)
			return
		case err == nil && (pin.Snapshot != listed.Snapshot || pin.Holder != listed.Holder):
			err = disagrees("it is that of %s on %s", pin.Holder, pin.Snapshot)
		}
		if err != nil {
			c.suspectRecord(keys[i], err)
			return
		}
		listed.Host, listed.Mounted, listed.Unchecked = pin.Host, pin.Mounted, pin.Unchecked
	})
	if err != nil {
		return err
	}
	var pins []PinInfo
	for i, pin := range c.pins {
		if !slices.Contains(gone, i) {
			pins = append(pins, pin)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Pins = append(c.report.Pins, pins...)
	return nil
}

func (c *lineageCheck) checkProgress(ctx context.Context) error {
	ids := sorted(c.progress)
	return eachRecord(ctx, c, keysOf(ids, manifest.ProgressKey), func(i int, p manifest.Progress, err error) {
		if errors.Is(err, blockstore.ErrNotExist) {
			return // it has ended
		}
		if err == nil && p.Snapshot != ids[i] {
			err = disagrees("it is that of %s", p.Snapshot)
		}
		if err != nil {
			c.suspectRecord(manifest.ProgressKey(ids[i]), err)
		}
	})
}

func (c *lineageCheck) checkMeta(ctx context.Context) error {
	ids := []manifest.SnapshotID{c.Snapshot}
	if c.Snapshot.IsZero() {
		listed, err := c.store.listKind(ctx, manifest.KindMeta, c.lineage.String())
		if err != nil {
			return err
		}
		ids = sorted(listed)
	}
	return eachRecord(ctx, c, keysOf(ids, manifest.MetaKey), func(i int, _ manifest.Meta, err error) {
		if err != nil && !errors.Is(err, blockstore.ErrNotExist) {
			c.suspectRecord(manifest.MetaKey(ids[i]), err, ids[i])
		}
	})
}

// lookAgain judges what was found damaged or missing: it is no damage if the
// snapshots that it harms need not be whole any more, by now, when all that was
// found was. What a record says of itself it does not judge.
func (c *lineageCheck) lookAgain(ctx context.Context) error {
	stands := make(map[manifest.SnapshotID]standing)
	for _, f := range c.suspicions {
		for _, h := range f.Harm {
			if _, asked := stands[h.Snapshot]; asked {
				continue
			}
			s, err := c.standing(ctx, h.Snapshot)
			if err != nil {
				return err
			}
			stands[h.Snapshot] = s
		}
	}
	for _, f := range c.suspicions {
		harmed := len(f.Harm) > 0
		f.Harm = slices.DeleteFunc(f.Harm, func(h Harm) bool { return stands[h.Snapshot] != mustBeWhole })
		if len(f.Harm) > 0 || !harmed {
			c.found(f)
		} else if _, data, _ := explain(f.Object); data.IsZero() {
			c.note("%s, of a deleted snapshot that nobody needs, is damaged: %v", f.Object, f.Err)
		}
	}
	for _, r := range c.roots {
		s, asked := stands[r.id]
		if !asked || s == mustBeWhole {
			c.verdict(r.id)
		}
	}
	for id, s := range stands {
		if s == inDoubt {
			c.note("%s is deleted and not whole: its pin may have come after that, and then keeps nothing", id)
		}
	}
	return nil
}

func (c *lineageCheck) verdict(id manifest.SnapshotID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Snapshots = append(c.report.Snapshots, Verdict{Snapshot: id, Deleted: c.tombstones[id]})
}

// A standing is whether a snapshot must be whole.
type standing int

const (
	mustBeWhole standing = iota
	needNotBe
	inDoubt // a pin may keep it, or have come too late: the store does not tell
)

// pinMargin is by how much a pin must be older than the tombstone to be sure
// that it was there first: stores tell ages to about a second.
const pinMargin = 2 * time.Second

// standing tells whether a snapshot must be whole now. One that is not deleted
// must, and was at any time before. A deleted one was if who keeps it came
// before the tombstone: who came later finds the tombstone and goes again, and
// meanwhile a reclaim that began before may be sweeping.
func (c *lineageCheck) standing(ctx context.Context, id manifest.SnapshotID) (standing, error) {
	deleted, err := c.store.exists(ctx, manifest.TombstoneKey(id))
	if isDamage(err) {
		deleted, err = true, nil
	}
	if err != nil || !deleted {
		return mustBeWhole, err
	}
	if err := c.store.objects.ReadRange(ctx, manifest.RootKey(id), 0, make([]byte, 1)); errors.Is(err, blockstore.ErrNotExist) {
		return needNotBe, nil // swept
	} else if err != nil && !isDamage(err) {
		return mustBeWhole, err
	}
	deletedFor, err := c.age(ctx, manifest.TombstoneKey(id))
	if err != nil {
		return mustBeWhole, err
	}
	s := needNotBe
	keeps := func(age time.Duration) {
		if age > deletedFor+pinMargin {
			s = mustBeWhole
		} else if s == needNotBe {
			s = inDoubt
		}
	}
	err = c.store.objects.List(ctx, manifest.PinPrefix(id), func(o blockstore.Info) error {
		if _, _, err := manifest.ParsePinKey(o.Key); err == nil {
			keeps(o.Age)
		}
		return nil
	})
	if err != nil {
		return mustBeWhole, err
	}
	for child, intent := range c.pending {
		if intent.Parent == nil || *intent.Parent != id {
			continue
		}
		switch _, err := c.store.outcome(ctx, child); {
		case err == nil || isDamage(err) && !errors.Is(err, blockstore.ErrNotExist):
			continue // it has ended
		case !errors.Is(err, blockstore.ErrNotExist):
			return mustBeWhole, err
		}
		age, err := c.age(ctx, manifest.IntentKey(child))
		if err != nil {
			return mustBeWhole, err
		}
		keeps(age)
	}
	return s, nil
}

// age returns how old an object is; 0 if it is gone.
func (c *lineageCheck) age(ctx context.Context, key string) (age time.Duration, err error) {
	err = c.store.objects.List(ctx, key, func(o blockstore.Info) error {
		if o.Key == key {
			age = o.Age
		}
		return nil
	})
	return age, err
}
