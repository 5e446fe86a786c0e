package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// MaxSize bounds a volume, in bytes: EBS's largest. Snapshots may be larger.
const MaxSize = cache.MaxWriteLayerSize

// ErrSize: the size asked for is not one a volume can have. ErrTooSmall: it is smaller
// than the snapshot.
var (
	ErrSize     = errors.New("invalid size")
	ErrTooSmall = errors.New("the size is smaller than the snapshot's")
)

// Create makes a volume: from a committed snapshot, or blank if that is nil. A
// size of 0 is the snapshot's; larger is zeros at the end. blockSize, in bytes,
// is that of a blank volume's lineage, which is encrypted under the key that keyURI
// names unless that is "". It reads a few records and no data. On
// return the volume is durable, and its pin on the snapshot stands.
//
// A failed Create leaves nothing behind, unless the store cannot be told: then
// the half-made volume stays, for Delete to remove with its pin.
func (h *Host) Create(ctx context.Context, from *manifest.SnapshotID, size int64, blockSize int, keyURI string) (manifest.VolumeID, error) {
	if err := checkSize(size, from == nil); err != nil {
		return "", fmt.Errorf("create volume: %w", err)
	}
	storeID, err := h.Store.ID(ctx)
	if err != nil {
		return "", fmt.Errorf("create volume: %w", err)
	}
	r := Record{
		Version: recordVersion, ID: manifest.NewVolumeID(), StoreURL: h.Store.String(), StoreID: storeID,
		Size: size, BlockSize: blockSize, Created: time.Now().UTC(), Creating: true, Base: from, Root: from,
	}
	lock, err := h.beginCreate(&r)
	if err == nil {
		err = h.create(ctx, &r, keyURI)
		if err != nil {
			err = errors.Join(err, h.undoCreate(ctx, &r))
		}
		err = errors.Join(err, lock.Close())
	}
	if err != nil {
		return "", fmt.Errorf("create volume: %w", err)
	}
	return r.ID, nil
}

func checkSize(size int64, blank bool) error {
	if size%manifest.SectorSize != 0 || size < 0 || size > MaxSize {
		return fmt.Errorf("%w: %d is not a multiple of %d up to %d", ErrSize, size, manifest.SectorSize, int64(MaxSize))
	}
	if blank && size == 0 {
		return fmt.Errorf("%w: a blank volume needs one", ErrSize)
	}
	return nil
}

// beginCreate makes the volume's folder with the record of a half-made volume,
// durably, and locks it. Rule: this comes before the pin. Should we die after
// the pin, somebody finds the volume to which it belongs.
func (h *Host) beginCreate(r *Record) (lock io.Closer, err error) {
	dir := Dir(h.State, r.ID)
	if err := h.mustKeep().MkdirAll(layersDir(dir), 0o700); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.FS.RemoveAll(dir))
		}
	}()
	if lock, err = h.lockVolume(r.ID); err != nil {
		return nil, err
	}
	err = r.save(h.mustKeep(), dir)
	if err == nil {
		err = h.FS.SyncDir(VolumesDir(h.State))
	}
	if err == nil {
		err = h.FS.SyncDir(h.State)
	}
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

func (h *Host) create(ctx context.Context, r *Record, keyURI string) error {
	var err error
	if r.Root == nil {
		err = h.createBlank(ctx, r, keyURI)
	} else {
		err = h.createFrom(ctx, r)
	}
	if err != nil {
		return err
	}
	key, err := h.Store.Key(ctx, r.Lineage)
	if err != nil {
		return err
	}
	dir := Dir(h.State, r.ID)
	layer, err := cache.CreateWriteLayer(h.mustKeep(), layerDir(dir, 1), r.Size, h.Boot, key)
	if err != nil {
		return err
	}
	if err := layer.Close(); err != nil {
		return err
	}
	r.Layers, r.Creating = []int64{1}, false
	return r.save(h.mustKeep(), dir)
}

func (h *Host) createBlank(ctx context.Context, r *Record, keyURI string) error {
	lineage, err := h.Store.CreateLineage(ctx, r.BlockSize, keyURI)
	r.Lineage, r.Encryption = lineage.ID, lineage.Encryption
	return err
}

func (h *Host) createFrom(ctx context.Context, r *Record) error {
	img, err := h.Store.Open(ctx, *r.Root, snapshot.Holder{ID: string(r.ID), Host: h.Name})
	if err != nil {
		return err
	}
	g := img.Geometry()
	switch {
	case !img.Pinned:
		return fmt.Errorf("a volume must pin its snapshot in %s: %w", h.Store, blockstore.ErrDenied)
	case r.Size == 0:
		r.Size = g.Size
	case r.Size < g.Size:
		return fmt.Errorf("%w: %d bytes instead of %d", ErrTooSmall, r.Size, g.Size)
	}
	if r.Size > MaxSize {
		return fmt.Errorf("%w: the snapshot's %d bytes are more than a volume can have (%d)", ErrSize, r.Size, int64(MaxSize))
	}
	r.BlockSize, r.BaseSize, r.Lineage = g.BlockSize, g.Size, img.ID().Lineage
	lineage, err := h.Store.Lineage(ctx, r.Lineage) // which Open has read
	if err != nil {
		return err
	}
	r.Encryption, r.RootHash = lineage.Encryption, img.Outcome.RootHash
	return saveRoot(h.mustKeep(), Dir(h.State, r.ID), img)
}

// undoCreate removes a half-made volume. Its pin may stand even if making it
// failed, since the reply may have been lost: so the pin goes first, and while
// that cannot be, the volume stays.
func (h *Host) undoCreate(ctx context.Context, r *Record) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	err := h.release(ctx, r)
	if errors.Is(err, blockstore.ErrDenied) {
		err = nil // who may not remove a pin could not make one
	}
	if err != nil {
		return fmt.Errorf("it is half made; delete %s: %w", r.ID, err)
	}
	return h.removeFolder(r.ID)
}
