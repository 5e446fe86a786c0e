package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// heartbeatInterval is how often a pending snapshot's progress is refreshed.
// Reclaim takes an owner for lost after staleAfter, a hundred times as long.
const (
	heartbeatInterval = 15 * time.Second
	staleAfter        = 100 * heartbeatInterval
)

// A Plan is what a snapshot is to be.
type Plan struct {
	// ID and Nonce identify the attempt. Whoever must be able to find out
	// after a crash what became of it records both durably before Begin.
	ID    manifest.SnapshotID
	Nonce string

	Parent *Image // nil for a first snapshot; of the same lineage

	// ParentLeaf, if set, returns a leaf of the parent that whoever plans may have
	// at hand, verified; the attempt does not change it. Else the store is asked.
	ParentLeaf func(context.Context, manifest.LeafRef) (*manifest.Leaf, error)

	Geometry    manifest.Geometry
	Volume      manifest.VolumeID // "" for an image
	Holder      Holder            // pins the new snapshot before it is committed; zero for an image
	Owner       string            // who makes it; "": the store's owner, or nobody in particular
	Description string
	Tags        map[string]string
	CopiedFrom  *manifest.CopySource // of a copy
	Set         manifest.SetID       // whose outcome is to decide the attempt's; "": it has its own
	Log         *slog.Logger         // nil discards

	// Memory is how many bytes of buffers Upload takes, about: more than
	// mostMemory are of no use, and it takes some 50 MiB at least. 0 is
	// mostMemory.
	Memory int64

	// Resumed says that the attempt was begun before, by a run that can do nothing
	// more: what that uploaded is used. Nil: this is its first run.
	Resumed *Numbers
}

// NewPlan draws the identity of an attempt in a lineage.
func NewPlan(lineage manifest.LineageID) Plan {
	return Plan{ID: manifest.NewSnapshotID(lineage), Nonce: manifest.NewNonce()}
}

// An Attempt is a snapshot between its intent and its outcome.
type Attempt struct {
	store  *Store
	plan   Plan
	key    *crypt.Key // of the lineage; nil: not encrypted
	intent manifest.Intent
	log    *slog.Logger

	began    atomic.Bool // by Upload
	uploaded *uploaded   // set by Upload, when all is in the store

	blocksDone atomic.Int64 // number of the block up to which all are packed; for Percent
	bytesDone  atomic.Int64 // of the source's blocks that are stored, or need not be; for Progress
	bytesAll   atomic.Int64 // that Source.Bytes says; for Progress
	storedSum  atomic.Int64
	beating    chan struct{} // holds a token while somebody refreshes the progress
	beaten     atomic.Bool   // a heartbeat was sent, so that there is progress to remove
}

// Begin checks the plan and records its intent. ErrParentGone: the parent was
// deleted and nothing may be inherited from it any more; the attempt was
// aborted. On any other error the intent may or may not be recorded; Resolve
// settles it.
func (s *Store) Begin(ctx context.Context, p Plan) (*Attempt, error) {
	p.Owner = cmp.Or(p.Owner, s.owner)
	if err := p.check(); err != nil {
		return nil, fmt.Errorf("begin snapshot: %w", err)
	}
	key, err := s.keyOfPlan(ctx, p) // before anything is recorded
	if err != nil {
		return nil, fmt.Errorf("begin snapshot: %w", err)
	}
	a := &Attempt{store: s, plan: p, key: key, intent: p.intent(), log: p.Log, beating: make(chan struct{}, 1)}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if a.intent, err = s.putIntent(ctx, a.intent); err != nil {
		return nil, fmt.Errorf("begin %s: %w", p.ID, err)
	}
	if p.Parent == nil {
		return a, nil
	}
	// Rule: the intent first, the parent's tombstone second. From here on
	// reclaim takes the parent for a root, unless it was deleted before; then
	// only this volume's own pin, read now and not remembered, keeps it whole.
	err = s.mayInherit(ctx, p.Parent.ID(), p.Holder)
	if errors.Is(err, ErrParentGone) {
		// Of a set it is aborted alone, without the set: that lists only what was
		// prepared, and so never this.
		_, abortErr := s.putOutcome(ctx, abortedBy(a.intent, "its parent was deleted"))
		return nil, errors.Join(fmt.Errorf("begin %s: %w", p.ID, err), abortErr)
	}
	if err != nil {
		return nil, fmt.Errorf("begin %s: %w", p.ID, err)
	}
	return a, nil
}

