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
	"sync"
	"syscall"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// MaxSize bounds a volume, in bytes: EBS's largest. Snapshots may be larger.
const MaxSize = 64 << 40

var (
	// ErrInUse: another process has the volume open.
	ErrInUse = errors.New("volume is in use")

	// ErrBusy: a snapshot of the volume is being made already.
	ErrBusy = errors.New("a snapshot of this volume is being made")

	// ErrSize: the size asked for is not one a volume can have.
	ErrSize = errors.New("invalid size")
)

// A Volume is a writable Device, and the only one who has its folder open.
type Volume struct {
	*Device

	dir    string
	holder snapshot.Holder
	lock   io.Closer

	making sync.Mutex // held while a snapshot is made, or settled

	mu     sync.Mutex // guards record, which mirrors volume.json
	record Record
}

// Create makes a volume: from a committed snapshot, or blank if that is nil. A
// size of 0 is the snapshot's; larger is zeros at the end. It reads a few
// records and no data. On return the volume is durable, and its pin on the
// snapshot stands.
func (h *Host) Create(ctx context.Context, from *manifest.SnapshotID, size int64, blockSize int) (_ manifest.VolumeID, err error) {
	if size%manifest.SectorSize != 0 || size < 0 || size > MaxSize {
		return "", fmt.Errorf("%w: %d is not a multiple of %d up to %d", ErrSize, size, manifest.SectorSize, int64(MaxSize))
	}
	storeID, err := h.Store.ID(ctx)
	if err != nil {
		return "", err
	}
	r := Record{
		Version: recordVersion, ID: manifest.NewVolumeID(), StoreURL: h.Store.String(), StoreID: storeID,
		Size: size, BlockSize: blockSize, Created: time.Now().UTC(), Creating: true, Base: from, Root: from,
	}
	dir := Dir(h.State, r.ID)
	if err := h.FS.MkdirAll(layersDir(dir), 0o700); err != nil {
		return "", fmt.Errorf("create volume: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("create volume: %w", err), h.FS.RemoveAll(dir))
		}
	}()
	// The record first: should we die after the pin, deleting the half-made
	// volume removes it.
	if err := r.save(h.FS, dir); err != nil {
		return "", err
	}
	if from == nil {
		err = h.createBlank(ctx, &r)
	} else {
		err = h.createFrom(ctx, &r, dir)
	}
	if err != nil {
		return "", err
	}
	if err := h.finishCreate(&r, dir); err != nil {
		if from != nil {
			err = errors.Join(err, h.Store.Unpin(ctx, *from, string(r.ID)))
		}
		return "", err
	}
	return r.ID, nil
}

func (h *Host) createBlank(ctx context.Context, r *Record) error {
	if r.Size == 0 {
		return fmt.Errorf("%w: a blank volume needs one", ErrSize)
	}
	lineage, err := h.Store.CreateLineage(ctx, r.BlockSize)
	r.Lineage = lineage.ID
	return err
}

func (h *Host) createFrom(ctx context.Context, r *Record, dir string) error {
	img, err := h.Store.Open(ctx, *r.Root, snapshot.Holder{ID: string(r.ID), Host: h.Name})
	if err != nil {
		return err
	}
	g := img.Geometry()
	err = func() error {
		switch {
		case !img.Pinned:
			return fmt.Errorf("a volume must pin its snapshot in %s: %w", h.Store, blockstore.ErrDenied)
		case r.Size == 0:
			r.Size = g.Size
		case r.Size < g.Size:
			return fmt.Errorf("%w: %d is smaller than the snapshot's %d", ErrSize, r.Size, g.Size)
		}
		if r.Size > MaxSize {
			return fmt.Errorf("%w: the snapshot's %d bytes are more than a volume can have (%d)", ErrSize, r.Size, int64(MaxSize))
		}
		r.BlockSize, r.BaseSize, r.Lineage = g.BlockSize, g.Size, img.ID().Lineage
		r.RootHash = manifest.HexHash(img.Root.Hash())
		return saveRoot(h.FS, dir, img.Root)
	}()
	if err != nil && img.Pinned {
		err = errors.Join(err, h.Store.Unpin(ctx, *r.Root, string(r.ID)))
	}
	return err
}

