package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// An Extent is a range of blocks that may differ from the parent's. Hole says
// that they are all zeros, without a need to read them.
type Extent struct {
	First, Count int64
	Hole         bool
}

// A Source is what an attempt uploads.
type Source struct {
	// Extents yields, in ascending order and without overlap, every block
	// that may differ from the parent's (without a parent: that may hold
	// data). It stops at the first error.
	Extents iter.Seq2[Extent, error]

	// Read fills p, BlockSize bytes, with a block's content, zero-padded
	// beyond the end of the device. It is called from several goroutines.
	Read func(ctx context.Context, block int64, p []byte) error

	// Changed, if set, is told each block that turned out to differ from the
	// parent's, in ascending order and from one goroutine.
	Changed func(block int64)
}

// Bounds of the upload pipeline. Together they keep it under about 150 MiB
// with blocks of the default size.
const (
	uploads      = 4        // packs and leaves parts on their way to the store
	blocksBudget = 32 << 20 // bytes of blocks between reading and packing
)

// upload is what an attempt has put into the store, and the root over it.
type upload struct {
	root         []byte
	hash         manifest.Hash
	dataBlocks   int64
	blocks       int64 // uploaded
	packs        int64
	storedBytes  int64 // of packs, leaves and root
	leavesLength int64
}

// describe adds what was uploaded to an outcome.
func (u *upload) describe(o *manifest.Outcome) {
	o.RootHash, o.RootLength = manifest.HexHash(u.hash), int64(len(u.root))
	if len(u.root) <= manifest.InlineRootMax {
		o.Root = u.root
	}
	o.DataBlocks, o.UploadedBlocks, o.Packs = u.dataBlocks, u.blocks, u.packs
	o.StoredBytes, o.LeavesLength = u.storedBytes, u.leavesLength
}

// job is one block on its way through the pipeline.
type job struct {
	block  int64
	old    manifest.Ref // the parent's
	hole   bool
	same   bool // as the parent's
	hash   manifest.Hash
	stored []byte // compressed, or raw
	raw    bool
	err    error
	done   chan struct{} // closed when all of the above is set
}

// Upload reads the source and puts packs, leaves and root: after it every
// object of the snapshot is durable in the store, and only the outcome is
// missing. Blocks are read, hashed and compressed by all cores, and packed in
// address order. Only blocks that differ by hash from the parent's are stored.
func (a *Attempt) Upload(ctx context.Context, src Source) error {
	beat, stop := context.WithCancel(ctx)
	var beating sync.WaitGroup
	beating.Go(func() { a.heartbeat(beat) })
	defer beating.Wait()
	defer stop()

	u, err := a.upload(ctx, src)
	if err != nil {
		return fmt.Errorf("upload %s: %w", a.ID(), err)
	}
	a.uploaded = u
	return nil
}

func (a *Attempt) upload(ctx context.Context, src Source) (*upload, error) {
	g, gctx := errgroup.WithContext(ctx)
	sender := newSender(ctx, a.store.objects)
	index := newIndexWriter(a, sender, src.Changed)

	workers := runtime.GOMAXPROCS(0)
	depth := max(2*workers, blocksBudget/a.plan.Geometry.BlockSize)
	var (
		work    = make(chan *job, depth)
		ordered = make(chan *job, depth) // the same jobs, in address order
		buffers = newBufferPool(depth+workers+1, a.plan.Geometry.BlockSize)
	)
	g.Go(func() error {
		defer close(work)
		defer close(ordered)
		return a.produce(gctx, src, index, func(j *job) error {
			select {
			case ordered <- j:
			case <-gctx.Done():
				return context.Cause(gctx)
			}
			select {
			case work <- j:
				return nil
			case <-gctx.Done():
				return context.Cause(gctx)
			}
		})
	})
	for range workers {
		g.Go(func() error {
			var c blockstore.Compressor
			block := make([]byte, a.plan.Geometry.BlockSize)
			for j := range work {
				a.process(gctx, src, &c, block, buffers, j)
				close(j.done)
			}
			return nil
		})
	}
	g.Go(func() error {
		for j := range ordered {
			select {
			case <-j.done:
			case <-gctx.Done():
				return context.Cause(gctx)
			}
			if j.err != nil {
				return j.err
			}
			if err := index.add(j); err != nil {
				return err
			}
			buffers.put(j.stored)
			a.blocksDone.Store(j.block + 1)
		}
		return nil
	})
	err := g.Wait()
	if err == nil {
		var u *upload
		if u, err = index.finish(ctx); err == nil {
			if err = sender.wait(); err == nil {
				a.blocksDone.Store(a.plan.Geometry.Blocks())
				return u, a.putRoot(ctx, u)
			}
		}
	}
	return nil, errors.Join(err, sender.stop())
}

