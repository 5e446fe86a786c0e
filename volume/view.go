package volume

import (
	"sync"
	"sync/atomic"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A view is what reads see at one moment. What they see in it never changes,
// but for what is written into its open layer.
type view struct {
	open   *cache.WriteLayer // nil in a read-only device, and in what a snapshot is made of
	sealed *cache.WriteLayer // what a snapshot is being made of; nil else
	image  *snapshot.Image   // the root; nil for a blank volume without snapshots

	durable atomic.Bool // the sealed layer is, as it changes no more

	// refs counts the readers, one more while it is the current view, and one
	// more while the view before it is not drained.
	refs    atomic.Int64
	next    *view         // set before the last release
	drained chan struct{} // closed when the last read through it, and all views before, has ended
}

func newView(open, sealed *cache.WriteLayer, image *snapshot.Image) *view {
	v := &view{open: open, sealed: sealed, image: image, drained: make(chan struct{})}
	v.refs.Store(1)
	return v
}

// release ends one use of the view.
func (v *view) release() {
	if v.refs.Add(-1) > 0 {
		return
	}
	close(v.drained)
	if v.next != nil {
		v.next.release()
	}
}

// syncSealed makes the sealed layer durable, which takes one Sync for all.
func (v *view) syncSealed() error {
	if v.sealed == nil || v.durable.Load() {
		return nil
	}
	if err := v.sealed.Sync(); err != nil {
		return err
	}
	v.durable.Store(true)
	return nil
}

// run returns the state of a page in the write layers, the layer that holds it
// if it is Data, and for how many pages, at most n, that goes on.
func (v *view) run(page, n int64) (cache.PageState, *cache.WriteLayer, int64) {
	layer, state := v.open, cache.Absent
	if v.open != nil {
		state, n = v.open.Run(page, n)
	}
	if state == cache.Absent && v.sealed != nil {
		layer = v.sealed
		state, n = v.sealed.Run(page, n)
	}
	return state, layer, n
}

// blocks returns how many blocks the root has: all beyond are holes.
func (v *view) blocks() int64 {
	if v.image == nil {
		return 0
	}
	return v.image.Geometry().Blocks()
}

// nextLeaf returns the first leaf at or after n in which the root has data.
func (v *view) nextLeaf(n int64) (manifest.LeafRef, bool) {
	if v.image == nil {
		return manifest.LeafRef{}, false
	}
	return v.image.Root.Next(n)
}

// current is the view that new reads get.
type current struct {
	mu   sync.RWMutex // guards view; held for no longer than to count a reader
	view *view
}

// acquire returns the current view; the caller releases it.
func (c *current) acquire() *view {
	c.mu.RLock()
	v := c.view
	v.refs.Add(1)
	c.mu.RUnlock()
	return v
}

// replace makes v, which is new, the current view and returns a channel that is
// closed when the last read through those before has ended.
func (c *current) replace(v *view) <-chan struct{} {
	v.refs.Add(1) // by the view before, until it is drained
	c.mu.Lock()
	old := c.view
	c.view = v
	c.mu.Unlock()
	old.next = v
	old.release()
	return old.drained
}
