package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// The promises that no schedule may break.
var (
	errBroken  = errors.New("broken promise")
	errLost    = fmt.Errorf("%w: what must be whole is not", errBroken)
	errVerdict = fmt.Errorf("%w: a host was told what is not so", errBroken)
	errFailed  = fmt.Errorf("%w: an operation failed without need", errBroken)
	errHalf    = fmt.Errorf("%w: a part of a set is committed", errBroken)
	errLeft    = fmt.Errorf("%w: something is left of what is gone", errBroken)
)

// An aftermath is a lineage when all hosts of a schedule have ended.
type aftermath struct {
	stage   *stage
	hosts   []*host
	objects blockstore.Store
	store   *snapshot.Store

	intents    map[manifest.SnapshotID]manifest.Intent
	outcomes   map[manifest.SnapshotID]manifest.Outcome
	tombstones map[manifest.SnapshotID]manifest.Tombstone
	metas      map[manifest.SnapshotID]manifest.Meta
	pins       map[manifest.SnapshotID][]string // holders
}

// check checks that a schedule broke no promise. It ends by deleting all that
// is in the lineage.
func (st *stage) check(ctx context.Context, s *schedule) error {
	a := &aftermath{stage: st, hosts: s.hosts, objects: s.objects, store: snapshot.New(s.objects)}
	for _, step := range []struct {
		when string
		do   []func(context.Context) error
	}{
		{"at the end", []func(context.Context) error{a.look, a.checkSets}},
		{"at the end", []func(context.Context) error{a.checkVerdicts, a.checkPins, a.checkWhole}},
		{"in a quiet reclaim", []func(context.Context) error{a.reclaim}},
		{"after a quiet reclaim", []func(context.Context) error{a.checkWhole, a.checkExact}},
		{"when all is deleted", []func(context.Context) error{a.deleteAll, a.reclaim, a.checkEmpty}},
	} {
		var broken []error
		for _, do := range step.do {
			broken = append(broken, do(ctx))
		}
		if err := errors.Join(broken...); err != nil {
			return fmt.Errorf("%s: %w", step.when, err)
		}
	}
	return nil
}

// look reads all records.
func (a *aftermath) look(ctx context.Context) (err error) {
	if a.intents, err = recordsOf[manifest.Intent](ctx, a.objects, manifest.KindIntents); err != nil {
		return err
	}
	if a.outcomes, err = recordsOf[manifest.Outcome](ctx, a.objects, manifest.KindOutcomes); err != nil {
		return err
	}
	if a.tombstones, err = recordsOf[manifest.Tombstone](ctx, a.objects, manifest.KindTombstones); err != nil {
		return err
	}
	if a.metas, err = recordsOf[manifest.Meta](ctx, a.objects, manifest.KindMeta); err != nil {
		return err
	}
	a.pins = make(map[manifest.SnapshotID][]string)
	return a.objects.List(ctx, manifest.KindPrefix(manifest.KindPins), func(o blockstore.Info) error {
		id, holder, err := manifest.ParsePinKey(o.Key)
		a.pins[id] = append(a.pins[id], holder)
		return err
	})
}

// recordsOf returns all records of a kind.
func recordsOf[T any](ctx context.Context, objects blockstore.Store, kind string) (map[manifest.SnapshotID]T, error) {
	records := make(map[manifest.SnapshotID]T)
	err := objects.List(ctx, manifest.KindPrefix(kind), func(o blockstore.Info) error {
		id, err := manifest.ParseSnapshotKey(kind, o.Key)
		if err != nil {
			return err
		}
		data, _, err := objects.Get(ctx, o.Key, manifest.MaxRecordLength)
		if err == nil {
			records[id], err = manifest.DecodeRecord[T](data)
		}
		return err
	})
	return records, err
}

// checkVerdicts compares what hosts were told with the records.
func (a *aftermath) checkVerdicts(context.Context) error {
	for _, h := range a.hosts {
		for id, verdict := range h.told {
			is := a.outcomes[id].State
			if _, gone := a.tombstones[id]; verdict == deleted && (gone || is == manifest.StateAborted) {
				continue
			}
			if verdict == held && (a.live(id) || is != manifest.StateCommitted) {
				continue
			}
			if is != verdict && !(is == "" && verdict == manifest.StateAborted) {
				return fmt.Errorf("%w: %s took %s for %s, and it is %q", errVerdict, h.name, id, verdict, is)
			}
		}
	}
	return nil
}

// checkPins checks that those pins stand that somebody counts on.
func (a *aftermath) checkPins(context.Context) error {
	for _, h := range a.hosts {
		for id, holder := range h.keeps {
			if !slices.Contains(a.pins[id], holder) {
				return fmt.Errorf("%w: %s counts on its pin on %s, and it is gone", errLost, h.name, id)
			}
		}
	}
	return nil
}

// live reports whether a snapshot is committed, and not deleted for good.
func (a *aftermath) live(id manifest.SnapshotID) bool {
	_, gone := a.tombstones[id]
	bin := a.metas[id].Bin
	return a.outcomes[id].State == manifest.StateCommitted && !gone && (bin == nil || !bin.Expired)
}

// whole lists the snapshots that must be: those that are live, and those that
// somebody keeps.
func (a *aftermath) whole() map[manifest.SnapshotID]bool {
	whole := make(map[manifest.SnapshotID]bool)
	for id := range a.outcomes {
		whole[id] = a.live(id)
	}
	for _, h := range a.hosts {
		for id := range h.keeps {
			whole[id] = true
		}
	}
	maps.DeleteFunc(whole, func(_ manifest.SnapshotID, is bool) bool { return !is })
	return whole
}

