package snapshot

import (
	"cmp"
	"context"
	"slices"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// An atlas tells what roots of a lineage refer to in damaged objects.
type atlas struct {
	*indexCheck
	blockSize int

	needed map[packID][]blockstore.NeededSlot        // of damaged packs, ascending
	alike  map[manifest.Hash][]blockstore.NeededSlot // slots that hold a block that is lost; some
	pieces map[string][]piece                        // of damaged parts of leaves streams, by their keys
}

// maxAlike bounds how many slots of the same content are remembered.
const maxAlike = 8

// A piece is a leaf or a section in a part of a leaves stream. find returns it, not
// sealed.
type piece struct {
	within int64
	length int // not sealed
	hash   manifest.Hash
	find   func(context.Context) ([]byte, bool)
}

// newAtlas looks at a lineage as it is now. It looks again if a snapshot went
// meanwhile, of which it could not read all.
func newAtlas(ctx context.Context, r *repairer, lineage manifest.LineageID, broken map[string]Finding) (*atlas, error) {
	const tries = 4
	for try := 1; ; try++ {
		a, err := drawAtlas(ctx, r, lineage, broken)
		if err != nil || try == tries {
			return a, err
		}
		went, err := a.went(ctx)
		if err != nil || !went {
			return a, err
		}
	}
}

// went reports whether a root that could not be read need not be whole any more.
func (a *atlas) went(ctx context.Context) (bool, error) {
	for _, root := range a.roots {
		if !root.unread {
			continue
		}
		if s, err := a.standing(ctx, root.id); err != nil || s != mustBeWhole {
			return true, err
		}
	}
	return false, nil
}

func drawAtlas(ctx context.Context, r *repairer, lineage manifest.LineageID, broken map[string]Finding) (*atlas, error) {
	c := newLineageCheck(&checker{at: r.store, report: &Report{}, window: maxWindow}, lineage, nil)
	if err := c.listRecords(ctx); err != nil {
		return nil, err
	}
	if err := c.records(ctx); err != nil {
		return nil, err
	}
	if err := c.unlock(ctx); err != nil {
		return nil, err
	}
	for _, id := range c.survey.roots() {
		c.roots = append(c.roots, &rootCheck{id: id, outcome: c.outcomes[id]})
	}
	a := &atlas{
		indexCheck: newIndexCheck(c), needed: make(map[packID][]blockstore.NeededSlot),
		alike: make(map[manifest.Hash][]blockstore.NeededSlot), pieces: make(map[string][]piece),
	}
	for key, f := range broken {
		if f.repair.pack != nil {
			a.needed[*f.repair.pack] = nil
		}
		if f.repair.part != nil {
			a.pieces[key] = nil
		}
		for _, h := range f.repair.lost {
			a.alike[h] = nil
		}
	}
	a.take = a.mark
	footers := func(context.Context) error {
		a.addSections(r)
		return nil
	}
	leaves := func(ctx context.Context, versions []*leafVersion) error {
		a.addLeaves(r, versions)
		if len(a.needed) == 0 {
			return nil
		}
		return a.checkLeaves(ctx, versions)
	}
	if err := a.eachWindow(ctx, footers, leaves); err != nil {
		return nil, err
	}
	for id, slots := range a.needed {
		slices.SortFunc(slots, func(x, y blockstore.NeededSlot) int { return int(x.Slot) - int(y.Slot) })
		a.needed[id] = slices.CompactFunc(slots, func(x, y blockstore.NeededSlot) bool { return x.Slot == y.Slot })
	}
	return a, nil
}

// incomplete reports whether there are records, roots or leaves that cannot be
// read, so that more may be needed than is known.
func (a *atlas) incomplete() bool {
	return len(a.damaged) > 0 || slices.ContainsFunc(a.roots, func(r *rootCheck) bool { return r.unread })
}

// mark notes a block if it is, or may help, one that is lost.
func (a *atlas) mark(w want) {
	slot := blockstore.NeededSlot{Block: w.block, Ref: w.ref}
	id := packID{w.ref.Owner, w.ref.Pack}
	if slots, broken := a.needed[id]; broken {
		a.needed[id] = append(slots, slot)
		a.blockSize = w.in[0].roots[0].geometry.BlockSize
	}
	if found, lost := a.alike[w.ref.Hash]; lost && len(found) < maxAlike {
		a.alike[w.ref.Hash] = append(found, slot)
	}
}

// addLeaves notes the leaves that lie in damaged parts.
func (a *atlas) addLeaves(r *repairer, versions []*leafVersion) {
	for _, v := range versions {
		part, within := manifest.SplitOffset(v.ref.Offset)
		key := manifest.LeavesKey(a.owner(v.ref.Owner), part)
		if _, broken := a.pieces[key]; !broken {
			continue
		}
		var others []manifest.LeafRef
		for _, other := range versions {
			if other.ref.Hash == v.ref.Hash && other.ref != v.ref {
				others = append(others, other.ref)
			}
		}
		a.pieces[key] = append(a.pieces[key], piece{within, manifest.EncodedLeafLen(v.blocks), v.ref.Hash, func(ctx context.Context) ([]byte, bool) {
			return r.findLeaf(ctx, a, v, others)
		}})
	}
}

// addSections notes the sections that lie in damaged parts.
func (a *atlas) addSections(r *repairer) {
	for ref, v := range a.sections {
		part, within := manifest.SplitOffset(ref.Offset)
		key := manifest.LeavesKey(a.owner(ref.Home), part)
		if _, broken := a.pieces[key]; broken {
			a.pieces[key] = append(a.pieces[key], piece{within, int(ref.Length), ref.Hash, func(ctx context.Context) ([]byte, bool) {
				return r.makeSection(ctx, a, v)
			}})
		}
	}
}

// writePart writes a part of a leaves stream.
func (r *repairer) writePart(ctx context.Context, a *atlas, key string, create bool) (bool, error) {
	missing := 0
	written, err := r.replace(ctx, key, create, func(old []byte) ([]byte, error) {
		data := slices.Clone(old)
		better := false
		missing = 0
		slices.SortFunc(a.pieces[key], func(p, q piece) int { return cmp.Compare(p.within, q.within) })
		for _, p := range a.pieces[key] {
			end := p.within + int64(p.length+a.key.ObjectOverhead())
			if end <= int64(len(old)) {
				if _, err := openIndex(a.key, ownerOf(key), old[p.within:end], p.hash); err == nil {
					continue
				}
			}
			found, ok := p.find(ctx)
			if !ok || len(found) != p.length || manifest.Sum(found) != p.hash {
				missing++
				continue
			}
			if grow := end - int64(len(data)); grow > 0 {
				data = append(data, make([]byte, grow)...)
			}
			copy(data[p.within:], a.key.SealObject(leavesName(ownerOf(key)), found))
			better = true
		}
		if end, ok := a.ends(key); ok && missing == 0 && int64(len(data)) > end {
			data, better = data[:end], true
		}
		if !better {
			return nil, nil
		}
		return data, nil
	})
	if missing > 0 && err == nil {
		r.obstacle("%s: %d leaves or sections: %v", key, missing, errUnrecoverable)
	}
	return written, err
}

// ends returns where a part of a leaves stream ends, if its owner is a root, which
// refers to all that it wrote.
func (a *atlas) ends(key string) (int64, bool) {
	part, err := manifest.ParseLeavesKey(key)
	if err != nil {
		return 0, false
	}
	for _, r := range a.roots {
		if r.id == ownerOf(key) {
			end, ok := r.ends[part]
			return end, ok
		}
	}
	return 0, false
}

// findLeaf looks for a leaf on this host, and at other places of the store.
func (r *repairer) findLeaf(ctx context.Context, a *atlas, v *leafVersion, others []manifest.LeafRef) ([]byte, bool) {
	if r.From != nil {
		if data, ok := r.From.Leaf(a.lineage, v.ref, v.blocks); ok {
			return data, true
		}
	}
	for _, other := range others {
		data, err := a.image(v.roots[0]).fetchIndex(ctx, other.Owner, other.Offset, manifest.EncodedLeafLen(v.blocks), v.ref.Hash)
		if err == nil {
			return data, true
		}
	}
	return nil, false
}

// makeSection makes a section from the leaves of a root that refers to it, and
// which it sums up.
func (r *repairer) makeSection(ctx context.Context, a *atlas, v *sectionVersion) ([]byte, bool) {
	root, err := a.readRoot(ctx, v.roots[0], false)
	if root == nil || err != nil {
		return nil, false
	}
	img := &Image{Root: root, objects: r.store.objects, key: a.key}
	section := manifest.NewSection(v.ref.Owner, v.ref.Section)
	for _, at := range root.Leaves {
		leaf, err := img.FetchLeaf(ctx, at)
		if err != nil {
			lost := &leafVersion{ref: at, blocks: root.Geometry.LeafLen(at.Leaf), roots: v.roots}
			data, ok := r.findLeaf(ctx, a, lost, nil)
			if !ok {
				return nil, false
			}
			if leaf, err = manifest.DecodeLeaf(data); err != nil {
				return nil, false
			}
		}
		for i := range leaf.Len() {
			ref := leaf.Ref(i)
			if ref.IsHole() || ref.Owner != v.ref.Owner || ref.Pack/manifest.SectionPacks != v.ref.Section {
				continue
			}
			if section.Add(ref.Pack, ref.Slot, ref.Length) != nil {
				return nil, false
			}
		}
	}
	return section.Encode(), true
}
