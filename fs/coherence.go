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
// kernels drop the range once more after the write, others do not.
//
// So while a handle for direct writing is open, a loop device's for instance,
// buffered opens bypass the cache, and the first one after it starts with an
// empty cache. What remains is a handle that caches already when the direct
// writer comes: then each direct write drops its range here.
//
// That is to be rare, as the kernel waits, uninterruptibly, for pages locked by
// reads that were not answered yet. It is left to a goroutine, since a handler
// that waited could keep those very reads from being received; and a daemon
// that is killed meanwhile, with a read unanswered, hangs until the connection
// is aborted (/sys/fs/fuse/connections). Until it has run, shortly after the
// write returned, a buffered reader that raced with the write may still see the
// old bytes, as it may on any filesystem where the two are mixed.
//
// What nobody writes needs none of this: a nil coherence always keeps the cache.
type coherence struct {
	drop func(off, n int64) // drops [off, off+n) from the page cache

	mu       sync.Mutex // guards what follows
	cached   int        // open handles that use the cache
	direct   int        // open handles for direct writing
	stale    bool       // a direct write was done while no handle used the cache
	from, to int64      // what drop is to be called with; empty if to is 0
	closed   bool

	work chan struct{} // capacity 1: there is something to do, or closed is set
	done chan struct{} // closed when run has returned
}

// caching says how a handle uses the page cache.
type caching uint8

const (
	bypass caching = iota // not at all
	renew                 // once it is emptied
	keep                  // as it is
)

func newCoherence(drop func(off, n int64)) *coherence {
	c := &coherence{drop: drop, work: make(chan struct{}, 1), done: make(chan struct{})}
	go c.run()
	return c
}

// openBuffered counts a handle opened without O_DIRECT and says how it may use
// the cache.
func (c *coherence) openBuffered() caching {
	if c == nil {
		return keep
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.direct > 0 {
		return bypass
	}
	c.cached++
	if c.stale {
		c.stale = false
		return renew
	}
	return keep
}

// releaseBuffered is called when the kernel will send no more requests for a
// handle that uses the cache: it is closed, unmapped, and its readahead has
// ended.
func (c *coherence) releaseBuffered() {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cached--
}

// openDirect counts a handle for direct writing, until releaseDirect.
func (c *coherence) openDirect() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.direct++
}

func (c *coherence) releaseDirect() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.direct--
}

// wroteDirect is called when the Device has done a write that bypassed the
// cache.
func (c *coherence) wroteDirect(off, n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cached == 0 {
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
	if c == nil {
		return
	}
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
