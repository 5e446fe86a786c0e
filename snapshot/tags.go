package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// changedTags returns the record of the tags a snapshot has now; nil if it
// still has those it was born with.
func (s *Store) changedTags(ctx context.Context, id manifest.SnapshotID) (*manifest.Meta, error) {
	meta, _, err := getRecord[manifest.Meta](ctx, s.objects, manifest.MetaKey(id))
	if errors.Is(err, blockstore.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &meta, nil
}

// SetTags changes a snapshot's tags: those in remove go, those in set are
// added or replaced. Concurrent changes all take effect.
func (s *Store) SetTags(ctx context.Context, id manifest.SnapshotID, set map[string]string, remove []string) error {
	const tries = 16 // each failed one means that another change took effect
	for range tries {
		err := s.trySetTags(ctx, id, set, remove)
		if err == nil {
			return nil
		}
		if !errors.Is(err, blockstore.ErrChanged) && !errors.Is(err, blockstore.ErrExists) {
			return fmt.Errorf("tag %s: %w", id, err)
		}
	}
	return fmt.Errorf("tag %s: others changed its tags %d times meanwhile; try again", id, tries)
}

func (s *Store) trySetTags(ctx context.Context, id manifest.SnapshotID, set map[string]string, remove []string) error {
	d, err := s.Describe(ctx, id)
	if err != nil {
		return err
	}
	condition := blockstore.IfAbsent
	tags := d.Tags
	meta, etag, err := getRecord[manifest.Meta](ctx, s.objects, manifest.MetaKey(id))
	switch {
	case err == nil:
		condition, tags = blockstore.IfMatch(etag), meta.Tags
	case !errors.Is(err, blockstore.ErrNotExist):
		return err
	}
	changed := make(map[string]string, len(tags)+len(set))
	maps.Copy(changed, tags)
	for _, k := range remove {
		delete(changed, k)
	}
	maps.Copy(changed, set)
	if err := manifest.CheckTags(changed); err != nil {
		return err
	}
	data, err := manifest.EncodeRecord(manifest.Meta{Version: manifest.RecordVersion, Tags: changed})
	if err != nil {
		return err
	}
	_, err = s.objects.Put(ctx, manifest.MetaKey(id), data, condition)
	return err
}
