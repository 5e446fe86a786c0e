package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// PinInfo is a pin and how long it has stood.
type PinInfo struct {
	manifest.Pin
	Age     time.Duration // by the store's clock
	Deleted bool          // its snapshot is deleted, so that the pin is what keeps it
}

// A survey is what the listings of a lineage showed.
type survey struct {
	store      *Store
	lineage    manifest.LineageID
	tombstones map[manifest.SnapshotID]bool
	pins       []PinInfo
	pinned     map[manifest.SnapshotID]bool
	intents    map[manifest.SnapshotID]time.Duration // their age
	progress   map[manifest.SnapshotID]time.Duration // likewise
	outcomes   map[manifest.SnapshotID]manifest.Outcome
	damaged    map[manifest.SnapshotID]error           // outcomes that cannot be decoded
	pending    map[manifest.SnapshotID]manifest.Intent // those without outcome

	// unrecorded are those among outcomes that only a set's outcome tells.
	unrecorded []manifest.SnapshotID

	// swept are deleted snapshots seen to be swept before this survey began.
	// Passes over a lineage share it.
	swept sweptSet
}

// A sweptSet remembers, from one pass over a lineage to the next, which deleted
// snapshots were found swept.
type sweptSet map[manifest.SnapshotID]bool

// survey lists a lineage. swept is what passes before this one found.
func (s *Store) survey(ctx context.Context, lineage manifest.LineageID, swept sweptSet) (*survey, error) {
	w := &survey{
		store: s, lineage: lineage, swept: swept,
		pinned:   make(map[manifest.SnapshotID]bool),
		outcomes: make(map[manifest.SnapshotID]manifest.Outcome),
		damaged:  make(map[manifest.SnapshotID]error),
		pending:  make(map[manifest.SnapshotID]manifest.Intent),
	}
	// Rule: tombstones, then pins, then intents and outcomes, each listing to
	// its last page before the next begins. Whoever pins or inherits looks for
	// the tombstone after its own record is up: one of the two sees the other.
	var err error
	if w.tombstones, err = s.listKind(ctx, manifest.KindTombstones, lineage.String()); err != nil {
		return nil, err
	}
	if err = w.listPins(ctx); err != nil {
		return nil, err
	}
	if w.intents, err = w.listAges(ctx, manifest.KindIntents); err != nil {
		return nil, err
	}
	ended, err := s.listKind(ctx, manifest.KindOutcomes, lineage.String())
	if err != nil {
		return nil, err
	}
	if w.progress, err = w.listAges(ctx, manifest.KindProgress); err != nil {
		return nil, err
	}
	return w, w.readRecords(ctx, ended)
}

func (w *survey) listPins(ctx context.Context) error {
	err := w.store.objects.List(ctx, manifest.LineagePrefix(manifest.KindPins, w.lineage), func(info blockstore.Info) error {
		id, holder, err := manifest.ParsePinKey(info.Key)
		if err != nil {
			return nil // not a pin
		}
		w.pinned[id] = true
		w.pins = append(w.pins, PinInfo{Pin: manifest.Pin{Snapshot: id, Holder: holder}, Age: info.Age, Deleted: w.tombstones[id]})
		return nil
	})
	if err != nil {
		return err
	}
	g, gctx := newGroup(ctx)
	g.SetLimit(parallel)
	for i := range w.pins {
		g.Go(func() error {
			// The key is the pin; its content is for people to read.
			pin, _, err := getRecord[manifest.Pin](gctx, w.store.objects, manifest.PinKey(w.pins[i].Snapshot, w.pins[i].Holder))
			if err == nil {
				w.pins[i].Host, w.pins[i].Mounted = pin.Host, pin.Mounted
			}
			if isDamage(err) {
				return nil
			}
			return err
		})
	}
	return g.Wait()
}

// listAges lists the snapshots that have a record of one kind, and how old it
// is.
func (w *survey) listAges(ctx context.Context, kind string) (map[manifest.SnapshotID]time.Duration, error) {
	ages := make(map[manifest.SnapshotID]time.Duration)
	err := w.store.objects.List(ctx, manifest.LineagePrefix(kind, w.lineage), func(info blockstore.Info) error {
		if id, err := manifest.ParseSnapshotKey(kind, info.Key); err == nil {
			ages[id] = info.Age
		}
		return nil
	})
	return ages, err
}

