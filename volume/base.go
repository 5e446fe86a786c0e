package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A base is the clean bytes of one snapshot on this host, and its leaves. Any
// number of processes may have it open; whoever does holds its lock shared, so
// that nobody unlinks it.
type base struct {
	*cache.Clean
	leaves *cache.IndexFile
	lock   io.Closer
	dir    string
	id     manifest.SnapshotID
	size   int64
}

// openBase opens the base of a snapshot, making it if this host has none.
func (h *Host) openBase(storeID string, id manifest.SnapshotID, g manifest.Geometry, key *crypt.Key) (_ *base, err error) {
	b := &base{dir: h.baseDir(storeID, id), id: id, size: g.Size}
	defer func() {
		if err != nil {
			err = fmt.Errorf("open the base of %s: %w", id, err)
		}
	}()
	if b.lock, err = h.lockBase(b.dir); err != nil {
		return nil, err
	}
	h.noteOpened(b.dir)
	if b.Clean, err = h.openClean(b.dir, g, basePages(key, id)); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	if b.leaves, err = cache.OpenIndexFile(h.mustKeep(), indexPath(b.dir), g, key); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

// basePages is what seals the pages of a base. They never change: that is what a
// snapshot is.
func basePages(key *crypt.Key, id manifest.SnapshotID) *crypt.Pages {
	return key.Pages("of "+id.String(), true)
}

// ownPages is what seals the pages of a volume's own clean layer.
func ownPages(key *crypt.Key, id manifest.VolumeID) *crypt.Pages {
	return key.Pages("of "+string(id), false)
}

// removalPatience bounds how long an evictor takes to remove a base, even one of
// terabytes.
const removalPatience = time.Minute

// lockBase makes the folder of a base, and locks it against removal. It waits for an
// evictor that is just removing it.
func (h *Host) lockBase(dir string) (io.Closer, error) {
	for end := time.Now().Add(removalPatience); ; time.Sleep(evictorPoll) {
		if err := h.mustKeep().MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
		lock, err := h.mustKeep().Lock(filepath.Join(dir, lockName), false)
		removing := errors.Is(err, vfs.ErrLocked) || errors.Is(err, fs.ErrNotExist)
		if !removing || time.Now().After(end) {
			return lock, err
		}
	}
}

// openClean opens a clean layer. Its files are made despite a full disk; what is
// cached in them later is not.
func (h *Host) openClean(dir string, g manifest.Geometry, pages *crypt.Pages) (layer *cache.Clean, err error) {
	err = h.Budget.despiteFull(0, shared, func() (err error) {
		layer, err = cache.OpenClean(h.FS, dir, g, pages)
		return err
	})
	return layer, err
}

// Close lets go of the base.
func (b *base) Close() error {
	var err error
	if b.leaves != nil {
		err = errors.Join(err, b.leaves.Close())
	}
	if b.Clean != nil {
		err = errors.Join(err, b.Clean.Close())
	}
	return errors.Join(err, b.lock.Close())
}

// LockHydrator makes this process the one that hydrates the base, until the
// lock is closed. vfs.ErrLocked: another process is.
func (d *Device) LockHydrator() (io.Closer, error) {
	if d.base == nil {
		return io.NopCloser(nil), nil
	}
	lock, err := d.host.mustKeep().Lock(filepath.Join(d.base.dir, "hydrator"), true)
	if err != nil && !errors.Is(err, vfs.ErrLocked) {
		err = fmt.Errorf("lock the hydrator of %s: %w", d.base.dir, err)
	}
	return lock, err
}

// leaf returns a leaf of an image: from memory, else from a local copy, else
// from the store. Each is verified by the hash in the root.
func (d *Device) leaf(ctx context.Context, img *snapshot.Image, ref manifest.LeafRef) (*manifest.Leaf, error) {
	return d.host.Leaves.Get(ctx, ref.Hash, func(ctx context.Context) (*manifest.Leaf, error) {
		if leaf, ok := d.localLeaf(ref); ok {
			return leaf, nil
		}
		ctx, cancel := context.WithTimeoutCause(ctx, d.host.ReadDeadline, errDeadline)
		defer cancel()
		// A read may wait for this, whoever began it: so it has a read's slots.
		leaf, err := img.Through(d.host.Demand).FetchLeaf(ctx, ref)
		if err != nil {
			return nil, err
		}
		d.stats.fetchedBytes.Add(int64(manifest.EncodedLeafLen(leaf.Len())))
		// Closed: the device did not wait for a leaf that nobody needs any more.
		if err := d.indexOf(img).Store(ref, leaf); err != nil && !errors.Is(err, fs.ErrClosed) {
			d.host.Log.Warn("could not keep a leaf on this host; it will be fetched again", "leaf", ref.Leaf, "error", err)
		}
		return leaf, nil
	})
}

// LoadFirstLeaf begins to load the first leaf of the index, unless this host has
// it, and does not wait: what is read first of a device is mostly its beginning.
// Should that fail, whoever reads asks again and is told.
func (d *Device) LoadFirstLeaf() {
	v := d.view.acquire()
	defer v.release()
	if ref, ok := v.nextLeaf(0); ok {
		img := v.image
		d.work.start(func(ctx context.Context) { _, _ = d.leaf(ctx, img, ref) })
	}
}

// localLeaf looks for a leaf on this host. A snapshot made of the volume
// shares most leaves with the base's, so both places may have it.
func (d *Device) localLeaf(ref manifest.LeafRef) (*manifest.Leaf, bool) {
	if d.base != nil {
		if leaf, ok := d.base.leaves.Load(ref); ok {
			return leaf, true
		}
	}
	if d.writes != nil {
		return d.writes.leaves.Load(ref)
	}
	return nil, false
}

// indexOf returns where the leaves of an image are kept on this host.
func (d *Device) indexOf(img *snapshot.Image) *cache.IndexFile {
	if d.base != nil && d.base.id == img.ID() {
		return d.base.leaves
	}
	return d.writes.leaves // only a volume's root is ever another than its base
}

// hasRef reports whether this host has what ref returns of a block.
func (d *Device) hasRef(img *snapshot.Image, block int64) bool {
	at, ok := img.Root.Find(block / manifest.LeafBlocks)
	if !ok {
		return true
	}
	if _, ok = d.host.Leaves.Peek(at.Hash); !ok {
		_, ok = d.localLeaf(at)
	}
	return ok
}

// ref returns where the bytes of a block lie, a hole for a block the image does
// not have.
func (d *Device) ref(ctx context.Context, img *snapshot.Image, block int64) (manifest.Ref, error) {
	n := block / manifest.LeafBlocks
	at, ok := img.Root.Find(n)
	if !ok {
		return manifest.Ref{}, nil
	}
	leaf, err := d.leaf(ctx, img, at)
	if err != nil {
		return manifest.Ref{}, &blockError{doing: "find", block: block, index: true, err: err}
	}
	if i := int(block % manifest.LeafBlocks); i < leaf.Len() {
		return leaf.Ref(i), nil
	}
	return manifest.Ref{}, nil
}
