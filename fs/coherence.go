package fs

import (
	"sync"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
)

// coherence keeps the kernel's page cache from showing what a direct write has
// replaced.
//
// Before it sends a direct write the kernel drops the cached pages of its range.
// A buffered read that comes after this and before the Device has done the
// write caches the old bytes, and as the cache outlives its handles
// (FOPEN_KEEP_CACHE, no invalidation by mtime) they would stay for good. Some
// kernels drop the range once more after the write, others do not. So a direct
// write that is done while any buffered handle is open drops its range here, and
// after any other the next buffered open starts with an empty cache.
//
// The dropping is left to a goroutine. It waits for locked pages, so for reads
// that were not answered yet, and a handler that did so could keep those very
// reads from being received. Until it has run, shortly after the write
// returned, a buffered reader that raced with the write may still see the old
// bytes, as it may on any filesystem where the two are mixed.
type coherence struct {
	drop func(off, n int64) // drops [off, off+n) from the page cache

	mu       sync.Mutex // guards what follows
	buffered int        // open buffered handles
	stale    bool       // a direct write was done while there were none
	from, to int64      // what drop is to be called with; empty if to is 0
	closed   bool

	work chan struct{} // capacity 1: there is something to do, or closed is set
	done chan struct{} // closed when run has returned
}

func newCoherence(drop func(off, n int64)) *coherence {
	c := &coherence{drop: drop, work: make(chan struct{}, 1), done: make(chan struct{})}
	go c.run()
	return c
}

// openBuffered counts a buffered handle. It reports whether the handle may find
// the page cache as it is.
func (c *coherence) openBuffered() (keep bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buffered++
	keep = !c.stale
	c.stale = false
	return keep
}

// releaseBuffered is called when the kernel will send no more requests for a
// buffered handle: it is closed, unmapped, and its readahead has ended.
func (c *coherence) releaseBuffered() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.buffered--
}

// wroteDirect is called when the Device has done a direct write.
func (c *coherence) wroteDirect(off, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.buffered == 0 {
		c.stale = true
		return
	}
	// One range is enough to remember: pages between two writes are dropped in
	// vain at worst.
	if c.to == 0 {
		c.from, c.to = off, off+n
	} else {
		c.from, c.to = min(c.from, off), max(c.to, off+n)
	}
	c.wake()
}

// wake tells run to look. The caller holds mu.
func (c *coherence) wake() {
	select {
	case c.work <- struct{}{}:
	default:
	}
}

func (c *coherence) run() {
	defer close(c.done)
	for range c.work {
		c.mu.Lock()
		from, to, closed := c.from, c.to, c.closed
		c.from, c.to = 0, 0
		c.mu.Unlock()
		if closed {
			return
		}
		if to > 0 {
			c.drop(from, to-from)
		}
	}
}

// close ends the goroutine and waits for it. Drops not begun are forgotten, so
// it is called when the mount is gone.
func (c *coherence) close() {
	c.mu.Lock()
	c.closed = true
	c.wake()
	c.mu.Unlock()
	<-c.done
}

// dropPages returns a function that drops a range of an inode from the page
// cache. The kernel may know nothing of the inode or the mount any more; then
// there is no page either.
func dropPages(inode *fusefs.Inode) func(off, n int64) {
	return func(off, n int64) { _ = inode.NotifyContent(off, n) }
}
