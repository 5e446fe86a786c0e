package volume

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// Delete removes a volume, with everything written since its last snapshot,
// its attempt at another one, and its pins. ErrInUse: it is open, or being made
// or deleted. Once it has begun, the volume cannot be opened any more; if it
// fails, Delete goes on where it stopped.
func (h *Host) Delete(ctx context.Context, id manifest.VolumeID) error {
	if _, err := ReadRecord(h.FS, h.State, id); err != nil {
		return err
	}
	lock, err := h.lockVolume(id)
	if err != nil {
		return err
	}
	if err := errors.Join(h.delete(ctx, id), lock.Close()); err != nil {
		return fmt.Errorf("delete %s: %w", id, err)
	}
	return nil
}

// delete removes a volume that is locked.
func (h *Host) delete(ctx context.Context, id manifest.VolumeID) error {
	r, err := ReadRecord(h.FS, h.State, id) // what its last owner left
	if err != nil {
		return err
	}
	if err := h.checkStore(ctx, &r); err != nil {
		return err
	}
	// Rule: nobody opens a volume whose pins are going, or gone.
	r.Deleting = true
	err = r.save(h.mustKeep(), Dir(h.State, id))
	if vfs.IsFull(err) {
		// What is clean of the volume itself is locked against other evictors.
		err = cache.RemoveClean(h.FS, cleanDir(Dir(h.State, id)))
		if err == nil {
			err = r.save(h.mustKeep(), Dir(h.State, id))
		}
	}
	if err != nil {
		return err
	}
	if err := h.release(ctx, &r); err != nil {
		return err
	}
	return h.removeFolder(id)
}

// ErrOtherStore: the store that was given is not the volume's.
var ErrOtherStore = errors.New("it is another store")

// checkStore makes sure that the host's store is the volume's: in another one
// its pins would not be found, and its attempts would be taken for gone.
func (h *Host) checkStore(ctx context.Context, r *Record) error {
	id, err := h.Store.ID(ctx)
	if err != nil {
		return err
	}
	if id != r.StoreID {
		return fmt.Errorf("%s belongs to the store %s, and not to %s: %w", r.ID, r.StoreURL, h.Store, ErrOtherStore)
	}
	return nil
}

// release gives up what a volume has in the store: its attempt and its pins.
func (h *Host) release(ctx context.Context, r *Record) error {
	pinned := slices.Clone(r.Unpin)
	if r.Root != nil {
		pinned = append(pinned, *r.Root)
	}
	if p := r.Pending; p != nil {
		committed, _, err := h.resolve(ctx, p, r.ID, "its volume was deleted")
		if err != nil {
			return err
		}
		if committed {
			pinned = append(pinned, p.Snapshot)
		}
	}
	for _, id := range pinned {
		if err := h.Store.Unpin(ctx, id, string(r.ID)); err != nil {
			return err
		}
	}
	return nil
}

// resolve asks the store what became of a volume's attempt, whose requests have
// all ended. Unless it was committed it never will be, and what it left in the
// store is removed.
func (h *Host) resolve(ctx context.Context, p *Pending, id manifest.VolumeID, why string) (committed bool, _ manifest.Outcome, err error) {
	committed, outcome, err := h.Store.ResolveMember(ctx, p.Set, p.Snapshot, p.Nonce, why)
	if err != nil || committed {
		return committed, outcome, err
	}
	return false, outcome, h.Store.Discard(ctx, p.Snapshot, snapshot.Holder{ID: string(id)})
}

// removeFolder removes a volume's folder, its record last: while anything of
// the volume is there, it is listed and can be deleted.
func (h *Host) removeFolder(id manifest.VolumeID) error {
	dir := Dir(h.State, id)
	names, err := h.FS.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == recordName || name == lockName {
			continue
		}
		if err := h.FS.RemoveAll(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := h.FS.SyncDir(dir); err != nil {
		return err
	}
	if err := h.FS.RemoveAll(dir); err != nil {
		return err
	}
	return h.FS.SyncDir(VolumesDir(h.State))
}