// finishCreate makes the first write layer and then the record that names it.
func (h *Host) finishCreate(r *Record, dir string) error {
	layer, err := cache.CreateWriteLayer(h.FS, layerDir(dir, 1), r.Size, h.Boot)
	if err != nil {
		return h.explainSize(err, r.Size)
	}
	if err := layer.Close(); err != nil {
		return err
	}
	r.Layers, r.Creating = []int64{1}, false
	if err := r.save(h.FS, dir); err != nil {
		return err
	}
	return h.FS.SyncDir(VolumesDir(h.State))
}

// explainSize says why a sparse file of a device's size could not be made.
func (h *Host) explainSize(err error, size int64) error {
	if errors.Is(err, syscall.EFBIG) {
		return fmt.Errorf("the filesystem of %s cannot hold a file of %d bytes, the size of the device (ext4 stops just below 16 TiB): %w", h.State, size, err)
	}
	return err
}

// OpenVolume opens a volume for this process alone. It asks the store nothing:
// Settle does that.
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
	r, err := ReadRecord(h.FS, h.State, id) // again: its last owner may have changed it
	if err != nil {
		return nil, err
	}
	if r.Creating {
		return nil, errors.New("its creation was interrupted; delete it")
	}
	if err := h.removeLeftovers(dir, &r); err != nil {
		return nil, err
	}
	v := &Volume{dir: dir, lock: lock, record: r, holder: snapshot.Holder{ID: string(id), Host: h.Name}}
	if v.Device, err = h.openDevice(dir, &r); err != nil {
		return nil, h.explainSize(err, r.Size)
	}
	return v, nil
}

func (h *Host) lockVolume(id manifest.VolumeID) (io.Closer, error) {
	lock, err := h.FS.Lock(filepath.Join(Dir(h.State, id), "lock"), true)
	if errors.Is(err, vfs.ErrLocked) {
		return nil, fmt.Errorf("%w: %s is mounted, or a command is working on it", ErrInUse, id)
	}
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", id, err)
	}
	return lock, nil
}

// openDevice opens all that a record names.
func (h *Host) openDevice(dir string, r *Record) (_ *Device, err error) {
	d := h.newDevice(string(r.ID), r.geometry(), r.Lineage)
	var opened []io.Closer
	defer func() {
		if err != nil {
			for _, c := range slices.Backward(opened) {
				err = errors.Join(err, c.Close())
			}
		}
	}()
	if r.Base != nil {
		base, err := h.openBase(r.StoreID, *r.Base, manifest.Geometry{Size: r.BaseSize, BlockSize: r.BlockSize})
		if err != nil {
			return nil, err
		}
		d.base = base
		opened = append(opened, base)
	}
	w, err := openWrites(h, dir, r.geometry())
	if err != nil {
		return nil, err
	}
	d.writes = w
	opened = append(opened, closerFunc(w.close))

	var image *snapshot.Image
	if r.Root != nil {
		root, err := loadRoot(h.FS, dir, *r.Root, manifest.Hash(r.RootHash))
		if err != nil {
			return nil, err
		}
		image = h.Store.ImageOf(root)
	}
	var layers []*cache.WriteLayer
	for _, n := range r.Layers {
		layer, err := cache.OpenWriteLayer(h.FS, layerDir(dir, n), r.Size, h.Boot)
		if err != nil {
			return nil, err
		}
		layers = append(layers, layer)
		opened = append(opened, layer)
	}
	var sealed *cache.WriteLayer
	if len(layers) == 2 {
		sealed = layers[0]
	}
	d.view.view = newView(layers[len(layers)-1], sealed, image)
	d.recount()
	return d, nil
}

