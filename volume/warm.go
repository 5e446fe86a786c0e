package volume

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// Plan returns the runs of blocks that this host lacks in the first leaf at or
// after the given one in which the root has data, and the leaf to go on with;
// io.EOF when there is none. An error in reading the leaf comes with the leaf
// to go on with, too.
func (d *Device) Plan(ctx context.Context, leaf int64) (runs []manifest.Run, next int64, err error) {
	v := d.view.acquire()
	defer v.release()
	at, ok := v.nextLeaf(leaf)
	if !ok {
		return nil, 0, io.EOF
	}
	blocks := make([]int64, v.image.Geometry().LeafLen(at.Leaf))
	for i := range blocks {
		blocks[i] = at.Leaf*manifest.LeafBlocks + int64(i)
	}
	blocks, refs, err := d.lacking(ctx, v, blocks)
	if err != nil {
		return nil, at.Leaf + 1, fmt.Errorf("plan hydration: %w", err)
	}
	return manifest.GroupRuns(blocks, refs, maxRunGap, maxRunSpan), at.Leaf + 1, nil
}

// PlanBlocks returns the runs of those of the blocks, in any order, that the
// root has and this host lacks, in the order of each run's first block.
func (d *Device) PlanBlocks(ctx context.Context, blocks []int64) ([]manifest.Run, error) {
	v := d.view.acquire()
	defer v.release()
	order := make(map[int64]int, len(blocks))
	var sorted []int64
	for i, block := range blocks {
		if _, twice := order[block]; !twice && block >= 0 && block < v.blocks() {
			order[block] = i
			sorted = append(sorted, block)
		}
	}
	slices.Sort(sorted)
	lacked, refs, err := d.lacking(ctx, v, sorted)
	if err != nil {
		return nil, fmt.Errorf("plan blocks: %w", err)
	}
	runs := manifest.GroupRuns(lacked, refs, maxRunGap, aheadSpan)
	first := func(r manifest.Run) int {
		least := len(blocks)
		for _, block := range r.Blocks {
			least = min(least, order[block])
		}
		return least
	}
	slices.SortFunc(runs, func(a, b manifest.Run) int { return cmp.Compare(first(a), first(b)) })
	return runs, nil
}

// lacking returns those of the blocks that the root has and this host lacks,
// and their refs. Not among them are those of which a snapshot is being made:
// their clean copies are the snapshot's to write.
func (d *Device) lacking(ctx context.Context, v *view, blocks []int64) (lacked []int64, refs []manifest.Ref, err error) {
	for _, block := range blocks {
		ref, err := d.ref(ctx, v.image, block)
		if err != nil {
			return nil, nil, err
		}
		if ref.IsHole() {
			continue
		}
		layer, _ := d.place(block)
		has, err := layer.Has(block)
		if err != nil {
			return nil, nil, err
		}
		own := d.writes != nil && layer == d.writes.clean
		if has || own && d.seals(v, block) {
			continue
		}
		lacked, refs = append(lacked, block), append(refs, ref)
	}
	return lacked, refs, nil
}

// Warm fetches blocks, ascending, in the background and keeps them. It looks
// them up anew: some may have arrived since they were planned, and a snapshot
// may have moved the root on. If some fail it still keeps the others. ErrFull:
// there is no room.
func (d *Device) Warm(ctx context.Context, blocks []int64) error {
	for {
		v := d.view.acquire()
		err := d.warm(ctx, v, blocks)
		now := d.view.acquire()
		same := now.image == v.image
		now.release()
		v.release()
		if err != nil || same {
			return err
		}
		// A commit came in between, and some blocks may not have been kept.
	}
}

func (d *Device) warm(ctx context.Context, v *view, blocks []int64) error {
	if v.image == nil {
		return nil
	}
	if err := d.trusted(); err != nil {
		return err
	}
	// What readers are fetching at this moment is left to them, and looked at again
	// when they have it.
	lacked, refs, err := d.lacking(ctx, v, blocks)
	if err != nil {
		return d.noteWarm(ctx, err)
	}
	own, ownRefs, others, release := d.flights.claim(v, lacked, refs)
	err = d.warmRuns(ctx, v, own, ownRefs)
	release()
	if err != nil || len(others) == 0 {
		return err
	}
	for _, flight := range others {
		select {
		case <-flight.left:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if lacked, refs, err = d.lacking(ctx, v, lacked); err != nil {
		return d.noteWarm(ctx, err)
	}
	return d.warmRuns(ctx, v, lacked, refs)
}

// warmRuns fetches and keeps blocks, in as few requests as that takes.
func (d *Device) warmRuns(ctx context.Context, v *view, blocks []int64, refs []manifest.Ref) error {
	var err error
	for _, run := range manifest.GroupRuns(blocks, refs, maxRunGap, maxRunSpan) {
		fitting, full := d.host.Budget.admitSome(len(run.Blocks), int64(d.geometry.BlockSize), false)
		if fitting > 0 {
			run.Blocks, run.Refs = run.Blocks[:fitting], run.Refs[:fitting]
			if runErr := d.warmRun(ctx, v, run); err == nil {
				err = runErr
			}
		}
		if full != nil {
			d.Recount() // for a while nothing will change
			return errors.Join(full, err)
		}
	}
	if vfs.IsFull(err) {
		d.Recount()
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return d.noteWarm(ctx, err)
}

// noteWarm notes why background work failed, for status, unless it was ended.
func (d *Device) noteWarm(ctx context.Context, err error) error {
	if err != nil && ctx.Err() == nil {
		d.stats.note(err)
	}
	return err
}

// warmRun fetches and keeps the blocks of one run, which were admitted.
func (d *Device) warmRun(ctx context.Context, v *view, run manifest.Run) error {
	buffer := d.buffers.Get().(*[]byte)
	defer d.buffers.Put(buffer)
	block := (*buffer)[:d.geometry.BlockSize]
	admitted := int64(len(run.Blocks))
	defer func() { d.host.Budget.done(admitted * int64(d.geometry.BlockSize)) }()
	var failed error
	d.fetchQuietly(ctx, run.Refs, block, func(i int, err error) {
		admitted--
		defer d.host.Budget.done(int64(d.geometry.BlockSize))
		if err == nil {
			d.stats.heal(run.Blocks[i])
			err = d.keep(v, run.Blocks[i], block)
		}
		if err != nil && failed == nil {
			failed = &blockError{doing: "hydrate", block: run.Blocks[i], err: err}
		}
	})
	return failed
}
