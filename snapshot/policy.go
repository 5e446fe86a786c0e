package snapshot

import (
	"context"
	"errors"
	"fmt"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// Policy returns what holds for all snapshots of the store.
func (s *Store) Policy(ctx context.Context) (manifest.Policy, error) {
	policy, _, err := s.policy(ctx)
	return policy, err
}

// policy returns the policy and the condition to replace it by.
func (s *Store) policy(ctx context.Context) (manifest.Policy, blockstore.Condition, error) {
	policy, etag, err := getRecord[manifest.Policy](ctx, s.objects, manifest.PolicyKey())
	switch {
	case errors.Is(err, blockstore.ErrNotExist):
		return manifest.Policy{Version: manifest.RecordVersion}, blockstore.IfAbsent, nil
	case err != nil:
		return policy, blockstore.Condition{}, fmt.Errorf("read the store's policy: %w", err)
	}
	return policy, blockstore.IfMatch(etag), nil
}

// ChangePolicy changes the policy by compare-and-swap, and returns it as it is
// then. change is called again with what others made of it meanwhile.
func (s *Store) ChangePolicy(ctx context.Context, change func(*manifest.Policy) error) (manifest.Policy, error) {
	const tries = 16 // each failed one means that another change took effect
	for range tries {
		policy, unchanged, err := s.policy(ctx)
		if err != nil {
			return policy, err
		}
		if err := change(&policy); err != nil {
			return policy, err
		}
		data, err := manifest.EncodeRecord(policy)
		if err != nil {
			return policy, err
		}
		_, err = s.objects.Put(ctx, manifest.PolicyKey(), data, unchanged)
		if err == nil {
			return policy, nil
		}
		if !errors.Is(err, blockstore.ErrChanged) && !errors.Is(err, blockstore.ErrExists) {
			return policy, fmt.Errorf("change the store's policy: %w", err)
		}
	}
	return manifest.Policy{}, fmt.Errorf("change the store's policy: others changed it %d times meanwhile; try again", tries)
}
