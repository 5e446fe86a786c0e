package snapshot

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"

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

// giveUp aborts the attempt on record, which cannot be gone on with. Its error is
// errEnded unless that fails.
func (c *Copy) giveUp(ctx context.Context, why error) error {
	if _, _, err := c.To.Resolve(ctx, c.Record.Snapshot, c.Record.Nonce, why.Error()); err != nil {
		return err
	}
	return fmt.Errorf("%w: %w", errEnded, why)
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

// lineage returns the lineage of the destination for copies of snapshots of a
// lineage under the key asked for: the first whose record says so, in a sequence of ids
// that follow from the origin, or a new one at the first of them that is free. So it is
// found with one request or two, and several copies that begin at once agree on it.
func (c *Copy) lineage(ctx context.Context, origin manifest.LineageOrigin) (manifest.LineageID, error) {
	id, err := c.findLineage(ctx, origin)
	if err != nil {
		return 0, fmt.Errorf("find a lineage for the copy: %w", err)
	}
	return id, nil
}

func (c *Copy) findLineage(ctx context.Context, origin manifest.LineageOrigin) (manifest.LineageID, error) {
	const draws = 64 // one for each key, and of 2³² ids
	uri, err := c.keyURI(ctx)
	if err != nil {
		return 0, err
	}
	key := c.canonicalKey(uri)
	for n := range uint32(draws) {
		id := copyLineageID(origin, n)
		record, err := c.To.Lineage(ctx, id)
		if errors.Is(err, ErrNotFound) {
			record = manifest.LineageRecord{ID: id, BlockSize: c.Image.Geometry().BlockSize, CopyOf: &origin}
			record, err = c.To.recordLineage(ctx, record, uri)
			if errors.Is(err, blockstore.ErrExists) {
				record, err = c.To.Lineage(ctx, id)
			}
		}
		if err != nil {
			return 0, err
		}
		if record.CopyOf == nil || *record.CopyOf != origin || record.BlockSize != c.Image.Geometry().BlockSize {
			continue
		}
		if same, err := key(ctx, record); same || err != nil {
			return id, err
		}
	}
	return 0, fmt.Errorf("%d ids tried and all taken", draws)
}

// keyURI names the key of the copy. Nothing that is encrypted is decrypted.
func (c *Copy) keyURI(ctx context.Context) (string, error) {
	if c.KeyURI != "" {
		return c.KeyURI, nil
	}
	source, err := c.From.Lineage(ctx, c.Image.ID().Lineage)
	if err != nil || source.Encryption == nil {
		return "", err
	}
	return source.Encryption.KeyURI, nil
}

// canonicalKey returns what tells whether a lineage is encrypted under a key. The key
// may have several names, of which only the store of keys knows the one on record.
func (c *Copy) canonicalKey(uri string) func(context.Context, manifest.LineageRecord) (bool, error) {
	canonical := ""
	return func(ctx context.Context, record manifest.LineageRecord) (bool, error) {
		e := record.Encryption
		switch {
		case e == nil || uri == "":
			return e == nil && uri == "", nil
		case e.Shredded:
			return false, nil
		case e.KeyURI == uri:
			return true, nil
		}
		if canonical == "" {
			made, _, err := c.To.encrypt(ctx, uri, record.ID)
			if err != nil {
				return false, err
			}
			canonical = made.KeyURI
		}
		return e.KeyURI == canonical, nil
	}
}

// copyLineageID returns the n-th id that a lineage with copies may have.
func copyLineageID(origin manifest.LineageOrigin, n uint32) manifest.LineageID {
	hash := sha256.Sum256(fmt.Appendf(nil, "copy of lineage %s in store %s: %d", origin.Lineage, origin.Store, n))
	return manifest.LineageID(max(1, binary.LittleEndian.Uint32(hash[:])))
}
