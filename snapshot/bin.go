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

// ListBin returns the completed snapshots in the recycle bin, those first that
// leave it first. Those whose records are damaged are left out and named by the
// error, beside which the others are returned.
func (s *Store) ListBin(ctx context.Context) ([]Description, error) {
	deleted, err := s.listKind(ctx, manifest.KindTombstones, "")
	if err != nil {
		return nil, fmt.Errorf("list the recycle bin: %w", err)
	}
	changed, err := s.listKind(ctx, manifest.KindMeta, "")
	if err != nil {
		return nil, fmt.Errorf("list the recycle bin: %w", err)
	}
	maps.DeleteFunc(changed, func(id manifest.SnapshotID, _ bool) bool { return deleted[id] })
	ids := sorted(changed)
	found := make([]Description, len(ids))
	damaged := make([]error, len(ids))
	g, gctx := newGroup(ctx)
	g.SetLimit(parallel)
	for i, id := range ids {
		g.Go(func() error {
			d, err := s.describeBinned(gctx, id)
			if isDamage(err) {
				damaged[i], err = fmt.Errorf("list %s: %w", id, err), nil
			}
			found[i] = d
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("list the recycle bin: %w", err)
	}
	found = slices.DeleteFunc(found, func(d Description) bool { return d.Bin == nil || d.Bin.Expired || d.State != Completed })
	slices.SortFunc(found, func(a, b Description) int {
		return cmp.Or(a.Bin.Until.Compare(b.Bin.Until), strings.Compare(a.ID.String(), b.ID.String()))
	})
	return found, errors.Join(damaged...)
}

// describeBinned describes a snapshot if it is in the recycle bin.
func (s *Store) describeBinned(ctx context.Context, id manifest.SnapshotID) (Description, error) {
	meta, _, err := s.meta(ctx, id)
	if err != nil || meta == nil || meta.Bin == nil {
		return Description{}, err
	}
	d, err := s.describe(ctx, id)
	if errors.Is(err, ErrNotFound) {
		return Description{}, nil // nothing but its meta, that of an attempt that never began
	}
	d.amend(meta)
	return d, err
}

// RestoreDeleted brings a snapshot back from the recycle bin, as it was: with
// its tags, and shared with the same accounts. ErrNotFound: it is unknown, or a
// reclaim has found its time over; from then on nothing brings it back.
// ErrNotInBin: it was not deleted.
func (s *Store) RestoreDeleted(ctx context.Context, id manifest.SnapshotID) error {
	if err := s.restoreDeleted(ctx, id); err != nil {
		return fmt.Errorf("restore %s: %w", id, err)
	}
	return nil
}

func (s *Store) restoreDeleted(ctx context.Context, id manifest.SnapshotID) error {
	d, err := s.existing(ctx, id)
	if err != nil {
		return err
	}
	tried := false
	err = s.changeMeta(ctx, d, func(m *manifest.Meta) error {
		switch {
		case m.Bin == nil && tried: // perhaps by ourselves, and the reply was lost
			return nil
		case m.Bin == nil:
			return fmt.Errorf("%w: %s", ErrNotInBin, id)
		case m.Bin.Expired:
			return checkBin(id, m)
		}
		m.Bin, tried = nil, true
		return nil
	})
	if err != nil && !errors.Is(err, ErrNotInBin) {
		return err
	}
	// Rule: the tombstone last. A meta without a word of the bin may be none at
	// all: that of what is deleted for good is removed, and its tombstone stays.
	return cmp.Or(s.checkTombstone(ctx, id), err)
}

// empty deletes for good the snapshots of the lineage whose time in the recycle
// bin is over, and those whose deletion was begun and not finished. It returns
// how many, and as an error of its own which records it could not read: what
// they are of stays as it is.
func (w *survey) empty(ctx context.Context) (n int, damaged, err error) {
	changed, err := w.store.listKind(ctx, manifest.KindMeta, w.lineage.String())
	if err != nil {
		return 0, nil, err
	}
	for id := range changed {
		if w.tombstones[id] || w.aborted(id) {
			delete(changed, id) // its meta only waits to be removed
		}
	}
	ids := sorted(changed)
	metas, damaged, err := w.readMetas(ctx, ids)
	if err != nil {
		return 0, damaged, err
	}
	for i, m := range metas {
		over, err := w.expire(ctx, ids[i], m)
		if err == nil && over {
			err = w.store.bury(ctx, ids[i])
			n++
		}
		if err != nil {
			return n, damaged, fmt.Errorf("delete %s, whose time in the recycle bin is over: %w", ids[i], err)
		}
	}
	return n, damaged, nil
}

// A taggedMeta is a record of what of a snapshot may change; meta is nil if it
// is gone, or damaged.
type taggedMeta struct {
	meta *manifest.Meta
	etag string
}

// readMetas reads the records of what may change of some snapshots.
func (w *survey) readMetas(ctx context.Context, ids []manifest.SnapshotID) (metas []taggedMeta, damaged, err error) {
	metas = make([]taggedMeta, len(ids))
	errs := make([]error, len(ids))
	g, gctx := newGroup(ctx)
	g.SetLimit(parallel)
	for i, id := range ids {
		g.Go(func() (err error) {
			metas[i].meta, metas[i].etag, err = w.store.meta(gctx, id)
			if isDamage(err) {
				errs[i], err = err, nil
			}
			return err
		})
	}
	err = g.Wait()
	return metas, errors.Join(errs...), err
}

// expire reports whether a snapshot is deleted for good, and makes it so when
// its time in the recycle bin is over.
//
// Rule: swapped into meta before the tombstone. Who restores the snapshot swaps
// that too: one of the two is refused.
func (w *survey) expire(ctx context.Context, id manifest.SnapshotID, m taggedMeta) (bool, error) {
	if m.meta == nil || m.meta.Bin == nil || m.meta.Bin.Expired {
		return m.meta != nil && m.meta.Bin != nil, nil
	}
	now, err := w.store.Now(ctx)
	if err != nil || now.Before(m.meta.Bin.Until) {
		return false, err
	}
	bin := *m.meta.Bin
	bin.Expired = true
	m.meta.Bin = &bin
	data, err := manifest.EncodeRecord(*m.meta)
	if err != nil {
		return false, err
	}
	_, err = w.store.objects.Put(ctx, manifest.MetaKey(id), data, blockstore.IfMatch(m.etag))
	if errors.Is(err, blockstore.ErrChanged) {
		return false, nil // restored, or tagged, or expired by another reclaim: the next one sees
	}
	return err == nil, err
}
