package snapshot

import (
	"context"
	"errors"
	"fmt"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// Resolve settles what became of an attempt whose owner cannot go on: it is
// aborted unless it was committed before, which the store decides. nonce tells
// the attempt from another one that drew the same id: if there is one, this one
// never began. It returns the outcome that stands, or in that case a zero one.
// One of a set takes the others with it, if it is aborted.
func (s *Store) Resolve(ctx context.Context, id manifest.SnapshotID, nonce, why string) (committed bool, _ manifest.Outcome, err error) {
	return s.ResolveMember(ctx, "", id, nonce, why)
}

// ResolveMember is Resolve for an attempt that is known to be of a set, as its
// intent may not tell. "" is none that is known of.
func (s *Store) ResolveMember(ctx context.Context, set manifest.SetID, id manifest.SnapshotID, nonce, why string) (committed bool, _ manifest.Outcome, err error) {
	aborted := manifest.Outcome{Version: manifest.RecordVersion, Snapshot: id, State: manifest.StateAborted, Nonce: nonce, Why: why, Set: set, End: now()}
	intent, err := s.intent(ctx, id)
	switch {
	case err == nil && intent.Nonce == nonce:
		aborted = abortedBy(intent, why)
	case err == nil:
		return false, manifest.Outcome{}, nil
	case !errors.Is(err, blockstore.ErrNotExist) && !errors.Is(err, manifest.ErrCorrupt):
		return false, manifest.Outcome{}, fmt.Errorf("resolve %s: %w", id, err)
	}
	// Without an intent too: it may be on its way, and the outcome keeps the
	// attempt from ever committing.
	end := s.putOutcome
	if aborted.Set != "" {
		end = s.endMember
	}
	outcome, err := end(ctx, aborted)
	if err != nil {
		return false, manifest.Outcome{}, fmt.Errorf("resolve %s: %w", id, err)
	}
	return outcome.State == manifest.StateCommitted && outcome.Nonce == nonce, outcome, nil
}

// abortedBy returns the outcome that aborts an attempt.
func abortedBy(i manifest.Intent, why string) manifest.Outcome {
	return manifest.Outcome{
		Version: manifest.RecordVersion, Snapshot: i.Snapshot, State: manifest.StateAborted, Nonce: i.Nonce, Why: why,
		Parent: i.Parent, Volume: i.Volume, Size: i.Size, BlockSize: i.BlockSize,
		Start: i.Start, End: now(), Owner: i.Owner, Description: i.Description, Tags: i.Tags, CopiedFrom: i.CopiedFrom, Set: i.Set,
	}
}

// putOutcome puts an outcome unless there is one, and returns the one that
// stands.
func (s *Store) putOutcome(ctx context.Context, outcome manifest.Outcome) (manifest.Outcome, error) {
	// Rule: create-once. Committer and reaper both come here, and the store
	// picks the winner, whatever either of them believes about the other.
	err := s.putOnce(ctx, manifest.OutcomeKey(outcome.Snapshot), outcome)
	if errors.Is(err, blockstore.ErrExists) {
		return s.outcome(ctx, outcome.Snapshot)
	}
	return outcome, err
}

// Discard removes what an aborted attempt left: the holder's pin on it, its
// progress, and what it uploaded, to which nothing can refer. Of a snapshot that
// is not aborted it removes nothing: the id is another attempt's, that of a
// Resolve which found this one never to have begun.
//
// The caller knows that none of the attempt's requests is still under way. What
// such a one brings back, the next reclaim removes.
func (s *Store) Discard(ctx context.Context, id manifest.SnapshotID, h Holder) error {
	outcome, err := s.outcome(ctx, id)
	if errors.Is(err, blockstore.ErrNotExist) || err == nil && outcome.State != manifest.StateAborted {
		return nil
	}
	if err != nil {
		return fmt.Errorf("discard %s: %w", id, err)
	}
	if h.ID != "" {
		if err := s.Unpin(ctx, id, h.ID); err != nil {
			return err
		}
	}
	keys := []string{manifest.ProgressKey(id)}
	err = s.objects.List(ctx, manifest.DataPrefix(id), func(info blockstore.Info) error {
		keys = append(keys, info.Key)
		return nil
	})
	if err != nil {
		return fmt.Errorf("list what aborted %s uploaded: %w", id, err)
	}
	if err := s.objects.Delete(ctx, keys...); err != nil {
		return fmt.Errorf("remove what aborted %s uploaded: %w", id, err)
	}
	return nil
}
