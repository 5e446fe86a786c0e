package volume

import (
	"sync"
	"sync/atomic"

	"github.com/lazyvol/lazyvol/manifest"
)

// A recorder notes the order in which blocks are first read.
type recorder struct {
	seen []atomic.Uint64 // a bit a block

	mu     sync.Mutex // guards blocks
	blocks manifest.Trace
}

func newRecorder(blocks int64) *recorder {
	return &recorder{seen: make([]atomic.Uint64, (blocks+63)/64)}
}

// touch notes a read of the blocks from first to last.
func (r *recorder) touch(first, last int64) {
	for block := first; block <= last; block++ {
		word, bit := &r.seen[block/64], uint64(1)<<(block%64)
		if word.Load()&bit != 0 || word.Or(bit)&bit != 0 {
			continue
		}
		r.mu.Lock()
		if len(r.blocks) < manifest.MaxTraceBlocks {
			r.blocks = append(r.blocks, block)
		}
		r.mu.Unlock()
	}
}

// RecordTrace makes the device note, from now on, the order in which blocks of
// its root are first read. It takes 1 MiB of memory for 4 TiB of the default
// block size, and 8 bytes for each block read. To be called before the first
// read.
func (d *Device) RecordTrace() { d.recorder = newRecorder(d.geometry.Blocks()) }

// Trace returns what was noted since RecordTrace, up to
// [manifest.MaxTraceBlocks] blocks; nil if that was not called.
func (d *Device) Trace() manifest.Trace {
	if d.recorder == nil {
		return nil
	}
	d.recorder.mu.Lock()
	defer d.recorder.mu.Unlock()
	return append(manifest.Trace{}, d.recorder.blocks...)
}

// record notes a read of n bytes at off, in as far as the root has them.
func (d *Device) record(v *view, off, n int64) {
	if d.recorder == nil || n <= 0 {
		return
	}
	blockSize := int64(d.geometry.BlockSize)
	known := min(v.blocks(), int64(len(d.recorder.seen))*64) // the volume may have grown since
	d.recorder.touch(off/blockSize, min((off+n-1)/blockSize, known-1))
}
