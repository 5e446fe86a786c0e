package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A Check says what of a store to verify, and how.
type Check struct {
	// Snapshot is the one to verify; zero is all of the store.
	Snapshot manifest.SnapshotID

	// Share of the blocks to read, from 0 to 1, drawn at random by Seed. Records
	// and indexes are checked in full whatever it is.
	Share float64
	Seed  uint64

	// Progress, if set, is told after each pack how many stored bytes of blocks
	// were looked at, and how many there are: a sum that grows until all
	// lineages were listed. It is called once at a time.
	Progress func(done, total int64)
}

// A Report is what verifying came to.
type Report struct {
	Snapshots []Verdict // that must be whole, in the order of their ids
	Findings  []Finding // damage, in the order of the objects' keys

	Blocks   int64 // read and found good; holes are none
	Bytes    int64 // their stored ones
	Problems int64 // findings

	// The rest is no damage.

	Pins    []PinInfo
	Pending []manifest.SnapshotID

	// Garbage are the objects that nothing live refers to and the next reclaim
	// removes: of deleted and aborted snapshots. DeadBytes are those of slots,
	// in packs that stay, to which nobody refers any more.
	Garbage   Pile
	DeadBytes int64

	// Strange are objects that no rule explains, the first 1000 of them by key:
	// of no kind that lazyvol knows, or of a snapshot that was never begun.
	Strange     Pile
	StrangeKeys []string

	Notes []string // what else may be of interest, a sentence each
}

// A Verdict is how many findings concern a snapshot.
type Verdict struct {
	Snapshot manifest.SnapshotID
	Deleted  bool // and kept whole by a pin, or by one being made from it
	Problems int
}

// A Pile is some objects of the store.
type Pile struct {
	Objects int64
	Bytes   int64
}

func (p *Pile) add(o blockstore.Info) {
	p.Objects++
	p.Bytes += o.Size
}

// maxStrangeKeys bounds Report.StrangeKeys.
const maxStrangeKeys = 1000

// A Finding is an object that is damaged or missing.
type Finding struct {
	Object string // its key
	Err    error  // what is the matter with it
	Harm   []Harm // whom it harms

	repair damage
}

// Harm is what a finding does to a snapshot. Without ranges none of its bytes
// is lost, yet something else, such as deleting or reclaiming, goes wrong.
type Harm struct {
	Snapshot manifest.SnapshotID
	Ranges   []Range // of its device, ascending
}

// A Range is a part of a device, in bytes.
type Range struct{ Offset, Length int64 }

// Error returns the finding as one line.
func (f Finding) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %v", f.Object, f.Err)
	for i := 0; i < len(f.Harm); {
		// Snapshots that suffer alike are named together.
		end := i + 1
		for end < len(f.Harm) && slices.Equal(f.Harm[end].Ranges, f.Harm[i].Ranges) {
			end++
		}
		b.WriteString("; harms")
		for _, h := range f.Harm[i:end] {
			fmt.Fprintf(&b, " %s", h.Snapshot)
		}
		for j, r := range f.Harm[i].Ranges {
			fmt.Fprintf(&b, "%s%d+%d", []string{" at ", ","}[min(j, 1)], r.Offset, r.Length)
		}
		i = end
	}
	return b.String()
}

// Unwrap returns Err.
func (f Finding) Unwrap() error { return f.Err }

// Check verifies a snapshot, or the whole store. Of every snapshot that must be
// whole it checks the records, the root, each leaf, that the footer lists
// exactly what the leaves refer to, that each pack is there, and of the blocks
// that are read the bytes by their hash, and the slot tables of their packs. A
// block is read once, however many snapshots share it. Of the whole store it
// also checks the records of all other snapshots, and tells what is in the store
// besides.
//
// It writes nothing and pins nothing, and other hosts may commit, delete and
// reclaim meanwhile: what is found damaged or missing is reported only if its
// snapshot must still be whole after that.
//
// Its memory does not grow with the blocks, but with the number of snapshots and
// with the damage.
//
// The error says that the check could not be finished, or that there was nothing
// to check: ErrNotStore; of one snapshot also ErrNotFound (if it is deleted
// meanwhile, too), ErrPending, ErrAborted.
func (s *Store) Check(ctx context.Context, how Check) (*Report, error) {
	c := &checker{at: s, Check: how, report: &Report{}, reads: make(places, packReads), window: maxWindow}
	var err error
	if how.Snapshot.IsZero() {
		if err = c.all(ctx); err != nil {
			err = fmt.Errorf("verify %s: %w", s, err)
		}
	} else if err = c.one(ctx); err != nil {
		err = fmt.Errorf("verify %s: %w", how.Snapshot, err)
	}
	c.finish()
	return c.report, err
}

// lineageChecks is how many lineages are checked at once.
const lineageChecks = 4

// A checker is one Check.
type checker struct {
	Check
	at     *Store
	reads  places // of packs, in all lineages
	window int    // as maxWindow

	mu          sync.Mutex // guards the fields below, and the calls of Progress
	report      *Report
	done, total int64 // stored bytes
}

