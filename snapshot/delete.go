package snapshot

import (
	"context"
	"errors"
	"fmt"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// Delete makes a snapshot not found, durably: a committed one by a tombstone, a
// pending one by aborting it. Its space is freed by Reclaim. Volumes and
// sessions that pinned it before keep reading it. Deleting a snapshot that is
// unknown or was deleted already is ErrNotFound.
func (s *Store) Delete(ctx context.Context, id manifest.SnapshotID) error {
	d, err := s.Describe(ctx, id)
	if err != nil {
		return err
	}
	switch d.State {
	case Aborted:
		return fmt.Errorf("%w: %s (%s)", ErrNotFound, id, d.Why)
	case Pending:
		return s.deletePending(ctx, id)
	}
	return s.tombstone(ctx, id)
}

// deletePending aborts a pending snapshot. A tombstone would not do: the
// snapshot could still be committed, and be inherited from.
func (s *Store) deletePending(ctx context.Context, id manifest.SnapshotID) error {
	intent, _, err := getRecord[manifest.Intent](ctx, s.objects, manifest.IntentKey(id))
	if err != nil {
		return fmt.Errorf("delete pending %s: %w", id, err)
	}
	committed, _, err := s.Resolve(ctx, id, intent.Nonce, "deleted while pending")
	if err != nil {
		return err
	}
	if committed { // a moment before
		return s.tombstone(ctx, id)
	}
	return nil
}

func (s *Store) tombstone(ctx context.Context, id manifest.SnapshotID) error {
	err := s.putOnce(ctx, manifest.TombstoneKey(id), manifest.Tombstone{Version: manifest.RecordVersion, Snapshot: id, Deleted: now()})
	if errors.Is(err, blockstore.ErrExists) {
		return nil // by another host at the same moment, or by us with the reply lost
	}
	if err != nil {
		return fmt.Errorf("delete %s: %w", id, err)
	}
	return nil
}

// Discard removes what an aborted attempt left: the holder's pin on it, its
// progress, and what it uploaded, to which nothing can refer. The caller knows
// that the outcome is aborted and that none of the attempt's requests is still
// under way.
func (s *Store) Discard(ctx context.Context, id manifest.SnapshotID, h Holder) error {
	if h.ID != "" {
		if err := s.Unpin(ctx, id, h.ID); err != nil {
			return err
		}
	}
	if err := s.objects.Delete(ctx, manifest.ProgressKey(id)); err != nil {
		return fmt.Errorf("remove the progress of aborted %s: %w", id, err)
	}
	return s.discard(ctx, id)
}

// discard removes an aborted attempt's objects.
func (s *Store) discard(ctx context.Context, id manifest.SnapshotID) error {
	objects, err := s.dataObjects(ctx, id)
	if err != nil {
		return err
	}
	keys := make([]string, 0, len(objects))
	for _, o := range objects {
		keys = append(keys, o.Key)
	}
	if err := s.objects.Delete(ctx, keys...); err != nil {
		return fmt.Errorf("remove what aborted %s uploaded: %w", id, err)
	}
	return nil
}

// dataObjects lists a snapshot's packs, leaves and root.
func (s *Store) dataObjects(ctx context.Context, id manifest.SnapshotID) ([]blockstore.Info, error) {
	var found []blockstore.Info
	err := s.objects.List(ctx, manifest.DataPrefix(id), func(info blockstore.Info) error {
		found = append(found, info)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list the objects of %s: %w", id, err)
	}
	return found, nil
}