// checkWhole reads every snapshot that must be whole.
func (a *aftermath) checkWhole(ctx context.Context) error {
	for id := range a.whole() {
		img, err := a.store.Load(ctx, a.outcomes[id])
		if err == nil {
			err = a.stage.holds(ctx, img)
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errLost, err)
		}
	}
	return nil
}

func (a *aftermath) reclaim(ctx context.Context) error {
	for _, lineage := range a.stage.lineages() {
		if _, err := a.store.Reclaim(ctx, lineage); err != nil {
			return fmt.Errorf("%w: %w", errFailed, err)
		}
	}
	return nil
}

// checkExact checks that nothing is in the store that need not be: no object to
// which nobody refers, and in packs of what is gone no slot.
func (a *aftermath) checkExact(ctx context.Context) error {
	need := needs{objects: make(map[string]bool), slots: make(map[string]map[int]bool)}
	roots := a.whole()
	// These may be whole or not: a pin that came too late keeps nothing.
	spared := make(map[manifest.SnapshotID]bool)
	for id := range a.pins {
		spared[id] = true
	}
	for id, intent := range a.intents {
		if a.outcomes[id].State == "" {
			spared[id] = true
			if intent.Parent != nil {
				spared[*intent.Parent] = true
			}
		}
	}
	for id := range spared {
		roots[id] = a.outcomes[id].State == manifest.StateCommitted
	}
	for id, is := range roots {
		if !is {
			continue
		}
		err := need.add(ctx, a, id)
		if err != nil && !(spared[id] && errors.Is(err, blockstore.ErrNotExist)) {
			return fmt.Errorf("%w: %w", errLost, err)
		}
	}
	return a.objects.List(ctx, manifest.KindPrefix(manifest.KindData), func(o blockstore.Info) error {
		owner, err := manifest.ParseSnapshotID(strings.Split(o.Key, "/")[1])
		if err != nil || spared[owner] {
			return err
		}
		if !need.objects[o.Key] {
			return fmt.Errorf("%w: %s", errLeft, o.Key)
		}
		number, err := manifest.ParsePackKey(o.Key)
		if err != nil || roots[owner] {
			return nil
		}
		table, err := blockstore.ReadSlotTable(ctx, a.objects, owner, number, nil)
		if err != nil {
			return err
		}
		for i, slot := range table.Slots {
			if !slot.Dead && !need.slots[o.Key][i] {
				return fmt.Errorf("%w: slot %d of %s", errLeft, i, o.Key)
			}
		}
		return nil
	})
}

// needs are the objects, and the slots in packs, that roots refer to.
type needs struct {
	objects map[string]bool
	slots   map[string]map[int]bool
}

func (n needs) add(ctx context.Context, a *aftermath, root manifest.SnapshotID) error {
	img, err := a.store.Load(ctx, a.outcomes[root])
	if err != nil {
		return err
	}
	owned := func(serial uint64) manifest.SnapshotID { return a.stage.id(serial) }
	n.objects[manifest.RootKey(root)] = true
	for _, part := range img.Root.LeavesParts() {
		n.objects[manifest.LeavesKey(owned(part.Owner), part.Part)] = true
	}
	for _, l := range img.Root.Leaves {
		leaf, err := img.FetchLeaf(ctx, l)
		if err != nil {
			return err
		}
		for i := range leaf.Len() {
			ref := leaf.Ref(i)
			if ref.IsHole() {
				continue
			}
			key := manifest.PackKey(owned(ref.Owner), ref.Pack)
			n.objects[key] = true
			if n.slots[key] == nil {
				n.slots[key] = make(map[int]bool)
			}
			n.slots[key][int(ref.Slot)] = true
		}
	}
	return nil
}

// deleteAll removes all pins, and deletes all snapshots.
func (a *aftermath) deleteAll(ctx context.Context) error {
	for id, holders := range a.pins {
		for _, holder := range holders {
			if err := a.store.Unpin(ctx, id, holder); err != nil {
				return err
			}
		}
	}
	for id := range a.intents {
		if err := a.store.Unlock(ctx, id); err != nil && !errors.Is(err, snapshot.ErrNotLocked) && !errors.Is(err, snapshot.ErrNotFound) && !errors.Is(err, snapshot.ErrAborted) {
			return err
		}
		if err := a.store.RestoreDeleted(ctx, id); err != nil && !errors.Is(err, snapshot.ErrNotInBin) && !errors.Is(err, snapshot.ErrNotFound) && !errors.Is(err, snapshot.ErrAborted) {
			return err
		}
		if err := a.store.Delete(ctx, id); err != nil && !errors.Is(err, snapshot.ErrNotFound) {
			return err
		}
	}
	return nil
}

// checkEmpty checks that nothing is left but the records that stay for ever.
func (a *aftermath) checkEmpty(ctx context.Context) error {
	for _, kind := range []string{manifest.KindData, manifest.KindPins, manifest.KindProgress, manifest.KindMeta} {
		err := a.objects.List(ctx, manifest.KindPrefix(kind), func(o blockstore.Info) error {
			return fmt.Errorf("%w: %s", errLeft, o.Key)
		})
		if err != nil {
			return err
		}
	}
	return nil
}
