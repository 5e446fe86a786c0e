package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A State says how far a snapshot is.
type State string

// The states, named as EBS names them; an aborted snapshot is an error there.
const (
	Pending   State = "pending"
	Completed State = "completed"
	Aborted   State = "error"
)

// A Description is what the store's records tell of a snapshot.
type Description struct {
	ID          manifest.SnapshotID
	State       State
	Percent     int                 // of the upload
	Parent      manifest.SnapshotID // zero: a first snapshot
	Volume      manifest.VolumeID   // "" when it was made from an image
	Geometry    manifest.Geometry
	Start       time.Time
	End         time.Time // zero while pending
	Owner       string    // who made it; "": whoever has the store
	Description string
	Tags        map[string]string
	CopiedFrom  *manifest.CopySource // nil: it is no copy
	Lock        *manifest.Lock       // nil: none; see LockState
	Bin         *manifest.Bin        // nil: not in the recycle bin
	Shares      []string             // accounts: see manifest.CheckAccount
	Encryption  *manifest.Encryption // of its lineage; nil: not encrypted
	Set         manifest.SetID       // of which it is one; "": none
	Why         string               // of an aborted one
	Outcome     manifest.Outcome     // zero while pending
}

// Describe returns one snapshot's description. Deleted and unknown ones are
// ErrNotFound.
func (s *Store) Describe(ctx context.Context, id manifest.SnapshotID) (Description, error) {
	var d Description
	var meta *manifest.Meta
	var encryption *manifest.Encryption
	var deleted, damaged, unread, unknown error
	var wg sync.WaitGroup
	wg.Go(func() { deleted = s.checkTombstone(ctx, id) })
	wg.Go(func() { d, damaged = s.describe(ctx, id) })
	wg.Go(func() { meta, _, unread = s.meta(ctx, id) })
	wg.Go(func() { encryption, unknown = s.encryption(ctx, id.Lineage) })
	wg.Wait()
	// Whatever became of a deleted one's records, it is not found.
	d.amend(meta)
	if err := cmp.Or(deleted, damaged, unread, d.binned(), unknown); err != nil {
		return Description{}, fmt.Errorf("describe %s: %w", id, err)
	}
	d.Encryption = encryption
	return d, nil
}

// encryption returns how a lineage is encrypted; nil: it is not.
func (s *Store) encryption(ctx context.Context, id manifest.LineageID) (*manifest.Encryption, error) {
	record, _, err := getRecord[manifest.LineageRecord](ctx, s.objects, manifest.LineageKey(id))
	if err != nil {
		return nil, fmt.Errorf("read lineage %s: %w", id, err)
	}
	return record.Encryption, nil
}

// describe is Describe without regard to tombstones and changed tags.
func (s *Store) describe(ctx context.Context, id manifest.SnapshotID) (Description, error) {
	outcome, err := s.decided(ctx, id)
	switch {
	case err == nil:
		return fromOutcome(outcome), nil
	case !errors.Is(err, blockstore.ErrNotExist):
		return Description{}, err
	}
	intent, err := s.intent(ctx, id)
	if errors.Is(err, blockstore.ErrNotExist) {
		return Description{}, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	if err != nil {
		return Description{}, err
	}
	d := fromIntent(intent)
	progress, _, err := getRecord[manifest.Progress](ctx, s.objects, manifest.ProgressKey(id))
	if err != nil && !errors.Is(err, blockstore.ErrNotExist) {
		return Description{}, err
	}
	d.Percent = progress.Percent
	return d, nil
}

// ownOutcome reads the outcome that is recorded as a snapshot's own;
// blockstore.ErrNotExist while there is none. Of one of a set its set's may decide:
// see outcome.
func (s *Store) ownOutcome(ctx context.Context, id manifest.SnapshotID) (manifest.Outcome, error) {
	outcome, _, err := getRecord[manifest.Outcome](ctx, s.objects, manifest.OutcomeKey(id))
	if err == nil && outcome.Snapshot != id {
		err = fmt.Errorf("the outcome of %s is that of %s: %w", id, outcome.Snapshot, manifest.ErrCorrupt)
	}
	return outcome, err
}

// intent reads a snapshot's intent; blockstore.ErrNotExist if it was never
// begun.
func (s *Store) intent(ctx context.Context, id manifest.SnapshotID) (manifest.Intent, error) {
	intent, _, err := getRecord[manifest.Intent](ctx, s.objects, manifest.IntentKey(id))
	if err == nil && intent.Snapshot != id {
		err = fmt.Errorf("the intent of %s is that of %s: %w", id, intent.Snapshot, manifest.ErrCorrupt)
	}
	return intent, err
}

func fromIntent(i manifest.Intent) Description {
	d := Description{
		ID: i.Snapshot, State: Pending, Volume: i.Volume, Start: i.Start,
		Geometry: manifest.Geometry{Size: i.Size, BlockSize: i.BlockSize},
		Owner:    i.Owner, Description: i.Description, Tags: i.Tags, CopiedFrom: i.CopiedFrom, Set: i.Set,
	}
	if i.Parent != nil {
		d.Parent = *i.Parent
	}
	return d
}

func fromOutcome(o manifest.Outcome) Description {
	d := Description{
		ID: o.Snapshot, State: Completed, Percent: 100, Volume: o.Volume, Start: o.Start, End: o.End,
		Geometry: manifest.Geometry{Size: o.Size, BlockSize: o.BlockSize},
		Owner:    o.Owner, Description: o.Description, Tags: o.Tags, CopiedFrom: o.CopiedFrom, Set: o.Set, Why: o.Why, Outcome: o,
	}
	if o.Parent != nil {
		d.Parent = *o.Parent
	}
	if o.State == manifest.StateAborted {
		d.State, d.Percent = Aborted, 0
	}
	return d
}
