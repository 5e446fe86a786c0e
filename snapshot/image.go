package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// A Holder is who pins a snapshot: the id of a volume or of a read-only
// session, and the host it is on. The zero Holder pins nothing.
type Holder struct {
	ID   string
	Host string
}

// pin returns the record of the holder's pin on a snapshot.
func (h Holder) pin(id manifest.SnapshotID) manifest.Pin {
	return manifest.Pin{Version: manifest.RecordVersion, Snapshot: id, Holder: h.ID, Host: h.Host, Mounted: now()}
}

// An Image is a committed snapshot opened for reading. It is immutable, and
// its methods may be called concurrently.
type Image struct {
	Outcome manifest.Outcome
	Root    *manifest.Root

	// Pinned says that the holder's pin stands. An image opened with
	// read-only credentials is not pinned: should its snapshot be deleted, its
	// reads begin to fail.
	Pinned bool

	objects blockstore.Store
	key     *crypt.Key // nil: not encrypted
	stored  []byte     // the root as it is stored, if that is sealed
}

// Pin makes a holder's pin on a snapshot stand, which keeps everything the
// snapshot refers to from being reclaimed until Unpin. A deleted snapshot is
// ErrNotFound and gets no pin.
func (s *Store) Pin(ctx context.Context, id manifest.SnapshotID, h Holder) error {
	return s.pin(ctx, h.pin(id))
}

func (s *Store) pin(ctx context.Context, pin manifest.Pin) error {
	id := pin.Snapshot
	if err := s.put(ctx, manifest.PinKey(id, pin.Holder), pin); err != nil {
		return fmt.Errorf("pin %s: %w", id, err)
	}
	// Rule: the pin first, the tombstone second. A reclaimer lists them in
	// the opposite order, so one of the two sees the other.
	deleted, err := s.exists(ctx, manifest.TombstoneKey(id))
	if err != nil {
		return fmt.Errorf("pin %s: look for its tombstone: %w", id, err)
	}
	if deleted {
		if err := s.Unpin(ctx, id, pin.Holder); err != nil {
			return err
		}
		return fmt.Errorf("%w: %s was deleted", ErrNotFound, id)
	}
	return nil
}

// Unpin removes a holder's pin. Absent is fine.
func (s *Store) Unpin(ctx context.Context, id manifest.SnapshotID, holder string) error {
	if err := s.objects.Delete(ctx, manifest.PinKey(id, holder)); err != nil {
		return fmt.Errorf("remove the pin of %s on %s: %w", holder, id, err)
	}
	return nil
}

// Open opens a committed snapshot and pins it for the holder, who must not be
// reading it through a pin already: see KeepPinned. Credentials that may not
// write give an image that is not Pinned. It costs two round trips. Deleted, be
// it into the recycle bin, or unknown is ErrNotFound, and the other states are
// ErrPending and ErrAborted.
//
// If it fails it removes the pin again, for which it takes unpinTimeout at most
// also when ctx has ended. Should that fail too, its error is ErrPinLeft as well,
// and Unpin is the holder's to call.
func (s *Store) Open(ctx context.Context, id manifest.SnapshotID, h Holder) (*Image, error) {
	img := &Image{objects: s.objects}
	refused := h.ID == "" // there is no pin, for certain
	// These are independent, so they share their round trips. None is
	// cancelled for another's failure: whether the pin was made must be known.
	// Of several errors the first in this order tells most.
	var errs [5]error
	var asking sync.WaitGroup
	asking.Go(func() { _, errs[0] = s.ID(ctx) })
	asking.Go(func() { img.key, errs[1] = s.Key(ctx, id.Lineage) })
	asking.Go(func() {
		if h.ID == "" {
			errs[2] = s.checkTombstone(ctx, id)
			return
		}
		err := s.Pin(ctx, id, h)
		img.Pinned = err == nil
		if errors.Is(err, blockstore.ErrDenied) {
			refused = true
			err = s.checkTombstone(ctx, id)
		}
		errs[2] = err
	})
	var root []byte
	asking.Go(func() {
		meta, _, err := s.meta(ctx, id)
		if errors.Is(err, manifest.ErrCorrupt) {
			err = nil // what it tells is no reason not to read what is whole
		}
		errs[3] = cmp.Or(err, checkBin(id, meta))
	})
	asking.Go(func() { img.Outcome, root, errs[4] = s.committedRoot(ctx, id) })
	asking.Wait()
	err := cmp.Or(errs[:]...)
	if err == nil {
		err = img.setRoot(id, root)
	}
	if err == nil {
		return img, nil
	}
	if !refused {
		err = errors.Join(err, s.unpinAfter(ctx, id, h))
	}
	return nil, fmt.Errorf("open %s: %w", id, err)
}

