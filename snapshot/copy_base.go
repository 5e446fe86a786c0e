package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/lazyvol/lazyvol/manifest"
)

// A copyBase is an earlier copy that a copy is made a child of.
type copyBase struct {
	parent *Image         // nil: there is none
	before *manifest.Root // of what it is a copy of; nil: the source has it no more
}

func (b copyBase) id() *manifest.SnapshotID {
	if b.parent == nil {
		return nil
	}
	id := b.parent.ID()
	return &id
}

// baseOnRecord returns the base that an earlier run has chosen. Whether it may still
// be inherited from Begin finds out.
func (c *Copy) baseOnRecord(ctx context.Context) (copyBase, error) {
	if c.Record.Parent == nil {
		return copyBase{}, nil
	}
	parent, err := c.To.committed(ctx, *c.Record.Parent)
	if isDamage(err) {
		return copyBase{}, c.giveUp(ctx, err)
	}
	if err != nil {
		return copyBase{}, err
	}
	before, err := c.rootBefore(ctx, parent.Outcome)
	return copyBase{parent, before}, err
}

// rootBefore returns the root of what an earlier copy was made of, nil if the source
// does not have it any more.
func (c *Copy) rootBefore(ctx context.Context, copied manifest.Outcome) (*manifest.Root, error) {
	img, err := c.From.committed(ctx, copied.CopiedFrom.Snapshot)
	if isDamage(err) || errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	return img.Root, err
}

// mostBases is how many earlier copies are compared with what is to be copied, the
// latest ones: each costs a request at the source.
const mostBases = 128

// chooseBase returns the earlier copy from which the fewest leaves differ, and of
// several the latest.
func (c *Copy) chooseBase(ctx context.Context, lineage manifest.LineageID, from manifest.CopySource) (copyBase, error) {
	copies, err := c.earlierCopies(ctx, lineage, from)
	if err != nil {
		return copyBase{}, fmt.Errorf("look for earlier copies: %w", err)
	}
	copies = copies[:min(len(copies), mostBases)]
	roots := make([]*manifest.Root, len(copies))
	g, gctx := newGroup(ctx)
	g.SetLimit(parallel)
	for i, o := range copies {
		g.Go(func() (err error) {
			roots[i], err = c.rootBefore(gctx, o)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return copyBase{}, fmt.Errorf("look for what was copied before: %w", err)
	}
	best, least := -1, math.MaxInt
	for i, root := range roots {
		differ := math.MaxInt - 1 // all have to be read
		if root != nil {
			differ = 0
			for range manifest.DiffLeaves(root, c.Image.Root) {
				differ++
			}
		}
		if differ < least {
			best, least = i, differ
		}
	}
	if best < 0 {
		return copyBase{}, nil
	}
	parent, err := c.To.Load(ctx, copies[best])
	if isDamage(err) {
		// Deleted and reclaimed since it was listed, or damaged: nothing to build on.
		return copyBase{}, nil
	}
	return copyBase{parent, roots[best]}, err
}

// earlierCopies returns the outcomes of the copies of snapshots of the same lineage
// that can be a parent, the latest first.
func (c *Copy) earlierCopies(ctx context.Context, lineage manifest.LineageID, from manifest.CopySource) ([]manifest.Outcome, error) {
	ended, err := c.To.listKind(ctx, manifest.KindOutcomes, lineage.String())
	if err != nil {
		return nil, err
	}
	deleted, err := c.To.listKind(ctx, manifest.KindTombstones, lineage.String())
	if err != nil {
		return nil, err
	}
	ids := slices.DeleteFunc(sorted(ended), func(id manifest.SnapshotID) bool { return deleted[id] })
	outcomes := make([]manifest.Outcome, len(ids))
	g, gctx := newGroup(ctx)
	g.SetLimit(parallel)
	for i, id := range ids {
		g.Go(func() (err error) {
			outcomes[i], err = c.To.outcome(gctx, id)
			if isDamage(err) {
				outcomes[i], err = manifest.Outcome{}, nil // nothing to build on
			}
			outcomes[i].Root = nil // all but one would be in memory for nothing
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	geometry := c.Image.Geometry()
	outcomes = slices.DeleteFunc(outcomes, func(o manifest.Outcome) bool {
		of := o.CopiedFrom
		return o.State != manifest.StateCommitted || of == nil || of.Store != from.Store || of.Snapshot.Lineage != from.Snapshot.Lineage ||
			o.Size > geometry.Size || o.BlockSize != geometry.BlockSize
	})
	slices.SortFunc(outcomes, func(a, b manifest.Outcome) int {
		return cmp.Or(b.End.Compare(a.End), compareIDs(b.Snapshot, a.Snapshot))
	})
	return outcomes, nil
}