type closerFunc func() error

func (f closerFunc) Close() error { return f() }

// removeLeftovers removes the write layers and roots the record no longer
// names, which a crash left behind.
func (h *Host) removeLeftovers(dir string, r *Record) error {
	names, err := h.FS.ReadDir(layersDir(dir))
	if err != nil {
		return err
	}
	for _, name := range names {
		n, err := strconv.ParseInt(name, 10, 64)
		if err == nil && slices.Contains(r.Layers, n) {
			continue
		}
		if err := h.FS.RemoveAll(filepath.Join(layersDir(dir), name)); err != nil {
			return err
		}
	}
	names, err = h.FS.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if match, _ := filepath.Match("root-*", name); !match || r.Root != nil && name == filepath.Base(rootPath(dir, *r.Root)) {
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
	return v.record
}

// update changes the record, durably. change works on a copy.
func (v *Volume) update(change func(r *Record)) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	r := v.record
	r.Layers, r.Unpin = slices.Clone(r.Layers), slices.Clone(r.Unpin)
	change(&r)
	if err := r.save(v.host.FS, v.dir); err != nil {
		return err
	}
	v.record = r
	return nil
}

// Close makes everything written durable and closes the volume.
func (v *Volume) Close() error {
	v.making.Lock() // wait for a snapshot: its context is its maker's to end
	defer v.making.Unlock()
	err := v.Sync(context.Background())
	v.flights.stop()
	now := v.view.acquire()
	defer now.release()
	err = errors.Join(err, now.open.Close())
	if now.sealed != nil {
		err = errors.Join(err, now.sealed.Close())
	}
	err = errors.Join(err, v.writes.close())
	if v.base != nil {
		err = errors.Join(err, v.base.Close())
	}
	if err != nil {
		err = fmt.Errorf("close %s: %w", v.name, err)
	}
	return errors.Join(err, v.lock.Close())
}

// Delete removes a volume that is not in use, with everything written since
// its last snapshot, and its pins.
func (h *Host) Delete(ctx context.Context, id manifest.VolumeID) error {
	r, err := ReadRecord(h.FS, h.State, id)
	if err != nil {
		return err
	}
	lock, err := h.lockVolume(id)
	if err != nil {
		return err
	}
	err = h.release(ctx, &r)
	if err == nil {
		err = h.FS.RemoveAll(Dir(h.State, id))
	}
	if err == nil {
		err = h.FS.SyncDir(VolumesDir(h.State))
	}
	if err != nil {
		err = fmt.Errorf("delete %s: %w", id, err)
	}
	return errors.Join(err, lock.Close())
}

// release gives up what a volume has in the store: its attempt and its pins.
func (h *Host) release(ctx context.Context, r *Record) error {
	pinned := slices.Clone(r.Unpin)
	if r.Root != nil {
		pinned = append(pinned, *r.Root)
	}
	if p := r.Pending; p != nil {
		if _, _, err := h.Store.Resolve(ctx, p.Snapshot, p.Nonce, "its volume was deleted"); err != nil {
			return err
		}
		pinned = append(pinned, p.Snapshot)
	}
	for _, id := range pinned {
		if err := h.Store.Unpin(ctx, id, string(r.ID)); err != nil {
			return err
		}
	}
	return nil
}

// List returns the records of the volumes of a state directory; one that
// cannot be read is in failed.
func List(fsys vfs.FS, state string) (records []Record, failed []error, err error) {
	names, err := fsys.ReadDir(VolumesDir(state))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("list volumes: %w", err)
	}
	for _, name := range names {
		id, err := manifest.ParseVolumeID(name)
		if err != nil {
			continue
		}
		r, err := ReadRecord(fsys, state, id)
		if err != nil {
			failed = append(failed, err)
			continue
		}
		records = append(records, r)
	}
	slices.SortFunc(records, func(a, b Record) int { return a.Created.Compare(b.Created) })
	return records, failed, nil
}
