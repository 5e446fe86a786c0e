package volume

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// Settle finishes what an interrupted snapshot left: the store's outcome
// decides whether the volume moves on to it or takes its changes back. It also
// makes sure that the volume's pin stands. It may be called at any time, and
// again after an error.
//
// snapshot.ErrNotFound: the root is lost, because the pin was gone and the
// snapshot deleted. The volume goes on without it: only what is cached or was
// written here can be read, and the next snapshot will be a full one, if all
// its blocks can still be read.
func (v *Volume) Settle(ctx context.Context) error {
	v.making.Lock()
	defer v.making.Unlock()
	if v.closed {
		return fmt.Errorf("settle %s: %w", v.name, errClosed)
	}
	checked, err := v.checkStoreAndPin(ctx)
	if err == nil {
		_, err = v.settle(ctx)
	}
	if err == nil && !v.isRoot(checked) {
		err = v.checkPin(ctx)
	}
	if err != nil {
		return fmt.Errorf("settle %s: %w", v.name, err)
	}
	return nil
}

// checkStoreAndPin makes sure that the host's store is the volume's, and looks
// for the pin on the root meanwhile, so that a mount waits for both at once. It
// returns the root if its pin stands: nil says nothing.
func (v *Volume) checkStoreAndPin(ctx context.Context) (pinned *manifest.SnapshotID, err error) {
	ctx, cancel := context.WithCancel(ctx)
	r := v.Record()
	var asking sync.WaitGroup
	if r.Root != nil {
		asking.Go(func() {
			if stands, err := v.host.Store.Pinned(ctx, *r.Root, v.holder); err == nil && stands {
				pinned = r.Root
			}
		})
	}
	if err = v.host.checkStore(ctx, &r); err != nil {
		cancel() // what another store says of the pin does not matter
	}
	asking.Wait()
	cancel()
	return pinned, err
}

// settle ends the attempt on record, if there is one, and leaves the volume
// with one write layer. It returns the attempt's outcome if it was committed,
// even when the volume could not move on to it.
func (v *Volume) settle(ctx context.Context) (committed *manifest.Outcome, err error) {
	r := v.Record()
	switch {
	case len(r.Layers) == 1:
	case !v.hasSealed(): // it was reopened, but the record still names the new one
		err = v.dropNewest()
	case r.Pending == nil:
		err = v.mergeBack(ctx)
	default:
		committed, err = v.settlePending(ctx, r.Pending)
	}
	if err != nil {
		return committed, err
	}
	v.unpin(ctx)
	return committed, nil
}

func (v *Volume) hasSealed() bool {
	now := v.view.acquire()
	defer now.release()
	return now.sealed != nil
}

func (v *Volume) settlePending(ctx context.Context, p *Pending) (*manifest.Outcome, error) {
	committed, outcome, err := v.host.resolve(ctx, p, manifest.VolumeID(v.name), "interrupted")
	if err != nil {
		return nil, err
	}
	if committed {
		return &outcome, v.finish(ctx, outcome)
	}
	return nil, v.mergeBack(ctx)
}

// finish moves the volume to the snapshot that was committed from its sealed
// layer. Each step is durable before the next, and all of them may be done
// again after a crash.
func (v *Volume) finish(ctx context.Context, outcome manifest.Outcome) error {
	image, err := v.host.Store.Load(ctx, outcome)
	if err != nil {
		return err
	}
	if err := saveRoot(v.host.mustKeep(), v.dir, image); err != nil {
		return err
	}
	now := v.view.acquire()
	sealed := now.sealed
	now.release()
	// Rule: diverged blocks are known as such before the root that has them.
	if err := v.writes.diverged.Add(v.blocksOf(sealed)); err != nil {
		return err
	}
	old := v.Record()
	err = v.update(func(r *Record) {
		if r.Root != nil {
			r.Unpin = append(r.Unpin, *r.Root)
		}
		root := image.ID()
		r.Root, r.RootHash = &root, image.Outcome.RootHash
		r.Layers, r.Pending = r.Layers[1:], nil
	})
	if err != nil {
		return err
	}
	drained, _ := v.swap(func(now *view) *view { return newView(now.open, nil, image) })
	v.lost.Store(nil)
	v.Recount()
	v.work.start(func(ctx context.Context) { v.keepLeaves(ctx, image) })
	// Rule: the old root's pin stands, and the layer is there, until the last
	// read through them has ended.
	<-drained
	v.unpin(ctx)
	v.removeLayer(sealed, old.Layers[0])
	if old.Root != nil {
		v.tidied(v.host.FS.Remove(rootPath(v.dir, *old.Root)))
	}
	return nil
}

// keepLeaves fetches the leaves that a snapshot of the volume wrote, so that
// holes near what was written can be read with the store down, as before. It
// gives up when one cannot be had: reads ask for it again.
func (v *Volume) keepLeaves(ctx context.Context, image *snapshot.Image) {
	for _, ref := range image.Root.Leaves {
		if ref.Owner != image.ID().Serial {
			continue
		}
		if _, err := v.leaf(ctx, image, ref); err != nil {
			return
		}
	}
}

// removeLayer closes and removes a write layer that the record does not name
// and that nobody reads.
func (v *Volume) removeLayer(layer *cache.WriteLayer, n int64) {
	v.tidied(errors.Join(layer.Close(), cache.RemoveWriteLayer(v.host.FS, layerDir(v.dir, n))))
}

// tidied logs why something that is of no use any more could not be removed.
// The next OpenVolume does it.
func (v *Volume) tidied(err error) {
	if err != nil {
		v.host.Log.Warn("could not remove what a snapshot made needless", "volume", v.name, "error", err)
	}
}