// unpinTimeout bounds the removal of a pin that a failed Open has made.
const unpinTimeout = 10 * time.Second

// unpinAfter removes a pin that may have been made by what failed. Its error is
// ErrPinLeft.
func (s *Store) unpinAfter(ctx context.Context, id manifest.SnapshotID, h Holder) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), unpinTimeout)
	defer cancel()
	if err := s.Unpin(ctx, id, h.ID); err != nil {
		return fmt.Errorf("%w: %w", ErrPinLeft, err)
	}
	return nil
}

func (s *Store) checkTombstone(ctx context.Context, id manifest.SnapshotID) error {
	deleted, err := s.exists(ctx, manifest.TombstoneKey(id))
	if err != nil {
		return fmt.Errorf("look for the tombstone of %s: %w", id, err)
	}
	if deleted {
		return fmt.Errorf("%w: %s was deleted", ErrNotFound, id)
	}
	return nil
}

// committed returns the image of a committed snapshot, whether or not it is
// tombstoned. After an error the image has the outcome as far as that was read.
func (s *Store) committed(ctx context.Context, id manifest.SnapshotID) (*Image, error) {
	img := &Image{objects: s.objects}
	var data []byte
	var err error
	if img.Outcome, data, err = s.committedRoot(ctx, id); err != nil {
		return img, err
	}
	if img.key, err = s.Key(ctx, id.Lineage); err != nil {
		return img, err
	}
	return img, img.setRoot(id, data)
}

