package snapshot

import (
	"context"
	"fmt"
	"maps"

	"github.com/lazyvol/lazyvol/manifest"
)

// SetTags changes a snapshot's tags: those in remove go, those in set are
// added or replaced. Concurrent changes all take effect. Snapshots in the recycle
// bin have tags too.
func (s *Store) SetTags(ctx context.Context, id manifest.SnapshotID, set map[string]string, remove []string) error {
	if err := s.setTags(ctx, id, set, remove); err != nil {
		return fmt.Errorf("tag %s: %w", id, err)
	}
	return nil
}

func (s *Store) setTags(ctx context.Context, id manifest.SnapshotID, set map[string]string, remove []string) error {
	if err := s.checkTombstone(ctx, id); err != nil {
		return err
	}
	d, err := s.describe(ctx, id)
	if err != nil {
		return err
	}
	return s.changeMeta(ctx, d, func(m *manifest.Meta) error {
		if m.Bin != nil && m.Bin.Expired {
			return checkBin(id, m)
		}
		changed := make(map[string]string, len(m.Tags)+len(set))
		maps.Copy(changed, m.Tags)
		for _, k := range remove {
			delete(changed, k)
		}
		maps.Copy(changed, set)
		m.Tags = changed
		return manifest.CheckTags(changed)
	})
}
