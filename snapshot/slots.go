package snapshot

import "math/bits"

// A packID names a pack of a lineage.
type packID struct {
	owner  uint64 // serial of the snapshot that uploaded it
	number uint32
}

// A bitmap is a set of a pack's slots. It is as long as the greatest of them
// asks for: a word for 64 slots.
type bitmap []uint64

func (b bitmap) has(slot uint16) bool {
	word := int(slot / 64)
	return word < len(b) && b[word]&(1<<(slot%64)) != 0
}

// add reports whether the slot was not in the set yet.
func (b *bitmap) add(slot uint16) bool {
	for len(*b) <= int(slot/64) {
		*b = append(*b, 0)
	}
	word, bit := &(*b)[slot/64], uint64(1)<<(slot%64)
	added := *word&bit == 0
	*word |= bit
	return added
}

// remove reports whether the slot was in the set.
func (b bitmap) remove(slot uint16) bool {
	if !b.has(slot) {
		return false
	}
	b[slot/64] &^= 1 << (slot % 64)
	return true
}

// len returns the number of slots in the set.
func (b bitmap) len() int {
	n := 0
	for _, word := range b {
		n += bits.OnesCount64(word)
	}
	return n
}

// last returns the greatest slot in the set, or -1.
func (b bitmap) last() int {
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] != 0 {
			return i*64 + bits.Len64(b[i]) - 1
		}
	}
	return -1
}

// all yields the slots in the set, ascending.
func (b bitmap) all(yield func(uint16) bool) {
	for i, word := range b {
		for ; word != 0; word &= word - 1 {
			if !yield(uint16(i*64 + bits.TrailingZeros64(word))) {
				return
			}
		}
	}
}

// A slotSet is a set of slots of any packs: a bit each, and some 50 bytes a
// pack, which is about 2 bytes a block.
type slotSet map[packID]bitmap

// add reports whether the slot was not in the set yet.
func (s slotSet) add(id packID, slot uint16) bool {
	b := s[id]
	added := b.add(slot)
	s[id] = b
	return added
}

// remove reports whether the slot was in the set. A pack's last slot takes the
// pack with it.
func (s slotSet) remove(id packID, slot uint16) bool {
	b := s[id]
	removed := b.remove(slot)
	if removed && b.last() < 0 {
		delete(s, id)
	}
	return removed
}
