package snapshot

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// settleTimeout bounds how long a Create that failed takes to clean up.
const settleTimeout = 20 * time.Second

// Create makes a snapshot: it begins, uploads and commits. begun, if set, is
// called once the intent is recorded, and may watch the attempt.
//
// If it fails, or ctx ends, it aborts the attempt and removes what that left,
// for which it takes settleTimeout at most. Its error says if that failed too:
// then the snapshot stays pending until it is deleted or its silence makes a
// reclaim abort it. A snapshot that the store turns out to have committed is a
// success even then.
func (s *Store) Create(ctx context.Context, p Plan, src Source, begun func(*Attempt)) (manifest.Outcome, error) {
	if err := p.check(); err != nil {
		return manifest.Outcome{}, fmt.Errorf("create snapshot: %w", err) // nothing was recorded
	}
	if _, err := s.keyOfPlan(ctx, p); err != nil {
		return manifest.Outcome{}, fmt.Errorf("create snapshot: %w", err) // likewise
	}
	attempt, err := s.Begin(ctx, p)
	if errors.Is(err, blockstore.ErrDenied) {
		if begun, lookErr := s.exists(ctx, manifest.IntentKey(p.ID)); lookErr == nil && !begun {
			return manifest.Outcome{}, err // likewise
		}
	}
	if err != nil {
		return s.settle(ctx, p, err)
	}
	if begun != nil {
		begun(attempt)
	}
	if err := attempt.Upload(ctx, src); err != nil {
		return s.settle(ctx, p, err)
	}
	outcome, err := attempt.Commit(ctx)
	if err != nil {
		return s.settle(ctx, p, err)
	}
	return outcome, nil
}

// settle ends an attempt that failed, though its context may have ended.
func (s *Store) settle(ctx context.Context, p Plan, failure error) (manifest.Outcome, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	committed, outcome, err := s.Resolve(ctx, p.ID, p.Nonce, failure.Error())
	if err != nil {
		return outcome, errors.Join(failure, fmt.Errorf("%s stays pending: %w", p.ID, err))
	}
	if committed {
		return outcome, nil // and the reply was lost
	}
	if err := s.Discard(ctx, p.ID, p.Holder); err != nil {
		return outcome, errors.Join(failure, err)
	}
	return outcome, failure
}
