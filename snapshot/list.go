package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// List returns the snapshots of the store that are not deleted, oldest first;
// aborted ones only if all is set. A snapshot that begins, ends or is deleted
// meanwhile may be shown in either state. Those whose records are damaged are
// left out and named by the error, beside which the others are returned.
func (s *Store) List(ctx context.Context, all bool) ([]Description, error) {
	ids, changed, err := s.listLive(ctx)
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	found := make([]Description, len(ids))
	damaged := make([]error, len(ids))
	g, gctx := newGroup(ctx)
	g.SetLimit(parallel)
	for i, id := range ids {
		g.Go(func() error {
			var err error
			found[i], err = s.describeListed(gctx, id, changed[id])
			if isDamage(err) {
				damaged[i] = fmt.Errorf("list %s: %w", id, err)
				return nil
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	found = slices.DeleteFunc(found, func(d Description) bool { return d.ID.IsZero() || d.State == Aborted && !all })
	slices.SortFunc(found, func(a, b Description) int {
		return cmp.Or(a.Start.Compare(b.Start), strings.Compare(a.ID.String(), b.ID.String()))
	})
	return found, errors.Join(damaged...)
}

// listLive lists the snapshots that were begun and are not deleted, and those
// whose tags were changed.
func (s *Store) listLive(ctx context.Context) (live []manifest.SnapshotID, changed map[manifest.SnapshotID]bool, err error) {
	var begun, deleted map[manifest.SnapshotID]bool
	g, gctx := newGroup(ctx)
	for kind, ids := range map[string]*map[manifest.SnapshotID]bool{
		manifest.KindIntents: &begun, manifest.KindTombstones: &deleted, manifest.KindMeta: &changed,
	} {
		g.Go(func() (err error) {
			*ids, err = s.listKind(gctx, kind, "")
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, nil, err
	}
	maps.DeleteFunc(begun, func(id manifest.SnapshotID, _ bool) bool { return deleted[id] })
	return sorted(begun), changed, nil
}

// describeListed describes a snapshot of a listing, which showed whether its
// tags were changed.
func (s *Store) describeListed(ctx context.Context, id manifest.SnapshotID, changed bool) (Description, error) {
	d, err := s.describe(ctx, id)
	if err != nil || !changed {
		return d, err
	}
	tags, err := s.changedTags(ctx, id)
	if err != nil {
		return Description{}, err
	}
	if tags != nil {
		d.Tags = tags.Tags
	}
	return d, nil
}

// listKind lists the snapshots that have a record of one kind, of the whole
// store ("") or of a lineage (its digits). Other keys are nothing of lazyvol's.
func (s *Store) listKind(ctx context.Context, kind, lineage string) (map[manifest.SnapshotID]bool, error) {
	ids := make(map[manifest.SnapshotID]bool)
	err := s.objects.List(ctx, manifest.KindPrefix(kind)+"snap-"+lineage, func(info blockstore.Info) error {
		if id, err := manifest.ParseSnapshotKey(kind, info.Key); err == nil {
			ids[id] = true
		}
		return nil
	})
	return ids, err
}
