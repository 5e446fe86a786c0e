package snapshot

import (
	"context"
	"fmt"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// Forget removes every pin of a holder that is lost, and returns the snapshots
// it pinned. A person decides that it is: no clock does.
func (s *Store) Forget(ctx context.Context, holder string) ([]manifest.SnapshotID, error) {
	var pinned []manifest.SnapshotID
	err := s.objects.List(ctx, manifest.KindPrefix(manifest.KindPins), func(info blockstore.Info) error {
		if id, h, err := manifest.ParsePinKey(info.Key); err == nil && h == holder {
			pinned = append(pinned, id)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("look for the pins of %s: %w", holder, err)
	}
	for i, id := range pinned {
		if err := s.Unpin(ctx, id, holder); err != nil {
			return pinned[:i], err
		}
	}
	return pinned, nil
}
