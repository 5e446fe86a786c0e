package snapshot

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// liveness says what roots refer to.
type liveness struct {
	packs map[packID]*livePack // of the owners asked for; those with live slots
	parts map[manifest.LeavesPart]bool
}

// A livePack is what of a pack is live.
type livePack struct {
	slots bitmap
	bytes int64 // stored
}

// fills reports whether a pack object of this size has no room for any dead
// bytes. It may be false also for one that has none, if its last slots are
// dead: its slot table tells.
func (p *livePack) fills(o blockstore.Info, key *crypt.Key) bool {
	return o.Size == p.size(key)
}

// size is how long a pack is at the least, with these slots live.
func (p *livePack) size(key *crypt.Key) int64 {
	return p.bytes + int64(p.slots.len()*key.Overhead()+blockstore.SlotTableLen(p.slots.last()+1, key))
}

// rootReads is how many roots, and sections of each, are read at once.
const rootReads = 4

// liveness reads the footers of roots, as far as they concern the owners asked
// for.
func (w *survey) liveness(ctx context.Context, roots []manifest.SnapshotID, concerns func(owner uint64) bool) (*liveness, error) {
	live := &liveness{packs: make(map[packID]*livePack), parts: make(map[manifest.LeavesPart]bool)}
	var mu sync.Mutex                    // guards live and seen
	seen := make(map[manifest.Hash]bool) // sections, which roots share
	add := func(ctx context.Context, id manifest.SnapshotID) error {
		img, err := w.store.Load(ctx, w.outcomes[id])
		if err != nil {
			return err
		}
		var sections []manifest.SectionRef
		mu.Lock()
		for _, part := range img.Root.LeavesParts() {
			live.parts[part] = true
		}
		for _, ref := range img.Root.Sections {
			if !concerns(ref.Owner) || seen[ref.Hash] {
				continue
			}
			seen[ref.Hash] = true // nobody else need read it, as all fails if we cannot
			sections = append(sections, ref)
		}
		mu.Unlock()
		return img.eachSection(ctx, sections, func(_ context.Context, s *manifest.Section) error {
			mu.Lock()
			defer mu.Unlock()
			live.add(s)
			return nil
		})
	}
	g, gctx := newGroup(ctx)
	g.SetLimit(rootReads)
	for _, id := range roots {
		g.Go(func() error {
			err := add(gctx, id)
			// Rule: what another root's failure cut short says nothing about this
			// one. The group's context ends with that failure for a cause, so
			// that requests here fail with it, as if it was this root that is gone.
			if gctx.Err() != nil {
				return err
			}
			if err = moved(err); !errors.Is(err, errMoved) {
				return err
			}
			swept, sweptErr := w.isSwept(ctx, id)
			if swept {
				mu.Lock()
				w.swept[id] = true // for the next pass: this one's listings may be older
				mu.Unlock()
			}
			return errors.Join(err, sweptErr)
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return live, nil
}

// isSwept reports whether a deleted snapshot's root object is gone, which is the
// first that a sweep removes.
func (w *survey) isSwept(ctx context.Context, id manifest.SnapshotID) (bool, error) {
	if !w.tombstones[id] {
		return false, nil
	}
	err := w.store.objects.ReadRange(ctx, manifest.RootKey(id), 0, make([]byte, 1))
	if errors.Is(err, blockstore.ErrNotExist) {
		return true, nil
	}
	return false, err
}

// moved turns the absence of something a root refers to into errMoved. Rule: it
// is never taken as referring to nothing. That the root is corrupt stays an
// error, and nothing is reclaimed until it is mended or deleted.
func moved(err error) error {
	if errors.Is(err, blockstore.ErrNotExist) || errors.Is(err, blockstore.ErrShort) {
		return fmt.Errorf("%w: %w", errMoved, err)
	}
	return err
}

func (l *liveness) add(s *manifest.Section) {
	for p := range s.Packs() {
		id := packID{s.Owner(), p.Pack}
		pack := l.packs[id]
		if pack == nil {
			pack = &livePack{}
			l.packs[id] = pack
		}
		for _, slot := range p.Slots {
			if pack.slots.add(slot.Slot) {
				pack.bytes += int64(slot.Length)
			}
		}
	}
}
