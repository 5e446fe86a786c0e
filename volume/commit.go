package volume

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// settleTimeout bounds how long a snapshot that was given up asks the store
// what became of it, before it leaves that to the next Settle.
const settleTimeout = 20 * time.Second

// SnapshotOptions describe a snapshot to be made of a volume.
type SnapshotOptions struct {
	Description string
	Tags        map[string]string

	// Cut, if set, is called once the moment of the snapshot has passed and
	// its intent is in the store; the upload follows.
	Cut func(*snapshot.Attempt)
}

// Snapshot makes a snapshot of the volume as it is now and returns its
// outcome; reads and writes go on meanwhile. ErrBusy: one is being made
// already. If it fails, or ctx ends, the changes stay in the volume and the
// attempt is aborted, or settled later if the store cannot be asked.
func (v *Volume) Snapshot(ctx context.Context, o SnapshotOptions) (manifest.Outcome, error) {
	if !v.making.TryLock() {
		return manifest.Outcome{}, fmt.Errorf("%w: %s", ErrBusy, v.name)
	}
	defer v.making.Unlock()
	if err := v.settle(ctx); err != nil {
		return manifest.Outcome{}, fmt.Errorf("snapshot %s: settle the attempt before: %w", v.name, err)
	}
	plan := snapshot.NewPlan(v.Record().Lineage)
	plan.Geometry, plan.Volume, plan.Holder = v.geometry, manifest.VolumeID(v.name), v.holder
	plan.Description, plan.Tags, plan.Log = o.Description, o.Tags, v.host.Log

	if err := v.seal(); err != nil {
		return manifest.Outcome{}, fmt.Errorf("snapshot %s: %w", v.name, err)
	}
	outcome, err := v.upload(ctx, plan, o)
	if err == nil {
		err = v.finish(ctx, outcome)
	} else {
		err = errors.Join(err, v.giveUp(ctx))
	}
	if err != nil {
		return outcome, fmt.Errorf("snapshot %s: %w", v.name, err)
	}
	return outcome, nil
}

// giveUp settles a failed attempt, as far as that can be done now. The
// context may have ended, which is no reason to leave things half done.
func (v *Volume) giveUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	if err := v.settle(ctx); err != nil {
		return fmt.Errorf("the changes are kept and the attempt will be settled later: %w", err)
	}
	return nil
}

// seal ends the open write layer and puts a new one in its place. Writers are
// stopped for as long as it takes to swap a pointer.
func (v *Volume) seal() error {
	layers := v.Record().Layers
	n := layers[len(layers)-1] + 1
	layer, err := cache.CreateWriteLayer(v.host.FS, layerDir(v.dir, n), v.geometry.Size, v.host.Boot)
	if err != nil {
		return fmt.Errorf("open a new write layer: %w", err)
	}
	// Rule: a layer is named durably before anything is written to it.
	if err := v.update(func(r *Record) { r.Layers = append(r.Layers, n) }); err != nil {
		return errors.Join(err, layer.Close(), cache.RemoveWriteLayer(v.host.FS, layerDir(v.dir, n)))
	}
	v.writes.cut.Lock()
	v.fill.Lock()
	now := v.view.view
	v.view.replace(newView(layer, now.open, now.image))
	v.fill.Unlock()
	v.writes.cut.Unlock()
	return nil
}

// upload takes the attempt from the sealed layer to its outcome.
func (v *Volume) upload(ctx context.Context, plan snapshot.Plan, o SnapshotOptions) (manifest.Outcome, error) {
	now := v.view.acquire()
	defer now.release()
	// Rule: the sealed layer is durable, then the attempt is on record, then
	// the store hears of it.
	if err := now.sealed.Sync(); err != nil {
		return manifest.Outcome{}, err
	}
	pending := Pending{Snapshot: plan.ID, Nonce: plan.Nonce}
	if err := v.update(func(r *Record) { r.Pending = &pending }); err != nil {
		return manifest.Outcome{}, err
	}
	plan.Parent = now.image
	attempt, err := v.host.Store.Begin(ctx, plan)
	if err != nil {
		return manifest.Outcome{}, err
	}
	if o.Cut != nil {
		o.Cut(attempt)
	}
	// What the snapshot reads: the cut, without what was written since.
	cut := newView(nil, now.sealed, now.image)
	err = attempt.Upload(ctx, snapshot.Source{
		Extents: v.dirty(now.sealed),
		Read:    func(ctx context.Context, block int64, p []byte) error { return v.assemble(ctx, cut, block, p) },
	})
	if err != nil {
		return manifest.Outcome{}, err
	}
	// Rule: the clean copies of diverged blocks are durable before the
	// outcome. After it, a clean copy that a power cut rolled back would be
	// believed in place of what the snapshot holds.
	if err := v.writes.clean.Sync(); err != nil {
		return manifest.Outcome{}, err
	}
	return attempt.Commit(ctx)
}

