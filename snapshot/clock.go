package snapshot

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// now is the time put into records for people to read. Nothing is decided by
// it.
func now() time.Time { return time.Now().UTC().Truncate(time.Millisecond) }

// Now returns the time by the store's own clock, exact to about a second, for
// one request. Locks and stays in the recycle bin end by it, so that no host's
// clock can end them early.
func (s *Store) Now(ctx context.Context) (time.Time, error) {
	var at time.Time
	err := s.objects.List(ctx, manifest.StoreKey(), func(info blockstore.Info) error {
		at = info.Listed
		return nil
	})
	if err == nil && at.IsZero() {
		err = errors.New("it does not tell")
	}
	if err != nil {
		return at, fmt.Errorf("ask %s for its time: %w", s.objects, err)
	}
	return at.UTC().Truncate(time.Millisecond), nil
}
