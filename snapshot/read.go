package snapshot

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// Bounds of reading a whole image: requests at once, and the bytes of one.
const (
	readRuns   = 6
	maxRunSpan = 16 << 20 // a pack
	maxRunGap  = 1 << 20  // unwanted bytes that cost less than another request
)

// ReadAll reads every block of the image that is not a hole, verified, and
// calls fn with each, in no particular order and from several goroutines; data
// is BlockSize long and only valid during the call. A block that cannot be
// read is reported to bad, if that is set, and else ends ReadAll with its
// error. fn's error ends it too.
func (m *Image) ReadAll(ctx context.Context, fn func(block int64, data []byte) error, bad func(block int64, err error)) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(readRuns)
	reader := &blockstore.BlockReader{Store: m.objects, Lineage: m.ID().Lineage, BlockSize: m.Geometry().BlockSize}
	buffers := sync.Pool{New: func() any { b := make([]byte, m.Geometry().BlockSize); return &b }}
	for _, ref := range m.Root.Leaves {
		leaf, err := m.FetchLeaf(gctx, ref)
		if err != nil {
			if bad == nil || ctx.Err() != nil {
				return errors.Join(err, g.Wait())
			}
			for i := range m.Geometry().LeafLen(ref.Leaf) {
				bad(ref.Leaf*manifest.LeafBlocks+int64(i), err)
			}
			continue
		}
		blocks, refs := leafBlocks(ref.Leaf, leaf)
		for _, run := range manifest.GroupRuns(blocks, refs, maxRunGap, maxRunSpan) {
			g.Go(func() error {
				buffer := buffers.Get().(*[]byte)
				defer buffers.Put(buffer)
				var failed error
				err := reader.ReadRun(gctx, run.Refs, func(int) []byte { return *buffer }, func(i int, err error) {
					if err == nil {
						err = fn(run.Blocks[i], *buffer)
					} else if bad != nil && gctx.Err() == nil {
						bad(run.Blocks[i], err)
						return
					}
					if err != nil && failed == nil {
						failed = fmt.Errorf("block %d: %w", run.Blocks[i], err)
					}
				})
				if failed != nil || bad != nil {
					return failed
				}
				return err
			})
		}
	}
	return g.Wait()
}

// leafBlocks lists the blocks of a leaf that are not holes.
func leafBlocks(n int64, leaf *manifest.Leaf) (blocks []int64, refs []manifest.Ref) {
	for i := range leaf.Len() {
		if ref := leaf.Ref(i); !ref.IsHole() {
			blocks = append(blocks, n*manifest.LeafBlocks+int64(i))
			refs = append(refs, ref)
		}
	}
	return blocks, refs
}