// keyOfPlan returns the key that a snapshot is sealed under; nil: none.
func (s *Store) keyOfPlan(ctx context.Context, p Plan) (*crypt.Key, error) {
	if p.Parent != nil {
		return p.Parent.key, nil
	}
	return s.Key(ctx, p.ID.Lineage)
}

// intent returns the intent to be recorded.
func (p Plan) intent() manifest.Intent {
	i := manifest.Intent{
		Version: manifest.RecordVersion, Snapshot: p.ID, Volume: p.Volume, Size: p.Geometry.Size, BlockSize: p.Geometry.BlockSize,
		Nonce: p.Nonce, Start: now(), Owner: p.Owner, Description: p.Description, Tags: p.Tags, CopiedFrom: p.CopiedFrom, Set: p.Set,
	}
	if p.Parent != nil {
		parent := p.Parent.ID()
		i.Parent = &parent
	}
	return i
}

// parentLeaf returns a leaf of the parent.
func (p *Plan) parentLeaf(ctx context.Context, ref manifest.LeafRef) (*manifest.Leaf, error) {
	if p.ParentLeaf != nil {
		return p.ParentLeaf(ctx, ref)
	}
	return p.Parent.FetchLeaf(ctx, ref)
}

// check refuses, before anything is recorded, what cannot become a snapshot.
func (p Plan) check() error {
	if p.Parent != nil && p.Parent.ID().Lineage != p.ID.Lineage {
		return fmt.Errorf("%w: parent %s and %s", ErrUnrelated, p.Parent.ID(), p.ID)
	}
	if _, err := manifest.EncodeRecord(p.intent()); err != nil {
		return err
	}
	if p.Holder.ID != "" {
		if _, err := manifest.EncodeRecord(p.Holder.pin(p.ID)); err != nil {
			return err
		}
	}
	if p.Parent == nil {
		return nil
	}
	switch g := p.Parent.Geometry(); {
	case g.BlockSize != p.Geometry.BlockSize:
		return fmt.Errorf("block size %d differs from the lineage's %d", p.Geometry.BlockSize, g.BlockSize)
	case g.Size > p.Geometry.Size:
		return fmt.Errorf("size %d is smaller than the parent's %d", p.Geometry.Size, g.Size)
	}
	return nil
}

// putIntent records an intent, and returns the one that stands. A key taken by
// this very attempt, its first reply lost or in an earlier run, is success.
func (s *Store) putIntent(ctx context.Context, intent manifest.Intent) (manifest.Intent, error) {
	err := s.putOnce(ctx, manifest.IntentKey(intent.Snapshot), intent)
	if !errors.Is(err, blockstore.ErrExists) {
		return intent, err
	}
	there, err := s.intent(ctx, intent.Snapshot)
	if err != nil {
		return there, err
	}
	if there.Nonce != intent.Nonce {
		return there, fmt.Errorf("snapshot id is taken by another attempt: %w", blockstore.ErrExists)
	}
	return there, nil
}

// mayInherit is nil when a pending snapshot may refer to what parent refers
// to.
func (s *Store) mayInherit(ctx context.Context, parent manifest.SnapshotID, h Holder) error {
	deleted, err := s.exists(ctx, manifest.TombstoneKey(parent))
	if err != nil {
		return fmt.Errorf("look for the tombstone of parent %s: %w", parent, err)
	}
	if !deleted {
		return nil
	}
	if h.ID != "" {
		pinned, err := s.Pinned(ctx, parent, h)
		if err != nil || pinned {
			return err
		}
	}
	return fmt.Errorf("%w: %s", ErrParentGone, parent)
}

// ID returns the id of the snapshot being made.
func (a *Attempt) ID() manifest.SnapshotID { return a.plan.ID }

// Percent returns how much of the device the upload has passed.
func (a *Attempt) Percent() int {
	if a.plan.Geometry.Blocks() == 0 {
		return 0
	}
	return int(a.blocksDone.Load() * 100 / a.plan.Geometry.Blocks())
}

// Progress returns how many bytes of blocks are in the store, or need not be put
// there, and how many there are: those of its source that are no holes. Of a source
// that cannot tell it is how many bytes of the device the upload has passed, and all.
func (a *Attempt) Progress() (done, total int64) {
	if all := a.bytesAll.Load(); all > 0 {
		return min(a.bytesDone.Load(), all), all
	}
	g := a.plan.Geometry
	return min(a.blocksDone.Load()*int64(g.BlockSize), g.Size), g.Size
}

// StoredBytes returns the bytes of packs finished so far.
func (a *Attempt) StoredBytes() int64 { return a.storedSum.Load() }