// committedRoot reads the outcome of a committed snapshot, and its root as it is stored.
func (s *Store) committedRoot(ctx context.Context, id manifest.SnapshotID) (manifest.Outcome, []byte, error) {
	outcome, err := s.outcome(ctx, id)
	if errors.Is(err, blockstore.ErrNotExist) {
		begun, err := s.exists(ctx, manifest.IntentKey(id))
		switch {
		case err != nil:
			return outcome, nil, err
		case begun:
			return outcome, nil, fmt.Errorf("%w: %s", ErrPending, id)
		}
		return outcome, nil, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	if err != nil {
		return outcome, nil, err
	}
	if outcome.State != manifest.StateCommitted {
		return outcome, nil, fmt.Errorf("%w: %s (%s)", ErrAborted, id, outcome.Why)
	}
	root, err := s.rootOf(ctx, outcome)
	return outcome, root, err
}

// rootOf returns a committed snapshot's root as it is stored, not verified.
func (s *Store) rootOf(ctx context.Context, outcome manifest.Outcome) ([]byte, error) {
	if len(outcome.Root) > 0 {
		return outcome.Root, nil
	}
	data, _, err := s.objects.Get(ctx, manifest.RootKey(outcome.Snapshot), manifest.MaxRootLength+crypt.ObjectOverhead)
	if err != nil {
		return nil, fmt.Errorf("read the root of %s: %w", outcome.Snapshot, err)
	}
	return data, nil
}

// setRoot gives the image its root, as it is stored, after comparing it with what the
// outcome says.
func (m *Image) setRoot(id manifest.SnapshotID, data []byte) (err error) {
	if m.Root, err = decodeRoot(id, m.Outcome, data, m.key); err == nil && m.key != nil {
		m.stored = data
	}
	return err
}

// Key returns the data key of the image's lineage; nil if that is not encrypted.
func (m *Image) Key() *crypt.Key { return m.key }

// StoredRoot returns the root as it is stored, sealed if it is.
func (m *Image) StoredRoot() []byte {
	if m.key != nil {
		return m.stored
	}
	return m.Root.Encode()
}

// Through returns the image as read through another object store, that holds the same.
func (m *Image) Through(objects blockstore.Store) *Image {
	other := *m
	other.objects = objects
	return &other
}

// decodeRoot decodes a committed snapshot's root, after comparing it with what
// the outcome says.
func decodeRoot(id manifest.SnapshotID, outcome manifest.Outcome, data []byte, key *crypt.Key) (*manifest.Root, error) {
	if manifest.Sum(data) != manifest.Hash(outcome.RootHash) {
		return nil, fmt.Errorf("the root of %s does not have the hash in its outcome: %w", id, manifest.ErrCorrupt)
	}
	root, err := openRoot(id, data, key)
	if err != nil {
		return nil, err
	}
	if root.Snapshot != id || root.Geometry.Size != outcome.Size || root.Geometry.BlockSize != outcome.BlockSize {
		return nil, fmt.Errorf("the root of %s is that of another snapshot: %w", id, manifest.ErrCorrupt)
	}
	return root, nil
}

func openRoot(id manifest.SnapshotID, data []byte, key *crypt.Key) (*manifest.Root, error) {
	data, err := key.OpenObject(rootName(id), data)
	if err != nil {
		return nil, fmt.Errorf("read the root of %s: %w: %w", id, manifest.ErrCorrupt, err)
	}
	root, err := manifest.DecodeRoot(data)
	if err != nil {
		return nil, fmt.Errorf("read the root of %s: %w", id, err)
	}
	return root, nil
}

// ID returns the snapshot's id.
func (m *Image) ID() manifest.SnapshotID { return m.Root.Snapshot }

// Geometry returns the snapshot's size and block size.
func (m *Image) Geometry() manifest.Geometry { return m.Root.Geometry }

// FetchLeaf reads a leaf from the store and verifies it.
func (m *Image) FetchLeaf(ctx context.Context, ref manifest.LeafRef) (*manifest.Leaf, error) {
	blocks := m.Root.Geometry.LeafLen(ref.Leaf)
	data, err := m.fetchIndex(ctx, ref.Owner, ref.Offset, manifest.EncodedLeafLen(blocks), ref.Hash)
	if err != nil {
		return nil, fmt.Errorf("read leaf %d of %s: %w", ref.Leaf, m.ID(), err)
	}
	leaf, err := manifest.DecodeLeaf(data)
	if err != nil {
		return nil, fmt.Errorf("read leaf %d of %s: %w", ref.Leaf, m.ID(), err)
	}
	if leaf.Len() != blocks {
		return nil, fmt.Errorf("leaf %d of %s has %d blocks instead of %d: %w", ref.Leaf, m.ID(), leaf.Len(), blocks, manifest.ErrCorrupt)
	}
	return leaf, nil
}

// fetchSection reads a section of the footer and verifies it.
func (m *Image) fetchSection(ctx context.Context, ref manifest.SectionRef) (*manifest.Section, error) {
	data, err := m.fetchIndex(ctx, ref.Home, ref.Offset, int(ref.Length), ref.Hash)
	if err == nil {
		var section *manifest.Section
		section, err = manifest.DecodeSection(data)
		if err == nil && (section.Owner() != ref.Owner || section.Number() != ref.Section) {
			err = fmt.Errorf("it is section %d of owner %09x: %w", section.Number(), section.Owner(), manifest.ErrCorrupt)
		}
		if err == nil {
			return section, nil
		}
	}
	return nil, fmt.Errorf("read the section of packs %d to %d of owner %09x in %s: %w",
		ref.Section*manifest.SectionPacks, (ref.Section+1)*manifest.SectionPacks-1, ref.Owner, m.ID(), err)
}

// fetchIndex reads length bytes of an owner's leaves stream and checks their
// hash.
func (m *Image) fetchIndex(ctx context.Context, owner uint64, offset int64, length int, hash manifest.Hash) ([]byte, error) {
	part, within := manifest.SplitOffset(offset)
	id := manifest.SnapshotID{Lineage: m.ID().Lineage, Serial: owner}
	data := make([]byte, length+m.key.ObjectOverhead())
	if err := m.objects.ReadRange(ctx, manifest.LeavesKey(id, part), within, data); err != nil {
		return nil, err
	}
	return openIndex(m.key, id, data, hash)
}

// ImageOf returns the image of a snapshot whose root, as it is stored, is at hand and
// has this hash, without asking the store. The caller sees to the pin.
func (s *Store) ImageOf(id manifest.SnapshotID, data []byte, hash manifest.Hash, key *crypt.Key) (*Image, error) {
	if manifest.Sum(data) != hash {
		return nil, fmt.Errorf("the root of %s does not have its hash: %w", id, manifest.ErrCorrupt)
	}
	root, err := openRoot(id, data, key)
	if err == nil && root.Snapshot != id {
		err = fmt.Errorf("the root of %s is that of %s: %w", id, root.Snapshot, manifest.ErrCorrupt)
	}
	if err != nil {
		return nil, err
	}
	img := &Image{Root: root, objects: s.objects, key: key}
	if key != nil {
		img.stored = data
	}
	return img, nil
}

// Load returns the image of a committed outcome. The caller sees to the pin.
func (s *Store) Load(ctx context.Context, outcome manifest.Outcome) (*Image, error) {
	data, err := s.rootOf(ctx, outcome)
	if err != nil {
		return nil, err
	}
	img := &Image{Outcome: outcome, objects: s.objects}
	if img.key, err = s.Key(ctx, outcome.Snapshot.Lineage); err != nil {
		return nil, err
	}
	if err := img.setRoot(outcome.Snapshot, data); err != nil {
		return nil, err
	}
	return img, nil
}

// RootOf returns the root of a committed snapshot, deleted or not, as it is stored,
// verified against its outcome. The caller's pin stands.
func (s *Store) RootOf(ctx context.Context, id manifest.SnapshotID) ([]byte, error) {
	img, err := s.committed(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("fetch the root of %s: %w", id, err)
	}
	return img.StoredRoot(), nil
}

// KeepPinned makes sure that the holder's pin on a snapshot, made before,
// stands: if it is gone the snapshot is pinned anew, and ErrNotFound if it was
// deleted meanwhile. After any other error it may be called again.
func (s *Store) KeepPinned(ctx context.Context, id manifest.SnapshotID, h Holder) error {
	stands, err := s.Pinned(ctx, id, h)
	if err != nil || stands {
		return err
	}
	// Rule: a pin made anew counts once the tombstone was looked for after it.
	// Should we not come to that, or not get rid of a pin that came too late,
	// its record says that it does not count, and the next call goes on.
	pin := h.pin(id)
	pin.Unchecked = true
	if err := s.pin(ctx, pin); err != nil {
		return err
	}
	pin.Unchecked = false
	if err := s.put(ctx, manifest.PinKey(id, h.ID), pin); err != nil {
		return fmt.Errorf("pin %s anew: %w", id, err)
	}
	return nil
}

// Pinned reports whether the holder's pin on a snapshot stands and counts.
func (s *Store) Pinned(ctx context.Context, id manifest.SnapshotID, h Holder) (bool, error) {
	pin, _, err := getRecord[manifest.Pin](ctx, s.objects, manifest.PinKey(id, h.ID))
	switch {
	case errors.Is(err, blockstore.ErrNotExist):
		return false, nil
	case errors.Is(err, manifest.ErrCorrupt):
		return true, nil // the key is the pin
	case err != nil:
		return false, fmt.Errorf("look for the pin of %s on %s: %w", h.ID, id, err)
	}
	return !pin.Unchecked, nil
}
