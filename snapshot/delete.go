package snapshot

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// Delete makes a snapshot not found, durably and for good: a committed one by a
// tombstone, a pending one by aborting it. Its space is freed by Reclaim.
// Volumes and sessions that pinned it before keep reading it. Deleting a
// snapshot that is unknown, aborted, or was deleted already, be it into the
// recycle bin, is ErrNotFound, and one that is locked ErrLocked. One whose
// outcome or intent is damaged can be deleted too, so that it does not stand in
// Reclaim's way; but not one of which it cannot be read whether it is locked.
func (s *Store) Delete(ctx context.Context, id manifest.SnapshotID) error {
	_, err := s.retire(ctx, id, func(map[string]string) time.Duration { return 0 })
	return err
}

// Retire is Delete for a store with a policy: a snapshot that this, or atLeast,
// says is to be retained goes into the recycle bin, where RestoreDeleted finds
// it, and stays whole. Until tells how long; it is zero if the snapshot is
// deleted for good, as pending ones always are.
func (s *Store) Retire(ctx context.Context, id manifest.SnapshotID, atLeast time.Duration) (until time.Time, err error) {
	if atLeast < 0 || atLeast > manifest.MaxRetention {
		return until, fmt.Errorf("delete %s: %w: %s; it is at most %d days", id, ErrRetention, atLeast, manifest.MaxRetention/day)
	}
	policy, err := s.Policy(ctx)
	if err != nil {
		return until, fmt.Errorf("delete %s: %w", id, err)
	}
	return s.retire(ctx, id, func(tags map[string]string) time.Duration {
		return max(atLeast, policy.Retention(tags))
	})
}

func (s *Store) retire(ctx context.Context, id manifest.SnapshotID, retention func(tags map[string]string) time.Duration) (until time.Time, err error) {
	bin, err := s.condemn(ctx, id, retention)
	if err == nil && bin.Expired {
		err = s.bury(ctx, id)
	}
	if err == nil && !bin.Expired {
		until = bin.Until
	}
	if err != nil {
		err = fmt.Errorf("delete %s: %w", id, err)
	}
	return until, err
}

// condemn records in a snapshot's meta that it is deleted, unless it is locked.
//
// Rule: this before the tombstone. A lock is a swap of the same record: either
// it comes first and is seen here, or it is refused.
func (s *Store) condemn(ctx context.Context, id manifest.SnapshotID, retention func(tags map[string]string) time.Duration) (manifest.Bin, error) {
	d, err := s.existing(ctx, id)
	switch {
	case errors.Is(err, manifest.ErrCorrupt):
		d.ID = id // and whatever else it was
	case errors.Is(err, ErrAborted):
		return manifest.Bin{}, fmt.Errorf("%w: it was aborted (%s)", ErrNotFound, d.Why)
	case err != nil:
		return manifest.Bin{}, err
	}
	var at time.Time // of the store, once it was asked
	clock := func() (err error) {
		if at.IsZero() {
			at, err = s.Now(ctx)
		}
		return err
	}
	var bin manifest.Bin
	err = s.changeMeta(ctx, d, func(m *manifest.Meta) error {
		if m.Bin != nil && (m.Bin.Expired || !at.IsZero() && m.Bin.Entered.Equal(at)) {
			bin = *m.Bin // by somebody who did not come to bury it, or by ourselves
			return nil
		}
		if err := checkBin(id, m); err != nil {
			return err
		}
		if m.Lock != nil {
			if err := clock(); err != nil {
				return err
			}
			if held := lockState(*m.Lock, d.End, at); held.State != manifest.LockStateExpired {
				return held.refuse(id)
			}
		}
		bin = manifest.Bin{Entered: now(), Expired: true}
		bin.Until = bin.Entered
		if retained := retention(m.Tags); retained > 0 && d.State == Completed {
			if err := clock(); err != nil {
				return err
			}
			bin = manifest.Bin{Entered: at, Until: at.Add(retained)}
		}
		m.Bin = &bin
		return nil
	})
	return bin, err
}

// bury makes what was recorded in a snapshot's meta come true: that it is
// deleted, for good. It may be done again.
func (s *Store) bury(ctx context.Context, id manifest.SnapshotID) error {
	outcome, err := s.outcome(ctx, id)
	switch {
	case errors.Is(err, blockstore.ErrNotExist):
		return s.deletePending(ctx, id)
	case errors.Is(err, manifest.ErrCorrupt):
		return s.tombstone(ctx, id) // whether it was committed or aborted
	case err != nil:
		return err
	case outcome.State == manifest.StateAborted:
		return nil
	case outcome.Set != "":
		// Rule: what a set committed is recorded before its tombstone stands. Soon
		// its root may be swept, of which the record has a copy.
		if _, err := s.putOutcome(ctx, outcome); err != nil {
			return err
		}
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