// dirty yields the blocks that the sealed layer knows anything of. Those that
// were discarded whole are holes, and lose their clean copies here.
func (v *Volume) dirty(sealed *cache.WriteLayer) iter.Seq2[snapshot.Extent, error] {
	pages := int64(v.geometry.BlockSize / manifest.PageSize)
	return func(yield func(snapshot.Extent, error) bool) {
		block, ok := sealed.NextBlock(0, v.geometry.BlockSize)
		for ok {
			e := snapshot.Extent{First: block, Count: 1}
			state, n := sealed.Run(block*pages, (v.geometry.Blocks()-block)*pages)
			if zeroed := v.wholeBlocks(block, n); state == cache.Zero && zeroed > 0 {
				e.Count, e.Hole = zeroed, true
			}
			if !yield(e, v.evictHole(e)) {
				return
			}
			block, ok = sealed.NextBlock(e.First+e.Count, v.geometry.BlockSize)
		}
	}
}

// wholeBlocks returns how many blocks n pages from the start of a block fill.
// The device's last block has only as many pages as the device.
func (v *Volume) wholeBlocks(block, n int64) int64 {
	blockSize := int64(v.geometry.BlockSize)
	if block*blockSize+n*manifest.PageSize >= v.geometry.Size {
		return v.geometry.Blocks() - block
	}
	return n * manifest.PageSize / blockSize
}

func (v *Volume) evictHole(e snapshot.Extent) error {
	if !e.Hole {
		return nil
	}
	for block := e.First; block < e.First+e.Count; block++ {
		if err := v.evictClean(block); err != nil {
			return err
		}
	}
	return nil
}

// evictClean makes sure that a block has no clean copy that its next root
// does not match.
func (v *Volume) evictClean(block int64) error {
	has, err := v.writes.clean.Has(block)
	if err == nil && has {
		err = v.writes.clean.Evict(block)
	}
	if err != nil {
		return fmt.Errorf("remove the stale clean copy of block %d: %w", block, err)
	}
	return nil
}

func (v *Volume) dirtyBlocks(layer *cache.WriteLayer) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		block, ok := layer.NextBlock(0, v.geometry.BlockSize)
		for ok && yield(block) {
			block, ok = layer.NextBlock(block+1, v.geometry.BlockSize)
		}
	}
}

// assemble reads a changed block as it was at the cut, and makes it the clean
// copy of the block: it is what the block will be once the snapshot is
// committed, and until then every page in which it differs is covered by a
// write layer.
func (v *Volume) assemble(ctx context.Context, cut *view, block int64, p []byte) error {
	off := block * int64(v.geometry.BlockSize)
	n := v.geometry.BlockLen(block)
	clear(p[n:])
	if err := v.read(ctx, cut, p[:n], off); err != nil {
		return err
	}
	if v.host.Room == nil || v.host.Room() == nil {
		if err := v.writes.clean.WriteBlock(block, p); err == nil {
			return nil
		}
	}
	// Without room for the new copy there must be no old one either.
	return v.evictClean(block)
}

// finish moves the volume to the snapshot that was committed from its sealed
// layer. Each step is durable before the next, and all of them may be done
// again after a crash.
func (v *Volume) finish(ctx context.Context, outcome manifest.Outcome) error {
	image, err := v.host.Store.Load(ctx, outcome)
	if err != nil {
		return err
	}
	if err := saveRoot(v.host.FS, v.dir, image.Root); err != nil {
		return err
	}
	sealed := v.view.view.sealed
	if err := v.writes.diverged.Add(v.dirtyBlocks(sealed)); err != nil {
		return fmt.Errorf("record which blocks diverged: %w", err)
	}
	record := v.Record()
	layer, open := record.Layers[0], record.Layers[1]
	err = v.update(func(r *Record) {
		if r.Root != nil {
			r.Unpin = append(r.Unpin, *r.Root)
		}
		root := image.ID()
		r.Root, r.RootHash = &root, manifest.HexHash(image.Root.Hash())
		r.Layers, r.Pending = []int64{open}, nil
	})
	if err != nil {
		return err
	}
	v.dropSealed(image)
	v.recount()
	v.host.Log.Info("snapshot committed", "volume", v.name, "snapshot", image.ID())
	// The rest tidies: it is done again by the next Settle if it fails now.
	if err := v.unpin(ctx); err != nil {
		v.host.Log.Warn("could not remove an old pin yet", "volume", v.name, "error", err)
	}
	if err := errors.Join(sealed.Close(), cache.RemoveWriteLayer(v.host.FS, layerDir(v.dir, layer))); err != nil {
		v.host.Log.Warn("could not remove a write layer that is done with", "volume", v.name, "error", err)
	}
	return nil
}

// dropSealed makes the view without the sealed layer current and returns when
// the last read through the one before has ended.
func (v *Volume) dropSealed(image *snapshot.Image) {
	v.writes.cut.Lock()
	v.fill.Lock()
	drained := v.view.replace(newView(v.view.view.open, nil, image))
	v.fill.Unlock()
	v.writes.cut.Unlock()
	<-drained
}

