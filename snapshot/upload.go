package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"
	"sync"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// An Extent is a range of blocks that may differ from the parent's. Hole says
// that they are all zeros, without a need to read them.
type Extent struct {
	First, Count int64
	Hole         bool

	// Stored, unless it is a hole's, says where an earlier run of the attempt has
	// put the extent's only block.
	Stored manifest.Ref
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

	// Check, if set, is called after the last Read. Its error fails the
	// upload: what was read is not the content of any one moment.
	Check func() error

	// Bytes, for progress alone, is how many bytes of blocks the Extents that are
	// no holes come to, about; 0: not known.
	Bytes int64
}

// ExtentBytes returns what Source.Bytes is to be for extents that can be gone
// through twice; 0 if they fail.
func ExtentBytes(extents iter.Seq2[Extent, error], blockSize int) (bytes int64) {
	for e, err := range extents {
		if err != nil {
			return 0
		}
		if !e.Hole {
			bytes += e.Count * int64(blockSize)
		}
	}
	return bytes
}

// Bounds of the upload, at most. With blocks of the default size they keep it
// under mostMemory.
const (
	mostMemory = 150 << 20

	// uploads is how many packs and leaves parts are on their way to the store
	// at once. One pack more is being filled, and another waits for its place.
	uploads = 4

	// blocksBudget is how many bytes of blocks are between being read and
	// being packed, compressed; leastBlocks is that with little memory.
	blocksBudget = 32 << 20
	leastBlocks  = 4 << 20

	// readers is how many blocks are read at once, or one per core: a block
	// may have to come from the store.
	readers = 16
)

// bounds returns how many uploads there are at once, and how many bytes of
// blocks between being read and being packed, within so much memory.
func bounds(memory int64) (sends int, blocks int64) {
	const pack = blockstore.PackTarget + 1<<20
	memory = cmp.Or(memory, mostMemory)
	// Before blocks come three packs: one that is filled, one on its way, and one that
	// was and is not collected yet.
	blocks = min(blocksBudget, max(leastBlocks, (memory-3*pack)/3))
	packs := (memory - blocks - blocks/2) / pack
	return int(max(1, min(uploads, packs-2))), blocks
}

// uploaded is what an attempt has put into the store.
type uploaded struct {
	root         []byte
	hash         manifest.Hash
	dataBlocks   int64
	blocks       int64 // that the packs hold
	packs        int64
	storedBytes  int64 // of packs, leaves and root
	leavesLength int64
}

// describe adds what was uploaded to an outcome.
func (u *uploaded) describe(o *manifest.Outcome) {
	o.RootHash, o.RootLength = manifest.HexHash(u.hash), int64(len(u.root))
	if len(u.root) <= manifest.InlineRootMax {
		o.Root = u.root
	}
	o.DataBlocks, o.UploadedBlocks, o.Packs = u.dataBlocks, u.blocks, u.packs
	o.StoredBytes, o.LeavesLength = u.storedBytes, u.leavesLength
}

