package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A CopyRecord is what of a copy must outlive its process, so that another run of
// it goes on where that was: what the first run has planned.
type CopyRecord struct {
	Snapshot    manifest.SnapshotID  `json:"snapshot"`         // the copy
	Nonce       string               `json:"nonce"`            // of its attempt
	Parent      *manifest.SnapshotID `json:"parent,omitempty"` // an earlier copy; nil: a full one
	Description string               `json:"description,omitempty"`
	Tags        map[string]string    `json:"tags,omitempty"`
	Used        Numbers              `json:"used"` // of the last run
}

// A Copy is a snapshot on its way from one store to another, or to another lineage
// of its own. Its fields are set before Run.
type Copy struct {
	From  *Store
	Image *Image // of From, pinned by the caller if that is possible
	To    *Store

	// KeyURI names the key that the copy's lineage is encrypted under. "" is the key
	// of the source's lineage, or none if that is not encrypted.
	KeyURI string

	Description string
	Tags        map[string]string
	Memory      int64        // bytes of buffers, about; 0: as much as is of use
	Log         *slog.Logger // nil discards

	// Record is that of an earlier run which did not end the copy, nil if there is
	// none. Save makes a record durable before anything depends on it.
	Record *CopyRecord
	Save   func(CopyRecord) error

	// Begun, if set, is told the attempt of this run before it uploads, and whether
	// only what differs from an earlier copy is uploaded.
	Begun func(a *Attempt, incremental bool)
}

// copyTries bounds how often a copy is planned anew because what it builds on was
// deleted meanwhile.
const copyTries = 4

// errEnded: the attempt of an earlier run was aborted.
var errEnded = errors.New("an earlier run of the copy was given up")

// Run makes the copy, and returns its outcome. Every leaf and every block is
// verified before it is committed. It is a child of an earlier copy of a snapshot
// of the same lineage, if the destination has one under the same key, and then only
// leaves and blocks in which the two differ are read and uploaded.
//
// After an error, or when ctx ends, the attempt stays pending, and a run with the
// record saved last goes on with it: packs that are uploaded are used, unless a
// reclaim has aborted the attempt in the meantime, after 25 minutes of silence.
// Damage of what is to be copied aborts it: then the error is IsDamage.
func (c *Copy) Run(ctx context.Context) (manifest.Outcome, error) {
	outcome, err := c.run(ctx)
	if err != nil {
		return outcome, fmt.Errorf("copy %s to %s: %w", c.Image.ID(), c.To, err)
	}
	return outcome, nil
}

func (c *Copy) run(ctx context.Context) (manifest.Outcome, error) {
	storeID, err := c.From.ID(ctx)
	if err != nil {
		return manifest.Outcome{}, err
	}
	from := manifest.CopySource{Store: storeID, Snapshot: c.Image.ID()}
	for try := 1; ; try++ {
		outcome, err := c.try(ctx, from)
		if try == copyTries || !errors.Is(err, ErrParentGone) && !errors.Is(err, errEnded) {
			return outcome, err
		}
		if err := c.To.Discard(ctx, c.Record.Snapshot, Holder{}); err != nil {
			return manifest.Outcome{}, err
		}
		c.Record = nil // and plan anew, without what is gone
	}
}

