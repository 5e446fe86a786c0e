package snapshot

import (
	"context"
	"errors"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// A lineageCheck is the check of one lineage, or of one snapshot of it.
type lineageCheck struct {
	*checker
	*survey
	stored []manifest.SnapshotID                   // that have data
	roots  []*rootCheck                            // that must be whole, in the order of their ids
	begun  map[manifest.SnapshotID]manifest.Intent // intents of those that must be whole
	key    *crypt.Key                              // nil: not encrypted, or the lineage's record is lost

	suspicions []Finding // guarded by checker.mu; to be looked at again at the end
}

func newLineageCheck(c *checker, lineage manifest.LineageID, stored []manifest.SnapshotID) *lineageCheck {
	return &lineageCheck{
		checker: c, stored: stored,
		survey: &survey{
			store: c.at, lineage: lineage, swept: make(sweptSet),
			pinned:   make(map[manifest.SnapshotID]bool),
			outcomes: make(map[manifest.SnapshotID]manifest.Outcome),
			damaged:  make(map[manifest.SnapshotID]error),
			pending:  make(map[manifest.SnapshotID]manifest.Intent),
		},
		begun: make(map[manifest.SnapshotID]manifest.Intent),
	}
}

func (c *lineageCheck) run(ctx context.Context) error {
	if err := c.listRecords(ctx); err != nil {
		return err
	}
	if err := c.records(ctx); err != nil {
		return err
	}
	for _, id := range c.survey.roots() {
		if c.Snapshot.IsZero() || id == c.Snapshot {
			c.roots = append(c.roots, &rootCheck{id: id, outcome: c.outcomes[id]})
		}
	}
	if err := c.indexes(ctx); err != nil {
		return err
	}
	return c.lookAgain(ctx)
}

// suspect notes what is to be looked at again when all else was.
func (c *lineageCheck) suspect(f Finding) {
	if _, data, _ := explain(f.Object); !data.IsZero() && errors.Is(f.Err, blockstore.ErrNotExist) {
		f.Err = blockstore.ErrNotExist // whoever asked for it, and in which words the store says so
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.suspicions = append(c.suspicions, f)
}

// listRecords lists what there is of records. Those of one snapshot it does not
// list, but looks for.
func (c *lineageCheck) listRecords(ctx context.Context) (err error) {
	if id := c.Snapshot; !id.IsZero() {
		c.tombstones = make(map[manifest.SnapshotID]bool)
		c.outcomes[id] = manifest.Outcome{}
		c.intents = map[manifest.SnapshotID]time.Duration{id: 0}
		return nil
	}
	// In the order of survey.
	if c.tombstones, err = c.store.listKind(ctx, manifest.KindTombstones, c.lineage.String()); err != nil {
		return err
	}
	err = c.store.objects.List(ctx, manifest.LineagePrefix(manifest.KindPins, c.lineage), func(info blockstore.Info) error {
		if id, holder, err := manifest.ParsePinKey(info.Key); err == nil {
			c.pinned[id] = true
			c.pins = append(c.pins, PinInfo{Pin: manifest.Pin{Snapshot: id, Holder: holder}, Age: info.Age, Deleted: c.tombstones[id]})
		}
		return nil
	})
	if err != nil {
		return err
	}
	if c.intents, err = c.listAges(ctx, manifest.KindIntents); err != nil {
		return err
	}
	ended, err := c.store.listKind(ctx, manifest.KindOutcomes, c.lineage.String())
	if err != nil {
		return err
	}
	for id := range ended {
		c.outcomes[id] = manifest.Outcome{}
	}
	c.progress, err = c.listAges(ctx, manifest.KindProgress)
	return err
}

// unlock gets the lineage's key. That it cannot be had is no damage.
func (c *lineageCheck) unlock(ctx context.Context) (err error) {
	c.key, err = c.survey.store.Key(ctx, c.lineage)
	if errors.Is(err, ErrNotFound) || isDamage(err) {
		return nil // which checkLineage tells
	}
	return err
}