// readRecords reads every outcome, and the intents that have none.
func (w *survey) readRecords(ctx context.Context, ended map[manifest.SnapshotID]bool) error {
	var mu sync.Mutex // guards the maps
	g, gctx := newGroup(ctx)
	g.SetLimit(parallel)
	for id := range ended {
		g.Go(func() error {
			outcome, err := w.store.outcome(gctx, id)
			mu.Lock()
			defer mu.Unlock()
			if errors.Is(err, manifest.ErrCorrupt) {
				w.damaged[id] = err
				return nil
			}
			if w.tombstones[id] && !w.pinned[id] {
				// Records stay for ever, so these are most of them. Should it be a
				// pending one's parent, there is the root object.
				outcome.Root = nil
			}
			w.outcomes[id] = outcome
			return err
		})
	}
	for id := range w.intents {
		if ended[id] {
			continue
		}
		g.Go(func() error {
			intent, err := w.store.intent(gctx, id)
			mu.Lock()
			defer mu.Unlock()
			w.pending[id] = intent
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := w.readSets(ctx); err != nil {
		return err
	}
	return w.checkDamaged()
}

// readSets takes from the outcomes of sets those of members that have none of
// their own. It is as if they had been listed with the others, a moment later.
func (w *survey) readSets(ctx context.Context) error {
	members := make(map[manifest.SetID][]manifest.SnapshotID)
	for _, id := range sorted(w.pending) {
		if set := w.pending[id].Set; set != "" {
			members[set] = append(members[set], id)
		}
	}
	var mu sync.Mutex // guards the maps
	g, gctx := newGroup(ctx)
	g.SetLimit(parallel)
	for id, ids := range members {
		g.Go(func() error {
			set, err := w.store.setOutcome(gctx, id)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case errors.Is(err, blockstore.ErrNotExist):
				return nil // pending, all of them
			case err != nil && !errors.Is(err, manifest.ErrCorrupt):
				return err
			}
			for _, id := range ids {
				if err != nil {
					w.damaged[id] = err
				} else {
					w.outcomes[id] = outcomeIn(set, abortedBy(w.pending[id], set.Why))
					w.unrecorded = append(w.unrecorded, id)
				}
				delete(w.pending, id)
			}
			return nil
		})
	}
	return g.Wait()
}

// record records what sets have decided, so that others need not look at them. It
// leaves out what was deleted because its set's outcome or its root was damaged.
func (w *survey) record(ctx context.Context) error {
	for _, id := range w.unrecorded {
		if w.tombstones[id] {
			continue
		}
		if _, err := w.store.record(ctx, w.outcomes[id]); err != nil {
			return err
		}
	}
	return nil
}

// checkDamaged fails if a snapshot with a damaged outcome may be a root, of
// which nobody knows what it refers to. If it is deleted, and nobody's pin or
// parent, it is dead whatever its outcome was.
func (w *survey) checkDamaged() error {
	for _, intent := range w.pending {
		if intent.Parent != nil && w.damaged[*intent.Parent] != nil {
			return w.damaged[*intent.Parent]
		}
	}
	for id, err := range w.damaged {
		if !w.tombstones[id] || w.pinned[id] {
			return err
		}
	}
	return nil
}

// silence returns for how long the owner of an attempt has shown no sign.
func (w *survey) silence(id manifest.SnapshotID) time.Duration {
	silence := w.intents[id]
	if beat, ok := w.progress[id]; ok {
		silence = min(silence, beat)
	}
	return silence
}

// abortStale aborts the pending snapshots whose owner has shown no sign for
// staleAfter. The store's clock only chooses when to try: should the owner
// live after all, its outcome and this one cannot both stand.
func (w *survey) abortStale(ctx context.Context) (int, error) {
	n := 0
	for _, id := range sorted(w.pending) {
		silence := w.silence(id)
		if silence < staleAfter {
			continue
		}
		why := fmt.Sprintf("its owner has not been heard of for %s", silence.Round(time.Minute))
		committed, _, err := w.store.Resolve(ctx, id, w.pending[id].Nonce, why)
		if err != nil {
			return n, err
		}
		if !committed {
			n++
		}
	}
	return n, nil
}

// pinsThatKeep returns the pins but for those on aborted snapshots.
func (w *survey) pinsThatKeep() []PinInfo {
	return slices.DeleteFunc(slices.Clone(w.pins), func(p PinInfo) bool { return w.aborted(p.Snapshot) })
}

func (w *survey) committed(id manifest.SnapshotID) bool {
	return w.outcomes[id].State == manifest.StateCommitted
}

func (w *survey) aborted(id manifest.SnapshotID) bool {
	return w.outcomes[id].State == manifest.StateAborted
}

// roots returns the committed snapshots whose footers say what is live: those
// not deleted, those pinned, and the parents of pending ones. One that had been
// swept before the listings is none: who swept it found nothing that kept it,
// so what keeps it in these listings came too late, and its owner will find the
// tombstone, or died before it could look.
func (w *survey) roots() []manifest.SnapshotID {
	roots := make(map[manifest.SnapshotID]bool)
	for id := range w.outcomes {
		if w.committed(id) && (!w.tombstones[id] || w.pinned[id]) {
			roots[id] = true
		}
	}
	for _, intent := range w.pending {
		if intent.Parent != nil && w.committed(*intent.Parent) {
			roots[*intent.Parent] = true
		}
	}
	for id := range w.swept {
		delete(roots, id)
	}
	return sorted(roots)
}

// dead returns the snapshots whose objects live only as far as roots refer to
// them: aborted ones, and committed ones that are deleted and no root. A pin on
// an aborted one keeps nothing, as nobody can have opened it.
func (w *survey) dead() []manifest.SnapshotID {
	dead := make(map[manifest.SnapshotID]bool)
	for id := range w.outcomes {
		if w.aborted(id) || w.tombstones[id] {
			dead[id] = true
		}
	}
	for id := range w.damaged {
		dead[id] = true
	}
	for _, id := range w.roots() {
		delete(dead, id)
	}
	return sorted(dead)
}

// sorted lists the snapshots that are keys of a map.
func sorted[V any](m map[manifest.SnapshotID]V) []manifest.SnapshotID {
	return slices.SortedFunc(maps.Keys(m), compareIDs)
}

// compareIDs orders snapshots as listings do.
func compareIDs(a, b manifest.SnapshotID) int {
	return cmp.Or(cmp.Compare(a.Lineage, b.Lineage), cmp.Compare(a.Serial, b.Serial))
}
