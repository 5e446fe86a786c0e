package snapshot

import (
	"context"
	"fmt"

	"github.com/lazyvol/lazyvol/manifest"
)

// Ping asks the store for its own record, and returns why it does not answer with
// it. Unlike ID it remembers nothing.
func (s *Store) Ping(ctx context.Context) error {
	if _, _, err := getRecord[manifest.StoreRecord](ctx, s.objects, manifest.StoreKey()); err != nil {
		return fmt.Errorf("ask store %s: %w", s.objects, err)
	}
	return nil
}
