package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

var (
	// ErrInUse: another process has the volume open, is making it or deleting it.
	ErrInUse = errors.New("volume is in use")

	// ErrBusy: a snapshot of the volume is being made already.
	ErrBusy = errors.New("a snapshot of this volume is being made")
)

// A Volume is a writable Device, and the only one who has its folder open.
type Volume struct {
	*Device

	dir    string
	holder snapshot.Holder
	lock   io.Closer

	// snapshotting is held by Snapshot, which never waits for it: one at a time
	// is enough. Taken first.
	snapshotting sync.Mutex

	// making is held while a snapshot is made or settled: by whoever changes
	// the view or the record. It guards the fields below, too. Taken second.
	making sync.Mutex
	closed bool  // written under sizing, too
	newest int64 // the highest number that a write layer's folder may have

	// sizing is held while the volume grows, and while a write layer is made: all
	// layers are as large as the volume. Taken third.
	sizing sync.Mutex

	mu     sync.Mutex // guards record, which mirrors volume.json
	record Record
}

// OpenVolume opens a volume for this process alone. It asks the store nothing, as
// Settle does that, unless the local copy of its root is damaged. What was written
// before is there: all of it if this is the boot in which it was written, else all
// that was synced. ErrNotFound, ErrInUse.
func (h *Host) OpenVolume(id manifest.VolumeID) (_ *Volume, err error) {
	dir := Dir(h.State, id)
	if _, err := ReadRecord(h.FS, h.State, id); err != nil {
		return nil, err
	}
	lock, err := h.lockVolume(id)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open %s: %w", id, err), lock.Close())
		}
	}()
	r, err := ReadRecord(h.FS, h.State, id) // what its last owner left
	switch {
	case err != nil:
		return nil, err
	case r.Creating:
		return nil, errors.New("its creation was interrupted; delete it")
	case r.Deleting:
		return nil, errors.New("its deletion was interrupted; delete it again")
	}
	// Rule: the record is durable before what it does not name is removed. Its
	// owner may have died, or failed, before it was.
	if err := h.FS.SyncDir(dir); err != nil {
		return nil, err
	}
	if err := h.removeLeftovers(dir, &r); err != nil {
		return nil, err
	}
	v := &Volume{
		dir: dir, lock: lock, holder: snapshot.Holder{ID: string(id), Host: h.Name},
		record: r, newest: slices.Max(r.Layers),
	}
	if v.Device, err = h.openDevice(dir, &r); err != nil {
		return nil, err
	}
	return v, nil
}

const lockName = "lock"

// lockVolume locks a volume's folder, which exists, for this process alone.
func (h *Host) lockVolume(id manifest.VolumeID) (io.Closer, error) {
	lock, err := h.mustKeep().Lock(filepath.Join(Dir(h.State, id), lockName), true)
	if errors.Is(err, vfs.ErrLocked) {
		lock, err = h.lockUnevicted(filepath.Join(Dir(h.State, id), lockName))
	}
	switch {
	case errors.Is(err, vfs.ErrLocked):
		return nil, fmt.Errorf("%w: %s is mounted, or a command is working on it", ErrInUse, id)
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %s was deleted just now", ErrNotFound, id)
	case err != nil:
		return nil, fmt.Errorf("lock %s: %w", id, err)
	}
	return lock, nil
}

// lockUnevicted takes a lock that may be held only by an evictor, for a moment: it
// tries while no evictor is at work.
func (h *Host) lockUnevicted(name string) (lock io.Closer, err error) {
	for end := time.Now().Add(removalPatience); ; time.Sleep(evictorPoll) {
		none, err := h.mustKeep().Lock(filepath.Join(h.State, evictorName), false)
		if err == nil {
			lock, err := h.mustKeep().Lock(name, true)
			return lock, errors.Join(err, none.Close())
		}
		if !errors.Is(err, vfs.ErrLocked) || time.Now().After(end) {
			return nil, err
		}
	}
}