// try goes on with the attempt on record, or begins one.
func (c *Copy) try(ctx context.Context, from manifest.CopySource) (manifest.Outcome, error) {
	resumed := c.Record != nil
	if resumed {
		if ended, outcome, err := c.ended(ctx); ended || err != nil {
			return outcome, err
		}
	}
	// Also of a resumed one: by its record alone a lineage could have lost its encryption.
	lineage, err := c.lineage(ctx, manifest.LineageOrigin{Store: from.Store, Lineage: from.Snapshot.Lineage})
	if err != nil {
		return manifest.Outcome{}, err
	}
	var earlier []earlierPack
	var base copyBase
	if resumed {
		if lineage != c.Record.Snapshot.Lineage {
			return manifest.Outcome{}, c.giveUp(ctx, fmt.Errorf("its lineage would be %s now", lineage))
		}
		if base, err = c.baseOnRecord(ctx); err != nil {
			return manifest.Outcome{}, err
		}
		if earlier, c.Record.Used, err = c.To.earlier(ctx, c.Record.Snapshot, c.Record.Used); err != nil {
			return manifest.Outcome{}, err
		}
	} else {
		if base, err = c.chooseBase(ctx, lineage, from); err != nil {
			return manifest.Outcome{}, err
		}
		plan := NewPlan(lineage)
		c.Record = &CopyRecord{Snapshot: plan.ID, Nonce: plan.Nonce, Parent: base.id(), Description: c.Description, Tags: c.Tags}
	}
	// Rule: on record before the store hears of it, the numbers included.
	if err := c.Save(*c.Record); err != nil {
		return manifest.Outcome{}, err
	}
	lookup := c.To.newLookup(c.Record.Snapshot, earlier)
	memory := cmp.Or(c.Memory, mostMemory)
	source := newCopySource(ctx, c.Image, base.parent, base.before, lookup, memory/4)
	defer source.close()
	plan := Plan{
		ID: c.Record.Snapshot, Nonce: c.Record.Nonce, Parent: base.parent, ParentLeaf: source.parentLeaf,
		Geometry: c.Image.Geometry(), Description: c.Record.Description, Tags: c.Record.Tags, CopiedFrom: &from,
		Log: c.Log, Memory: memory - memory/4,
	}
	if resumed {
		plan.Resumed = &c.Record.Used
	}
	return c.upload(ctx, plan, source)
}

// ended reports whether an earlier run has committed the copy on record. If it was
// given up, or deleted since, that is errEnded; else it is known to be alive from now on.
func (c *Copy) ended(ctx context.Context) (bool, manifest.Outcome, error) {
	outcome, err := c.To.outcome(ctx, c.Record.Snapshot)
	switch {
	case errors.Is(err, blockstore.ErrNotExist):
		return false, outcome, c.To.put(ctx, manifest.ProgressKey(c.Record.Snapshot), manifest.Progress{
			Version: manifest.RecordVersion, Snapshot: c.Record.Snapshot, Heartbeat: now(),
		})
	case err != nil:
		return false, outcome, err
	case outcome.State != manifest.StateCommitted || outcome.Nonce != c.Record.Nonce:
		return false, outcome, errEnded
	}
	if err := c.To.checkTombstone(ctx, c.Record.Snapshot); errors.Is(err, ErrNotFound) {
		return false, outcome, errEnded
	} else if err != nil {
		return false, outcome, err
	}
	return true, outcome, nil
}

func (c *Copy) upload(ctx context.Context, plan Plan, source *copySource) (manifest.Outcome, error) {
	attempt, err := c.To.Begin(ctx, plan)
	if err != nil {
		return manifest.Outcome{}, err // ErrParentGone: it is aborted
	}
	attempt.beaten.Store(plan.Resumed != nil)
	if c.Begun != nil {
		c.Begun(attempt, plan.Parent != nil)
	}
	err = attempt.Upload(ctx, source.source())
	if err == nil {
		return attempt.Commit(ctx)
	}
	source.close() // before what it feeds is removed
	if isDamage(err) && ctx.Err() == nil {
		ctx, cancel := context.WithTimeout(ctx, settleTimeout)
		defer cancel()
		err = errors.Join(err, attempt.Abort(ctx, err.Error()))
	}
	return manifest.Outcome{}, err
}

// giveUp aborts the attempt on record, which cannot be gone on with. Its error is
// errEnded unless that fails.
func (c *Copy) giveUp(ctx context.Context, why error) error {
	if _, _, err := c.To.Resolve(ctx, c.Record.Snapshot, c.Record.Nonce, why.Error()); err != nil {
		return err
	}
	return fmt.Errorf("%w: %w", errEnded, why)
}
