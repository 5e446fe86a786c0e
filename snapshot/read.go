package snapshot

import (
	"context"
	"fmt"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// Bounds of reading a whole image: requests at once, and the bytes of one.
const (
	leafReads  = 8 // leaves read ahead
	readRuns   = 6
	maxRunSpan = 16 << 20 // a pack
	maxRunGap  = 1 << 20  // unwanted bytes that cost less than another request
)

// ReadAll reads every block of the image that is not a hole, verified, and
// calls fn with each, in no particular order and from several goroutines; data
// is BlockSize long and only valid during the call. A block that cannot be
// read is reported to bad, if that is set, also from several goroutines, and
// else ends ReadAll with its error. fn's error ends it too.
func (m *Image) ReadAll(ctx context.Context, fn func(block int64, data []byte) error, bad func(block int64, err error)) error {
	if err := m.readAll(ctx, fn, bad); err != nil {
		return fmt.Errorf("read %s: %w", m.ID(), err)
	}
	return nil
}

func (m *Image) readAll(ctx context.Context, fn func(block int64, data []byte) error, bad func(block int64, err error)) error {
	reader := &blockstore.BlockReader{Store: m.objects, Lineage: m.ID().Lineage, BlockSize: m.Geometry().BlockSize, Key: m.key}
	buffers := make(freelist[[]byte], readRuns)
	pick := func(_ context.Context, l leafRead) ([]int64, []manifest.Ref, error) {
		if l.err == nil {
			blocks, refs := l.blocks()
			return blocks, refs, nil
		}
		if bad == nil {
			return nil, nil, l.err
		}
		for i := range m.Geometry().LeafLen(l.ref.Leaf) {
			bad(l.ref.Leaf*manifest.LeafBlocks+int64(i), l.err)
		}
		return nil, nil, nil
	}
	return m.eachRun(ctx, pick, func(ctx context.Context, run manifest.Run) error {
		buffer := buffers.get(func() []byte { return make([]byte, reader.BlockSize) })
		defer buffers.put(buffer)
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		_ = reader.ReadRun(ctx, run.Refs, func(int) []byte { return buffer }, func(i int, err error) {
			switch {
			case ctx.Err() != nil: // the first error counts
			case err == nil:
				err = fn(run.Blocks[i], buffer)
			case bad != nil:
				bad(run.Blocks[i], err)
				err = nil
			}
			if err != nil {
				cancel(fmt.Errorf("block %d: %w", run.Blocks[i], err))
			}
		}) // done was told each error
		return context.Cause(ctx)
	})
}

// A leafRead is a leaf of an image, or why it could not be read.
type leafRead struct {
	ref  manifest.LeafRef
	leaf *manifest.Leaf
	err  error
}

// blocks lists the blocks of the leaf that are not holes.
func (l leafRead) blocks() (blocks []int64, refs []manifest.Ref) {
	for i := range l.leaf.Len() {
		if ref := l.leaf.Ref(i); !ref.IsHole() {
			blocks = append(blocks, l.ref.Leaf*manifest.LeafBlocks+int64(i))
			refs = append(refs, ref)
		}
	}
	return blocks, refs
}

// eachRun calls read, several times at once, with runs of the blocks that pick
// takes out of each leaf. pick is called with one leaf after the other, also
// those that cannot be read.
func (m *Image) eachRun(ctx context.Context, pick func(context.Context, leafRead) ([]int64, []manifest.Ref, error), read func(context.Context, manifest.Run) error) error {
	leaves := func(yield func(*leafRead, error) bool) {
		for _, ref := range m.Root.Leaves {
			if !yield(&leafRead{ref: ref}, nil) {
				return
			}
		}
	}
	fetch := func(ctx context.Context, l *leafRead) error {
		l.leaf, l.err = m.FetchLeaf(ctx, l.ref)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return nil
	}
	runs := newCrew(ctx, make(places, readRuns))
	return runs.lead(func(ctx context.Context) error {
		return inOrder(ctx, leafReads, leafReads, leaves, fetch, func(ctx context.Context, l *leafRead) error {
			blocks, refs, err := pick(ctx, *l)
			if err != nil {
				return err
			}
			for _, run := range manifest.GroupRuns(blocks, refs, maxRunGap, maxRunSpan) {
				if err := runs.run(ctx, func(ctx context.Context) error { return read(ctx, run) }); err != nil {
					return err
				}
			}
			return nil
		})
	})
}
