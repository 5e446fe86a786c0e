package cache

import (
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/lazyvol/lazyvol/manifest"
)

// EvictRange removes count blocks from first on and frees their space, as far as the
// filesystem can. Unlike [Clean.Evict] it writes nothing where no page is marked: so
// it needs no space for blocks the layer does not have, and passes over parts of the
// map that were never written, however large. After an error any of the blocks may
// still be there.
func (c *Clean) EvictRange(first, count int64) error {
	if first < 0 || count < 0 || count > c.g.Blocks()-first {
		return fmt.Errorf("clean layer: evict %d blocks from %d of %d", count, first, c.g.Blocks())
	}
	perBlock := int64(c.g.BlockSize / manifest.PageSize)
	end := first + count
	for block := first; block < end; {
		from, to, err := c.marked(block, perBlock)
		if err != nil {
			return fmt.Errorf("clean layer: find marks: %w", err)
		}
		for block = from; block < min(to, end); block++ {
			any, err := c.anyMark(block)
			if err != nil {
				return err
			}
			if !any {
				continue
			}
			if err := c.Evict(block); err != nil && !errors.Is(err, errors.ErrUnsupported) {
				return err
			}
		}
	}
	return nil
}

// ClearUnmarked makes count blocks from first on, none of which anybody ever writes,
// read as zeros in the layer's data file: a disk may have changed them. It frees what
// space they take. errors.ErrUnsupported: the filesystem has no holes.
func (c *Clean) ClearUnmarked(first, count int64) error {
	if first < 0 || count < 0 || count > c.g.Blocks()-first {
		return fmt.Errorf("clean layer: clear %d blocks from %d of %d", count, first, c.g.Blocks())
	}
	off := first * int64(c.g.BlockSize)
	end := min(off+count*int64(c.g.BlockSize), c.g.Size())
	for off < end {
		from, err := c.data.SeekData(off)
		if err == io.EOF || err == nil && from >= end {
			return nil
		}
		if err == nil {
			if off, err = c.data.SeekHole(from); err == nil {
				off = min(off, end)
				err = c.data.PunchHole(from, off-from)
			}
		}
		if err != nil {
			return fmt.Errorf("clean layer: clear blocks: %w", err)
		}
	}
	return nil
}

// anyMark reports whether a page of a block is marked, or may be: its mark cannot be
// read.
func (c *Clean) anyMark(block int64) (bool, error) {
	s := c.scratch.Get().(*cleanScratch)
	defer c.scratch.Put(s)
	first := block * int64(c.g.BlockSize) / manifest.PageSize
	for n := pagesOf(int64(c.g.BlockLen(block))); n > 0; {
		k := min(n, batchPages)
		marks := s.marks[:k*c.markLen]
		if _, err := c.marks.ReadAt(marks, c.markOffset(first)); errors.Is(err, fs.ErrClosed) {
			return false, fmt.Errorf("clean layer: %w", err)
		} else if err != nil {
			return true, nil
		}
		for _, b := range marks {
			if b != 0 {
				return true, nil
			}
		}
		first += k
		n -= k
	}
	return false, nil
}
