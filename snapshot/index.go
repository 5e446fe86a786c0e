package snapshot

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// maxOpenLeaves is how many rewritten leaves, of 56 KiB, wait for the pack that
// their blocks are in to be finished. Reaching it finishes the pack early:
// only changes scattered over more than 100 GiB that also compress well do.
const maxOpenLeaves = 256

// indexWriter packs the changed blocks of a snapshot, and writes the leaves
// and sections they change. It is used by one goroutine at a time.
type indexWriter struct {
	attempt *Attempt
	sender  *sender

	pack    *blockstore.PackBuilder // nil when none is open
	places  []place                 // in the leaves, of the open pack's slots
	packs   uint32                  // finished
	section *manifest.Section       // of the packs being written; nil before the first
	open    []openLeaf              // ascending; being rewritten
	died    slotSet                 // slots the parent refers to and this snapshot does not
	earlier earlierPacks            // of a resumed attempt

	leaves   []manifest.LeafRef // written
	changed  map[int64]bool     // leaves written, or left out as all holes
	sections []manifest.SectionRef
	stream   leavesStream
	result   uploaded
}

// An openLeaf is a leaf of the new snapshot that may get more changes.
type openLeaf struct {
	number int64
	leaf   *manifest.Leaf
}

// A place is where a block's ref goes when it is known.
type place struct {
	leaf *manifest.Leaf
	i    int
}

func newIndexWriter(a *Attempt, s *sender) *indexWriter {
	w := &indexWriter{
		attempt: a, sender: s, died: make(slotSet), changed: make(map[int64]bool),
		stream: leavesStream{sender: s, id: a.ID()},
	}
	if p := a.plan.Parent; p != nil {
		w.result.dataBlocks = p.Root.DataBlocks
	}
	return w
}

