package cache

import (
	"encoding/binary"
	"fmt"
	"io"
	"iter"

	"github.com/lazyvol/lazyvol/manifest"
)

// presentBatch is how many pages' marks Present reads at a time: 64 KiB, or 512 if
// they are sealed, which is a whole number of blocks of any size.
const presentBatch = 16 << 10

// Present yields the blocks all of whose pages are marked, ascending, until an error,
// which comes last. It reads only those parts of the map that were ever written, 1 MiB
// for each GiB of blocks that are there: nothing to wait for when a large volume is
// opened. Like [Clean.Has] it checks no bytes, and takes marks that cannot be
// read for absent. Blocks may come and go meanwhile.
func (c *Clean) Present() iter.Seq2[int64, error] {
	return func(yield func(int64, error) bool) {
		perBlock := int64(c.g.BlockSize / manifest.PageSize)
		for block := int64(0); block < c.g.Blocks(); {
			first, end, err := c.marked(block, perBlock)
			if err != nil {
				yield(0, fmt.Errorf("clean layer: find marks: %w", err))
				return
			}
			for block = first; block < end; {
				n := min(end-block, presentBatch/perBlock)
				ok, err := c.yieldMarked(block, n, perBlock, yield)
				if err != nil {
					yield(0, err)
				}
				if err != nil || !ok {
					return
				}
				block += n
			}
		}
	}
}

// marked returns the next range of blocks from block on whose marks lie in parts of
// the map that are not holes; an empty one at the end of the device.
func (c *Clean) marked(block, perBlock int64) (first, end int64, err error) {
	blocks := c.g.Blocks()
	data, err := c.marks.SeekData(c.markOffset(block * perBlock))
	if err == io.EOF {
		return blocks, blocks, nil
	}
	if err != nil {
		return 0, 0, err
	}
	hole, err := c.marks.SeekHole(data)
	if err == io.EOF { // cut off meanwhile
		return blocks, blocks, nil
	}
	if err != nil {
		return 0, 0, err
	}
	first = max(block, (data-cleanHeaderLen)/c.markLen/perBlock)
	end = min(blocks, ceilDiv(hole-cleanHeaderLen, c.markLen*perBlock))
	return first, max(end, first+1), nil
}

// yieldMarked yields those of n blocks that are marked. ok is false when the
// consumer wants no more.
func (c *Clean) yieldMarked(block, n, perBlock int64, yield func(int64, error) bool) (ok bool, err error) {
	first := block * perBlock
	pages := min((block+n)*perBlock, pagesOf(c.g.Size())) - first
	marks := make([]byte, pages*c.markLen)
	if _, err := c.marks.ReadAt(marks, c.markOffset(first)); err != nil {
		return c.yieldHad(block, n, yield)
	}
	for ; n > 0; n-- {
		k := min(perBlock*c.markLen, int64(len(marks)))
		if c.allMarked(marks[:k]) && !yield(block, nil) {
			return false, nil
		}
		marks = marks[k:]
		block++
	}
	return true, nil
}

// yieldHad is yieldMarked block by block, for where the map has a bad sector.
func (c *Clean) yieldHad(block, n int64, yield func(int64, error) bool) (ok bool, err error) {
	for ; n > 0; n-- {
		has, err := c.Has(block)
		if err != nil {
			return false, err
		}
		if has && !yield(block, nil) {
			return false, nil
		}
		block++
	}
	return true, nil
}

func (c *Clean) allMarked(marks []byte) bool {
	for ; len(marks) > 0; marks = marks[c.markLen:] {
		if binary.LittleEndian.Uint32(marks) == 0 {
			return false
		}
	}
	return true
}
