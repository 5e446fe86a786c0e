package volume

import (
	"context"
	"errors"
	"sync"
)

// errClosed: the device was closed, or is being closed.
var errClosed = errors.New("the device is closed")

// work is what a device does on its own account and not on a caller's: fetches
// that readers share, and counting. It ends with the device.
type work struct {
	ctx    context.Context
	cancel context.CancelCauseFunc

	mu      sync.Mutex // guards closed, and additions to running
	closed  bool
	running sync.WaitGroup
}

func newWork() *work {
	w := &work{}
	w.ctx, w.cancel = context.WithCancelCause(context.Background())
	return w
}

// start runs f in the background, and reports whether it does: not after stop.
// f's context ends with the device.
func (w *work) start(f func(ctx context.Context)) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	w.running.Go(func() { f(w.ctx) })
	return true
}

// stop ends all work and waits for it.
func (w *work) stop() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.cancel(errClosed)
	w.running.Wait()
}
