package snapshot

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// lookAgain judges what was found damaged or missing: it is no damage if the
// snapshots that it harms need not be whole any more, by now, when all that was
// found was. What a record says of itself it does not judge.
func (c *lineageCheck) lookAgain(ctx context.Context) error {
	stands := make(map[manifest.SnapshotID]standing)
	for _, f := range c.suspicions {
		for _, h := range f.Harm {
			if _, asked := stands[h.Snapshot]; asked {
				continue
			}
			s, err := c.standing(ctx, h.Snapshot)
			if err != nil {
				return err
			}
			stands[h.Snapshot] = s
		}
	}
	for _, f := range c.suspicions {
		harmed := len(f.Harm) > 0
		f.Harm = slices.DeleteFunc(f.Harm, func(h Harm) bool { return stands[h.Snapshot] != mustBeWhole })
		if len(f.Harm) > 0 || !harmed {
			c.found(f)
		} else if _, data, _ := explain(f.Object); data.IsZero() {
			c.note("%s, of a deleted snapshot that nobody needs, is damaged: %v", f.Object, f.Err)
		}
	}
	for _, r := range c.roots {
		s, asked := stands[r.id]
		if !asked || s == mustBeWhole {
			c.verdict(r.id)
		}
	}
	for id, s := range stands {
		if s == inDoubt {
			c.note("%s is deleted and not whole: its pin may have come after that, and then keeps nothing", id)
		}
	}
	return nil
}

func (c *lineageCheck) verdict(id manifest.SnapshotID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Snapshots = append(c.report.Snapshots, Verdict{Snapshot: id, Deleted: c.tombstones[id]})
}

// A standing is whether a snapshot must be whole.
type standing int

const (
	mustBeWhole standing = iota
	needNotBe
	inDoubt // a pin may keep it, or have come too late: the store does not tell
)

// pinMargin is by how much a pin must be older than the tombstone to be sure
// that it was there first: stores tell ages to about a second.
const pinMargin = 2 * time.Second

// standing tells whether a snapshot must be whole now. One that is not deleted
// must, and was at any time before. A deleted one was if who keeps it came
// before the tombstone: who came later finds the tombstone and goes again, and
// meanwhile a reclaim that began before may be sweeping.
func (c *lineageCheck) standing(ctx context.Context, id manifest.SnapshotID) (standing, error) {
	deleted, err := c.store.exists(ctx, manifest.TombstoneKey(id))
	if isDamage(err) {
		deleted, err = true, nil
	}
	if err != nil || !deleted {
		return mustBeWhole, err
	}
	if err := c.store.objects.ReadRange(ctx, manifest.RootKey(id), 0, make([]byte, 1)); errors.Is(err, blockstore.ErrNotExist) {
		return needNotBe, nil // swept
	} else if err != nil && !isDamage(err) {
		return mustBeWhole, err
	}
	deletedFor, err := c.age(ctx, manifest.TombstoneKey(id))
	if err != nil {
		return mustBeWhole, err
	}
	s := needNotBe
	keeps := func(age time.Duration) {
		if age > deletedFor+pinMargin {
			s = mustBeWhole
		} else if s == needNotBe {
			s = inDoubt
		}
	}
	err = c.store.objects.List(ctx, manifest.PinPrefix(id), func(o blockstore.Info) error {
		if _, _, err := manifest.ParsePinKey(o.Key); err == nil {
			keeps(o.Age)
		}
		return nil
	})
	if err != nil {
		return mustBeWhole, err
	}
	for child, intent := range c.pending {
		if intent.Parent == nil || *intent.Parent != id {
			continue
		}
		switch _, err := c.store.outcome(ctx, child); {
		case err == nil || isDamage(err) && !errors.Is(err, blockstore.ErrNotExist):
			continue // it has ended
		case !errors.Is(err, blockstore.ErrNotExist):
			return mustBeWhole, err
		}
		age, err := c.age(ctx, manifest.IntentKey(child))
		if err != nil {
			return mustBeWhole, err
		}
		keeps(age)
	}
	return s, nil
}

// age returns how old an object is; 0 if it is gone.
func (c *lineageCheck) age(ctx context.Context, key string) (age time.Duration, err error) {
	err = c.store.objects.List(ctx, key, func(o blockstore.Info) error {
		if o.Key == key {
			age = o.Age
		}
		return nil
	})
	return age, err
}
