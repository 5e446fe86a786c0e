package snapshot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

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
	Percent     int // of the upload
	Parent      manifest.SnapshotID
	Volume      manifest.VolumeID // "" when it was made from an image
	Geometry    manifest.Geometry
	Start       time.Time
	End         time.Time // zero while pending
	Description string
	Tags        map[string]string
	Why         string           // of an aborted one
	Outcome     manifest.Outcome // zero while pending
}

// Describe returns one snapshot's description. Deleted and unknown ones are
// ErrNotFound.
func (s *Store) Describe(ctx context.Context, id manifest.SnapshotID) (Description, error) {
	var deleted bool
	var d Description
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		deleted, err = s.exists(gctx, manifest.TombstoneKey(id))
		return err
	})
	g.Go(func() (err error) {
		d, err = s.describe(gctx, id)
		return err
	})
	if err := g.Wait(); err != nil {
		return d, fmt.Errorf("describe %s: %w", id, err)
	}
	if deleted {
		return d, fmt.Errorf("%w: %s was deleted", ErrNotFound, id)
	}
	return d, nil
}

// describe is Describe without regard to tombstones.
func (s *Store) describe(ctx context.Context, id manifest.SnapshotID) (Description, error) {
	outcome, err := s.outcome(ctx, id)
	switch {
	case err == nil:
		d := fromOutcome(outcome)
		return d, s.addTags(ctx, &d)
	case !errors.Is(err, blockstore.ErrNotExist):
		return Description{}, err
	}
	intent, _, err := getRecord[manifest.Intent](ctx, s.objects, manifest.IntentKey(id))
	if errors.Is(err, blockstore.ErrNotExist) {
		return Description{}, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	if err != nil {
		return Description{}, err
	}
	d := fromIntent(intent)
	progress, _, err := getRecord[manifest.Progress](ctx, s.objects, manifest.ProgressKey(id))
	if err != nil && !errors.Is(err, blockstore.ErrNotExist) {
		return d, err
	}
	d.Percent = progress.Percent
	return d, s.addTags(ctx, &d)
}

// outcome reads a snapshot's outcome; blockstore.ErrNotExist while there is
// none.
func (s *Store) outcome(ctx context.Context, id manifest.SnapshotID) (manifest.Outcome, error) {
	outcome, _, err := getRecord[manifest.Outcome](ctx, s.objects, manifest.OutcomeKey(id))
	return outcome, err
}

// addTags replaces the tags a snapshot was born with by those it has now.
func (s *Store) addTags(ctx context.Context, d *Description) error {
	meta, _, err := getRecord[manifest.Meta](ctx, s.objects, manifest.MetaKey(d.ID))
	if errors.Is(err, blockstore.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	d.Tags = meta.Tags
	return nil
}

func fromIntent(i manifest.Intent) Description {
	d := Description{
		ID: i.Snapshot, State: Pending, Volume: i.Volume, Start: i.Start,
		Geometry:    manifest.Geometry{Size: i.Size, BlockSize: i.BlockSize},
		Description: i.Description, Tags: i.Tags,
	}
	if i.Parent != nil {
		d.Parent = *i.Parent
	}
	return d
}

func fromOutcome(o manifest.Outcome) Description {
	d := Description{
		ID: o.Snapshot, State: Completed, Percent: 100, Volume: o.Volume, Start: o.Start, End: o.End,
		Geometry:    manifest.Geometry{Size: o.Size, BlockSize: o.BlockSize},
		Description: o.Description, Tags: o.Tags, Why: o.Why, Outcome: o,
	}
	if o.Parent != nil {
		d.Parent = *o.Parent
	}
	if o.State == manifest.StateAborted {
		d.State, d.Percent = Aborted, 0
	}
	return d
}

// List returns the snapshots of the store that are not deleted, oldest first;
// aborted ones only if all is set. A snapshot that begins or ends meanwhile
// may be shown in either state.
func (s *Store) List(ctx context.Context, all bool) ([]Description, error) {
	ids, err := s.listIDs(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	var live []manifest.SnapshotID
	for id := range ids.intents {
		if !ids.tombstones[id] {
			live = append(live, id)
		}
	}
	found := make([]Description, len(live))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for i, id := range live {
		g.Go(func() (err error) {
			found[i], err = s.describe(gctx, id)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	found = slices.DeleteFunc(found, func(d Description) bool { return d.State == Aborted && !all })
	slices.SortFunc(found, func(a, b Description) int {
		if c := a.Start.Compare(b.Start); c != 0 {
			return c
		}
		return strings.Compare(a.ID.String(), b.ID.String())
	})
	return found, nil
}

// idSets are the snapshots that have a record of each kind.
type idSets struct {
	intents, tombstones map[manifest.SnapshotID]bool
}

func (s *Store) listIDs(ctx context.Context, suffix string) (idSets, error) {
	var ids idSets
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		ids.intents, err = s.listKind(gctx, manifest.KindIntents, suffix)
		return err
	})
	g.Go(func() (err error) {
		ids.tombstones, err = s.listKind(gctx, manifest.KindTombstones, suffix)
		return err
	})
	return ids, g.Wait()
}

// listKind lists the snapshots that have a record of one kind, of the whole
// store ("") or of a lineage (its digits).
func (s *Store) listKind(ctx context.Context, kind, lineage string) (map[manifest.SnapshotID]bool, error) {
	ids := make(map[manifest.SnapshotID]bool)
	err := s.objects.List(ctx, kind+"/snap-"+lineage, func(info blockstore.Info) error {
		id, err := manifest.ParseSnapshotKey(kind, info.Key)
		if err != nil {
			return nil // not a record of ours; verify reports it
		}
		ids[id] = true
		return nil
	})
	return ids, err
}

// SetTags changes a snapshot's tags: those in remove go, those in set are
// added or replaced. Concurrent changes all take effect.
func (s *Store) SetTags(ctx context.Context, id manifest.SnapshotID, set map[string]string, remove []string) error {
	const tries = 16 // each failed one means that another change took effect
	for range tries {
		err := s.trySetTags(ctx, id, set, remove)
		if err == nil {
			return nil
		}
		if !errors.Is(err, blockstore.ErrChanged) && !errors.Is(err, blockstore.ErrExists) {
			return fmt.Errorf("tag %s: %w", id, err)
		}
	}
	return fmt.Errorf("tag %s: others changed its tags %d times meanwhile; try again", id, tries)
}

func (s *Store) trySetTags(ctx context.Context, id manifest.SnapshotID, set map[string]string, remove []string) error {
	d, err := s.Describe(ctx, id)
	if err != nil {
		return err
	}
	condition := blockstore.IfAbsent
	tags := d.Tags
	meta, etag, err := getRecord[manifest.Meta](ctx, s.objects, manifest.MetaKey(id))
	switch {
	case err == nil:
		condition, tags = blockstore.IfMatch(etag), meta.Tags
	case !errors.Is(err, blockstore.ErrNotExist):
		return err
	}
	changed := make(map[string]string, len(tags)+len(set))
	for k, v := range tags {
		changed[k] = v
	}
	for _, k := range remove {
		delete(changed, k)
	}
	for k, v := range set {
		changed[k] = v
	}
	if err := manifest.CheckTags(changed); err != nil {
		return err
	}
	data, err := manifest.EncodeRecord(manifest.Meta{Version: manifest.RecordVersion, Tags: changed})
	if err != nil {
		return err
	}
	_, err = s.objects.Put(ctx, manifest.MetaKey(id), data, condition)
	return err
}
