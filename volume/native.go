package volume

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// ErrIncomplete: this host lacks blocks of a device that must be complete.
var ErrIncomplete = errors.New("not all of it is on this host")

// wholeBatch is how many bytes are read at a time to see that they are what they
// were.
const wholeBatch = 1 << 20

// GiveAway gives the data file of a snapshot's base a second name, under which it
// can be read as the device's content without this package: by a loop device. Before
// that every block is read and verified, and fetched again where it is damaged; holes
// are made to read as zeros. As long as the second name exists, nobody on this host
// evicts any of the base. What the disk damages later is not found by those who read
// the file.
//
// The name must be free, and on the same filesystem. It need not be durable: what
// reads the file does not outlive the host. ErrIncomplete: blocks are missing, and
// nothing is given away. It takes as long as reading all of the base.
func (d *Device) GiveAway(ctx context.Context, name string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("give the data file of %s away: %w", d.name, err)
		}
	}()
	if d.writes != nil || d.base == nil {
		return errors.New("it is not a snapshot")
	}
	if d.Encrypted() {
		return errors.New("it is encrypted, and so is its file")
	}
	native, err := d.lockNative(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, native.Close()) }()
	v := d.view.acquire()
	defer v.release()
	done := int64(0) // blocks
	for leaf, ok := v.nextLeaf(0); ok; leaf, ok = v.nextLeaf(leaf.Leaf + 1) {
		first := leaf.Leaf * manifest.LeafBlocks
		if err := d.base.ClearUnmarked(done, first-done); err != nil {
			return err
		}
		done = first + int64(v.image.Geometry().LeafLen(leaf.Leaf))
		if err := d.verifyLeaf(ctx, v, first, done); err != nil {
			return err
		}
	}
	if err := d.base.ClearUnmarked(done, v.blocks()-done); err != nil {
		return err
	}
	// Else reads past the page cache would wait for it to be written.
	if err := d.base.Sync(); err != nil {
		return err
	}
	return d.host.FS.Link(cache.DataFile(d.base.dir), name)
}

// lockNative keeps evictors away from the base until the lock is closed. One that is
// at work has it for a moment.
func (d *Device) lockNative(ctx context.Context) (io.Closer, error) {
	for end := time.Now().Add(removalPatience); ; {
		lock, err := d.host.FS.Lock(filepath.Join(d.base.dir, nativeName), false)
		if !errors.Is(err, vfs.ErrLocked) || time.Now().After(end) {
			return lock, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(evictorPoll):
		}
	}
}

// verifyLeaf verifies the blocks from first to end, which are all of one leaf.
func (d *Device) verifyLeaf(ctx context.Context, v *view, first, end int64) error {
	var data, damaged []int64
	all := make([]int64, end-first)
	for i := range all {
		all[i] = first + int64(i)
	}
	lacked, _, err := d.lacking(ctx, v, all)
	if err != nil {
		return err
	}
	if len(lacked) > 0 {
		return fmt.Errorf("%w: %d blocks from block %d", ErrIncomplete, len(lacked), lacked[0])
	}
	for block := first; block < end; block++ {
		ref, err := d.ref(ctx, v.image, block)
		if err != nil {
			return err
		}
		if ref.IsHole() {
			err = d.base.ClearUnmarked(block, 1)
		} else {
			data = append(data, block)
		}
		if err != nil {
			return err
		}
	}
	buffer := make([]byte, max(wholeBatch, d.geometry.BlockSize))
	for _, run := range neighbours(data, int64(len(buffer)/d.geometry.BlockSize)) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if hit, err := d.verified(run, buffer); err != nil {
			return err
		} else if !hit {
			damaged = append(damaged, run...)
		}
	}
	if len(damaged) == 0 {
		return nil
	}
	return d.mend(ctx, v, damaged, buffer)
}

// mend fetches blocks anew that turned out to be damaged, and verifies them. They
// are written over, not evicted: somebody may have been given the file before, and
// reads it.
func (d *Device) mend(ctx context.Context, v *view, blocks []int64, buffer []byte) error {
	for _, block := range blocks {
		hit, err := d.verified([]int64{block}, buffer)
		if err == nil && !hit {
			var ref manifest.Ref
			if ref, err = d.ref(ctx, v.image, block); err == nil {
				err = d.warmRuns(ctx, v, []int64{block}, []manifest.Ref{ref})
			}
			if err == nil {
				hit, err = d.verified([]int64{block}, buffer)
			}
			if err == nil && !hit {
				err = &blockError{doing: "verify", block: block, err: ErrIncomplete}
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// verified reports whether the bytes of neighbouring blocks are in the base as they
// should be.
func (d *Device) verified(blocks []int64, buffer []byte) (bool, error) {
	size := int64(d.geometry.BlockSize)
	off, end := blocks[0]*size, min((blocks[len(blocks)-1]+1)*size, d.base.size)
	return d.base.ReadAt(buffer[:end-off], off)
}

// neighbours splits ascending blocks into runs of neighbours, of so many at most.
func neighbours(blocks []int64, most int64) (runs [][]int64) {
	for from := 0; from < len(blocks); {
		to := from + 1
		for to < len(blocks) && blocks[to] == blocks[to-1]+1 && int64(to-from) < most {
			to++
		}
		runs = append(runs, blocks[from:to])
		from = to
	}
	return runs
}
