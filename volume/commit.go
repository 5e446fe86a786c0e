package volume

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// settleTimeout bounds how long we go on asking the store for what cannot be
// left half done when the caller has given up, or the attempt has failed.
// Beyond it, that is left to the next Settle.
const settleTimeout = 20 * time.Second

// SnapshotOptions describe a snapshot to be made of a volume.
type SnapshotOptions struct {
	Description string
	Tags        map[string]string

	// Sealed, if set, is called once the moment of the snapshot has passed; the
	// store is asked only after it has returned. Of a Member nothing is called.
	Sealed func()

	// Cut, if set, is called once the moment of the snapshot has passed and
	// its intent is in the store; the upload follows.
	Cut func(*snapshot.Attempt)

	set manifest.SetID // whose outcome decides the snapshot's: see Member
}

// Snapshot makes a snapshot of the volume as it is now and returns its
// outcome; reads and writes go on meanwhile. ErrBusy: one is being made
// already.
//
// Without error the snapshot is committed, even if ctx has ended. With one it
// is not and, as far as the store could be asked, never will be: the changes
// stay in the volume, and what the store did not answer is settled later.
func (v *Volume) Snapshot(ctx context.Context, o SnapshotOptions) (manifest.Outcome, error) {
	if !v.snapshotting.TryLock() {
		return manifest.Outcome{}, fmt.Errorf("%w: %s", ErrBusy, v.name)
	}
	defer v.snapshotting.Unlock()
	v.making.Lock() // waits for a Settle
	defer v.making.Unlock()
	outcome, err := v.snapshot(ctx, o)
	if err != nil {
		return outcome, fmt.Errorf("snapshot %s: %w", v.name, err)
	}
	v.host.Log.Info("snapshot committed", "volume", v.name, "snapshot", outcome.Snapshot)
	return outcome, nil
}

// snapshot is Snapshot with v.making held.
func (v *Volume) snapshot(ctx context.Context, o SnapshotOptions) (manifest.Outcome, error) {
	if v.closed {
		return manifest.Outcome{}, errClosed
	}
	if ctx.Err() != nil {
		return manifest.Outcome{}, context.Cause(ctx)
	}
	if _, err := v.settle(ctx); err != nil {
		return manifest.Outcome{}, fmt.Errorf("settle the attempt before: %w", err)
	}
	stopped, g, err := v.seal()
	if err != nil {
		return manifest.Outcome{}, err
	}
	if o.Sealed != nil {
		o.Sealed()
	}
	outcome, err := v.upload(ctx, o, g, stopped)

	// From here on the caller's patience does not matter: the volume must not
	// be left between two states if that can be helped.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	if err == nil {
		v.finishLater(outcome, v.finish(ctx, outcome))
		return outcome, nil
	}
	committed, settleErr := v.settle(ctx)
	if committed != nil { // only the store's reply was lost
		v.finishLater(*committed, settleErr)
		return *committed, nil
	}
	if settleErr != nil {
		settleErr = fmt.Errorf("the changes are kept and the attempt will be settled later: %w", settleErr)
	}
	return manifest.Outcome{}, errors.Join(err, settleErr)
}

// finishLater notes why the volume could not move on to a snapshot, if so. That
// is committed all the same, and the next Settle goes on.
func (v *Volume) finishLater(outcome manifest.Outcome, err error) {
	if err != nil {
		err = fmt.Errorf("%s is committed, but the volume could not move on to it yet: %w", outcome.Snapshot, err)
		v.stats.note(err)
		v.host.Log.Warn("settling later", "volume", v.name, "error", err)
	}
}

// seal ends the open write layer and puts a new one in its place. Writers are
// stopped for as long as it takes to swap a pointer: it returns how long, and the
// volume's geometry at that moment.
func (v *Volume) seal() (stopped time.Duration, g manifest.Geometry, err error) {
	v.sizing.Lock()
	defer v.sizing.Unlock()
	layer, g, err := v.openNext()
	if err != nil {
		return 0, g, err
	}
	_, stopped = v.swap(func(now *view) *view { return newView(layer, now.open, now.image) })
	return stopped, g, nil
}

// openNext makes the write layer that is to take the open one's place, and puts it
// on record. The caller holds sizing until it has.
func (v *Volume) openNext() (layer *cache.WriteLayer, g manifest.Geometry, err error) {
	g = v.geometry.Get()
	v.newest++
	dir := layerDir(v.dir, v.newest)
	layer, err = cache.CreateWriteLayer(v.host.mustKeep(), dir, g.Size, v.host.Boot, v.key)
	if err != nil {
		return nil, g, errors.Join(fmt.Errorf("open a new write layer: %w", err), cache.RemoveWriteLayer(v.host.FS, dir))
	}
	// Rule: layers have room for the size on record, which a Resize that failed half
	// way may have made more than the volume's.
	if recorded := v.Record().Size; recorded > g.Size {
		if err := layer.Extend(recorded); err != nil {
			return nil, g, errors.Join(fmt.Errorf("open a new write layer: %w", err), layer.Close(), cache.RemoveWriteLayer(v.host.FS, dir))
		}
	}
	// Rule: a layer is named durably before anything is written to it. Should
	// that fail it may be named all the same, and must stay.
	if err := v.update(func(r *Record) { r.Layers = append(r.Layers, v.newest) }); err != nil {
		return nil, g, errors.Join(err, layer.Close())
	}
	return layer, g, nil
}

