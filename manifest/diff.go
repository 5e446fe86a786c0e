package manifest

import "iter"

// DiffLeaves yields, ascending, the numbers of the leaves that differ between two roots of one
// lineage: those of another hash, and those that only one has. It costs O(leaves) and needs none of
// them. A device's last leaf differs also when only the size of the device does.
func DiffLeaves(a, b *Root) iter.Seq[int64] {
	return func(yield func(int64) bool) {
		as, bs := a.Leaves, b.Leaves
		for len(as) > 0 || len(bs) > 0 {
			var leaf int64
			var differ bool
			switch {
			case len(bs) == 0 || len(as) > 0 && as[0].Leaf < bs[0].Leaf:
				leaf, differ = as[0].Leaf, true
				as = as[1:]
			case len(as) == 0 || bs[0].Leaf < as[0].Leaf:
				leaf, differ = bs[0].Leaf, true
				bs = bs[1:]
			default:
				leaf, differ = as[0].Leaf, as[0].Hash != bs[0].Hash
				as, bs = as[1:], bs[1:]
			}
			if differ && !yield(leaf) {
				return
			}
		}
	}
}

// DiffBlocks yields, ascending, the numbers within the leaf of the blocks whose content differs. A
// nil leaf, and what lies beyond the end of the shorter one, is holes. Where the same content lies
// does not matter.
func DiffBlocks(a, b *Leaf) iter.Seq[int] {
	return func(yield func(int) bool) {
		for i := range max(leafLen(a), leafLen(b)) {
			if contentHash(a, i) != contentHash(b, i) && !yield(i) {
				return
			}
		}
	}
}

func leafLen(l *Leaf) int {
	if l == nil {
		return 0
	}
	return l.Len()
}

// contentHash is the hash of a block's content, zero for a hole. A block of data hashes to zero
// with a chance of 2⁻²⁵⁶.
func contentHash(l *Leaf, i int) Hash {
	if i >= leafLen(l) {
		return Hash{}
	}
	return l.Ref(i).Hash
}
