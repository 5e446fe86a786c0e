package snapshot

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// Bounds of what an indexWriter remembers.
const (
	// maxPending is how many changed blocks wait for the pack they are in to
	// be finished. Reaching it finishes the pack early.
	maxPending = 64 << 10

	// maxParentLeaves is how many of the parent's leaves are kept between
	// comparing with them and rewriting them: 28 MiB.
	maxParentLeaves = 512
)

// change is one block whose ref differs from the parent's. slot is its place
// in the open pack, or -1 when ref is final.
type change struct {
	block int64
	slot  int
	ref   manifest.Ref
}

// slotID names a slot of a pack of another snapshot.
type slotID struct {
	owner uint64
	pack  uint32
	slot  uint16
}

// indexWriter packs the changed blocks of a snapshot, and writes the leaves
// and sections they change. Only parentLeaf may be called concurrently.
type indexWriter struct {
	attempt *Attempt
	sender  *sender
	changed func(int64)

	pack    *blockstore.PackBuilder // nil when none is open
	packs   uint32                  // finished
	section *manifest.Section       // of the packs being written
	pending []change                // in address order, leaves not yet written
	died    []slotID                // slots the parent refers to and this snapshot does not

	leaves   []manifest.LeafRef
	rewrote  map[int64]bool // leaves written, or dropped as all holes
	sections []manifest.SectionRef
	stream   *leavesStream
	result   upload

	mu     sync.Mutex // guards parent, order
	parent map[int64]*manifest.Leaf
	order  []int64 // keys of parent, oldest first
}

func newIndexWriter(a *Attempt, s *sender, changed func(int64)) *indexWriter {
	if changed == nil {
		changed = func(int64) {}
	}
	w := &indexWriter{
		attempt: a, sender: s, changed: changed,
		rewrote: make(map[int64]bool),
		stream:  &leavesStream{sender: s, id: a.ID()},
		parent:  make(map[int64]*manifest.Leaf),
	}
	if p := a.plan.Parent; p != nil {
		w.result.dataBlocks = p.Root.DataBlocks
	}
	return w
}

// parentLeaf returns the parent's leaf, nil when it is all holes.
func (w *indexWriter) parentLeaf(ctx context.Context, n int64) (*manifest.Leaf, error) {
	p := w.attempt.plan.Parent
	if p == nil {
		return nil, nil
	}
	ref, ok := p.Root.Find(n)
	if !ok {
		return nil, nil
	}
	w.mu.Lock()
	leaf := w.parent[n]
	w.mu.Unlock()
	if leaf != nil {
		return leaf, nil
	}
	leaf, err := p.FetchLeaf(ctx, ref)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.parent[n] == nil {
		w.parent[n] = leaf
		w.order = append(w.order, n)
		if len(w.order) > maxParentLeaves {
			delete(w.parent, w.order[0])
			w.order = w.order[1:]
		}
	}
	return leaf, nil
}

// add takes the next block, in address order.
func (w *indexWriter) add(j *job) error {
	if j.same || j.hole && j.old.IsHole() {
		return nil
	}
	w.changed(j.block)
	if !j.old.IsHole() {
		w.died = append(w.died, slotID{j.old.Owner, j.old.Pack, j.old.Slot})
		w.result.dataBlocks--
	}
	c := change{block: j.block, slot: -1}
	if !j.hole {
		if w.pack == nil {
			w.pack = blockstore.NewPackBuilder(w.attempt.ID(), w.packs, w.attempt.plan.Geometry.BlockSize)
		}
		c.slot = w.pack.Slots()
		w.pack.Add(j.block, j.hash, j.stored, j.raw)
		w.result.dataBlocks++
		w.result.blocks++
	}
	w.pending = append(w.pending, c)
	if w.pack != nil && (w.pack.Full() || len(w.pending) >= maxPending) {
		if err := w.finishPack(); err != nil {
			return err
		}
	}
	if w.pack == nil {
		return w.writeLeaves(j.block / manifest.LeafBlocks)
	}
	return nil
}