// putRoot puts the root, after everything it refers to.
func (a *Attempt) putRoot(ctx context.Context, u *upload) error {
	_, err := a.store.objects.Put(ctx, manifest.RootKey(a.ID()), u.root, blockstore.IfAbsent)
	if err != nil && !errors.Is(err, blockstore.ErrExists) { // our own, its reply lost: nobody else writes under this id
		return fmt.Errorf("put root: %w", err)
	}
	return nil
}

// produce makes a job of every block that has to be looked at.
func (a *Attempt) produce(ctx context.Context, src Source, index *indexWriter, emit func(*job) error) error {
	blocks := a.plan.Geometry.Blocks()
	next := int64(0)
	for e, err := range src.Extents {
		if err != nil {
			return err
		}
		if e.First < next || e.Count < 0 || e.First+e.Count > blocks {
			return fmt.Errorf("source extent of blocks %d+%d is out of order or beyond the device", e.First, e.Count)
		}
		next = e.First + e.Count
		if e.Hole && a.plan.Parent == nil {
			continue
		}
		for block := e.First; block < next; {
			leaf := block / manifest.LeafBlocks
			end := min(next, (leaf+1)*manifest.LeafBlocks)
			old, err := index.parentLeaf(ctx, leaf)
			if err != nil {
				return err
			}
			for ; block < end; block++ {
				j := &job{block: block, hole: e.Hole}
				if i := int(block % manifest.LeafBlocks); old != nil && i < old.Len() {
					j.old = old.Ref(i)
				}
				if j.hole && j.old.IsHole() {
					continue
				}
				j.done = make(chan struct{})
				if err := emit(j); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// process reads, hashes and compresses one block.
func (a *Attempt) process(ctx context.Context, src Source, c *blockstore.Compressor, block []byte, buffers *bufferPool, j *job) {
	if j.hole {
		return
	}
	if j.err = ctx.Err(); j.err != nil {
		return
	}
	if err := src.Read(ctx, j.block, block); err != nil {
		j.err = fmt.Errorf("read block %d: %w", j.block, err)
		return
	}
	if isZero(block) {
		j.hole = true
		return
	}
	j.hash = manifest.Sum(block)
	if !j.old.IsHole() && j.hash == j.old.Hash {
		j.same = true
		return
	}
	dst, err := buffers.get(ctx)
	if err != nil {
		j.err = err
		return
	}
	stored, raw := c.Compress(dst[:0], block)
	if raw {
		stored = append(dst[:0], block...)
	}
	j.stored, j.raw = stored, raw
}

// isZero reports whether a block is all zeros.
func isZero(p []byte) bool {
	// Comparing a slice with itself one byte on is a memequal, which is
	// vectorised; the first byte anchors it.
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
}

// bufferPool is a bounded set of buffers for compressed blocks.
type bufferPool struct {
	free chan []byte
}

func newBufferPool(n, blockSize int) *bufferPool {
	p := &bufferPool{free: make(chan []byte, n)}
	for range n {
		p.free <- make([]byte, 0, blockSize)
	}
	return p
}

func (p *bufferPool) get(ctx context.Context) ([]byte, error) {
	select {
	case b := <-p.free:
		return b, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (p *bufferPool) put(b []byte) {
	if cap(b) > 0 {
		p.free <- b[:0]
	}
}

// sender puts the objects of one snapshot, a few at a time.
type sender struct {
	objects blockstore.Store
	group   *errgroup.Group
	ctx     context.Context
	cancel  context.CancelFunc
}

func newSender(ctx context.Context, objects blockstore.Store) *sender {
	ctx, cancel := context.WithCancel(ctx)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(uploads)
	return &sender{objects: objects, group: g, ctx: gctx, cancel: cancel}
}

// send puts an object in the background. It blocks while too many are on
// their way, and reports the error of an earlier one.
func (s *sender) send(key string, data []byte) error {
	if err := s.ctx.Err(); err != nil {
		return context.Cause(s.ctx)
	}
	s.group.Go(func() error {
		_, err := s.objects.Put(s.ctx, key, data, blockstore.IfAbsent)
		if errors.Is(err, blockstore.ErrExists) {
			return nil // our own, its reply lost: nobody else writes under this id
		}
		if err != nil {
			return fmt.Errorf("put %s: %w", key, err)
		}
		return nil
	})
	return nil
}

// wait returns when all objects sent are durable, or one failed.
func (s *sender) wait() error {
	defer s.cancel()
	return s.group.Wait()
}

// stop gives up what is on its way and returns the error of what failed before.
func (s *sender) stop() error {
	s.cancel()
	if err := s.group.Wait(); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}
