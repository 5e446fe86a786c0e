package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// listReads is how many records List reads at once: a thousand in sixteen round
// trips.
const listReads = 64

// List returns the snapshots of the store that are not deleted, oldest first;
// aborted ones only if all is set. Their Outcome lacks the root. A snapshot that
// begins, ends or is deleted meanwhile may be shown in either state. Those whose
// records are damaged are left out and named by the error, beside which the
// others are returned.
//
// It takes a few listings, and a request for each record that the RecordCache
// does not have: they never change, but for tags and progress.
func (s *Store) List(ctx context.Context, all bool) ([]Description, error) {
	found, err := s.list(ctx, all)
	if err != nil && found == nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	return found, err
}

func (s *Store) list(ctx context.Context, all bool) ([]Description, error) {
	ids, listed, err := s.listLive(ctx)
	if err != nil {
		return nil, err
	}
	view := New(listed)
	found := make([]Description, len(ids))
	damaged := make([]error, len(ids))
	lineages := make(map[manifest.LineageID]*lineageState)
	g, gctx := newGroup(ctx)
	g.SetLimit(listReads)
	unlessDamaged := func(err error, damage *error) error {
		if isDamage(err) {
			*damage = err
			return nil
		}
		return err
	}
	for i, id := range ids {
		if lineages[id.Lineage] == nil {
			l := new(lineageState)
			lineages[id.Lineage] = l
			g.Go(func() (err error) {
				l.encryption, err = view.encryption(gctx, id.Lineage)
				return unlessDamaged(err, &l.damaged)
			})
		}
		g.Go(func() (err error) {
			_, changed := listed.etags[manifest.MetaKey(id)]
			found[i], err = view.describeListed(gctx, id, changed)
			return unlessDamaged(err, &damaged[i])
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for i, id := range ids {
		l := lineages[id.Lineage]
		found[i].Encryption = l.encryption
		if damaged[i] = cmp.Or(damaged[i], l.damaged); damaged[i] != nil {
			found[i], damaged[i] = Description{}, fmt.Errorf("list %s: %w", id, damaged[i])
		}
	}
	if err := listed.keep(ctx, s); err != nil {
		return nil, err
	}
	found = slices.DeleteFunc(found, func(d Description) bool {
		return d.ID.IsZero() || d.State == Aborted && !all || d.State != Aborted && d.Bin != nil
	})
	slices.SortFunc(found, func(a, b Description) int {
		return cmp.Or(a.Start.Compare(b.Start), strings.Compare(a.ID.String(), b.ID.String()))
	})
	return found, errors.Join(damaged...)
}

// A lineageState is what a list found out of a lineage.
type lineageState struct {
	encryption *manifest.Encryption
	damaged    error
}

// listLive lists the snapshots that were begun and are not deleted, and what
// there is of records.
func (s *Store) listLive(ctx context.Context) (live []manifest.SnapshotID, listed *listedStore, err error) {
	var deleted map[manifest.SnapshotID]bool
	g, gctx := newGroup(ctx)
	g.Go(func() (err error) {
		deleted, err = s.listKind(gctx, manifest.KindTombstones, "")
		return err
	})
	g.Go(func() (err error) {
		listed, err = s.listRecords(gctx)
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, nil, err
	}
	begun := make(map[manifest.SnapshotID]bool)
	for key := range listed.etags {
		if id, err := manifest.ParseSnapshotKey(manifest.KindIntents, key); err == nil && !deleted[id] {
			begun[id] = true
		}
	}
	return sorted(begun), listed, nil
}

// describeListed describes a snapshot of a listing, which showed whether it has
// a meta.
func (s *Store) describeListed(ctx context.Context, id manifest.SnapshotID, changed bool) (Description, error) {
	d, err := s.describe(ctx, id)
	if err != nil || !changed {
		return d, err
	}
	meta, _, err := s.meta(ctx, id)
	if err != nil {
		return Description{}, err
	}
	d.amend(meta)
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