// blocksOf yields the blocks that a write layer knows anything of.
func (v *Volume) blocksOf(layer *cache.WriteLayer) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		block, ok := layer.NextBlock(0, v.geometry.BlockSize)
		for ok && yield(block) {
			block, ok = layer.NextBlock(block+1, v.geometry.BlockSize)
		}
	}
}

// unpin removes the pins on former roots, of which no read is under way. They
// do no harm but to the space they keep: what fails now is tried again by the
// next Settle.
func (v *Volume) unpin(ctx context.Context) {
	for _, id := range v.Record().Unpin {
		err := v.host.Store.Unpin(ctx, id, v.holder.ID)
		if err == nil {
			err = v.update(func(r *Record) {
				r.Unpin = slices.DeleteFunc(r.Unpin, func(other manifest.SnapshotID) bool { return other == id })
			})
		}
		if err != nil {
			v.host.Log.Warn("could not remove the pin on a former root yet", "volume", v.name, "error", err)
			return
		}
	}
}

// isRoot reports whether a snapshot, nil for none, is the root.
func (v *Volume) isRoot(id *manifest.SnapshotID) bool {
	root := v.Record().Root
	return root != nil && id != nil && *root == *id
}

// checkPin makes sure that the pin on the root stands.
func (v *Volume) checkPin(ctx context.Context) error {
	r := v.Record()
	if r.Root == nil {
		return nil
	}
	err := v.host.Store.KeepPinned(ctx, *r.Root, v.holder)
	switch {
	case errors.Is(err, snapshot.ErrNotFound):
		return v.lose(err)
	case errors.Is(err, blockstore.ErrDenied):
		v.host.Log.Warn("could not look after the volume's pin", "volume", v.name, "error", err)
		return nil
	}
	return err
}

// lose notes that the root cannot be trusted any more, and returns what reads
// will be told: what is cold may be gone from the store.
func (v *Volume) lose(why error) error {
	err := fmt.Errorf("the pin of %s on its root is gone and the snapshot deleted; only what is cached or was written here can be read: %w", v.name, why)
	v.lost.Store(&err)
	return err
}

// mergeBack takes back the changes of an attempt that never was, or was
// aborted. Reads and writes go on meanwhile.
func (v *Volume) mergeBack(ctx context.Context) error {
	now := v.view.acquire()
	syncErr := now.syncSealed()
	now.release()
	var err error
	// A layer that the disk has failed to keep is not gone on with: its pages,
	// as long as they can be read, are saved into the new one.
	if syncErr == nil {
		err = v.reopenSealed()
	}
	if err == nil && v.hasSealed() {
		err = v.mergeSealed(ctx)
	}
	if err != nil {
		return fmt.Errorf("take back the changes of an aborted snapshot: %w", err)
	}
	return nil
}

// reopenSealed makes the sealed layer the open one again, unless something was
// written since it was sealed.
func (v *Volume) reopenSealed() error {
	now := v.view.acquire()
	empty := now.open
	now.release()
	drained, _ := v.swap(func(now *view) *view {
		if _, dirty := empty.NextBlock(0, v.geometry.BlockSize); dirty {
			return nil
		}
		return newView(now.sealed, nil, now.image)
	})
	if drained == nil {
		return nil
	}
	<-drained
	v.tidied(empty.Close())
	return v.dropNewest()
}

// dropNewest takes the newest write layer, which is empty and closed, off the
// record. Rule: first it is out of use, then off the record, then removed. While
// the record names it, a crash merges the older layer into it, which is as good.
func (v *Volume) dropNewest() error {
	layers := v.Record().Layers
	if err := v.update(func(r *Record) { r.Layers, r.Pending = layers[:1], nil }); err != nil {
		return err
	}
	v.tidied(cache.RemoveWriteLayer(v.host.FS, layerDir(v.dir, layers[1])))
	return nil
}

// mergeSealed copies the sealed layer's pages into the open one, but for those
// written since, and drops it.
func (v *Volume) mergeSealed(ctx context.Context) error {
	now := v.view.acquire()
	open, sealed := now.open, now.sealed
	now.release()
	for block := range v.blocksOf(sealed) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := v.mergeBlock(open, sealed, block); err != nil {
			return err
		}
	}
	// Rule: the pages are durable in the open layer before the sealed one,
	// which may be durable, stops being named.
	if err := open.Sync(); err != nil {
		return err
	}
	layers := v.Record().Layers
	if err := v.update(func(r *Record) { r.Layers, r.Pending = layers[1:], nil }); err != nil {
		return err
	}
	drained, _ := v.swap(func(now *view) *view { return newView(open, nil, now.image) })
	<-drained
	v.removeLayer(sealed, layers[0])
	return nil
}

// mergeBlock copies one block's pages from the sealed into the open layer.
func (v *Volume) mergeBlock(open, sealed *cache.WriteLayer, block int64) error {
	v.writes.cut.RLock()
	defer v.writes.cut.RUnlock()
	start := block * int64(v.geometry.BlockSize)
	end := start + int64(v.geometry.BlockLen(block))
	stripe := v.stripe(start)
	stripe.Lock()
	defer stripe.Unlock()
	buffer := v.buffers.Get().(*[]byte)
	defer v.buffers.Put(buffer)

	for off := start; off < end; {
		page := off / manifest.PageSize
		newer, n := open.Run(page, pagesOf(end)-page)
		state, n := sealed.Run(page, n)
		length := min(n*manifest.PageSize, end-off)
		var err error
		switch {
		case newer != cache.Absent: // written since
		case state == cache.Data:
			p := (*buffer)[:length]
			if err = sealed.ReadAt(p, off); err == nil {
				err = open.WriteAt(p, off)
			}
		case state == cache.Zero:
			err = open.Zero(off, length)
		}
		if err != nil {
			return err
		}
		off += length
	}
	return nil
}
