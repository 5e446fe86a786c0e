package snapshot

import (
	"context"
	"errors"
	"fmt"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// UniqueBytes returns how many bytes of the store deleting a committed
// snapshot, and reclaiming its lineage, would free: what no other root of the
// lineage refers to. What keeps the snapshot for a while, pins and pending
// snapshots made from it, is not counted, nor is what a reclaim would free even
// now.
func (s *Store) UniqueBytes(ctx context.Context, id manifest.SnapshotID) (int64, error) {
	const tries = 4 // of a world that moves
	var n int64
	var err error
	swept := make(sweptSet)
	for range tries {
		if n, err = s.uniqueBytes(ctx, id, swept); !errors.Is(err, errMoved) {
			break
		}
	}
	if err != nil {
		return 0, fmt.Errorf("measure what only %s uses: %w", id, err)
	}
	return n, nil
}

func (s *Store) uniqueBytes(ctx context.Context, id manifest.SnapshotID, swept sweptSet) (int64, error) {
	w, err := s.survey(ctx, id.Lineage, swept)
	if err != nil {
		return 0, err
	}
	_, pending := w.pending[id]
	switch {
	case pending:
		return 0, ErrPending
	case w.aborted(id):
		return 0, ErrAborted
	case w.tombstones[id] || !w.committed(id):
		return 0, ErrNotFound
	}
	img, err := s.Load(ctx, w.outcomes[id])
	if err != nil {
		return 0, moved(err)
	}
	var others []manifest.SnapshotID
	for _, root := range w.roots() {
		if root != id {
			others = append(others, root)
		}
	}
	owners := make(map[uint64]bool)
	for _, ref := range img.Root.Sections {
		owners[ref.Owner] = true
	}
	rest, err := w.liveness(ctx, others, func(owner uint64) bool { return owners[owner] })
	if err != nil {
		return 0, err
	}
	u := usage{store: s, img: img, rest: rest, foreign: make(map[uint64]*ownerUsage)}
	if err := u.countSections(ctx); err != nil {
		return 0, moved(err)
	}
	u.collectParts()
	if err := u.countObjects(ctx); err != nil {
		return 0, err
	}
	return u.bytes + int64(w.outcomes[id].RootLength), nil
}

// usage adds up what only one image refers to.
type usage struct {
	store *Store
	img   *Image
	rest  *liveness // what all others refer to
	bytes int64

	foreign map[uint64]*ownerUsage // whole objects, whose sizes a listing tells
}

// ownerUsage are the objects of one owner that only the image refers to.
type ownerUsage struct {
	packs, parts map[uint32]bool
}

func (u *usage) owner(serial uint64) *ownerUsage {
	o := u.foreign[serial]
	if o == nil {
		o = &ownerUsage{packs: make(map[uint32]bool), parts: make(map[uint32]bool)}
		u.foreign[serial] = o
	}
	return o
}

// countSections counts the slots that only the image refers to. Of a pack of
// which nobody refers to anything else, all of the object would be removed.
func (u *usage) countSections(ctx context.Context) error {
	return u.img.eachSection(ctx, u.img.Root.Sections, func(_ context.Context, s *manifest.Section) error {
		for p := range s.Packs() {
			pack := u.rest.packs[packID{s.Owner(), p.Pack}]
			if pack == nil && s.Owner() != u.img.ID().Serial {
				u.owner(s.Owner()).packs[p.Pack] = true
				continue
			}
			if pack == nil { // its own, in which it refers to every slot
				u.bytes += int64(blockstore.SlotTableLen(len(p.Slots), u.img.key))
			}
			for _, slot := range p.Slots {
				if pack == nil || !pack.slots.has(slot.Slot) {
					u.bytes += int64(slot.Length) + int64(u.img.key.Overhead())
				}
			}
		}
		return nil
	})
}

// collectParts finds the leaves parts that only the image refers to.
func (u *usage) collectParts() {
	for _, part := range u.img.Root.LeavesParts() {
		if !u.rest.parts[part] {
			u.owner(part.Owner).parts[part.Part] = true
		}
	}
}

// countObjects counts whole objects.
func (u *usage) countObjects(ctx context.Context) error {
	for serial, owned := range u.foreign {
		id := manifest.SnapshotID{Lineage: u.img.ID().Lineage, Serial: serial}
		prefix := manifest.LeavesPrefix(id)
		if len(owned.packs) > 0 {
			prefix = manifest.DataPrefix(id)
		}
		err := u.store.objects.List(ctx, prefix, func(o blockstore.Info) error {
			if n, err := manifest.ParseLeavesKey(o.Key); err == nil && owned.parts[n] {
				u.bytes += o.Size
			}
			if n, err := manifest.ParsePackKey(o.Key); err == nil && owned.packs[n] {
				u.bytes += o.Size
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
