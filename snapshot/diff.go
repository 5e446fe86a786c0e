package snapshot

import (
	"context"
	"fmt"

	"github.com/lazyvol/lazyvol/manifest"
)

// A Change is a range of bytes in which two snapshots differ, in whole blocks
// but for the end of the device. First and Second tell whether the range holds
// data in either, rather than a hole.
type Change struct {
	Offset, Length int64
	First, Second  bool
}

// Diff calls fn for the ranges in which b differs from a, in ascending order,
// adjoining ones of one kind merged. It reads only leaves that differ. The
// snapshots must be of one lineage, else ErrUnrelated. fn's error ends it.
func Diff(ctx context.Context, a, b *Image, fn func(Change) error) error {
	if a.ID().Lineage != b.ID().Lineage {
		return fmt.Errorf("%w: %s and %s", ErrUnrelated, a.ID(), b.ID())
	}
	leaves := func(yield func(*leafPair, error) bool) {
		for n := range manifest.DiffLeaves(a.Root, b.Root) {
			if !yield(&leafPair{number: n}, nil) {
				return
			}
		}
	}
	fetch := func(ctx context.Context, p *leafPair) (err error) {
		if p.first, err = a.leaf(ctx, p.number); err == nil {
			p.second, err = b.leaf(ctx, p.number)
		}
		return err
	}
	changes := changeMerger{fn: fn}
	blockSize, size := int64(b.Geometry().BlockSize), max(a.Geometry().Size, b.Geometry().Size)
	err := inOrder(ctx, leafReads, leafReads, leaves, fetch, func(_ context.Context, p *leafPair) error {
		for i := range manifest.DiffBlocks(p.first, p.second) {
			offset := (p.number*manifest.LeafBlocks + int64(i)) * blockSize
			c := Change{
				Offset: offset, Length: min(blockSize, size-offset),
				First: !refAt(p.first, i).IsHole(), Second: !refAt(p.second, i).IsHole(),
			}
			if err := changes.add(c); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return changes.flush()
}

// A leafPair is what two images have in the same place; nil is all holes.
type leafPair struct {
	number        int64
	first, second *manifest.Leaf
}

// A changeMerger calls fn with changes after merging those that adjoin.
type changeMerger struct {
	fn   func(Change) error
	open Change // Length 0: none
}

func (m *changeMerger) add(c Change) error {
	if o := &m.open; o.Length > 0 && o.Offset+o.Length == c.Offset && o.First == c.First && o.Second == c.Second {
		o.Length += c.Length
		return nil
	}
	if err := m.flush(); err != nil {
		return err
	}
	m.open = c
	return nil
}

func (m *changeMerger) flush() error {
	c := m.open
	m.open = Change{}
	if c.Length == 0 {
		return nil
	}
	return m.fn(c)
}

// leaf reads a leaf; nil if it is all holes.
func (m *Image) leaf(ctx context.Context, n int64) (*manifest.Leaf, error) {
	ref, ok := m.Root.Find(n)
	if !ok {
		return nil, nil
	}
	return m.FetchLeaf(ctx, ref)
}

// refAt returns a leaf's ref, a hole beyond its end or of no leaf.
func refAt(l *manifest.Leaf, i int) manifest.Ref {
	if l == nil || i >= l.Len() {
		return manifest.Ref{}
	}
	return l.Ref(i)
}
