package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A Salvage is what somebody has of what is in the store, found by its hash.
type Salvage interface {
	// Block fills p with a block of a lineage that has the hash, and reports
	// whether it could. The block's number is where to look first.
	Block(lineage manifest.LineageID, block int64, hash manifest.Hash, p []byte) bool

	// Leaf returns the encoded leaf of so many blocks that ref names.
	Leaf(lineage manifest.LineageID, ref manifest.LeafRef, blocks int) ([]byte, bool)

	// Root returns the encoded root of a snapshot that has the hash.
	Root(id manifest.SnapshotID, hash manifest.Hash) ([]byte, bool)
}

// A Repair says what of a store to repair, and with what.
type Repair struct {
	Check         // of which Share is taken for 1
	From  Salvage // nil: only what is in the store itself

	// Pin pins a snapshot until unpin is called, in a way that ends even if the
	// process is killed. It fails, with ErrNotFound, if the snapshot is deleted.
	Pin func(ctx context.Context, id manifest.SnapshotID) (unpin func(), err error)
}

// A Repaired is what a repair came to.
type Repaired struct {
	*Report            // of a check after it
	Before    int64    // findings of a check before it
	Objects   []string // keys of those written
	Obstacles []string // why others were not
}

// Repair checks, and writes again what is damaged or missing: root objects,
// leaves and sections of indexes, and packs. What it writes has the hash by
// which it is referred to, and is read back. Of what it cannot recover it
// changes nothing, and neither of what is sound. Then it checks once more.
//
// It never brings back what reclaim removes: it replaces an object only if that
// is still the one it read, and makes a missing one only under a pin on the
// snapshot that owns it, so not of one that is deleted. It may run beside
// everything else, and on several hosts.
func (s *Store) Repair(ctx context.Context, how Repair) (*Repaired, error) {
	how.Share = 1
	result := &Repaired{}
	report, err := s.Check(ctx, how.Check)
	result.Report, result.Before = report, report.Problems
	if err != nil || report.Problems == 0 {
		return result, err
	}
	// A part of an index that is back shows what else is missing.
	const rounds = 4
	for range rounds {
		r := &repairer{Repair: how, store: s, result: result, pinned: make(map[manifest.SnapshotID]bool)}
		written := len(result.Objects)
		result.Obstacles = nil
		if err := r.all(ctx, report.Findings); err != nil {
			return result, fmt.Errorf("repair %s: %w", s, err)
		}
		if len(result.Objects) == written {
			break
		}
		report, err = s.Check(ctx, how.Check)
		result.Report = report
		if err != nil || report.Problems == 0 {
			break
		}
	}
	return result, err
}

// A repairer is one round of a Repair.
type repairer struct {
	Repair
	store  *Store
	result *Repaired
	pinned map[manifest.SnapshotID]bool // false: it is deleted
	unpin  []func()
}

// all repairs what findings are about, as far as it can.
func (r *repairer) all(ctx context.Context, findings []Finding) error {
	defer func() {
		for _, unpin := range r.unpin {
			unpin()
		}
	}()
	broken := make(map[manifest.LineageID]map[string]Finding) // by key
	for _, f := range findings {
		if !f.repair.known() {
			r.obstacle("%s: only what its snapshot uploaded can be repaired", f.Object)
			continue
		}
		lineage := ownerOf(f.Object).Lineage
		if broken[lineage] == nil {
			broken[lineage] = make(map[string]Finding)
		}
		broken[lineage][f.Object] = f
	}
	for _, lineage := range slices.Sorted(maps.Keys(broken)) {
		objects := broken[lineage]
		// One look is enough, even if others commit and delete meanwhile: what
		// they make refers to no slot and no leaf that was there before, but
		// through a parent that was seen.
		a, err := newAtlas(ctx, r, lineage, objects)
		if err != nil {
			return err
		}
		for _, key := range slices.Sorted(maps.Keys(objects)) {
			if err := r.one(ctx, a, key, objects[key].repair); err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
		}
	}
	return nil
}

// ownerOf returns whose an object below data/ is.
func ownerOf(key string) manifest.SnapshotID {
	_, id, _ := explain(key)
	return id
}

// one repairs an object, if it can.
func (r *repairer) one(ctx context.Context, a *atlas, key string, d damage) error {
	owner := ownerOf(key)
	create, err := r.pin(ctx, owner)
	if err != nil {
		return err
	}
	var written bool
	switch {
	case d.root != nil:
		written, err = r.writeRoot(ctx, *d.root, create)
	case d.part != nil:
		written, err = r.writePart(ctx, a, key, create)
	default:
		written, err = r.writePack(ctx, a, owner, *d.pack, create)
	}
	switch {
	case errors.Is(err, blockstore.ErrNoCreate):
		r.obstacle("%s: its snapshot is deleted, and what is missing of one is not made again", key)
		return nil
	case errors.Is(err, errUnrecoverable), errors.Is(err, blockstore.ErrPartial), isDamage(err),
		errors.Is(err, blockstore.ErrChanged), errors.Is(err, blockstore.ErrExists):
		r.obstacle("%s: %v", key, err)
		return nil
	case err != nil:
		return err
	}
	if written {
		r.result.Objects = append(r.result.Objects, key)
	}
	return nil
}

