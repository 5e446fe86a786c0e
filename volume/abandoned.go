package volume

import (
	"errors"
	"fmt"
	"io/fs"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// RemoveAbandoned removes the folders of volumes that have no record: those
// whose Create was killed before it wrote one, and so before it pinned anything,
// and those whose Delete was killed when the record was gone. Neither leaves
// anything else: a folder with a layer in it lost its record some other way, and
// may hold what is nowhere else, so it stays, and the error names it. A Create
// that is just beginning may find its folder taken, and fails with ErrInUse or
// ErrNotFound.
func (h *Host) RemoveAbandoned() error {
	names, err := h.FS.ReadDir(VolumesDir(h.State))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var failed error
	for _, name := range names {
		id, err := manifest.ParseVolumeID(name)
		if err != nil {
			continue
		}
		if recorded, err := h.hasRecord(id); recorded || err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		lock, err := h.lockVolume(id)
		if err != nil {
			continue // somebody is at it, or it is gone
		}
		failed = errors.Join(failed, h.removeAbandoned(id), lock.Close())
	}
	return failed
}

func (h *Host) hasRecord(id manifest.VolumeID) (bool, error) {
	_, err := ReadRecord(h.FS, h.State, id)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return true, err
}

// removeAbandoned removes a folder that is locked, unless it has a record by
// now, or a layer.
func (h *Host) removeAbandoned(id manifest.VolumeID) error {
	if recorded, err := h.hasRecord(id); recorded || err != nil {
		return err
	}
	dir := Dir(h.State, id)
	layers, err := h.FS.ReadDir(layersDir(dir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(layers) > 0 {
		return fmt.Errorf("%s has no %s, and is left alone as it holds a write layer", dir, recordName)
	}
	return vfs.RemoveLocked(h.FS, dir, lockName)
}
