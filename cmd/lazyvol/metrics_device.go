package main

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/lazyvol/lazyvol/volume"
)

// An ioOp is what the kernel asks of a device.
type ioOp int

const (
	ioRead ioOp = iota
	ioWrite
	ioDiscard // and write zeroes
	ioFlush
	ioOps
)

// String names the operation as metrics do.
func (op ioOp) String() string {
	return [ioOps]string{"read", "write", "discard", "flush"}[op]
}

// ioCount counts one kind of operation. Those of different kinds do not share a
// cache line: two processors that read and write would pass it to and fro.
type ioCount struct {
	ops, bytes, errors atomic.Int64
	_                  [40]byte
}

// add counts an operation on n bytes with the context ctx. One whose caller went away
// has not failed.
func (c *ioCount) add(ctx context.Context, n int64, err error) {
	c.ops.Add(1)
	c.bytes.Add(n)
	if err != nil && !errors.Is(ctx.Err(), context.Canceled) {
		c.errors.Add(1)
	}
}

// countedDevice is a device that counts what the kernel asks of it.
type countedDevice struct {
	*volume.Device
	counts   *[ioOps]ioCount
	unsynced *atomic.Bool // the last sync failed
}

// counted returns the monitored device as it is to be mounted.
func (m *monitor) counted() countedDevice {
	return countedDevice{m.daemon.device, &m.counts, &m.unsynced}
}

// ReadAt implements [fs.Device].
func (d countedDevice) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := d.Device.ReadAt(ctx, p, off)
	d.counts[ioRead].add(ctx, int64(n), err)
	return n, err
}

// WriteAt implements [fs.Device].
func (d countedDevice) WriteAt(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := d.Device.WriteAt(ctx, p, off)
	d.counts[ioWrite].add(ctx, int64(n), err)
	return n, err
}

// Zero implements [fs.Device].
func (d countedDevice) Zero(ctx context.Context, off, n int64) error {
	err := d.Device.Zero(ctx, off, n)
	if err != nil {
		n = 0
	}
	d.counts[ioDiscard].add(ctx, n, err)
	return err
}

// Sync implements [fs.Device].
func (d countedDevice) Sync(ctx context.Context) error {
	err := d.Device.Sync(ctx)
	d.counts[ioFlush].add(ctx, 0, err)
	if err == nil || ctx.Err() == nil { // else it is the caller who went
		d.unsynced.Store(err != nil)
	}
	return err
}
