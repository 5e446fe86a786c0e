package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

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
		c.mu.Lock()
		defer c.mu.Unlock()
		c.report.Pending = slices.AppendSeq(c.report.Pending, maps.Keys(c.pending))
	}
	return nil
}

// copied compares an intent with the outcome that says the same.
func copied(i manifest.Intent, o manifest.Outcome) error {
	for _, field := range []struct {
		name string
		same bool
	}{
		{"nonce", i.Nonce == o.Nonce}, {"parent", same(i.Parent, o.Parent)}, {"volume", i.Volume == o.Volume},
		{"size", i.Size == o.Size}, {"block size", i.BlockSize == o.BlockSize}, {"start", i.Start.Equal(o.Start)},
		{"owner", i.Owner == o.Owner}, {"set", i.Set == o.Set}, {"source", same(i.CopiedFrom, o.CopiedFrom)},
		{"description", i.Description == o.Description}, {"tags", maps.Equal(i.Tags, o.Tags)},
	} {
		if !field.same {
			return disagrees("the intent and the outcome have another %s", field.name)
		}
	}
	return nil
}

// same reports whether two records have the same of something, or both nothing.
func same[T comparable](a, b *T) bool {
	return a == b || a != nil && b != nil && *a == *b
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
