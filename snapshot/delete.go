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
// unknown, aborted, or was deleted already is ErrNotFound. One whose records
// are damaged can be deleted too, so that it does not stand in Reclaim's way.
func (s *Store) Delete(ctx context.Context, id manifest.SnapshotID) error {
	if err := s.delete(ctx, id); err != nil {
		return fmt.Errorf("delete %s: %w", id, err)
	}
	return nil
}

func (s *Store) delete(ctx context.Context, id manifest.SnapshotID) error {
	if err := s.checkTombstone(ctx, id); err != nil {
		return err
	}
	outcome, err := s.outcome(ctx, id)
	switch {
	case errors.Is(err, blockstore.ErrNotExist):
		return s.deletePending(ctx, id)
	case errors.Is(err, manifest.ErrCorrupt):
		return s.tombstone(ctx, id) // whether it was committed or aborted
	case err != nil:
		return err
	case outcome.State == manifest.StateAborted:
		return fmt.Errorf("%w: it was aborted (%s)", ErrNotFound, outcome.Why)
	}
	return s.tombstone(ctx, id)
}

// deletePending aborts a pending snapshot. A tombstone would not do: the
// snapshot could still be committed, and be inherited from.
func (s *Store) deletePending(ctx context.Context, id manifest.SnapshotID) error {
	intent, err := s.intent(ctx, id)
	if errors.Is(err, blockstore.ErrNotExist) {
		return fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	if err != nil && !errors.Is(err, manifest.ErrCorrupt) {
		return err
	}
	_, outcome, err := s.Resolve(ctx, id, intent.Nonce, "deleted while pending")
	if err != nil {
		return err
	}
	if outcome.State == manifest.StateCommitted { // a moment before
		return s.tombstone(ctx, id)
	}
	return nil
}

// tombstone deletes a committed snapshot. Somebody else's tombstone, at the
// same moment, is as good as one's own.
func (s *Store) tombstone(ctx context.Context, id manifest.SnapshotID) error {
	err := s.putOnce(ctx, manifest.TombstoneKey(id), manifest.Tombstone{Version: manifest.RecordVersion, Snapshot: id, Deleted: now()})
	if errors.Is(err, blockstore.ErrExists) {
		return nil
	}
	return err
}
