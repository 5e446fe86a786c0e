package snapshot

import (
	"context"
	"errors"
	"fmt"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// UniqueBytes returns how many bytes of the store deleting a committed
// snapshot would free: what no other root of its lineage refers to. Pins on
// the snapshot itself, which delay that, are not counted.
func (s *Store) UniqueBytes(ctx context.Context, id manifest.SnapshotID) (int64, error) {
	const tries = 4 // of a world that moves
	for range tries {
		n, err := s.uniqueBytes(ctx, id)
		if err == nil {
			return n, nil
		}
		if !errors.Is(err, errMoved) {
			return 0, fmt.Errorf("measure what only %s uses: %w", id, err)
		}
	}
	return 0, fmt.Errorf("measure what only %s uses: %w; try again", id, errMoved)
}

func (s *Store) uniqueBytes(ctx context.Context, id manifest.SnapshotID) (int64, error) {
	w, err := s.survey(ctx, id.Lineage)
	if err != nil {
		return 0, err
	}
	if !w.committed(id) {
		return 0, nil
	}
	var others []manifest.SnapshotID
	for _, root := range w.roots() {
		if root != id {
			others = append(others, root)
		}
	}
	all := func(uint64) bool { return true }
	rest, err := w.livenessOf(ctx, others, all)
	if err != nil {
		return 0, err
	}
	mine, err := w.livenessOf(ctx, []manifest.SnapshotID{id}, all)
	if err != nil {
		return 0, err
	}
	total := w.outcomes[id].RootLength
	for pack, slots := range mine.slots {
		for slot, length := range slots {
			if _, shared := rest.slots[pack][slot]; !shared {
				total += int64(length)
			}
		}
	}
	parts, err := s.partSizes(ctx, id.Lineage, mine, rest)
	return total + parts, err
}

// partSizes adds up the leaves parts that mine refers to and rest does not.
func (s *Store) partSizes(ctx context.Context, lineage manifest.LineageID, mine, rest *liveness) (int64, error) {
	owners := make(map[uint64]bool)
	for part := range mine.parts {
		if !rest.parts[part] {
			owners[part.Owner] = true
		}
	}
	total := int64(0)
	for owner := range owners {
		id := manifest.SnapshotID{Lineage: lineage, Serial: owner}
		err := s.objects.List(ctx, manifest.LeavesPrefix(id), func(o blockstore.Info) error {
			n, err := manifest.ParseLeavesKey(o.Key)
			part := manifest.LeavesPart{Owner: owner, Part: n}
			if err == nil && mine.parts[part] && !rest.parts[part] {
				total += o.Size
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	return total, nil
}
