package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// meta returns what of a snapshot may change, and its ETag; nil if nothing of
// it ever did.
func (s *Store) meta(ctx context.Context, id manifest.SnapshotID) (*manifest.Meta, string, error) {
	meta, etag, err := getRecord[manifest.Meta](ctx, s.objects, manifest.MetaKey(id))
	if errors.Is(err, blockstore.ErrNotExist) {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	return &meta, etag, nil
}

// changeMeta changes by compare-and-swap what of a snapshot may change, whose
// other records say what d is. change gets it as it is, and is called again with
// what others made of it meanwhile: so it depends on nothing else.
//
// That a change took effect does not tell that the snapshot is still there: a
// reclaim may have removed the record of a deleted one before.
func (s *Store) changeMeta(ctx context.Context, d Description, change func(*manifest.Meta) error) error {
	const tries = 16 // each failed one means that another change took effect
	for range tries {
		err := s.tryChangeMeta(ctx, d, change)
		if !errors.Is(err, blockstore.ErrChanged) && !errors.Is(err, blockstore.ErrExists) {
			return err
		}
	}
	return fmt.Errorf("others changed it %d times meanwhile; try again", tries)
}

func (s *Store) tryChangeMeta(ctx context.Context, d Description, change func(*manifest.Meta) error) error {
	meta, etag, err := s.meta(ctx, d.ID)
	if err != nil {
		return err
	}
	condition := blockstore.IfMatch(etag)
	var before []byte
	if meta == nil {
		condition = blockstore.IfAbsent
		meta = &manifest.Meta{Version: manifest.RecordVersion, Tags: d.Tags}
	} else if before, err = manifest.EncodeRecord(*meta); err != nil {
		return err
	}
	if err := change(meta); err != nil {
		return err
	}
	data, err := manifest.EncodeRecord(*meta)
	if err != nil || bytes.Equal(data, before) {
		return err
	}
	_, err = s.objects.Put(ctx, manifest.MetaKey(d.ID), data, condition)
	return err
}

// binned is ErrNotFound for a snapshot that was deleted, be it into the recycle
// bin. An aborted one stays an aborted one.
func (d *Description) binned() error {
	if d.State == Aborted {
		return nil
	}
	return checkBin(d.ID, &manifest.Meta{Bin: d.Bin})
}

// amend makes of a description what the snapshot's meta changes; nil is none.
func (d *Description) amend(meta *manifest.Meta) {
	if meta != nil {
		d.Tags, d.Lock, d.Bin, d.Shares = meta.Tags, meta.Lock, meta.Bin, meta.Shares
	}
}

// existing describes a snapshot that may be in the recycle bin, by those of its
// records that never change. Deleted and unknown ones are ErrNotFound, and
// aborted ones ErrAborted.
func (s *Store) existing(ctx context.Context, id manifest.SnapshotID) (Description, error) {
	if err := s.checkTombstone(ctx, id); err != nil {
		return Description{}, err
	}
	d, err := s.describe(ctx, id)
	if err == nil && d.State == Aborted {
		err = fmt.Errorf("%w: %s (%s)", ErrAborted, id, d.Why)
	}
	return d, err
}

// checkBin is ErrNotFound for a snapshot that was deleted, be it into the
// recycle bin.
func checkBin(id manifest.SnapshotID, meta *manifest.Meta) error {
	switch {
	case meta == nil || meta.Bin == nil:
		return nil
	case meta.Bin.Expired:
		return fmt.Errorf("%w: %s was deleted", ErrNotFound, id)
	}
	return fmt.Errorf("%w: %s, until %s", ErrInBin, id, meta.Bin.Until.Format(timeFormat))
}

// timeFormat is how messages show a time.
const timeFormat = "2006-01-02 15:04:05 MST"
