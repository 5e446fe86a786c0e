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

// checkSets checks the outcomes of sets against those of their members, and takes
// from them the outcomes of those that have none of their own.
func (c *lineageCheck) checkSets(ctx context.Context, members map[manifest.SetID][]manifest.SnapshotID) error {
	ids := slices.Sorted(maps.Keys(members))
	keys := make([]string, len(ids))
	for i, id := range ids {
		keys[i] = manifest.SetOutcomeKey(id)
	}
	err := eachRecord(ctx, c, keys, func(i int, set manifest.SetOutcome, err error) {
		committed := slices.ContainsFunc(members[ids[i]], c.committed)
		switch {
		case errors.Is(err, blockstore.ErrNotExist) && !committed:
			return // pending
		case errors.Is(err, blockstore.ErrNotExist):
			err = fmt.Errorf("snapshots of the set are committed: %w", err)
		case err == nil && set.Set != ids[i]:
			err = disagrees("it is that of %s", set.Set)
		}
		for _, id := range members[ids[i]] {
			own, ended := c.outcomes[id]
			if err != nil || !ended {
				continue
			}
			listed, ok := set.Member(id, own.Nonce)
			if ok != c.committed(id) || listed.RootHash != own.RootHash {
				err = disagrees("the outcome of %s is another one", id)
			}
		}
		if err != nil {
			c.suspectRecord(keys[i], err)
		}
	})
	if err != nil {
		return err
	}
	if err := c.readSets(ctx); err != nil {
		return err
	}
	if _, pending := c.pending[c.Snapshot]; pending {
		// It was there when the check began.
		c.damaged[c.Snapshot] = fmt.Errorf("its outcome is gone: %w", blockstore.ErrNotExist)
		delete(c.pending, c.Snapshot)
	}
	return nil
}