// upload takes the attempt from the sealed layer to its outcome.
func (v *Volume) upload(ctx context.Context, o SnapshotOptions, g manifest.Geometry, stopped time.Duration) (manifest.Outcome, error) {
	attempt, err := v.put(ctx, o, g, stopped)
	if err != nil {
		return manifest.Outcome{}, err
	}
	return attempt.Commit(ctx)
}

// put puts all of the sealed layer into the store but the outcome. g is the
// geometry at the cut, stopped for how long that stopped writers.
func (v *Volume) put(ctx context.Context, o SnapshotOptions, g manifest.Geometry, stopped time.Duration) (*snapshot.Attempt, error) {
	now := v.view.acquire()
	defer now.release()
	// Rule: the sealed layer is durable, then the attempt is on record, then
	// the store hears of it.
	if err := now.syncSealed(); err != nil {
		return nil, err
	}
	attempt, full, err := v.begin(ctx, now.image, g, o)
	if err != nil {
		return nil, err
	}
	v.host.Log.Info("snapshot cut", "volume", v.name, "snapshot", attempt.ID(), "stopped_ms", float64(stopped)/float64(time.Millisecond))
	if o.Cut != nil {
		o.Cut(attempt)
	}
	c := &cut{Volume: v, view: newView(nil, now.sealed, now.image), geometry: g}
	if err := c.evictHoles(); err != nil {
		return nil, err
	}
	source := snapshot.Source{Extents: c.changes(), Read: c.readBlock}
	if full {
		source.Extents = c.everything(ctx)
	} else {
		source.Bytes = snapshot.ExtentBytes(source.Extents, g.BlockSize)
	}
	if err := attempt.Upload(ctx, source); err != nil {
		return nil, err
	}
	// Rule: the clean copies of diverged blocks are durable before the
	// outcome. After it, a clean copy that a power cut rolled back would be
	// believed in place of what the snapshot holds.
	if err := v.writes.clean.Sync(); err != nil {
		return nil, err
	}
	return attempt, nil
}

// begin records an attempt here and in the store. It is a full one, without a
// parent, if the root's snapshot was deleted while the volume's pin on it was
// gone: then nothing may be inherited from it.
func (v *Volume) begin(ctx context.Context, root *snapshot.Image, g manifest.Geometry, o SnapshotOptions) (_ *snapshot.Attempt, full bool, err error) {
	plan := v.plan(g, o)
	if plan.Parent = root; root != nil {
		plan.ParentLeaf = func(ctx context.Context, ref manifest.LeafRef) (*manifest.Leaf, error) { return v.leaf(ctx, root, ref) }
	}
	attempt, err := v.beginPlan(ctx, plan)
	if !errors.Is(err, snapshot.ErrParentGone) {
		return attempt, false, err
	}
	lost := v.lose(err)
	v.host.Log.Warn("making a full snapshot", "volume", v.name, "why", lost)
	// Rule: the record may forget an attempt only when it can commit no more.
	pending := Pending{Snapshot: plan.ID, Nonce: plan.Nonce}
	committed, _, err := v.host.resolve(ctx, &pending, manifest.VolumeID(v.name), "its parent was deleted")
	if err != nil {
		return nil, false, err
	}
	if committed {
		return nil, false, fmt.Errorf("%s was committed by somebody else", plan.ID)
	}
	attempt, err = v.beginPlan(ctx, v.plan(g, o))
	return attempt, true, err
}

func (v *Volume) plan(g manifest.Geometry, o SnapshotOptions) snapshot.Plan {
	plan := snapshot.NewPlan(v.Record().Lineage)
	plan.Geometry, plan.Volume, plan.Holder = g, manifest.VolumeID(v.name), v.holder
	plan.Description, plan.Tags, plan.Set, plan.Log = o.Description, o.Tags, o.set, v.host.Log
	plan.Memory = v.host.UploadMemory
	return plan
}

func (v *Volume) beginPlan(ctx context.Context, plan snapshot.Plan) (*snapshot.Attempt, error) {
	pending := Pending{Snapshot: plan.ID, Nonce: plan.Nonce, Set: plan.Set}
	if err := v.update(func(r *Record) { r.Pending = &pending }); err != nil {
		return nil, err
	}
	return v.host.Store.Begin(ctx, plan)
}