// add takes the next job, in address order.
func (w *indexWriter) add(ctx context.Context, j *job) error {
	if j.same {
		return nil
	}
	for i := range j.count {
		old := j.oldRef(i)
		if j.hole && old.IsHole() {
			continue
		}
		leaf, err := w.openLeaf(ctx, j.first/manifest.LeafBlocks, j.old)
		if err != nil {
			return err
		}
		at := place{leaf, int((j.first + i) % manifest.LeafBlocks)}
		if !old.IsHole() {
			w.died.add(packID{old.Owner, old.Pack}, old.Slot)
			w.result.dataBlocks--
			leaf.Set(at.i, manifest.Ref{})
		}
		if j.hole {
			continue
		}
		if !j.there.IsHole() {
			err = w.addThere(j, at)
		} else {
			err = w.addBlock(ctx, j, at)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// addBlock puts a block into the open pack.
func (w *indexWriter) addBlock(ctx context.Context, j *job, at place) error {
	if w.pack == nil {
		if w.packs > manifest.MaxPack {
			return fmt.Errorf("more than %d packs", w.packs)
		}
		w.pack = blockstore.NewPackBuilder(w.attempt.ID(), w.packs, w.attempt.plan.Geometry.BlockSize, w.attempt.key)
	}
	w.pack.Add(j.first, j.hash, j.stored, j.raw)
	w.places = append(w.places, at)
	w.result.dataBlocks++
	w.result.blocks++
	if w.pack.Full() {
		return w.finishPack(ctx)
	}
	return nil
}

// openLeaf returns a leaf to be changed, beginning with what the parent has
// there. Those before it have all their changes.
func (w *indexWriter) openLeaf(ctx context.Context, n int64, old *manifest.Leaf) (*manifest.Leaf, error) {
	if len(w.open) > 0 && w.open[len(w.open)-1].number == n {
		return w.open[len(w.open)-1].leaf, nil
	}
	if len(w.open) >= maxOpenLeaves && w.pack != nil {
		if err := w.finishPack(ctx); err != nil {
			return nil, err
		}
	}
	if w.pack == nil {
		if err := w.writeLeaves(ctx); err != nil {
			return nil, err
		}
	}
	leaf := resized(old, w.attempt.plan.Geometry.LeafLen(n))
	w.open = append(w.open, openLeaf{n, leaf})
	return leaf, nil
}

// resized returns a copy of a leaf with a number of blocks that is not smaller;
// nil is all holes.
func resized(l *manifest.Leaf, blocks int) *manifest.Leaf {
	if l != nil && l.Len() == blocks {
		return l.Clone()
	}
	grown := manifest.NewLeaf(blocks)
	if l != nil {
		for i := range l.Len() {
			grown.Set(i, l.Ref(i))
		}
	}
	return grown
}

// finishPack sends the open pack and tells the leaves where its blocks lie.
func (w *indexWriter) finishPack(ctx context.Context) error {
	object, refs := w.pack.Finish()
	if w.section == nil {
		w.section = manifest.NewSection(w.attempt.ID().Serial, w.packs/manifest.SectionPacks)
	}
	for slot, ref := range refs {
		at := w.places[slot]
		at.leaf.Set(at.i, ref)
		if err := w.section.Add(ref.Pack, ref.Slot, ref.Length); err != nil {
			return err
		}
	}
	key := manifest.PackKey(w.attempt.ID(), w.packs)
	bytes := int64(len(w.places)) * int64(w.attempt.plan.Geometry.BlockSize)
	w.pack, w.places = nil, w.places[:0]
	w.packs++
	w.result.packs++
	w.result.storedBytes += int64(len(object))
	w.attempt.storedSum.Add(int64(len(object)))
	if err := w.sender.send(ctx, key, object, func() { w.attempt.bytesDone.Add(bytes) }); err != nil {
		return err
	}
	if w.packs%manifest.SectionPacks == 0 {
		return w.finishSection(ctx)
	}
	return nil
}

// finishSection writes the section of the packs written last.
func (w *indexWriter) finishSection(ctx context.Context) error {
	if w.section == nil {
		return nil
	}
	section := w.section
	w.section = nil
	return w.writeSection(ctx, section)
}

// writeLeaves writes the open leaves, all of whose refs are known.
func (w *indexWriter) writeLeaves(ctx context.Context) error {
	for _, l := range w.open {
		w.changed[l.number] = true
		if l.leaf.DataBlocks() == 0 {
			continue
		}
		data := l.leaf.Encode()
		offset, err := w.stream.write(ctx, w.seal(data))
		if err != nil {
			return err
		}
		w.leaves = append(w.leaves, manifest.LeafRef{Leaf: l.number, Owner: w.attempt.ID().Serial, Offset: offset, Hash: manifest.Sum(data)})
	}
	w.open = w.open[:0]
	return nil
}

// seal seals a leaf or a section.
func (w *indexWriter) seal(data []byte) []byte {
	return w.attempt.key.SealObject(leavesName(w.attempt.ID()), data)
}

// writeSection writes a section, unless nothing in it is live.
func (w *indexWriter) writeSection(ctx context.Context, s *manifest.Section) error {
	if s.Empty() {
		return nil
	}
	data := s.Encode()
	offset, err := w.stream.write(ctx, w.seal(data))
	if err != nil {
		return err
	}
	w.sections = append(w.sections, manifest.SectionRef{
		Owner: s.Owner(), Section: s.Number(), Home: w.attempt.ID().Serial,
		Offset: offset, Length: uint32(len(data)), Hash: manifest.Sum(data),
	})
	return nil
}

// finish writes what is left, and makes the root, which is not yet sent.
func (w *indexWriter) finish(ctx context.Context) (*uploaded, error) {
	if w.pack != nil {
		if err := w.finishPack(ctx); err != nil {
			return nil, err
		}
	}
	if err := w.writeLeaves(ctx); err != nil {
		return nil, err
	}
	if err := w.growLastLeaf(ctx); err != nil {
		return nil, err
	}
	if err := w.finishSection(ctx); err != nil {
		return nil, err
	}
	if err := w.finishEarlier(ctx); err != nil {
		return nil, err
	}
	if err := w.inheritSections(ctx); err != nil {
		return nil, err
	}
	if err := w.stream.flush(ctx); err != nil {
		return nil, err
	}
	root := &manifest.Root{
		Snapshot: w.attempt.ID(), Geometry: w.attempt.plan.Geometry, DataBlocks: w.result.dataBlocks,
		Leaves: w.inheritLeaves(), Sections: w.sections,
	}
	slices.SortFunc(root.Sections, func(a, b manifest.SectionRef) int {
		return cmp.Or(cmp.Compare(a.Owner, b.Owner), cmp.Compare(a.Section, b.Section))
	})
	if err := root.Validate(); err != nil {
		return nil, fmt.Errorf("index of %d leaves and %d sections: %w", len(root.Leaves), len(root.Sections), err)
	}
	w.result.root = w.attempt.key.SealObject(rootName(w.attempt.ID()), root.Encode())
	w.result.hash = manifest.Sum(w.result.root)
	w.result.leavesLength = w.stream.sent
	w.result.storedBytes += w.stream.sent + int64(len(w.result.root))
	return &w.result, nil
}

// growLastLeaf rewrites the parent's last leaf when the device grew and the
// leaf with it: a leaf has an entry for each of its blocks.
func (w *indexWriter) growLastLeaf(ctx context.Context) error {
	p := w.attempt.plan.Parent
	if p == nil {
		return nil
	}
	last := p.Geometry().Leaves() - 1
	if w.changed[last] || p.Geometry().LeafLen(last) == w.attempt.plan.Geometry.LeafLen(last) {
		return nil
	}
	ref, ok := p.Root.Find(last)
	if !ok {
		return nil
	}
	old, err := w.attempt.plan.parentLeaf(ctx, ref)
	if err != nil {
		return err
	}
	if _, err := w.openLeaf(ctx, last, old); err != nil {
		return err
	}
	return w.writeLeaves(ctx)
}

// inheritLeaves merges the leaves written with those of the parent that did
// not change.
func (w *indexWriter) inheritLeaves() []manifest.LeafRef {
	merged := slices.Clone(w.leaves)
	if p := w.attempt.plan.Parent; p != nil {
		for _, ref := range p.Root.Leaves {
			if !w.changed[ref.Leaf] {
				merged = append(merged, ref)
			}
		}
	}
	slices.SortFunc(merged, func(a, b manifest.LeafRef) int { return cmp.Compare(a.Leaf, b.Leaf) })
	return merged
}
