package cache

import (
	"fmt"
	"io"
	"sync/atomic"
)

// usedBlocks is which blocks of a layer this process used lately, a bit for each: 4
// MiB for 16 TiB in blocks of 512 KiB, of which the parts that were never used take
// no memory. Of the use by other processes it knows nothing.
//
// Its bits are what the second-chance algorithm (CLOCK) needs to evict roughly what
// was used least recently: the hand passes over the blocks, in rounds, takes the
// bit from those that have it and evicts those that have not.
type usedBlocks struct {
	words atomic.Pointer[[]atomic.Uint64] // longer ones take its place when the device grows
}

const wordBits = 64

// mark stores only what changes, so that readers of one block do not fight for its
// cache line.
func (u *usedBlocks) mark(block int64) {
	word, bit := u.at(block)
	if word.Load()&bit == 0 {
		word.Or(bit)
	}
}

// markRange marks the blocks from first to last.
func (u *usedBlocks) markRange(first, last int64) {
	for ; first <= last; first++ {
		u.mark(first)
	}
}

// take takes the bit from a block, and reports whether it had it.
func (u *usedBlocks) take(block int64) bool {
	word, bit := u.at(block)
	return word.Load()&bit != 0 && word.And(^bit)&bit != 0
}

func (u *usedBlocks) at(block int64) (word *atomic.Uint64, bit uint64) {
	return &(*u.words.Load())[block/wordBits], 1 << (block % wordBits)
}

// Use notes that a block is in use, as reading it does: EvictUnused passes it by once.
func (c *Clean) Use(block int64) error {
	if err := c.checkBlock(block); err != nil {
		return err
	}
	c.used.mark(block)
	return nil
}

// EvictUnused evicts blocks of the device, from the given one on, until that has
// freed want bytes or the device ends, and returns the block to go on with, or the
// number of blocks. A block that this process read or used since the last time is
// passed by once, and one that spare holds for, unless that is nil, always. After an
// error next is the block behind the one that could not be evicted;
// errors.ErrUnsupported, from a filesystem without holes, means that evicting
// blocks frees nothing.
//
// What counts is the space that is taken: so it finds bytes, too, that lost their
// marks when a process died between the two.
func (c *Clean) EvictUnused(from, want int64, spare func(block int64) bool) (next, freed int64, err error) {
	blocks := c.g.Blocks()
	block := max(0, from)
	for block < blocks && freed < want {
		first, end, err := c.taken(block)
		if err != nil {
			return blocks, freed, fmt.Errorf("clean layer: find bytes: %w", err)
		}
		for block = first; block < end && freed < want; block++ {
			if spare != nil && spare(block) || c.used.take(block) {
				continue
			}
			if err := c.vacate(block); err != nil {
				return block + 1, freed, err
			}
			freed += int64(c.g.BlockLen(block))
		}
	}
	return block, freed, nil
}

// taken returns the next range of blocks from block on that take space; an empty one
// at the end of the device.
func (c *Clean) taken(block int64) (first, end int64, err error) {
	blocks, size := c.g.Blocks(), int64(c.g.BlockSize)
	data, err := c.data.SeekData(block * size)
	if err == io.EOF {
		return blocks, blocks, nil
	}
	if err != nil {
		return 0, 0, err
	}
	hole, err := c.data.SeekHole(data)
	if err == io.EOF {
		return blocks, blocks, nil
	}
	if err != nil {
		return 0, 0, err
	}
	first = max(block, data/size)
	return first, max(first+1, min(blocks, ceilDiv(hole, size))), nil
}

// vacateTries bounds how often vacate begins anew.
const vacateTries = 3

// vacate evicts a block that takes space. Other processes may be writing it: marks
// that came while its bytes went would promise what is not there, until a read finds
// out, so it looks for them afterwards.
func (c *Clean) vacate(block int64) error {
	changing := c.lockBlock(block)
	defer changing.Unlock()
	for try := 0; ; try++ {
		marked, err := c.anyMark(block)
		if err != nil {
			return err
		}
		switch {
		case marked:
			err = c.evictLocked(block)
		case try == 0:
			err = c.data.PunchHole(block*int64(c.g.BlockSize), int64(c.g.BlockLen(block)))
		}
		if err != nil {
			return err
		}
		if try > 0 && !marked || try == vacateTries {
			return nil
		}
	}
}
