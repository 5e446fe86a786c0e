package snapshot

import (
	"context"
	"fmt"
	"iter"
	"sync"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

const (
	// mostCopyWindow is how many bytes of blocks are fetched together, at most: a
	// pack of blocks that do not compress.
	mostCopyWindow = 16 << 20

	// copyRuns is how many ranges of packs are fetched at once.
	copyRuns = 6
)

// A copySource is a snapshot of one store as a source of blocks for another. It
// reads only leaves that differ from those of an earlier copy, and fetches blocks
// in ranges, ahead of the upload, which holds it back: what it has fetched and
// nobody has read yet is at most what the upload has begun, and a window.
type copySource struct {
	from   *Image
	before *manifest.Root // of what parent is a copy of; nil: all its leaves have to be read
	parent *Image         // the earlier copy; nil: none
	there  *lookup        // what earlier runs have uploaded

	reader blockstore.BlockReader
	window int // blocks
	runs   *crew
	leaves sync.WaitGroup
	cancel context.CancelFunc
	ctx    context.Context // of all that is fetched
	free   freelist[[]byte]

	mu      sync.Mutex // guards the fields below
	blocks  map[int64]*fetched
	parents map[int64]*manifest.Leaf // that the upload is about to ask for
}

// A fetched is a block that was asked for.
type fetched struct {
	done chan struct{} // closed when the fields below are set
	data []byte        // a buffer of free
	err  error
}

// newCopySource returns a source that fetches a quarter of so many bytes of blocks at a
// time. The caller closes it.
func newCopySource(ctx context.Context, from *Image, parent *Image, before *manifest.Root, there *lookup, memory int64) *copySource {
	blockSize := from.Geometry().BlockSize
	window := max(1, int(min(mostCopyWindow, memory/4))/blockSize)
	c := &copySource{
		from: from, before: before, parent: parent, there: there, window: window,
		reader: blockstore.BlockReader{Store: from.objects, Lineage: from.ID().Lineage, BlockSize: blockSize, Key: from.key},
		free:   make(freelist[[]byte], 2*window),
		blocks: make(map[int64]*fetched), parents: make(map[int64]*manifest.Leaf),
	}
	c.ctx, c.cancel = context.WithCancel(ctx)
	c.runs = newCrew(c.ctx, make(places, copyRuns))
	return c
}

// close ends what is being fetched, and waits for it.
func (c *copySource) close() {
	c.cancel()
	c.leaves.Wait()
	_ = c.runs.lead(func(context.Context) error { return nil }) // each block has its own error
}

// source returns the source for an upload, which calls nothing of it after close.
func (c *copySource) source() Source {
	s := Source{Extents: c.extents, Read: c.read}
	if c.parent == nil {
		s.Bytes = c.from.Root.DataBlocks * int64(c.from.Geometry().BlockSize)
	}
	return s
}

// extents yields the blocks that differ from the earlier copy's.
func (c *copySource) extents(yield func(Extent, error) bool) {
	for pair, err := range c.pairs() {
		if err != nil {
			yield(Extent{}, err)
			return
		}
		if !c.extentsOf(pair, yield) {
			return
		}
	}
}

// extentsOf yields the blocks of a leaf that differ, a window at a time, of which
// it has begun to fetch the data.
func (c *copySource) extentsOf(pair *leafPair, yield func(Extent, error) bool) bool {
	var extents []Extent
	var blocks []int64
	var refs []manifest.Ref
	flush := func() bool {
		if err := c.fetch(blocks, refs); err != nil {
			yield(Extent{}, err)
			return false
		}
		for _, e := range extents {
			if !yield(e, nil) {
				return false
			}
		}
		extents, blocks, refs = extents[:0], nil, nil
		return true
	}
	kept := false
	for i := range manifest.DiffBlocks(pair.first, pair.second) {
		if pair.first != nil && !kept { // the upload asks for it, once
			c.keepParent(pair.number, pair.first)
			kept = true
		}
		block, ref := pair.number*manifest.LeafBlocks+int64(i), refAt(pair.second, i)
		extent := Extent{First: block, Count: 1, Hole: ref.IsHole()}
		if !extent.Hole {
			there, err := c.there.find(c.ctx, block)
			if err != nil {
				yield(Extent{}, err)
				return false
			}
			if there.IsHole() {
				blocks, refs = append(blocks, block), append(refs, ref)
			} else {
				there.Hash = ref.Hash
				extent.Stored = there
			}
		}
		extents = append(extents, extent)
		if len(blocks) == c.window && !flush() {
			return false
		}
	}
	return flush()
}

// pairs yields the leaves that may differ from the earlier copy's, second, with
// those, first, in order, several being read ahead.
func (c *copySource) pairs() iter.Seq2[*leafPair, error] {
	type read struct {
		leafPair
		done chan struct{}
		err  error
	}
	begin := func(n int64) *read {
		r := &read{leafPair: leafPair{number: n}, done: make(chan struct{})}
		c.leaves.Go(func() {
			defer close(r.done)
			if r.second, r.err = c.from.leaf(c.ctx, n); r.err == nil && c.parent != nil {
				r.first, r.err = c.parent.leaf(c.ctx, n)
			}
		})
		return r
	}
	return func(yield func(*leafPair, error) bool) {
		next, stop := iter.Pull(c.leafNumbers())
		defer stop()
		var ahead []*read
		for more := true; ; {
			for more && len(ahead) < leafReads {
				var n int64
				if n, more = next(); more {
					ahead = append(ahead, begin(n))
				}
			}
			if len(ahead) == 0 {
				return
			}
			r := ahead[0]
			ahead = ahead[1:]
			<-r.done
			if !yield(&r.leafPair, r.err) || r.err != nil {
				return
			}
		}
	}
}

// leafNumbers yields the numbers of the leaves that may differ.
func (c *copySource) leafNumbers() iter.Seq[int64] {
	switch {
	case c.before != nil:
		return manifest.DiffLeaves(c.before, c.from.Root)
	case c.parent != nil:
		return manifest.DiffLeaves(c.parent.Root, c.from.Root) // leaves of two lineages all differ
	}
	return func(yield func(int64) bool) {
		for _, ref := range c.from.Root.Leaves {
			if !yield(ref.Leaf) {
				return
			}
		}
	}
}

// fetch begins to fetch blocks.
func (c *copySource) fetch(blocks []int64, refs []manifest.Ref) error {
	waiting := make(map[int64]*fetched, len(blocks))
	c.mu.Lock()
	for _, block := range blocks {
		waiting[block] = &fetched{done: make(chan struct{})}
		c.blocks[block] = waiting[block]
	}
	c.mu.Unlock()
	for _, run := range manifest.GroupRuns(blocks, refs, maxRunGap, maxRunSpan) {
		err := c.runs.run(c.ctx, func(ctx context.Context) error {
			dst := func(i int) []byte {
				f := waiting[run.Blocks[i]]
				if f.data == nil {
					f.data = c.free.get(func() []byte { return make([]byte, c.reader.BlockSize) })
				}
				return f.data
			}
			_ = c.reader.ReadRun(ctx, run.Refs, dst, func(i int, err error) {
				f := waiting[run.Blocks[i]]
				f.err = err
				close(f.done)
			}) // done was told each error
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// read waits for a block that extents has yielded, and which is read once.
func (c *copySource) read(ctx context.Context, block int64, p []byte) error {
	c.mu.Lock()
	f := c.blocks[block]
	delete(c.blocks, block)
	c.mu.Unlock()
	if f == nil {
		return fmt.Errorf("block %d was not fetched", block)
	}
	select {
	case <-f.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if f.err != nil {
		return f.err
	}
	copy(p, f.data)
	c.free.put(f.data)
	return nil
}

func (c *copySource) keepParent(n int64, leaf *manifest.Leaf) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.parents[n] = leaf
}

// parentLeaf returns a leaf of the earlier copy: the one that was compared, if
// the upload asks for it the first time.
func (c *copySource) parentLeaf(ctx context.Context, ref manifest.LeafRef) (*manifest.Leaf, error) {
	c.mu.Lock()
	leaf := c.parents[ref.Leaf]
	delete(c.parents, ref.Leaf)
	c.mu.Unlock()
	if leaf != nil {
		return leaf, nil
	}
	return c.parent.FetchLeaf(ctx, ref)
}
