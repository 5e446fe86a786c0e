package volume

import (
	"errors"
	"fmt"

	"github.com/lazyvol/lazyvol/cache"
)

// ErrShrink: a volume can only grow. What a guest has at its end would be lost.
var ErrShrink = errors.New("a volume cannot shrink")

// errGrown: what was a device's last page, and so whole although short, is not its
// last one any more.
var errGrown = errors.New("the device has grown")

// Resize makes the volume size bytes large, of which the new ones are zeros. Reads,
// writes and snapshots go on: a snapshot that is being made has the size that the
// volume had at its cut. That size already is no error. On return the size is
// durable, and Size returns it. ErrSize: no volume can have it; ErrShrink: it is
// less than the volume has. A filesystem that cannot hold a file of that size is
// syscall.EFBIG, and a full disk ENOSPC.
//
// After an error the volume has its former size until it is opened again, when it
// may have either, and Resize may be called again.
func (v *Volume) Resize(size int64) error {
	if err := v.resize(size); err != nil {
		return fmt.Errorf("resize %s: %w", v.name, err)
	}
	return nil
}

func (v *Volume) resize(size int64) error {
	if err := checkSize(size, true); err != nil {
		return err
	}
	v.sizing.Lock()
	defer v.sizing.Unlock()
	recorded := v.Record().Size // more than Size if the call before could not go on
	switch {
	case v.closed:
		return errClosed
	case size < recorded:
		return fmt.Errorf("%w: it has %d bytes, more than %d", ErrShrink, recorded, size)
	case size == v.Size():
		return nil
	}
	// No write layer comes while we hold sizing, and those that go are kept by
	// this view until we are done.
	now := v.view.acquire()
	defer now.release()
	layers := []*cache.WriteLayer{now.open}
	if now.sealed != nil {
		layers = append(layers, now.sealed)
	}
	// Rule: there is room in all layers, durably, then the size is on record, then
	// anybody sees it, and can write there. What is longer than the record says is
	// cut off when it is opened.
	for _, layer := range layers {
		if err := layer.Extend(size); err != nil {
			return err
		}
	}
	if err := v.update(func(r *Record) { r.Size = size }); err != nil {
		return err
	}
	block, tail := v.readTail(now)
	if err := v.writes.clean.Grow(size); err != nil {
		return fmt.Errorf("its size is on record as %d, but it cannot be seen yet: %w", size, err)
	}
	v.grow(layers, size)
	v.keepTail(block, tail)
	v.host.Log.Info("resized", "volume", v.name, "bytes", size)
	return nil
}

// grow lets the device be seen with its new size. Nobody writes meanwhile, and who
// reads does not look beyond the size, which comes last.
func (v *Volume) grow(layers []*cache.WriteLayer, size int64) {
	v.writes.cut.Lock()
	defer v.writes.cut.Unlock()
	for _, layer := range layers {
		layer.Grow(size)
	}
	g := v.geometry.Get()
	g.Size = size
	v.writes.leaves.Grow(size)
	v.writes.diverged.Grow(g.Blocks())
	v.geometry.Grow(size)
}

// readTail returns the clean copy of the device's last block, padded with zeros, if
// that is a short one of which there is a copy: it counts as missing once the
// block is longer. A copy that a snapshot is about to replace is left to that.
func (v *Volume) readTail(now *view) (block int64, tail []byte) {
	g := v.geometry.Get()
	block = g.Blocks() - 1
	n := int64(g.BlockLen(block))
	if layer, _ := v.place(block); n == int64(g.BlockSize) || layer != v.writes.clean || v.seals(now, block) {
		return 0, nil
	}
	p := make([]byte, g.BlockSize)
	if hit, err := v.writes.clean.ReadAt(p[:n], block*int64(g.BlockSize)); err != nil || !hit {
		return 0, nil
	}
	return block, p
}

// keepTail writes what readTail returned. No other content can have come for the
// block: no snapshot that changes it was being made, nor begins while sizing is held.
func (v *Volume) keepTail(block int64, tail []byte) {
	n := int64(len(tail))
	if n == 0 || v.host.Budget.admit(n, false) != nil {
		return
	}
	defer v.host.Budget.done(n)
	if err := v.writes.clean.WriteBlock(block, tail); err != nil {
		v.host.Log.Warn("could not cache the block at the former end, which will be fetched again", "volume", v.name, "error", err)
	}
}