// openDevice opens all that a record names.
func (h *Host) openDevice(dir string, r *Record) (_ *Device, err error) {
	h.Store.Recall(r.lineage())
	key, err := h.Store.Key(context.Background(), r.Lineage)
	if err != nil {
		return nil, err
	}
	d := h.newDevice(string(r.ID), r.geometry(), r.Lineage, key)
	var opened []io.Closer
	defer func() {
		if err != nil {
			d.unshare()
			for _, c := range slices.Backward(opened) {
				err = errors.Join(err, c.Close())
			}
		}
	}()
	// What is clean comes first, so that it can be evicted if the rest finds the
	// disk full.
	d.writes, err = openWrites(h, dir, r.ID, r.geometry(), key)
	if err != nil {
		return nil, err
	}
	opened = append(opened, d.writes)
	d.shareWrites()
	if r.Base != nil {
		d.base, err = h.openBase(r.StoreID, *r.Base, manifest.Geometry{Size: r.BaseSize, BlockSize: r.BlockSize}, key)
		if err != nil {
			return nil, err
		}
		opened = append(opened, d.base)
		d.shareBase()
	}

	var image *snapshot.Image
	if r.Root != nil {
		if image, err = h.root(dir, r, key); err != nil {
			return nil, err
		}
	}
	var layers [2]*cache.WriteLayer // open, sealed
	for i, n := range slices.Backward(r.Layers) {
		layer, err := cache.OpenWriteLayer(h.mustKeep(), layerDir(dir, n), r.Size, h.Boot, key)
		if err != nil {
			return nil, err
		}
		layers[len(r.Layers)-1-i] = layer
		opened = append(opened, layer)
	}
	d.view.view = newView(layers[0], layers[1], image)
	d.opened.Store(true)
	return d, nil
}

// removeLeftovers removes the write layers and roots that the record does not
// name, which a crash left behind.
func (h *Host) removeLeftovers(dir string, r *Record) error {
	keep := make(map[string]bool)
	for _, n := range r.Layers {
		keep[strconv.FormatInt(n, 10)] = true
	}
	names, err := h.FS.ReadDir(layersDir(dir))
	if err != nil {
		return err
	}
	for _, name := range names {
		if keep[name] {
			continue
		}
		if err := h.FS.RemoveAll(filepath.Join(layersDir(dir), name)); err != nil {
			return err
		}
	}
	if names, err = h.FS.ReadDir(dir); err != nil {
		return err
	}
	for _, name := range names {
		if !strings.HasPrefix(name, rootPrefix) || r.Root != nil && name == rootPrefix+r.Root.String() {
			continue
		}
		if err := h.FS.Remove(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// Record returns the volume's record as it is now.
func (v *Volume) Record() Record {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.record.clone()
}

// update changes the record, durably. After an error the disk may have either
// version, and this process goes on with the one before.
func (v *Volume) update(change func(r *Record)) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	r := v.record.clone()
	change(&r)
	if err := r.save(v.host.mustKeep(), v.dir); err != nil {
		return err
	}
	v.record = r
	return nil
}

// swap makes the view that next returns the one that new reads and writes get,
// unless next returns nil. Writers are stopped for as long as the writes under
// way take, and next: it returns how long that was. It also returns a channel
// that is closed when the last read through earlier views has ended, nil if the
// view stayed.
func (v *Volume) swap(next func(now *view) *view) (drained <-chan struct{}, stopped time.Duration) {
	v.fill.Lock()
	defer v.fill.Unlock()
	begin := time.Now()
	v.writes.cut.Lock()
	defer v.writes.cut.Unlock()
	now := v.view.acquire()
	defer now.release()
	then := next(now)
	if then == nil {
		return nil, time.Since(begin)
	}
	return v.view.replace(then), time.Since(begin)
}

// Close makes everything written durable and closes the volume. It waits for a
// snapshot that is being made, whose context is its maker's to end. Reads and
// writes must have ended.
func (v *Volume) Close() error {
	v.making.Lock()
	defer v.making.Unlock()
	if v.closed {
		return fmt.Errorf("close %s: %w", v.name, errClosed)
	}
	v.sizing.Lock() // waits for a Resize
	v.closed = true
	v.sizing.Unlock()
	err := v.Sync(context.Background())
	v.work.stop()
	v.unshare()
	now := v.view.acquire()
	defer now.release()
	err = errors.Join(err, now.open.Close())
	if now.sealed != nil {
		err = errors.Join(err, now.sealed.Close())
	}
	err = errors.Join(err, v.writes.Close())
	if v.base != nil {
		err = errors.Join(err, v.base.Close())
	}
	if err = errors.Join(err, v.lock.Close()); err != nil {
		return fmt.Errorf("close %s: %w", v.name, err)
	}
	return nil
}
