package snapshot

import (
	"context"
	"errors"
	"hash/maphash"
	"slices"

	"github.com/lazyvol/lazyvol/manifest"
)

const (
	// maxWindow is how many references to leaves, of all roots of a lineage
	// together, are in memory at once. The devices are passed through in windows
	// of as many leaves as that allows, and the roots read anew for each.
	maxWindow = 1 << 19

	// maxWants is how many blocks are gathered before their packs are read: of
	// 64 bytes each. With blocks of the default size that is 32 GiB of one
	// snapshot, so that few packs are needed twice.
	maxWants = 1 << 16
)

// An indexCheck compares the leaves of roots with their footers, and finds the
// blocks to be read.
type indexCheck struct {
	*lineageCheck
	seeds    [2]maphash.Seed
	sections map[manifest.SectionRef]*sectionVersion
	parts    map[manifest.LeavesPart]bool // that roots refer to

	suspects map[packID]bool // packs that a listing showed missing or too short: looked at in any case
	group    []*leafVersion  // of one leaf, being gathered
	take     func(want)      // is given each block; adds it to wants if it is drawn
	wants    []want
}

// A sectionVersion is a section, and the roots that refer to it.
type sectionVersion struct {
	ref   manifest.SectionRef
	roots []*rootCheck
}

// A leafVersion is a leaf, and the roots that refer to it.
type leafVersion struct {
	ref    manifest.LeafRef
	blocks int
	roots  []*rootCheck
	leaf   *manifest.Leaf
	err    error
}

// A want is a block that is to be looked at.
type want struct {
	block int64
	ref   manifest.Ref
	in    []*leafVersion // all versions of the leaf that the block is in
}

func newIndexCheck(c *lineageCheck) *indexCheck {
	x := &indexCheck{
		lineageCheck: c, seeds: [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()},
		sections: make(map[manifest.SectionRef]*sectionVersion), parts: make(map[manifest.LeavesPart]bool),
		suspects: make(map[packID]bool),
	}
	x.take = x.draw
	return x
}

// indexes checks the indexes of all roots of the lineage, and the blocks.
func (c *lineageCheck) indexes(ctx context.Context) error {
	if err := c.unlock(ctx); errors.Is(err, ErrShredded) {
		c.note("lineage %s was shredded: nothing of it can be read", c.lineage)
		return nil
	} else if err != nil {
		return err
	}
	x := newIndexCheck(c)
	if err := x.eachWindow(ctx, x.checkOwners, x.checkLeaves); err != nil {
		return err
	}
	return x.compare(ctx)
}

// owner returns the id of a snapshot of the lineage.
func (c *lineageCheck) owner(serial uint64) manifest.SnapshotID {
	return manifest.SnapshotID{Lineage: c.lineage, Serial: serial}
}

// checkLeaves checks leaves, sorted by their numbers, and the blocks in them.
func (c *indexCheck) checkLeaves(ctx context.Context, versions []*leafVersion) error {
	items := func(yield func(*leafVersion, error) bool) {
		for _, v := range versions {
			if !yield(v, nil) {
				return
			}
		}
	}
	fetch := func(ctx context.Context, v *leafVersion) error {
		v.leaf, v.err = c.image(v.roots[0]).FetchLeaf(ctx, v.ref)
		if v.err != nil && (!isDamage(v.err) || ctx.Err() != nil) {
			return v.err
		}
		return nil
	}
	err := inOrder(ctx, leafReads, leafReads, items, fetch, func(ctx context.Context, v *leafVersion) error {
		if len(c.group) > 0 && c.group[0].ref.Leaf != v.ref.Leaf {
			if err := c.gather(ctx); err != nil {
				return err
			}
		}
		if v.err != nil {
			c.lostLeaf(v)
			return nil
		}
		c.addLeaf(v)
		c.group = append(c.group, v)
		return nil
	})
	if err == nil {
		err = c.gather(ctx)
	}
	if err == nil {
		err = c.checkPacks(ctx)
	}
	return err
}

func (c *indexCheck) lostLeaf(v *leafVersion) {
	part, _ := manifest.SplitOffset(v.ref.Offset)
	f := Finding{Object: manifest.LeavesKey(c.owner(v.ref.Owner), part), Err: v.err, repair: damage{part: &manifest.LeavesPart{Owner: v.ref.Owner, Part: part}}}
	for _, r := range v.roots {
		r.unread = true
		f.Harm = append(f.Harm, Harm{r.id, []Range{blockRange(r.geometry, v.ref.Leaf*manifest.LeafBlocks, int64(v.blocks))}})
	}
	c.suspect(f)
}

// blockRange returns where blocks lie in a device.
func blockRange(g manifest.Geometry, block, count int64) Range {
	first := block * int64(g.BlockSize)
	return Range{first, min(g.Size, first+count*int64(g.BlockSize)) - first}
}

// addLeaf adds a leaf to the sums of its roots.
func (c *indexCheck) addLeaf(v *leafVersion) {
	var sum slotSum
	owned := make(map[uint64]int64) // blocks by who uploaded them
	for i := range v.blocks {
		if ref := v.leaf.Ref(i); !ref.IsHole() {
			c.sum(&sum, ref.Owner, ref.Pack, ref.Slot, ref.Length)
			owned[ref.Owner]++
		}
	}
	for _, r := range v.roots {
		r.leaves.add(sum)
		r.dataBlocks += sum.slots
		r.ownBlocks += owned[r.id.Serial]
	}
}

// gather adds the blocks of all versions of a leaf to those wanted, each once.
func (c *indexCheck) gather(ctx context.Context) error {
	group := c.group
	c.group = nil
	for i := range manifest.LeafBlocks {
		var seen []manifest.Ref
		for _, v := range group {
			if i >= v.blocks {
				continue
			}
			ref := v.leaf.Ref(i)
			if ref.IsHole() || slices.Contains(seen, ref) {
				continue
			}
			seen = append(seen, ref)
			c.take(want{group[0].ref.Leaf*manifest.LeafBlocks + int64(i), ref, group})
		}
	}
	if len(c.wants) >= maxWants {
		return c.checkPacks(ctx)
	}
	return nil
}

// draw wants a block if it is among those to be read.
func (c *indexCheck) draw(w want) {
	if c.drawn(w.ref) {
		c.wants = append(c.wants, w)
	}
}

// drawn reports whether a block is among those to be read.
func (c *indexCheck) drawn(ref manifest.Ref) bool {
	if c.Share >= 1 || c.suspects[packID{ref.Owner, ref.Pack}] {
		return true
	}
	// The finaliser of splitmix64, over all that names the slot.
	h := c.Seed
	for _, v := range []uint64{uint64(c.lineage), ref.Owner, uint64(ref.Pack), uint64(ref.Slot)} {
		h += v + 0x9e3779b97f4a7c15
		h = (h ^ h>>30) * 0xbf58476d1ce4e5b9
		h = (h ^ h>>27) * 0x94d049bb133111eb
		h ^= h >> 31
	}
	return float64(h>>11)/(1<<53) < c.Share
}
