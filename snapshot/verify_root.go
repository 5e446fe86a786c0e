package snapshot

import (
	"cmp"
	"context"
	"slices"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
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
