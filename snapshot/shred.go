package snapshot

import (
	"context"
	"errors"
	"fmt"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

var (
	// ErrNotEncrypted: the lineage has no key.
	ErrNotEncrypted = errors.New("lineage is not encrypted")

	// ErrPinned: somebody still reads what is to go.
	ErrPinned = errors.New("lineage is in use")
)

// Shred destroys the wrapped data key of an encrypted lineage, and so everything in it:
// nobody can read it again, but for hosts whose volumes keep a copy of the wrapped key,
// and buckets that keep former versions. The next Reclaim frees the space. ErrNotFound,
// ErrNotEncrypted; ErrLocked if a lock is in force on one of its snapshots; ErrPinned,
// unless pinned, if a volume or a mount has one in use. A lineage that was shredded
// already is fine. A lock that is set at the same moment may come too late.
func (s *Store) Shred(ctx context.Context, id manifest.LineageID, pinned bool) error {
	err := s.shred(ctx, id, pinned)
	if err != nil {
		return fmt.Errorf("shred lineage %s: %w", id, err)
	}
	return nil
}

func (s *Store) shred(ctx context.Context, id manifest.LineageID, pinned bool) error {
	record, etag, err := getRecord[manifest.LineageRecord](ctx, s.objects, manifest.LineageKey(id))
	switch {
	case errors.Is(err, blockstore.ErrNotExist):
		return fmt.Errorf("%w: the store has no such lineage", ErrNotFound)
	case err != nil:
		return err
	case record.ID != id:
		return fmt.Errorf("%w: its record is that of %s", manifest.ErrCorrupt, record.ID)
	case record.Encryption == nil:
		return ErrNotEncrypted
	case record.Encryption.Shredded:
		return nil
	}
	w, err := s.survey(ctx, id, make(sweptSet))
	if err != nil {
		return err
	}
	for _, pin := range w.pins {
		if !pinned && !w.aborted(pin.Snapshot) {
			return fmt.Errorf("%w: %s is pinned by %s", ErrPinned, pin.Snapshot, pin.Holder)
		}
	}
	now, err := s.Now(ctx)
	if err != nil {
		return err
	}
	for _, root := range w.roots() {
		d, err := s.Describe(ctx, root)
		if err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		if l := d.LockState(now); l != nil && l.State != manifest.LockStateExpired {
			return l.refuse(root)
		}
	}
	record.Encryption = &manifest.Encryption{KeyURI: record.Encryption.KeyURI, Shredded: true}
	data, err := manifest.EncodeRecord(record)
	if err == nil {
		_, err = s.objects.Put(ctx, manifest.LineageKey(id), data, blockstore.IfMatch(etag))
	}
	if errors.Is(err, blockstore.ErrChanged) { // perhaps by ourselves, and the reply was lost
		there, thereErr := s.encryption(ctx, id)
		if thereErr == nil && there != nil && there.Shredded {
			err = nil
		}
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.lineages, id)
	delete(s.dataKeys, id)
	return nil
}

// reclaimShredded removes all data of a lineage that was shredded: whoever refers to
// it, nobody can read it. Its records stay.
func (s *Store) reclaimShredded(ctx context.Context, result *Reclaimed) error {
	var keys []string
	var sizes int64
	remove := func() error {
		if err := s.objects.Delete(ctx, keys...); err != nil {
			return err
		}
		result.Objects += len(keys)
		result.Bytes += sizes
		keys, sizes = keys[:0], 0
		return nil
	}
	for _, kind := range []string{manifest.KindData, manifest.KindTraces} {
		err := s.objects.List(ctx, manifest.LineagePrefix(kind, result.Lineage), func(o blockstore.Info) error {
			keys, sizes = append(keys, o.Key), sizes+o.Size
			if len(keys) < deleteBatch {
				return nil
			}
			return remove()
		})
		if err == nil && len(keys) > 0 {
			err = remove()
		}
		if err != nil {
			return fmt.Errorf("remove what was shredded: %w", err)
		}
	}
	return nil
}