// finishPack sends the open pack and makes the refs of its blocks final.
func (w *indexWriter) finishPack() error {
	object, refs := w.pack.Finish()
	w.pack = nil
	for i := range w.pending {
		if c := &w.pending[i]; c.slot >= 0 {
			c.ref, c.slot = refs[c.slot], -1
		}
	}
	if w.section == nil {
		w.section = manifest.NewSection(w.attempt.ID().Serial, w.packs/manifest.SectionPacks)
	}
	for _, ref := range refs {
		if err := w.section.Add(ref.Pack, ref.Slot, ref.Length); err != nil {
			return err
		}
	}
	key := manifest.PackKey(w.attempt.ID(), w.packs)
	w.packs++
	w.result.packs++
	w.result.storedBytes += int64(len(object))
	w.attempt.storedSum.Add(int64(len(object)))
	if err := w.sender.send(key, object); err != nil {
		return err
	}
	if w.packs%manifest.SectionPacks == 0 {
		return w.writeSection(w.section)
	}
	return nil
}

// writeLeaves writes the leaves below the given one that have changes. All of
// these must be final.
func (w *indexWriter) writeLeaves(below int64) error {
	n := 0
	for n < len(w.pending) {
		leaf := w.pending[n].block / manifest.LeafBlocks
		if leaf >= below {
			break
		}
		end := n + 1
		for end < len(w.pending) && w.pending[end].block/manifest.LeafBlocks == leaf {
			end++
		}
		if err := w.writeLeaf(leaf, w.pending[n:end]); err != nil {
			return err
		}
		n = end
	}
	w.pending = slices.Delete(w.pending, 0, n)
	return nil
}

// writeLeaf writes the parent's leaf with changes applied to it.
func (w *indexWriter) writeLeaf(n int64, changes []change) error {
	leaf := manifest.NewLeaf(w.attempt.plan.Geometry.LeafLen(n))
	old, err := w.parentLeaf(w.sender.ctx, n)
	if err != nil {
		return err
	}
	if old != nil {
		for i := range old.Len() {
			leaf.Set(i, old.Ref(i))
		}
	}
	for _, c := range changes {
		leaf.Set(int(c.block%manifest.LeafBlocks), c.ref)
	}
	w.rewrote[n] = true
	if leaf.DataBlocks() == 0 {
		return nil
	}
	offset, err := w.stream.write(leaf.Encode())
	if err != nil {
		return err
	}
	w.leaves = append(w.leaves, manifest.LeafRef{Leaf: n, Owner: w.attempt.ID().Serial, Offset: offset, Hash: leaf.Hash()})
	return nil
}

// writeSection writes a section, unless nothing in it is live.
func (w *indexWriter) writeSection(s *manifest.Section) error {
	if s == w.section {
		w.section = nil
	}
	if s.Empty() {
		return nil
	}
	data := s.Encode()
	offset, err := w.stream.write(data)
	if err != nil {
		return err
	}
	w.sections = append(w.sections, manifest.SectionRef{
		Owner: s.Owner(), Section: s.Number(), Home: w.attempt.ID().Serial,
		Offset: offset, Length: uint32(len(data)), Hash: manifest.Sum(data),
	})
	return nil
}

// finish writes what is left and returns the root, which is not yet sent.
func (w *indexWriter) finish(ctx context.Context) (*upload, error) {
	if w.pack != nil {
		if err := w.finishPack(); err != nil {
			return nil, err
		}
	}
	if err := w.writeLeaves(w.attempt.plan.Geometry.Leaves()); err != nil {
		return nil, err
	}
	if err := w.growLastLeaf(); err != nil {
		return nil, err
	}
	if w.section != nil {
		if err := w.writeSection(w.section); err != nil {
			return nil, err
		}
	}
	inherited, err := w.inheritSections(ctx)
	if err != nil {
		return nil, err
	}
	if err := w.stream.flush(); err != nil {
		return nil, err
	}
	root := &manifest.Root{
		Snapshot: w.attempt.ID(), Geometry: w.attempt.plan.Geometry, DataBlocks: w.result.dataBlocks,
		Leaves: w.inheritLeaves(), Sections: append(w.sections, inherited...),
	}
	slices.SortFunc(root.Sections, func(a, b manifest.SectionRef) int {
		return cmp.Or(cmp.Compare(a.Owner, b.Owner), cmp.Compare(a.Section, b.Section))
	})
	w.result.root = root.Encode()
	w.result.hash = manifest.Sum(w.result.root)
	w.result.leavesLength = w.stream.length
	w.result.storedBytes += w.stream.length + int64(len(w.result.root))
	return &w.result, nil
}

