package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// Reclaimed is what a reclaim found and did in one lineage.
type Reclaimed struct {
	Lineage   manifest.LineageID
	Roots     int // snapshots that keep what they refer to
	Dead      int // deleted or aborted ones whose objects were looked at
	Aborted   int // attempts whose owner was lost
	Objects   int // removed
	Bytes     int64
	Rewritten int // packs
	Pins      []PinInfo
}

// PinInfo is a pin and how long it has stood.
type PinInfo struct {
	manifest.Pin
	Age     time.Duration // by the store's clock
	Deleted bool          // its snapshot is deleted, so that the pin is what keeps it
}

// errMoved: what a listing showed is gone, because another host deleted or
// reclaimed meanwhile.
var errMoved = errors.New("the lineage changed while it was reclaimed")

// Lineages returns the lineages of the store, in order.
func (s *Store) Lineages(ctx context.Context) ([]manifest.LineageID, error) {
	var ids []manifest.LineageID
	err := s.objects.List(ctx, manifest.KindLineages+"/", func(info blockstore.Info) error {
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

// Reclaim removes every object of a lineage that no live, pinned or pending
// snapshot refers to, and rewrites packs of which they refer to a part. Run
// twice, or by several hosts at once, it does no harm; interrupted, the next
// one goes on.
func (s *Store) Reclaim(ctx context.Context, lineage manifest.LineageID) (Reclaimed, error) {
	const tries = 8 // of a world that moves: each one means that another reclaim got further
	var result Reclaimed
	for range tries {
		err := s.reclaim(ctx, lineage, &result)
		if err == nil || !errors.Is(err, errMoved) {
			return result, err
		}
	}
	return result, fmt.Errorf("reclaim lineage %s: %w %d times; try again", lineage, errMoved, tries)
}

func (s *Store) reclaim(ctx context.Context, lineage manifest.LineageID, result *Reclaimed) error {
	w, err := s.survey(ctx, lineage)
	if err != nil {
		return fmt.Errorf("reclaim lineage %s: %w", lineage, err)
	}
	aborted, err := w.abortStale(ctx)
	if err != nil {
		return fmt.Errorf("reclaim lineage %s: %w", lineage, err)
	}
	if result.Aborted += aborted; aborted > 0 {
		if w, err = s.survey(ctx, lineage); err != nil {
			return fmt.Errorf("reclaim lineage %s: %w", lineage, err)
		}
	}
	result.Lineage, result.Pins = lineage, w.pinInfos()

	dead := w.dead()
	result.Roots, result.Dead = len(w.roots()), len(dead)
	if len(dead) == 0 {
		return nil
	}
	owners := make(map[uint64]bool, len(dead))
	for _, id := range dead {
		owners[id.Serial] = true
	}
	live, err := w.liveness(ctx, func(owner uint64) bool { return owners[owner] })
	if err != nil {
		return fmt.Errorf("reclaim lineage %s: %w", lineage, err)
	}
	for _, id := range dead {
		if err := s.sweep(ctx, id, live, result); err != nil {
			return fmt.Errorf("reclaim lineage %s: %w", lineage, err)
		}
	}
	return nil
}

// A survey is what the listings of a lineage showed.
type survey struct {
	store      *Store
	lineage    manifest.LineageID
	tombstones map[manifest.SnapshotID]bool
	pins       []PinInfo
	pinned     map[manifest.SnapshotID]bool
	intents    map[manifest.SnapshotID]time.Duration // age of the last sign of the owner
	outcomes   map[manifest.SnapshotID]manifest.Outcome
	pending    map[manifest.SnapshotID]manifest.Intent // those without outcome
}

// survey lists a lineage.
func (s *Store) survey(ctx context.Context, lineage manifest.LineageID) (*survey, error) {
	w := &survey{
		store: s, lineage: lineage,
		pinned:   make(map[manifest.SnapshotID]bool),
		intents:  make(map[manifest.SnapshotID]time.Duration),
		outcomes: make(map[manifest.SnapshotID]manifest.Outcome),
		pending:  make(map[manifest.SnapshotID]manifest.Intent),
	}
	// Rule: tombstones, then pins, then intents and outcomes, each listing to
	// its last page before the next begins. Whoever pins or inherits looks for
	// the tombstone after its own record is up: one of the two sees the other.
	var err error
	if w.tombstones, err = s.listKind(ctx, manifest.KindTombstones, lineage.String()); err != nil {
		return nil, err
	}
	if err := w.listPins(ctx); err != nil {
		return nil, err
	}
	if err := w.listIntents(ctx); err != nil {
		return nil, err
	}
	ended, err := s.listKind(ctx, manifest.KindOutcomes, lineage.String())
	if err != nil {
		return nil, err
	}
	return w, w.readRecords(ctx, ended)
}

func (w *survey) listPins(ctx context.Context) error {
	var keys []string
	err := w.store.objects.List(ctx, manifest.LineagePrefix(manifest.KindPins, w.lineage), func(info blockstore.Info) error {
		id, holder, err := manifest.ParsePinKey(info.Key)
		if err != nil {
			return nil // not a pin; verify reports it
		}
		w.pinned[id] = true
		w.pins = append(w.pins, PinInfo{Pin: manifest.Pin{Snapshot: id, Holder: holder}, Age: info.Age, Deleted: w.tombstones[id]})
		keys = append(keys, info.Key)
		return nil
	})
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, key := range keys {
		g.Go(func() error {
			// The key is the pin; its content is for people to read.
			pin, _, err := getRecord[manifest.Pin](gctx, w.store.objects, key)
			if errors.Is(err, blockstore.ErrNotExist) || errors.Is(err, manifest.ErrCorrupt) || errors.Is(err, manifest.ErrVersion) {
				return nil
			}
			if err != nil {
				return err
			}
			w.pins[i].Pin = pin
			return nil
		})
	}
	return g.Wait()
}

func (w *survey) listIntents(ctx context.Context) error {
	beats := make(map[manifest.SnapshotID]time.Duration)
	note := func(kind string, ages map[manifest.SnapshotID]time.Duration) error {
		return w.store.objects.List(ctx, manifest.LineagePrefix(kind, w.lineage), func(info blockstore.Info) error {
			if id, err := manifest.ParseSnapshotKey(kind, info.Key); err == nil {
				ages[id] = info.Age
			}
			return nil
		})
	}
	if err := note(manifest.KindIntents, w.intents); err != nil {
		return err
	}
	if err := note(manifest.KindProgress, beats); err != nil {
		return err
	}
	for id, age := range beats {
		if began, ok := w.intents[id]; ok {
			w.intents[id] = min(age, began)
		}
	}
	return nil
}

// readRecords reads every outcome, and the intents that have none.
func (w *survey) readRecords(ctx context.Context, ended map[manifest.SnapshotID]bool) error {
	var mu sync.Mutex // guards the maps
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for id := range ended {
		g.Go(func() error {
			outcome, err := w.store.outcome(gctx, id)
			if err != nil {
				return fmt.Errorf("read the outcome of %s: %w", id, err)
			}
			mu.Lock()
			defer mu.Unlock()
			w.outcomes[id] = outcome
			return nil
		})
	}
	for id := range w.intents {
		if ended[id] {
			continue
		}
		g.Go(func() error {
			intent, _, err := getRecord[manifest.Intent](gctx, w.store.objects, manifest.IntentKey(id))
			if err != nil {
				return fmt.Errorf("read the intent of %s: %w", id, err)
			}
			mu.Lock()
			defer mu.Unlock()
			w.pending[id] = intent
			return nil
		})
	}
	return g.Wait()
}

func (w *survey) pinInfos() []PinInfo { return w.pins }

// abortStale aborts the pending snapshots whose owner has shown no sign for
// staleAfter. The store's clock only chooses when to try: should the owner
// live after all, its outcome and this one cannot both stand.
func (w *survey) abortStale(ctx context.Context) (int, error) {
	n := 0
	for id, intent := range w.pending {
		if w.intents[id] < staleAfter {
			continue
		}
		committed, _, err := w.store.Resolve(ctx, id, intent.Nonce, fmt.Sprintf("its owner has not been heard of for %s", w.intents[id].Round(time.Minute)))
		if err != nil {
			return n, err
		}
		if !committed {
			n++
		}
	}
	return n, nil
}

func (w *survey) committed(id manifest.SnapshotID) bool {
	return w.outcomes[id].State == manifest.StateCommitted
}

// roots returns the committed snapshots whose footers say what is live: those
// not deleted, those pinned, and the parents of pending ones.
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
	return sorted(roots)
}

// dead returns the snapshots whose objects live only as far as roots refer to
// them: aborted ones, and committed ones that are deleted and no root.
func (w *survey) dead() []manifest.SnapshotID {
	dead := make(map[manifest.SnapshotID]bool)
	for id, outcome := range w.outcomes {
		aborted := outcome.State == manifest.StateAborted
		if (aborted || w.tombstones[id]) && !w.pinned[id] {
			dead[id] = true
		}
	}
	for _, id := range w.roots() {
		delete(dead, id)
	}
	return sorted(dead)
}

func sorted(set map[manifest.SnapshotID]bool) []manifest.SnapshotID {
	return slices.SortedFunc(maps.Keys(set), func(a, b manifest.SnapshotID) int {
		return slices.Compare([]uint64{uint64(a.Lineage), a.Serial}, []uint64{uint64(b.Lineage), b.Serial})
	})
}

// liveness says what roots refer to.
type liveness struct {
	slots map[packID]map[uint16]uint32 // stored length of each live slot
	parts map[manifest.LeavesPart]bool
}

type packID struct {
	owner  uint64
	number uint32
}

// liveness reads the footers of all roots, as far as they concern the owners
// asked for.
func (w *survey) liveness(ctx context.Context, concerns func(owner uint64) bool) (*liveness, error) {
	return w.livenessOf(ctx, w.roots(), concerns)
}

func (w *survey) livenessOf(ctx context.Context, roots []manifest.SnapshotID, concerns func(owner uint64) bool) (*liveness, error) {
	live := &liveness{slots: make(map[packID]map[uint16]uint32), parts: make(map[manifest.LeavesPart]bool)}
	seen := make(map[manifest.Hash]bool) // sections that several roots share
	for _, id := range roots {
		root, err := w.store.root(ctx, id, w.outcomes[id])
		if err != nil {
			return nil, moved(err)
		}
		for _, part := range root.LeavesParts() {
			live.parts[part] = true
		}
		img := &Image{Root: root, objects: w.store.objects}
		for _, ref := range root.Sections {
			if !concerns(ref.Owner) || seen[ref.Hash] {
				continue
			}
			seen[ref.Hash] = true
			section, err := img.fetchSection(ctx, ref)
			if err != nil {
				return nil, moved(err)
			}
			live.add(section)
		}
	}
	return live, nil
}

// moved turns the absence of something a root refers to into errMoved. Rule: it
// is never taken as referring to nothing. That the root is corrupt stays an
// error, and nothing is reclaimed until it is mended or deleted.
func moved(err error) error {
	if errors.Is(err, blockstore.ErrNotExist) || errors.Is(err, blockstore.ErrShort) {
		return fmt.Errorf("%w: %w", errMoved, err)
	}
	return err
}

func (l *liveness) add(s *manifest.Section) {
	for p := range s.Packs() {
		id := packID{s.Owner(), p.Pack}
		slots := l.slots[id]
		if slots == nil {
			slots = make(map[uint16]uint32, len(p.Slots))
			l.slots[id] = slots
		}
		for _, slot := range p.Slots {
			slots[slot.Slot] = slot.Length
		}
	}
}

// sweep removes the objects of a dead snapshot that nothing refers to, its
// root last, and rewrites packs that are partly dead.
func (s *Store) sweep(ctx context.Context, id manifest.SnapshotID, live *liveness, result *Reclaimed) error {
	objects, err := s.dataObjects(ctx, id)
	if err != nil {
		return err
	}
	var doomed []string
	hasRoot := false
	for _, o := range objects {
		if o.Key == manifest.RootKey(id) {
			hasRoot = true
			result.Bytes += o.Size
			continue
		}
		keep, err := s.keep(ctx, id, o, live, result)
		if err != nil {
			return err
		}
		if !keep {
			doomed = append(doomed, o.Key)
			result.Bytes += o.Size
		}
	}
	if err := s.objects.Delete(ctx, doomed...); err != nil {
		return fmt.Errorf("remove objects of %s: %w", id, err)
	}
	result.Objects += len(doomed)
	if hasRoot {
		if err := s.objects.Delete(ctx, manifest.RootKey(id)); err != nil {
			return fmt.Errorf("remove the root of %s: %w", id, err)
		}
		result.Objects++
	}
	if err := s.objects.Delete(ctx, manifest.MetaKey(id), manifest.ProgressKey(id)); err != nil {
		return fmt.Errorf("remove records of %s: %w", id, err)
	}
	return nil
}

// keep reports whether a root refers to the object, and rewrites a pack
// without the slots that none refers to.
func (s *Store) keep(ctx context.Context, id manifest.SnapshotID, o blockstore.Info, live *liveness, result *Reclaimed) (bool, error) {
	if part, err := manifest.ParseLeavesKey(o.Key); err == nil {
		return live.parts[manifest.LeavesPart{Owner: id.Serial, Part: part}], nil
	}
	pack, err := manifest.ParsePackKey(o.Key)
	if err != nil {
		return true, nil // nothing lazyvol wrote; verify reports it
	}
	slots := live.slots[packID{id.Serial, pack}]
	if len(slots) == 0 {
		return false, nil
	}
	if o.Size <= liveSize(slots)+rewriteSlack {
		return true, nil
	}
	freed, err := blockstore.RewritePack(ctx, s.objects, id, pack, func(slot uint16) bool {
		_, ok := slots[slot]
		return ok
	})
	switch {
	case errors.Is(err, blockstore.ErrChanged), errors.Is(err, blockstore.ErrNotExist):
		return true, nil // another reclaim was faster
	case err != nil:
		return true, fmt.Errorf("rewrite pack %d of %s: %w", pack, id, err)
	}
	if freed > 0 {
		result.Rewritten++
		result.Bytes += freed
	}
	return true, nil
}

// rewriteSlack is how many bytes beyond its live blocks a pack may have before
// its slot table is looked at for dead ones: a header and a table of the usual
// size.
const rewriteSlack = 4 << 10

// liveSize returns the size of a pack's live blocks, in bytes.
func liveSize(slots map[uint16]uint32) int64 {
	n := int64(0)
	for _, length := range slots {
		n += int64(length)
	}
	return n
}
