package snapshot

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// Reclaimed is what a reclaim found and did in one lineage.
type Reclaimed struct {
	Lineage   manifest.LineageID
	Roots     int   // snapshots that keep what they refer to
	Dead      int   // deleted or aborted ones whose objects were looked at
	Aborted   int   // attempts whose owner was lost
	Expired   int   // snapshots that left the recycle bin
	Objects   int   // removed
	Rewritten int   // packs
	Bytes     int64 // freed by both
	Pins      []PinInfo
}

const (
	// sweeps is how many dead snapshots are looked at at once.
	sweeps = 8

	// rewrites is how many packs are rewritten at once. Each takes the memory
	// of two packs.
	rewrites = 4

	// deleteBatch is how many objects one Delete removes: what S3 takes in one
	// request.
	deleteBatch = 1000
)

// errMoved: what a listing showed is gone, because another host deleted or
// reclaimed meanwhile.
var errMoved = errors.New("the lineage changed while it was looked at")

// Lineages returns the lineages of the store, in order.
func (s *Store) Lineages(ctx context.Context) ([]manifest.LineageID, error) {
	var ids []manifest.LineageID
	err := s.objects.List(ctx, manifest.KindPrefix(manifest.KindLineages), func(info blockstore.Info) error {
		if id, err := manifest.ParseLineageKey(info.Key); err == nil {
			ids = append(ids, id)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list lineages: %w", err)
	}
	return ids, nil
}

// TellFreed has Reclaim tell, by and by, how many bytes it has freed since it told
// last: from several goroutines, of one lineage once at a time. It is set before use.
func (s *Store) TellFreed(freed func(bytes int64)) { s.freed = freed }

// Reclaim removes every object of a lineage that no live, pinned or pending
// snapshot refers to, and rewrites packs of which they refer to a part. Pending
// ones whose owner has not been heard of for 25 minutes it aborts, and those whose
// time in the recycle bin is over it deletes for good. Run twice,
// or by several hosts at once, it does no harm; interrupted, the next one goes
// on. An error says what could not be reclaimed, and the result what was.
//
// Nothing is reclaimed in a lineage of which a root or a record cannot be read,
// but for a damaged meta: its snapshot stays as it is.
// A damaged pack of a deleted snapshot is kept as it is and named by the error.
func (s *Store) Reclaim(ctx context.Context, lineage manifest.LineageID) (Reclaimed, error) {
	const tries = 8 // of a world that moves: each one means that another host got further
	result := Reclaimed{Lineage: lineage}
	var err error
	swept := make(sweptSet)
	for range tries {
		if err = s.reclaim(ctx, swept, &result); !errors.Is(err, errMoved) {
			break
		}
	}
	if err != nil {
		err = fmt.Errorf("reclaim lineage %s: %w", lineage, err)
	}
	return result, err
}

func (s *Store) reclaim(ctx context.Context, swept sweptSet, result *Reclaimed) (failed error) {
	w, err := s.survey(ctx, result.Lineage, swept)
	if err != nil {
		return err
	}
	aborted, err := w.abortStale(ctx)
	result.Aborted += aborted
	if err != nil {
		return err
	}
	emptied, damaged, err := w.empty(ctx)
	result.Expired += emptied
	defer func() { failed = errors.Join(failed, damaged) }()
	if err != nil {
		return err
	}
	if aborted+emptied > 0 {
		if w, err = s.survey(ctx, result.Lineage, swept); err != nil {
			return err
		}
	}
	if err := w.record(ctx); err != nil {
		return err
	}
	lineage, err := s.Lineage(ctx, result.Lineage)
	if err == nil && lineage.Encryption != nil && lineage.Encryption.Shredded {
		return s.reclaimShredded(ctx, result)
	}
	roots, dead := w.roots(), w.dead()
	result.Roots, result.Dead, result.Pins = len(roots), len(dead), w.pinsThatKeep()
	if err := w.tidy(ctx, dead); err != nil || len(dead) == 0 {
		return err
	}
	owners := make(map[uint64]bool, len(dead))
	for _, id := range dead {
		owners[id.Serial] = true
	}
	live, err := w.liveness(ctx, roots, func(owner uint64) bool { return owners[owner] })
	if err != nil {
		return err
	}
	key, err := s.Key(ctx, result.Lineage)
	if err != nil {
		return err
	}
	sweep := &sweep{objects: s.objects, key: key, live: live, rewriters: make(places, rewrites), result: result, freed: s.freed}
	return sweep.all(ctx, dead)
}

// tidy removes the records that ended attempts and dead snapshots need no more.
// Their intents, outcomes and tombstones stay for ever, so that no late request
// can bring them back to life.
func (w *survey) tidy(ctx context.Context, dead []manifest.SnapshotID) error {
	metas, err := w.store.listKind(ctx, manifest.KindMeta, w.lineage.String())
	if err != nil {
		return err
	}
	keys, err := w.store.tracesOf(ctx, w.lineage, dead)
	if err != nil {
		return err
	}
	for id := range w.progress {
		if _, ended := w.outcomes[id]; ended {
			keys = append(keys, manifest.ProgressKey(id))
		}
	}
	for _, id := range dead {
		if metas[id] {
			keys = append(keys, manifest.MetaKey(id))
		}
	}
	for _, pin := range w.pins {
		if w.aborted(pin.Snapshot) {
			keys = append(keys, manifest.PinKey(pin.Snapshot, pin.Holder))
		}
	}
	if len(keys) == 0 {
		return nil
	}
	if err := w.store.objects.Delete(ctx, keys...); err != nil {
		return fmt.Errorf("remove records of ended attempts: %w", err)
	}
	return nil
}

// A sweep removes the objects of dead snapshots that nothing refers to, and
// rewrites packs that are partly dead.
type sweep struct {
	objects   blockstore.Store
	key       *crypt.Key // of the lineage; nil: not encrypted
	live      *liveness
	rewriters places // of all sweeps together
	freed     func(bytes int64)

	mu      sync.Mutex // guards the fields below, and the calls of freed
	result  *Reclaimed
	damaged []error
}

// free counts bytes as freed. The caller holds mu.
func (s *sweep) free(bytes int64) {
	s.result.Bytes += bytes
	if s.freed != nil {
		s.freed(bytes)
	}
}

func (s *sweep) all(ctx context.Context, dead []manifest.SnapshotID) error {
	sweepers := newCrew(ctx, make(places, sweeps))
	err := sweepers.lead(func(ctx context.Context) error {
		for _, id := range dead {
			if err := sweepers.run(ctx, func(ctx context.Context) error { return s.one(ctx, id) }); err != nil {
				return err
			}
		}
		return nil
	})
	return errors.Join(append(s.damaged, err)...)
}

// one sweeps one dead snapshot.
func (s *sweep) one(ctx context.Context, id manifest.SnapshotID) error {
	rewriters := newCrew(ctx, s.rewriters)
	batch := deleteList{sweep: s, owner: id}
	err := rewriters.lead(func(ctx context.Context) error {
		return s.objects.List(ctx, manifest.DataPrefix(id), func(o blockstore.Info) error {
			if o.Key == manifest.RootKey(id) {
				return batch.add(ctx, o)
			}
			if part, err := manifest.ParseLeavesKey(o.Key); err == nil {
				if s.live.parts[manifest.LeavesPart{Owner: id.Serial, Part: part}] {
					return nil
				}
				return batch.add(ctx, o)
			}
			number, err := manifest.ParsePackKey(o.Key)
			if err != nil {
				return nil // nothing that lazyvol wrote
			}
			pack := s.live.packs[packID{id.Serial, number}]
			if pack == nil {
				return batch.add(ctx, o)
			}
			if pack.fills(o, s.key) {
				return nil
			}
			return rewriters.run(ctx, func(ctx context.Context) error { return s.rewrite(ctx, id, number, pack) })
		})
	})
	if err == nil {
		err = batch.flush(ctx)
	}
	if err != nil {
		return fmt.Errorf("sweep %s: %w", id, err)
	}
	return nil
}

// A deleteList deletes objects of a dead snapshot in batches.
type deleteList struct {
	sweep *sweep
	owner manifest.SnapshotID
	begun bool // the root object is gone
	keys  []string
	bytes int64
}

func (d *deleteList) add(ctx context.Context, o blockstore.Info) error {
	d.keys = append(d.keys, o.Key)
	d.bytes += o.Size
	if len(d.keys) < deleteBatch {
		return nil
	}
	return d.flush(ctx)
}

func (d *deleteList) flush(ctx context.Context) error {
	if len(d.keys) == 0 {
		return nil
	}
	// Rule: the root object before all others. By that a footer that was swept
	// can be told from one that is damaged: see survey.isSwept.
	if !d.begun {
		if err := d.sweep.objects.Delete(ctx, manifest.RootKey(d.owner)); err != nil {
			return err
		}
		d.begun = true
	}
	if err := d.sweep.objects.Delete(ctx, d.keys...); err != nil {
		return err
	}
	d.sweep.mu.Lock()
	defer d.sweep.mu.Unlock()
	d.sweep.result.Objects += len(d.keys)
	d.sweep.free(d.bytes)
	d.keys, d.bytes = d.keys[:0], 0
	return nil
}

// rewrite rewrites a pack without its dead slots, if it has any.
func (s *sweep) rewrite(ctx context.Context, id manifest.SnapshotID, number uint32, pack *livePack) error {
	freed, err := s.tryRewrite(ctx, id, number, pack)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case errors.Is(err, blockstore.ErrChanged), errors.Is(err, blockstore.ErrNotExist):
		return nil // another reclaim was faster
	case isDamage(err):
		s.damaged = append(s.damaged, err)
		return nil
	case err != nil:
		return err
	}
	if freed > 0 {
		s.result.Rewritten++
		s.free(freed)
	}
	return nil
}

func (s *sweep) tryRewrite(ctx context.Context, id manifest.SnapshotID, number uint32, pack *livePack) (freed int64, err error) {
	table, err := blockstore.ReadSlotTable(ctx, s.objects, id, number, s.key)
	if err != nil {
		return 0, err
	}
	for i, slot := range table.Slots {
		if !slot.Dead && !pack.slots.has(uint16(i)) {
			return blockstore.RewritePack(ctx, s.objects, id, number, s.key, pack.slots.has)
		}
	}
	return 0, nil
}