func (c *checker) one(ctx context.Context) error {
	id := c.Snapshot
	if err := c.at.checkTombstone(ctx, id); err != nil {
		return err
	}
	outcome, err := c.at.outcome(ctx, id)
	switch {
	case errors.Is(err, blockstore.ErrNotExist):
		_, err := c.at.committed(ctx, id) // pending, or not found
		return err
	case errors.Is(err, manifest.ErrVersion):
		return err
	case err == nil && outcome.State != manifest.StateCommitted:
		return fmt.Errorf("%w: %s (%s)", ErrAborted, id, outcome.Why)
	}
	l := newLineageCheck(c, id.Lineage, []manifest.SnapshotID{id})
	if err := l.run(ctx); err != nil {
		return err
	}
	return c.at.checkTombstone(ctx, id)
}

func (c *checker) all(ctx context.Context) error {
	owners, err := c.sortOut(ctx)
	if err != nil {
		return err
	}
	_, err = c.at.ID(ctx)
	if isDamage(err) || errors.Is(err, ErrNotStore) && len(owners) > 0 {
		c.found(Finding{Object: manifest.StoreKey(), Err: err})
	} else if err != nil {
		return err
	}
	if _, err := c.at.Policy(ctx); isDamage(err) {
		c.found(Finding{Object: manifest.PolicyKey(), Err: err})
	} else if err != nil {
		return err
	}
	g, gctx := newGroup(ctx)
	g.SetLimit(lineageChecks)
	for _, lineage := range slices.Sorted(maps.Keys(owners)) {
		g.Go(func() error {
			if err := newLineageCheck(c, lineage, owners[lineage]).run(gctx); err != nil {
				return fmt.Errorf("lineage %s: %w", lineage, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// sortOut lists the whole store, and returns the lineages in it with their
// snapshots that have data.
func (c *checker) sortOut(ctx context.Context) (map[manifest.LineageID][]manifest.SnapshotID, error) {
	owners := make(map[manifest.LineageID][]manifest.SnapshotID)
	var last manifest.SnapshotID
	err := c.at.objects.List(ctx, "", func(o blockstore.Info) error {
		lineage, owner, ok := explain(o.Key)
		if !ok {
			c.strange(o)
		}
		if lineage != 0 && owners[lineage] == nil {
			owners[lineage] = []manifest.SnapshotID{}
		}
		if !owner.IsZero() && owner != last {
			owners[lineage] = append(owners[lineage], owner)
			last = owner
		}
		return nil
	})
	return owners, err
}

// explain tells whether a key is one of lazyvol's, of which lineage, and whose
// data. Traces and events are advice: nothing depends on them.
func explain(key string) (lineage manifest.LineageID, owner manifest.SnapshotID, ok bool) {
	kind, rest, _ := strings.Cut(key, "/")
	switch kind {
	case manifest.StoreKey(), manifest.PolicyKey(), manifest.KindTraces, manifest.KindEvents:
		return 0, owner, true
	case manifest.KindSets:
		_, err := manifest.ParseSetOutcomeKey(key)
		return 0, owner, err == nil
	case manifest.KindLineages:
		id, err := manifest.ParseLineageKey(key)
		return id, owner, err == nil
	case manifest.KindPins:
		id, _, err := manifest.ParsePinKey(key)
		return id.Lineage, owner, err == nil
	case manifest.KindData:
		name, _, _ := strings.Cut(rest, "/")
		id, err := manifest.ParseSnapshotID(name)
		return id.Lineage, id, err == nil // what of it is its own, its lineage's check tells
	case manifest.KindIntents, manifest.KindProgress, manifest.KindOutcomes, manifest.KindTombstones, manifest.KindMeta:
		id, err := manifest.ParseSnapshotKey(kind, key)
		return id.Lineage, owner, err == nil
	}
	return 0, owner, false
}

func (c *checker) strange(o blockstore.Info) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Strange.add(o)
	if len(c.report.StrangeKeys) < maxStrangeKeys {
		c.report.StrangeKeys = append(c.report.StrangeKeys, o.Key)
	}
}

func (c *checker) garbage(o blockstore.Info) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Garbage.add(o)
}

func (c *checker) note(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Notes = append(c.report.Notes, fmt.Sprintf(format, args...))
}

func (c *checker) found(f Finding) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Findings = append(c.report.Findings, f)
}

// expect adds to the bytes that are to be looked at.
func (c *checker) expect(bytes int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.total += bytes
}

// advance counts blocks that were looked at, some of which were good.
func (c *checker) advance(done, blocks, bytes int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done += done
	c.report.Blocks += blocks
	c.report.Bytes += bytes
	if c.Progress != nil {
		c.Progress(c.done, max(c.total, c.done))
	}
}

// finish puts the report in order.
func (c *checker) finish() {
	r := c.report
	r.Problems = int64(len(r.Findings))
	slices.SortFunc(r.Findings, func(a, b Finding) int {
		return cmp.Or(strings.Compare(a.Object, b.Object), strings.Compare(a.Err.Error(), b.Err.Error()))
	})
	slices.SortFunc(r.Snapshots, func(a, b Verdict) int { return compareIDs(a.Snapshot, b.Snapshot) })
	slices.SortFunc(r.Pins, func(a, b PinInfo) int {
		return cmp.Or(compareIDs(a.Snapshot, b.Snapshot), strings.Compare(a.Holder, b.Holder))
	})
	slices.SortFunc(r.Pending, compareIDs)
	slices.Sort(r.StrangeKeys)
	slices.Sort(r.Notes)
	concerned := make(map[manifest.SnapshotID]int)
	for _, f := range r.Findings {
		for _, h := range f.Harm {
			concerned[h.Snapshot]++
		}
	}
	for i := range r.Snapshots {
		r.Snapshots[i].Problems = concerned[r.Snapshots[i].Snapshot]
	}
}