// Upload reads the source and puts packs, leaves and root: after it every
// object of the snapshot is durable in the store, and only the outcome is
// missing. Blocks are read, hashed and compressed by all cores, and packed in
// address order. Only blocks that differ by hash from the parent's are stored.
//
// It may be called once. After an error the attempt can only be aborted.
func (a *Attempt) Upload(ctx context.Context, src Source) error {
	if a.began.Swap(true) {
		// A second one would find the first one's packs in its way, and could
		// not tell whether they hold what it has read.
		return fmt.Errorf("upload %s: an upload was begun already", a.ID())
	}
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

func (a *Attempt) upload(ctx context.Context, src Source) (*uploaded, error) {
	var u *uploaded
	a.bytesAll.Store(src.Bytes)
	sends, budget := bounds(a.plan.Memory)
	senders := newCrew(ctx, make(places, sends))
	index := newIndexWriter(a, &sender{a.store.objects, senders})
	if a.plan.Resumed != nil {
		index.numberFrom(*a.plan.Resumed)
	}
	ahead := max(2, int(budget)/a.plan.Geometry.BlockSize)
	workers := min(ahead, max(readers, runtime.GOMAXPROCS(0)))
	blocks := newPreparer(a.plan.Geometry.BlockSize, src.Read, workers, ahead)
	err := senders.lead(func(ctx context.Context) (err error) {
		emit := func(ctx context.Context, j *job) error {
			if j.data && (j.same || j.hole || !j.there.IsHole()) { // else it is done when its pack is stored
				a.bytesDone.Add(int64(a.plan.Geometry.BlockSize))
			}
			if err := index.add(ctx, j); err != nil {
				return err
			}
			blocks.release(j)
			a.blocksDone.Store(j.first + j.count)
			return nil
		}
		if err := inOrder(ctx, workers, ahead, a.jobs(src), blocks.prepare, emit); err != nil {
			return err
		}
		if src.Check != nil {
			if err := src.Check(); err != nil {
				return err
			}
		}
		u, err = index.finish(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	// After everything that it refers to.
	if a.plan.Resumed != nil {
		err = a.finishResumed(ctx, index, u.root)
	} else {
		err = putOwn(ctx, a.store.objects, manifest.RootKey(a.ID()), u.root)
	}
	if err != nil {
		return nil, err
	}
	a.blocksDone.Store(a.plan.Geometry.Blocks())
	a.bytesDone.Store(a.bytesAll.Load())
	return u, nil
}

// job is a block on its way through the upload, or several of one leaf that
// are holes.
type job struct {
	first, count int64
	hole         bool
	data         bool         // of an extent that is no hole, though the block may turn out to be one
	there        manifest.Ref // where an earlier run has put the block; a hole's: nowhere
	parent       *parentLeaf  // nil: all holes there

	// What its worker finds out.
	old    *manifest.Leaf // the parent's leaf, nil: all holes
	same   bool           // as the parent's
	hash   manifest.Hash
	stored []byte // compressed, or raw; a buffer of the pool
	raw    bool
}

// oldRef returns what the parent has in the job's i-th block.
func (j *job) oldRef(i int64) manifest.Ref {
	return refAt(j.old, int((j.first+i)%manifest.LeafBlocks))
}

// A parentLeaf is a leaf of the parent, fetched when it is first asked for.
type parentLeaf struct {
	plan *Plan
	ref  manifest.LeafRef
	once sync.Once // sets the fields below
	leaf *manifest.Leaf
	err  error
}

func (l *parentLeaf) get(ctx context.Context) (*manifest.Leaf, error) {
	l.once.Do(func() { l.leaf, l.err = l.plan.parentLeaf(ctx, l.ref) })
	return l.leaf, l.err
}

// jobs cuts the extents of a source into jobs.
func (a *Attempt) jobs(src Source) iter.Seq2[*job, error] {
	return func(yield func(*job, error) bool) {
		leaves := parentLeaves{plan: &a.plan}
		next := int64(0)
		for e, err := range src.Extents {
			if err == nil {
				err = a.checkExtent(e, next)
			}
			if err != nil {
				yield(nil, err)
				return
			}
			next = e.First + e.Count
			if !leaves.cut(e, func(j *job) bool { return yield(j, nil) }) {
				return
			}
		}
	}
}

func (a *Attempt) checkExtent(e Extent, next int64) error {
	blocks := a.plan.Geometry.Blocks()
	if e.First < next || e.First > blocks || e.Count < 0 || e.Count > blocks-e.First {
		return fmt.Errorf("source extent of blocks %d+%d is out of order or beyond the device", e.First, e.Count)
	}
	return nil
}

// parentLeaves hands out the leaves of a parent in ascending order.
type parentLeaves struct {
	plan *Plan       // without a parent: holes
	last *parentLeaf // the one handed out last
}

// cut cuts an extent into jobs: a block each, or in a hole a leaf each where
// the parent has data.
func (l *parentLeaves) cut(e Extent, yield func(*job) bool) bool {
	end := e.First + e.Count
	if !e.Hole {
		for block := e.First; block < end; block++ {
			if !yield(&job{first: block, count: 1, data: true, there: e.Stored, parent: l.get(block / manifest.LeafBlocks)}) {
				return false
			}
		}
		return true
	}
	for block := e.First; block < end && l.plan.Parent != nil; {
		ref, ok := l.plan.Parent.Root.Next(block / manifest.LeafBlocks)
		if !ok {
			break
		}
		first := max(block, ref.Leaf*manifest.LeafBlocks)
		if first >= end {
			break
		}
		block = min(end, (ref.Leaf+1)*manifest.LeafBlocks)
		if !yield(&job{first: first, count: block - first, hole: true, parent: l.get(ref.Leaf)}) {
			return false
		}
	}
	return true
}

// get returns a leaf, the same one to all jobs in it; nil if it is all holes.
func (l *parentLeaves) get(n int64) *parentLeaf {
	if l.plan.Parent == nil {
		return nil
	}
	if l.last == nil || l.last.ref.Leaf != n {
		ref, ok := l.plan.Parent.Root.Find(n)
		if !ok {
			return nil
		}
		l.last = &parentLeaf{plan: l.plan, ref: ref}
	}
	return l.last
}

// A sender puts the objects of one snapshot in the background, a few at a time.
type sender struct {
	objects blockstore.Store
	crew    *crew
}

// send puts an object, of which it keeps the data, and then calls stored, unless that
// is nil. It blocks while too many are on their way. An error of the Put ends the crew.
func (s *sender) send(ctx context.Context, key string, data []byte, stored func()) error {
	return s.crew.run(ctx, func(ctx context.Context) error {
		err := putOwn(ctx, s.objects, key, data)
		if err == nil && stored != nil {
			stored()
		}
		return err
	})
}

// putOwn puts an object that only this attempt may write, and once.
func putOwn(ctx context.Context, objects blockstore.Store, key string, data []byte) error {
	_, err := objects.Put(ctx, key, data, blockstore.IfAbsent)
	if err != nil && !errors.Is(err, blockstore.ErrExists) { // it is our own, its first reply lost
		return fmt.Errorf("put %s: %w", key, err)
	}
	return nil
}
