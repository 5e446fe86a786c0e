package snapshot

import (
	"context"
	"errors"
	"fmt"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A set is snapshots of several volumes, of any lineages, that are all committed
// or none. Their intents name it, and its outcome, which is created once, alone
// decides them. What it says of each is then recorded as that one's own outcome,
// by whoever comes by first: it saves the next one a look.
//
// A member's own outcome, where there is one, agrees with the set's. Two come
// before that, and agree with what it can only be: its owner may abort an attempt
// that the set will never list, as Begin does, and who deletes a pending snapshot
// whose intent is damaged cannot tell that it is of a set. So a volume believes in
// its commit only when its own outcome stands.

// CommitSet makes the snapshots of a set exist, all of them. members are what
// Prepare returned of each. ErrAborted: somebody aborted the set first. After any
// other error the outcome is not known: CommitSet again, or AbortSet.
func (s *Store) CommitSet(ctx context.Context, id manifest.SetID, members []manifest.Outcome) error {
	set := manifest.SetOutcome{Version: manifest.RecordVersion, Set: id, State: manifest.StateCommitted, End: now()}
	for _, m := range members {
		m.Description, m.Tags, m.Root = "", nil, nil // see manifest.SetOutcome
		set.Members = append(set.Members, m)
	}
	won, err := s.putSetOutcome(ctx, set)
	if err != nil {
		return fmt.Errorf("commit %s: %w", id, err)
	}
	if won.State != manifest.StateCommitted {
		return fmt.Errorf("commit %s: %w (%s)", id, ErrAborted, won.Why)
	}
	return nil
}

// AbortSet keeps a set from ever being committed, unless it was before.
func (s *Store) AbortSet(ctx context.Context, id manifest.SetID, why string) (committed bool, err error) {
	won, err := s.putSetOutcome(ctx, abortedSet(id, why))
	if err != nil {
		return false, fmt.Errorf("abort %s: %w", id, err)
	}
	return won.State == manifest.StateCommitted, nil
}

// RecordMembers records the outcomes of a set that CommitSet has committed as
// those of its members. What it fails to record is recorded by whoever needs it.
func (s *Store) RecordMembers(ctx context.Context, members []manifest.Outcome) error {
	g, gctx := newGroup(ctx)
	g.SetLimit(parallel)
	for _, m := range members {
		g.Go(func() error {
			if _, err := s.putOutcome(gctx, m); err != nil {
				return fmt.Errorf("record that %s is committed: %w", m.Snapshot, err)
			}
			return nil
		})
	}
	return g.Wait()
}

func abortedSet(id manifest.SetID, why string) manifest.SetOutcome {
	return manifest.SetOutcome{Version: manifest.RecordVersion, Set: id, State: manifest.StateAborted, Why: why, End: now()}
}

// putSetOutcome puts the outcome of a set unless there is one, and returns the
// one that stands.
func (s *Store) putSetOutcome(ctx context.Context, set manifest.SetOutcome) (manifest.SetOutcome, error) {
	// Rule: create-once. Coordinator and whoever aborts a member come here.
	err := s.putOnce(ctx, manifest.SetOutcomeKey(set.Set), set)
	if errors.Is(err, blockstore.ErrExists) {
		return s.setOutcome(ctx, set.Set)
	}
	return set, err
}

// setOutcome reads the outcome of a set; blockstore.ErrNotExist while there is
// none.
func (s *Store) setOutcome(ctx context.Context, id manifest.SetID) (manifest.SetOutcome, error) {
	set, _, err := getRecord[manifest.SetOutcome](ctx, s.objects, manifest.SetOutcomeKey(id))
	if err == nil && set.Set != id {
		err = fmt.Errorf("the outcome of %s is that of %s: %w", id, set.Set, manifest.ErrCorrupt)
	}
	return set, err
}

// outcome returns a snapshot's outcome, recorded as its own or by its set;
// blockstore.ErrNotExist while there is none. It writes nothing.
func (s *Store) outcome(ctx context.Context, id manifest.SnapshotID) (manifest.Outcome, error) {
	outcome, err := s.decided(ctx, id)
	if err != nil || outcome.Set == "" {
		return outcome, err
	}
	return s.inlined(ctx, outcome)
}

// decided is outcome but for the copy of the root, which may be missing.
func (s *Store) decided(ctx context.Context, id manifest.SnapshotID) (manifest.Outcome, error) {
	outcome, none := s.ownOutcome(ctx, id)
	if !errors.Is(none, blockstore.ErrNotExist) {
		return outcome, none
	}
	intent, err := s.intent(ctx, id)
	switch {
	case isDamage(err): // or there is none: of which set, nobody can tell
		return outcome, none
	case err != nil:
		return outcome, err
	case intent.Set == "":
		return outcome, none
	}
	set, err := s.setOutcome(ctx, intent.Set)
	switch {
	case errors.Is(err, blockstore.ErrNotExist):
		return outcome, none
	case err != nil:
		return outcome, err
	}
	return outcomeIn(set, abortedBy(intent, set.Why)), nil
}

// outcomeIn returns what a set's outcome says of one of its attempts, of which
// aborted is the outcome if the set does not list it. It is as in its own record
// but for the copy of the root.
func outcomeIn(set manifest.SetOutcome, aborted manifest.Outcome) manifest.Outcome {
	o, ok := set.Member(aborted.Snapshot, aborted.Nonce)
	if !ok {
		aborted.End = set.End
		return aborted
	}
	o.Description, o.Tags = aborted.Description, aborted.Tags
	return o
}

// inlined adds to an outcome that a set has committed its copy of the root, if
// that belongs into it and is not there.
func (s *Store) inlined(ctx context.Context, o manifest.Outcome) (manifest.Outcome, error) {
	if o.State != manifest.StateCommitted || o.RootLength > manifest.InlineRootMax || len(o.Root) > 0 {
		return o, nil
	}
	root, _, err := s.objects.Get(ctx, manifest.RootKey(o.Snapshot), manifest.InlineRootMax)
	if errors.Is(err, blockstore.ErrNotExist) {
		// Deleted and swept, and before that recorded: see delete.
		own, ownErr := s.ownOutcome(ctx, o.Snapshot)
		if !errors.Is(ownErr, blockstore.ErrNotExist) {
			return own, ownErr
		}
	}
	if errors.Is(err, blockstore.ErrNotExist) {
		err = fmt.Errorf("%s has committed it, and it is gone: %w", o.Set, manifest.ErrCorrupt) // an outcome there is
	}
	if err == nil && manifest.Sum(root) != manifest.Hash(o.RootHash) {
		err = fmt.Errorf("it does not have the hash in the outcome of %s: %w", o.Set, manifest.ErrCorrupt)
	}
	if err != nil {
		return manifest.Outcome{}, fmt.Errorf("read the root of %s: %w", o.Snapshot, err)
	}
	o.Root = root
	return o, nil
}

// record makes what a set's outcome says of an attempt the attempt's own outcome,
// and returns the one that stands.
func (s *Store) record(ctx context.Context, said manifest.Outcome) (manifest.Outcome, error) {
	said, err := s.inlined(ctx, said)
	if err != nil {
		return said, err
	}
	return s.putOutcome(ctx, said)
}

// endMember is putOutcome for one that aborts an attempt of a set: its set is
// aborted, unless it was committed before.
func (s *Store) endMember(ctx context.Context, aborted manifest.Outcome) (manifest.Outcome, error) {
	own, err := s.ownOutcome(ctx, aborted.Snapshot)
	if !errors.Is(err, blockstore.ErrNotExist) {
		return own, err
	}
	// Rule: to abort one of a set is to abort the set. Its own outcome is not
	// what the committer looks at.
	ended, err := s.putSetOutcome(ctx, abortedSet(aborted.Set, fmt.Sprintf("%s: %s", aborted.Snapshot, aborted.Why)))
	if err != nil {
		return own, err
	}
	if ended.State == manifest.StateAborted {
		aborted.Why = ended.Why
	}
	return s.record(ctx, outcomeIn(ended, aborted))
}
