package snapshot

import (
	"context"
	"fmt"
	"runtime"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A preparer reads, hashes and compresses blocks, by several goroutines at
// once. It keeps buffers from one block to the next; the pipeline bounds how
// many that takes.
type preparer struct {
	read      func(ctx context.Context, block int64, p []byte) error
	blockSize int
	scratch   freelist[[]byte] // of blockSize, as read
	stored    freelist[[]byte] // of blockSize

	// cores has a compressor for each core: who computes has one. Many blocks may
	// be waited for at once, but were as many computed at once, then whatever
	// else this process has to do, such as serving the volume, would have to
	// wait for its turn behind all of them.
	cores chan *blockstore.Compressor
}

// newPreparer returns a preparer for a number of workers at once, and as many
// prepared blocks waiting.
func newPreparer(blockSize int, read func(context.Context, int64, []byte) error, workers, waiting int) *preparer {
	p := &preparer{
		read: read, blockSize: blockSize,
		scratch: make(freelist[[]byte], workers), stored: make(freelist[[]byte], waiting),
		cores: make(chan *blockstore.Compressor, runtime.GOMAXPROCS(0)),
	}
	for range cap(p.cores) {
		p.cores <- new(blockstore.Compressor)
	}
	return p
}

// prepare finds out all that there is to know of a job.
func (p *preparer) prepare(ctx context.Context, j *job) (err error) {
	if j.parent != nil {
		if j.old, err = j.parent.get(ctx); err != nil {
			return err
		}
	}
	if j.hole || !j.there.IsHole() {
		return nil
	}
	block := p.scratch.get(p.newBuffer)
	defer func() { p.scratch.put(block) }()
	if err := p.read(ctx, j.first, block); err != nil {
		return fmt.Errorf("read block %d: %w", j.first, err)
	}
	compressor := <-p.cores
	defer func() { p.cores <- compressor }()
	if manifest.IsZero(block) {
		j.hole = true
		return nil
	}
	j.hash = manifest.Sum(block)
	if old := j.oldRef(0); !old.IsHole() && j.hash == old.Hash {
		j.same = true
		return nil
	}
	buffer := p.stored.get(p.newBuffer)
	if j.stored, j.raw = compressor.Compress(buffer, block); j.raw {
		block = buffer // the job takes the block itself
	}
	return nil
}

func (p *preparer) newBuffer() []byte { return make([]byte, p.blockSize) }

// release takes back a prepared job's buffer.
func (p *preparer) release(j *job) {
	if j.stored != nil {
		p.stored.put(j.stored[:p.blockSize])
		j.stored = nil
	}
}

// A freelist keeps things that cost something to make, as many as its capacity.
type freelist[T any] chan T

func (f freelist[T]) get(make func() T) T {
	select {
	case v := <-f:
		return v
	default:
		return make()
	}
}

func (f freelist[T]) put(v T) {
	select {
	case f <- v:
	default:
	}
}
