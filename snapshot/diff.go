package snapshot

import (
	"context"
	"fmt"

	"github.com/lazyvol/lazyvol/manifest"
)

// A Change is a range of bytes in which two snapshots may differ, whole blocks
// but for the end of the device. First and Second tell whether the range holds
// data in either, rather than a hole.
type Change struct {
	Offset, Length int64
	First, Second  bool
}

// Diff calls fn for the ranges in which b differs from a, in ascending order,
// adjoining ones of one kind merged. It reads only leaves that differ. The
// snapshots must be of one lineage, else ErrUnrelated. fn's error is returned.
func Diff(ctx context.Context, a, b *Image, fn func(Change) error) error {
	if a.ID().Lineage != b.ID().Lineage {
		return fmt.Errorf("%w: %s and %s", ErrUnrelated, a.ID(), b.ID())
	}
	blockSize := int64(b.Geometry().BlockSize)
	size := max(a.Geometry().Size, b.Geometry().Size)
	var open Change
	flush := func() error {
		if open.Length == 0 {
			return nil
		}
		c := open
		open = Change{}
		return fn(c)
	}
	for n := range manifest.DiffLeaves(a.Root, b.Root) {
		first, err := a.leafOrHoles(ctx, n)
		if err != nil {
			return err
		}
		second, err := b.leafOrHoles(ctx, n)
		if err != nil {
			return err
		}
		for i := range max(first.Len(), second.Len()) {
			old, changed := refAt(first, i), refAt(second, i)
			if old.Hash == changed.Hash && old.IsHole() == changed.IsHole() {
				continue
			}
			offset := (n*manifest.LeafBlocks + int64(i)) * blockSize
			c := Change{Offset: offset, Length: min(blockSize, size-offset), First: !old.IsHole(), Second: !changed.IsHole()}
			if open.Length > 0 && open.Offset+open.Length == c.Offset && open.First == c.First && open.Second == c.Second {
				open.Length += c.Length
				continue
			}
			if err := flush(); err != nil {
				return err
			}
			open = c
		}
	}
	return flush()
}

// leafOrHoles returns a leaf from the store; an empty one if it is all holes.
func (m *Image) leafOrHoles(ctx context.Context, n int64) (*manifest.Leaf, error) {
	ref, ok := m.Root.Find(n)
	if !ok {
		return manifest.NewLeaf(0), nil
	}
	return m.FetchLeaf(ctx, ref)
}

// refAt returns a leaf's ref, a hole beyond its end.
func refAt(l *manifest.Leaf, i int) manifest.Ref {
	if i >= l.Len() {
		return manifest.Ref{}
	}
	return l.Ref(i)
}