// growLastLeaf rewrites the parent's last leaf when the device grew and the
// leaf with it: a leaf has an entry for each of its blocks.
func (w *indexWriter) growLastLeaf() error {
	p := w.attempt.plan.Parent
	if p == nil {
		return nil
	}
	last := p.Geometry().Leaves() - 1
	if last < 0 || w.rewrote[last] || p.Geometry().LeafLen(last) == w.attempt.plan.Geometry.LeafLen(last) {
		return nil
	}
	if _, ok := p.Root.Find(last); !ok {
		return nil
	}
	return w.writeLeaf(last, nil)
}

// inheritLeaves merges the leaves written with those of the parent that did
// not change.
func (w *indexWriter) inheritLeaves() []manifest.LeafRef {
	merged := slices.Clone(w.leaves)
	if p := w.attempt.plan.Parent; p != nil {
		for _, ref := range p.Root.Leaves {
			if !w.rewrote[ref.Leaf] {
				merged = append(merged, ref)
			}
		}
	}
	slices.SortFunc(merged, func(a, b manifest.LeafRef) int { return cmp.Compare(a.Leaf, b.Leaf) })
	return merged
}

// inheritSections returns the parent's sections, those in which slots died
// rewritten without them.
func (w *indexWriter) inheritSections(ctx context.Context) ([]manifest.SectionRef, error) {
	p := w.attempt.plan.Parent
	if p == nil {
		return nil, nil
	}
	slices.SortFunc(w.died, func(a, b slotID) int {
		return cmp.Or(cmp.Compare(a.owner, b.owner), cmp.Compare(a.pack, b.pack), cmp.Compare(a.slot, b.slot))
	})
	var kept []manifest.SectionRef
	died := w.died
	for _, ref := range p.Root.Sections {
		n := 0
		for n < len(died) && died[n].owner == ref.Owner && died[n].pack/manifest.SectionPacks == ref.Section {
			n++
		}
		if n == 0 {
			kept = append(kept, ref)
			continue
		}
		section, err := p.fetchSection(ctx, ref)
		if err != nil {
			return nil, err
		}
		for _, d := range died[:n] {
			if err := section.Remove(d.pack, d.slot); err != nil {
				return nil, fmt.Errorf("the footer of %s does not list slot %d of pack %d, which its leaves refer to: %w", p.ID(), d.slot, d.pack, err)
			}
		}
		died = died[n:]
		if err := w.writeSection(section); err != nil {
			return nil, err
		}
	}
	if len(died) > 0 {
		return nil, fmt.Errorf("the footer of %s has no section for pack %d of owner %x: %w", p.ID(), died[0].pack, died[0].owner, manifest.ErrCorrupt)
	}
	return kept, nil
}

// leavesStream is the logical stream of leaves and sections that a snapshot
// writes, cut into parts.
type leavesStream struct {
	sender *sender
	id     manifest.SnapshotID
	part   []byte // being filled
	parts  uint32 // sent
	length int64  // bytes sent
}

// write appends a leaf or a section and returns its offset in the stream.
func (s *leavesStream) write(data []byte) (int64, error) {
	if len(s.part)+len(data) > manifest.LeavesPartSize {
		if err := s.flush(); err != nil {
			return 0, err
		}
	}
	offset := int64(s.parts)*manifest.LeavesPartSize + int64(len(s.part))
	s.part = append(s.part, data...)
	return offset, nil
}

// flush sends the part being filled.
func (s *leavesStream) flush() error {
	if len(s.part) == 0 {
		return nil
	}
	err := s.sender.send(manifest.LeavesKey(s.id, s.parts), s.part)
	s.length += int64(len(s.part))
	s.part = nil
	s.parts++
	return err
}
