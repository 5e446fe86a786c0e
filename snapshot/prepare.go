package snapshot

import (
	"bytes"
	"context"
	"fmt"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A preparer reads, hashes and compresses blocks, by several goroutines at
// once. It keeps buffers from one block to the next; the pipeline bounds how
// many that takes.
type preparer struct {
	read      func(ctx context.Context, block int64, p []byte) error
	blockSize int
	scratch   freelist[*scratch]
	stored    freelist[[]byte] // of blockSize
}

// scratch is what preparing one block takes.
type scratch struct {
	block      []byte
	compressor blockstore.Compressor
}

// newPreparer returns a preparer for a number of workers at once, and as many
// prepared blocks waiting.
func newPreparer(blockSize int, read func(context.Context, int64, []byte) error, workers, waiting int) *preparer {
	return &preparer{
		read: read, blockSize: blockSize,
		scratch: make(freelist[*scratch], workers), stored: make(freelist[[]byte], waiting),
	}
}

// prepare finds out all that there is to know of a job.
func (p *preparer) prepare(ctx context.Context, j *job) (err error) {
	if j.parent != nil {
		if j.old, err = j.parent.get(ctx); err != nil {
			return err
		}
	}
	if j.hole {
		return nil
	}
	s := p.scratch.get(func() *scratch { return &scratch{block: make([]byte, p.blockSize)} })
	defer p.scratch.put(s)
	if err := p.read(ctx, j.first, s.block); err != nil {
		return fmt.Errorf("read block %d: %w", j.first, err)
	}
	if isZero(s.block) {
		j.hole = true
		return nil
	}
	j.hash = manifest.Sum(s.block)
	if old := j.oldRef(0); !old.IsHole() && j.hash == old.Hash {
		j.same = true
		return nil
	}
	buffer := p.stored.get(func() []byte { return make([]byte, p.blockSize) })
	if j.stored, j.raw = s.compressor.Compress(buffer, s.block); j.raw {
		s.block = buffer // the job takes the block itself
	}
	return nil
}

// release takes back a prepared job's buffer.
func (p *preparer) release(j *job) {
	if j.stored != nil {
		p.stored.put(j.stored[:p.blockSize])
		j.stored = nil
	}
}

// isZero reports whether a block is all zeros.
func isZero(p []byte) bool {
	// Comparing a slice with itself one byte on is a memequal, which is
	// vectorised; the first byte anchors it.
	return len(p) == 0 || p[0] == 0 && bytes.Equal(p[1:], p[:len(p)-1])
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