// unpin removes the pins on former roots, after the last read through them.
func (v *Volume) unpin(ctx context.Context) error {
	for _, id := range v.Record().Unpin {
		if err := v.host.Store.Unpin(ctx, id, v.holder.ID); err != nil {
			return err
		}
		err := v.update(func(r *Record) {
			r.Unpin = slices.DeleteFunc(r.Unpin, func(other manifest.SnapshotID) bool { return other == id })
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Settle finishes what an interrupted snapshot left: the store's outcome
// decides whether the volume moves on to it or takes its changes back. It also
// makes sure that the volume's pin stands. It may be called again after an
// error.
func (v *Volume) Settle(ctx context.Context) error {
	v.making.Lock()
	defer v.making.Unlock()
	if err := v.settle(ctx); err != nil {
		return err
	}
	return v.checkPin(ctx)
}

func (v *Volume) settle(ctx context.Context) error {
	r := v.Record()
	if err := v.unpin(ctx); err != nil {
		return err
	}
	if len(r.Layers) == 1 {
		return nil
	}
	if p := r.Pending; p != nil {
		committed, outcome, err := v.host.Store.Resolve(ctx, p.Snapshot, p.Nonce, "interrupted")
		if err != nil {
			return err
		}
		if committed {
			return v.finish(ctx, outcome)
		}
		if err := v.host.Store.Discard(ctx, p.Snapshot, v.holder); err != nil {
			return err
		}
	}
	if err := v.mergeBack(); err != nil {
		return fmt.Errorf("take back the changes of an aborted snapshot: %w", err)
	}
	return nil
}

// checkPin makes sure that the pin on the root stands. If it is gone and the
// snapshot deleted, what is cold may be gone too: cold reads fail from then on.
func (v *Volume) checkPin(ctx context.Context) error {
	r := v.Record()
	if r.Root == nil {
		return nil
	}
	err := v.host.Store.KeepPinned(ctx, *r.Root, v.holder)
	if errors.Is(err, snapshot.ErrNotFound) {
		err = fmt.Errorf("the pin of %s on its root is gone and the snapshot deleted; only what is cached and written here can be read: %w", v.name, err)
		v.lost.Store(&err)
	}
	if errors.Is(err, blockstore.ErrDenied) {
		v.host.Log.Warn("could not look after the volume's pin", "volume", v.name, "error", err)
		return nil
	}
	return err
}

// mergeBack moves the sealed layer's pages into the open one, but for those
// written since, and drops it. Reads and writes go on meanwhile.
func (v *Volume) mergeBack() error {
	now := v.view.view
	if done, err := v.reopenSealed(); done || err != nil {
		return err
	}
	for block := range v.dirtyBlocks(now.sealed) {
		if err := v.mergeBlock(now, block); err != nil {
			return err
		}
	}
	// Rule: the pages are durable in the open layer before the sealed one,
	// which is durable, stops being named.
	if err := now.open.Sync(); err != nil {
		return err
	}
	layers := v.Record().Layers
	if err := v.update(func(r *Record) { r.Layers, r.Pending = layers[1:], nil }); err != nil {
		return err
	}
	v.dropSealed(now.image)
	return errors.Join(now.sealed.Close(), cache.RemoveWriteLayer(v.host.FS, layerDir(v.dir, layers[0])))
}

// reopenSealed makes the sealed layer the open one again if nothing was
// written since it was sealed.
func (v *Volume) reopenSealed() (done bool, err error) {
	v.writes.cut.Lock()
	defer v.writes.cut.Unlock()
	now := v.view.view
	if _, dirty := now.open.NextBlock(0, v.geometry.BlockSize); dirty {
		return false, nil
	}
	layers := v.Record().Layers
	if err := v.update(func(r *Record) { r.Layers, r.Pending = layers[:1], nil }); err != nil {
		return false, err
	}
	v.fill.Lock()
	drained := v.view.replace(newView(now.sealed, nil, now.image))
	v.fill.Unlock()
	// Writers wait for reads in flight here, which only happens to a
	// snapshot that failed.
	<-drained
	return true, errors.Join(now.open.Close(), cache.RemoveWriteLayer(v.host.FS, layerDir(v.dir, layers[1])))
}

// mergeBlock moves one block's pages from the sealed into the open layer.
func (v *Volume) mergeBlock(now *view, block int64) error {
	blockSize := int64(v.geometry.BlockSize)
	v.writes.cut.RLock()
	defer v.writes.cut.RUnlock()
	stripe := v.stripe(block * blockSize)
	stripe.Lock()
	defer stripe.Unlock()

	start := block * blockSize
	end := start + int64(v.geometry.BlockLen(block))
	buffer := v.flights.buffers.Get().(*[]byte)
	defer v.flights.buffers.Put(buffer)
	for off := start; off < end; {
		page := off / manifest.PageSize
		pages := (end - off + manifest.PageSize - 1) / manifest.PageSize
		covered, n := now.open.Run(page, pages)
		state, n := now.sealed.Run(page, n)
		length := min(n*manifest.PageSize, end-off)
		var err error
		switch {
		case covered != cache.Absent: // written since
		case state == cache.Data:
			p := (*buffer)[:length]
			if err = now.sealed.ReadAt(p, off); err == nil {
				err = now.open.WriteAt(p, off)
			}
		case state == cache.Zero:
			err = now.open.Zero(off, length)
		}
		if err != nil {
			return err
		}
		off += length
	}
	return nil
}