// Commit makes the uploaded snapshot exist: it pins it for the holder, then
// puts the outcome, whose key the store lets exist only once. ErrAborted:
// somebody aborted the attempt first. After any other error the outcome is not
// known: Commit again or Resolve.
func (a *Attempt) Commit(ctx context.Context) (manifest.Outcome, error) {
	if a.plan.Set != "" {
		return manifest.Outcome{}, fmt.Errorf("commit %s: %s decides it", a.ID(), a.plan.Set)
	}
	outcome, err := a.Prepare(ctx)
	if err != nil {
		return manifest.Outcome{}, err
	}
	won, err := a.store.putOutcome(ctx, outcome)
	if err != nil {
		return won, fmt.Errorf("commit %s: %w", a.ID(), err)
	}
	if won.State != manifest.StateCommitted || won.Nonce != a.plan.Nonce {
		return won, fmt.Errorf("commit %s: %w (%s)", a.ID(), ErrAborted, won.Why)
	}
	a.forgetProgress(ctx)
	return won, nil
}

// Prepare pins the uploaded snapshot for the holder, and returns the outcome that
// would commit it: of an attempt of a set, for CommitSet.
func (a *Attempt) Prepare(ctx context.Context) (manifest.Outcome, error) {
	if a.uploaded == nil {
		return manifest.Outcome{}, errors.New("commit: nothing was uploaded")
	}
	// The volume's pin must stand before anybody can see, and delete, the
	// snapshot the volume is about to read through.
	if a.plan.Holder.ID != "" {
		if err := a.store.put(ctx, manifest.PinKey(a.ID(), a.plan.Holder.ID), a.plan.Holder.pin(a.ID())); err != nil {
			return manifest.Outcome{}, fmt.Errorf("commit %s: pin it: %w", a.ID(), err)
		}
	}
	return a.outcome(), nil
}

// Abort gives the attempt up and removes what it uploaded. It fails if the
// snapshot is already committed.
func (a *Attempt) Abort(ctx context.Context, why string) error {
	committed, _, err := a.store.Resolve(ctx, a.ID(), a.plan.Nonce, why)
	if err != nil {
		return err
	}
	if committed {
		return fmt.Errorf("abort %s: it is committed already", a.ID())
	}
	return a.store.Discard(ctx, a.ID(), a.plan.Holder)
}

// outcome returns the outcome that commits what was uploaded.
func (a *Attempt) outcome() manifest.Outcome {
	o := manifest.Outcome{
		Version: manifest.RecordVersion, Snapshot: a.ID(), State: manifest.StateCommitted, Nonce: a.plan.Nonce,
		Parent: a.intent.Parent, Volume: a.intent.Volume, Size: a.intent.Size, BlockSize: a.intent.BlockSize,
		Start: a.intent.Start, End: now(), Owner: a.intent.Owner, Description: a.intent.Description, Tags: a.intent.Tags, CopiedFrom: a.intent.CopiedFrom, Set: a.intent.Set,
	}
	a.uploaded.describe(&o)
	return o
}

// KeepAlive refreshes the attempt's progress until ctx ends, so that reclaim can
// tell an owner that waits for others from a lost one.
func (a *Attempt) KeepAlive(ctx context.Context) { a.heartbeat(ctx) }

// heartbeat refreshes the attempt's progress until ctx ends, so that reclaim can
// tell a slow owner from a lost one. While somebody else does it waits, to take
// over.
func (a *Attempt) heartbeat(ctx context.Context) {
	select {
	case a.beating <- struct{}{}:
	case <-ctx.Done():
		return
	}
	defer func() { <-a.beating }()
	tick := time.NewTicker(heartbeatInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		a.beaten.Store(true)
		err := a.store.put(ctx, manifest.ProgressKey(a.ID()), manifest.Progress{
			Version: manifest.RecordVersion, Snapshot: a.ID(), Percent: a.Percent(), Heartbeat: now(),
		})
		if err != nil && ctx.Err() == nil {
			a.log.Warn("could not refresh the progress of a pending snapshot", "snapshot", a.ID(), "error", err)
		}
	}
}

// forgetProgress removes the progress of an ended attempt. It only tidies, so
// that its failure is nobody's: reclaim tidies too.
func (a *Attempt) forgetProgress(ctx context.Context) {
	if !a.beaten.Load() {
		return
	}
	if err := a.store.objects.Delete(ctx, manifest.ProgressKey(a.ID())); err != nil {
		a.log.Warn("could not remove the progress of an ended snapshot", "snapshot", a.ID(), "error", err)
	}
}