// pin pins the owner of an object until the end of the round, and reports whether
// it could: it is not deleted.
//
// Rule: a missing object is made under a pin on its owner, which keeps reclaim
// from sweeping it at the same time. Of a deleted snapshot reclaim may have
// removed it, because nobody needs it, or be about to: it is not made again.
func (r *repairer) pin(ctx context.Context, owner manifest.SnapshotID) (bool, error) {
	pinned, asked := r.pinned[owner]
	if asked {
		return pinned, nil
	}
	unpin, err := r.Pin(ctx, owner)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return false, err
	}
	if err == nil {
		r.unpin = append(r.unpin, unpin)
	}
	r.pinned[owner] = err == nil
	return err == nil, nil
}

// obstacle notes why something was not repaired.
func (r *repairer) obstacle(format string, args ...any) {
	r.result.Obstacles = append(r.result.Obstacles, fmt.Sprintf(format, args...))
}

// errUnrecoverable: nobody has what is to be written.
var errUnrecoverable = errors.New("it cannot be recovered from what this host and the store have")

// writeRoot writes a root object. Rule: never that of a deleted snapshot, whose
// absence says that it was swept.
func (r *repairer) writeRoot(ctx context.Context, o manifest.Outcome, create bool) (bool, error) {
	if !create {
		return false, blockstore.ErrNoCreate
	}
	stands, err := r.store.outcome(ctx, o.Snapshot)
	if err != nil {
		return false, err
	}
	data := stands.Root
	if len(data) == 0 {
		found := false
		if r.From != nil {
			data, found = r.From.Root(o.Snapshot, manifest.Hash(o.RootHash))
		}
		if !found {
			return false, errUnrecoverable
		}
	}
	key, err := r.store.Key(ctx, o.Snapshot.Lineage)
	if err == nil {
		_, err = decodeRoot(o.Snapshot, o, data, key)
	}
	if err != nil {
		return false, err
	}
	return r.replace(ctx, manifest.RootKey(o.Snapshot), create, func([]byte) ([]byte, error) { return data, nil })
}

// replace writes an object anew that is damaged or missing: if it is still the
// one that was read, or if there still is none. change makes the new content
// from the old one, nil if there is none, and nil if there is nothing to write.
func (r *repairer) replace(ctx context.Context, key string, create bool, change func(old []byte) ([]byte, error)) (bool, error) {
	const tries = 8 // each failed one means that somebody else wrote it
	var lost error
	for range tries {
		old, etag, err := r.store.objects.Get(ctx, key, blockstore.MaxObjectSize)
		condition := blockstore.IfMatch(etag)
		if errors.Is(err, blockstore.ErrNotExist) {
			if !create {
				return false, blockstore.ErrNoCreate
			}
			old, condition, err = nil, blockstore.IfAbsent, nil
		}
		if err != nil {
			return false, err
		}
		data, err := change(old)
		if err != nil || data == nil {
			return false, err
		}
		_, err = r.store.objects.Put(ctx, key, data, condition)
		if !errors.Is(err, blockstore.ErrChanged) && !errors.Is(err, blockstore.ErrExists) {
			return err == nil, err
		}
		lost = err
	}
	return false, lost
}

// writePack writes a pack.
func (r *repairer) writePack(ctx context.Context, a *atlas, owner manifest.SnapshotID, pack packID, create bool) (bool, error) {
	needed := a.needed[pack]
	if len(needed) == 0 {
		return false, nil // nobody needs it any more
	}
	repaired, err := blockstore.RepairPack(ctx, r.store.objects, blockstore.PackRepair{
		Owner: owner, Pack: pack.number, BlockSize: a.blockSize, Key: a.key, Needed: needed, Partial: a.incomplete(), Create: create,
		Find: func(slot blockstore.NeededSlot, dst []byte) bool { return r.find(ctx, a, slot, dst) },
	})
	if err != nil {
		return false, err
	}
	if n := len(repaired.Lost); n > 0 {
		r.obstacle("%s: %d of its blocks: %v", manifest.PackKey(owner, pack.number), n, errUnrecoverable)
	}
	return repaired.Written, nil
}

// find looks for a block by its hash: at its place in what the host has, in
// other slots, and at other places of the host.
func (r *repairer) find(ctx context.Context, a *atlas, slot blockstore.NeededSlot, dst []byte) bool {
	if r.From != nil && r.From.Block(a.lineage, slot.Block, slot.Hash, dst) {
		return true
	}
	for _, other := range a.alike[slot.Hash] {
		if r.From != nil && other.Block != slot.Block && r.From.Block(a.lineage, other.Block, slot.Hash, dst) {
			return true
		}
		if other.Owner == slot.Owner && other.Pack == slot.Pack && other.Slot == slot.Slot {
			continue
		}
		reader := &blockstore.BlockReader{Store: r.store.objects, Lineage: a.lineage, BlockSize: len(dst), Key: a.key}
		if reader.ReadRun(ctx, []manifest.Ref{other.Ref}, func(int) []byte { return dst }, func(int, error) {}) == nil {
			return true
		}
	}
	return false
}
