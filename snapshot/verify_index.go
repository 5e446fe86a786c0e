package snapshot

import (
	"cmp"
	"context"
	"errors"
	"hash/maphash"
	"slices"

	"github.com/lazyvol/lazyvol/crypt"
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

// A rootCheck is the check of one snapshot that must be whole.
type rootCheck struct {
	id       manifest.SnapshotID
	outcome  manifest.Outcome
	geometry manifest.Geometry

	unread     bool // a part of the index, so that the sums below mean nothing
	leaves     slotSum
	sections   slotSum
	dataBlocks int64 // in its leaves
	ownBlocks  int64 // of these, uploaded by itself
	count      counts
	ends       map[uint32]int64 // of the parts of its own leaves stream: it refers to all of it
}

// A slotSum is a digest of a multiset of slots and their lengths: whatever the
// order in which they were added, and in which parts. With two seeds of 64 bits
// that nobody knows, different sets have the same sum with a chance of 2⁻¹²⁸.
type slotSum struct {
	slots int64
	sums  [2]uint64
}

func (s *slotSum) add(t slotSum) {
	s.slots += t.slots
	s.sums[0] += t.sums[0]
	s.sums[1] += t.sums[1]
}

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

// sum adds a slot to a digest.
func (c *indexCheck) sum(to *slotSum, owner uint64, pack uint32, slot uint16, length uint32) {
	type entry struct {
		owner  uint64
		pack   uint32
		slot   uint16
		length uint32
	}
	to.slots++
	for i, seed := range c.seeds {
		to.sums[i] += maphash.Comparable(seed, entry{owner, pack, slot, length})
	}
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

// eachWindow reads the roots, and calls footers when their footers are known,
// and leaves with the leaves of each window.
func (c *indexCheck) eachWindow(ctx context.Context, footers func(context.Context) error, leaves func(context.Context, []*leafVersion) error) error {
	// The footers are in the roots, which the first window reads anyway.
	versions, next, err := c.look(ctx, 0, true)
	if err == nil {
		err = footers(ctx)
	}
	for err == nil {
		if err = leaves(ctx, versions); err != nil || next < 0 {
			return err
		}
		versions, next, err = c.look(ctx, next, false)
	}
	return err
}

// look reads the roots, and returns their leaves in the window that begins with
// a given leaf, and where the next one begins: -1 if this is the last.
func (c *indexCheck) look(ctx context.Context, from int64, first bool) ([]*leafVersion, int64, error) {
	type key struct {
		manifest.LeafRef
		blocks int
	}
	span := int64(max(1, c.window/max(1, len(c.roots))))
	found := make(map[key]*leafVersion)
	var versions []*leafVersion
	next := int64(-1)
	load := func(ctx context.Context, r *rootRead) (err error) {
		r.root, err = c.readRoot(ctx, r.rootCheck, first)
		return err
	}
	roots := func(yield func(*rootRead, error) bool) {
		for _, r := range c.roots {
			if !yield(&rootRead{rootCheck: r}, nil) {
				return
			}
		}
	}
	err := inOrder(ctx, rootReads, rootReads, roots, load, func(_ context.Context, r *rootRead) error {
		if r.root == nil {
			return nil
		}
		if first {
			c.addFooter(r)
		}
		i, _ := slices.BinarySearchFunc(r.root.Leaves, from, func(l manifest.LeafRef, n int64) int { return cmp.Compare(l.Leaf, n) })
		for ; i < len(r.root.Leaves); i++ {
			ref := r.root.Leaves[i]
			if ref.Leaf >= from+span {
				if next < 0 || ref.Leaf < next {
					next = ref.Leaf
				}
				break
			}
			k := key{ref, r.geometry.LeafLen(ref.Leaf)}
			v := found[k]
			if v == nil {
				v = &leafVersion{ref: ref, blocks: k.blocks}
				found[k] = v
				versions = append(versions, v)
			}
			v.roots = append(v.roots, r.rootCheck)
		}
		return nil
	})
	slices.SortStableFunc(versions, func(a, b *leafVersion) int { return cmp.Compare(a.ref.Leaf, b.ref.Leaf) })
	return versions, next, err
}

// A rootRead is a root on its way.
type rootRead struct {
	*rootCheck
	root *manifest.Root
}

// readRoot reads a root; nil if it cannot be. What is wrong with it is told the
// first time.
func (c *indexCheck) readRoot(ctx context.Context, r *rootCheck, first bool) (*manifest.Root, error) {
	key := manifest.RootKey(r.id)
	data, _, err := c.store.objects.Get(ctx, key, manifest.MaxRootLength+crypt.ObjectOverhead)
	var root *manifest.Root
	if err == nil {
		root, err = decodeRoot(r.id, r.outcome, data, c.key)
	}
	if err != nil && !isDamage(err) {
		return nil, err
	}
	harm := []Harm{{Snapshot: r.id}}
	if err != nil {
		// The copy in the outcome is as good, if there is one.
		outcome, copyErr := c.store.outcome(ctx, r.id)
		if copyErr == nil && len(outcome.Root) > 0 {
			root, copyErr = decodeRoot(r.id, r.outcome, outcome.Root, c.key)
		}
		if copyErr != nil && !isDamage(copyErr) {
			return nil, copyErr
		}
		if root == nil {
			harm[0].Ranges = []Range{{0, r.outcome.Size}}
			r.unread = true
		}
		if first {
			c.suspect(Finding{Object: key, Err: err, Harm: harm, repair: damage{root: &r.outcome}})
		}
		if root == nil {
			return nil, nil
		}
	}
	r.geometry = root.Geometry
	if o := r.outcome; first && err == nil && (o.RootLength != int64(len(data)) || o.DataBlocks != root.DataBlocks) {
		c.suspect(Finding{Object: manifest.OutcomeKey(r.id), Harm: harm, Err: disagrees(
			"it tells of a root of %d bytes with %d blocks, and that has %d and %d", o.RootLength, o.DataBlocks, len(data), root.DataBlocks)})
	}
	return root, nil
}

// addFooter adds what a root refers to.
func (c *indexCheck) addFooter(r *rootRead) {
	for _, part := range r.root.LeavesParts() {
		c.parts[part] = true
	}
	r.ends = make(map[uint32]int64)
	own := func(offset int64, length int) {
		part, within := manifest.SplitOffset(offset)
		r.ends[part] = max(r.ends[part], within+int64(length+c.key.ObjectOverhead()))
	}
	for _, ref := range r.root.Leaves {
		if ref.Owner == r.id.Serial {
			own(ref.Offset, manifest.EncodedLeafLen(r.geometry.LeafLen(ref.Leaf)))
		}
	}
	for _, ref := range r.root.Sections {
		if ref.Home == r.id.Serial {
			own(ref.Offset, int(ref.Length))
		}
		v := c.sections[ref]
		if v == nil {
			v = &sectionVersion{ref: ref}
			c.sections[ref] = v
		}
		v.roots = append(v.roots, r.rootCheck)
	}
}

// image returns something to read the index of a root through.
func (c *indexCheck) image(r *rootCheck) *Image {
	return &Image{Root: &manifest.Root{Snapshot: r.id, Geometry: r.geometry}, objects: c.store.objects, key: c.key}
}

// harmAll returns a harm to all roots, without ranges.
func harmAll(roots []*rootCheck) []Harm {
	var harm []Harm
	for _, r := range roots {
		harm = append(harm, Harm{Snapshot: r.id})
	}
	return harm
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

// compare compares, of each root, the leaves with the footer, and both with the
// root and the outcome. Reclaim believes the footer.
func (c *indexCheck) compare(ctx context.Context) error {
	for _, r := range c.roots {
		if r.unread {
			continue
		}
		harm := []Harm{{Snapshot: r.id}}
		if r.dataBlocks != r.outcome.DataBlocks || r.ownBlocks != r.outcome.UploadedBlocks {
			c.suspect(Finding{Object: manifest.RootKey(r.id), Harm: harm, Err: disagrees(
				"its leaves have %d blocks of data, %d of them uploaded by itself, and the outcome says %d and %d",
				r.dataBlocks, r.ownBlocks, r.outcome.DataBlocks, r.outcome.UploadedBlocks)})
		}
		// As long as it must be whole nobody removes any of what it uploaded.
		if o := r.outcome; r.count.packs != o.Packs || r.count.parts != o.LeavesLength && !r.count.tail {
			c.suspect(Finding{Object: manifest.OutcomeKey(r.id), Harm: harm, Err: disagrees(
				"it tells of %d packs and %d bytes of leaves, and %d and %d are in the store", o.Packs, o.LeavesLength, r.count.packs, r.count.parts)})
		} else if r.count.bytes != o.StoredBytes {
			c.note("%s has %d bytes in the store, and its outcome says %d", r.id, r.count.bytes, o.StoredBytes)
		}
		if r.leaves == r.sections {
			continue
		}
		if err := c.explainFooter(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

// explainFooter tells in what the leaves and the footer of a root differ. It
// takes some 8 bytes a block.
func (c *indexCheck) explainFooter(ctx context.Context, r *rootCheck) error {
	root, err := c.readRoot(ctx, r, false)
	if root == nil || err != nil {
		return err
	}
	suspect := func(format string, args ...any) {
		c.suspect(Finding{Object: manifest.RootKey(r.id), Err: disagrees(format, args...), Harm: []Harm{{Snapshot: r.id}}})
	}
	img := &Image{Root: root, objects: c.store.objects, key: c.key}
	lengths := make(map[packID]map[uint16]uint32) // of the slots that leaves refer to, and no section yet
	for _, ref := range root.Leaves {
		leaf, err := img.FetchLeaf(ctx, ref)
		if err != nil {
			return c.gone(err)
		}
		blocks, refs := leafRead{ref: ref, leaf: leaf}.blocks()
		for i, ref := range refs {
			id := packID{ref.Owner, ref.Pack}
			if lengths[id] == nil {
				lengths[id] = make(map[uint16]uint32)
			}
			if _, twice := lengths[id][ref.Slot]; twice {
				suspect("block %d: another block, too, refers to slot %d of pack %d of owner %09x", blocks[i], ref.Slot, ref.Pack, ref.Owner)
			}
			lengths[id][ref.Slot] = ref.Length
		}
	}
	for _, ref := range root.Sections {
		section, err := img.fetchSection(ctx, ref)
		if err != nil {
			return c.gone(err)
		}
		for p := range section.Packs() {
			id := packID{section.Owner(), p.Pack}
			strays, wrong := 0, 0
			for _, slot := range p.Slots {
				length, ok := lengths[id][slot.Slot]
				switch {
				case !ok:
					strays++
				case length != slot.Length:
					wrong++
				}
				delete(lengths[id], slot.Slot)
			}
			if strays > 0 {
				suspect("the footer lists %d slots of pack %d of owner %09x that no leaf refers to", strays, p.Pack, id.owner)
			}
			if wrong > 0 {
				suspect("the footer lists %d slots of pack %d of owner %09x with other lengths than the leaves", wrong, p.Pack, id.owner)
			}
		}
	}
	for id, slots := range lengths {
		if len(slots) > 0 {
			suspect("the leaves refer to %d slots of pack %d of owner %09x that the footer does not list", len(slots), id.number, id.owner)
		}
	}
	return nil
}

// gone drops an error that says that what was read before is gone by now: the
// snapshot was deleted meanwhile, or else the next check finds it.
func (c *indexCheck) gone(err error) error {
	if isDamage(err) {
		return nil
	}
	return err
}
