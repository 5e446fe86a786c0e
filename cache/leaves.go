package cache

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/dgraph-io/ristretto/v2"

	"github.com/lazyvol/lazyvol/manifest"
)

const (
	// leafOverhead is what a cached leaf costs beyond its encoding, in bytes: the
	// structs around it and ristretto's own entry.
	leafOverhead = 256

	// countersPerLeaf is how many access counters ristretto recommends for each
	// entry of a full cache.
	countersPerLeaf = 10

	// recentLeaves is the number of leaves kept besides ristretto, which may refuse
	// a new leaf in favour of proven ones: it is needed again at once, for its
	// other blocks. At most 1 MiB.
	recentLeaves = 16
)

// Leaves keeps decoded leaves of the index in memory, by their hash, and loads each
// one once when many ask for it at the same time. It is safe for concurrent use.
type Leaves struct {
	memory *ristretto.Cache[uint64, *cachedLeaf]
	recent [recentLeaves]atomic.Pointer[cachedLeaf] // by the hash's first byte

	// Loads run on this context and not on those of their callers.
	ctx  context.Context
	stop context.CancelFunc

	// mu guards:
	mu     sync.Mutex
	loads  map[manifest.Hash]*leafLoad
	closed bool

	running sync.WaitGroup // loads
}

type cachedLeaf struct {
	hash manifest.Hash
	leaf *manifest.Leaf
}

// A leafLoad is a load under way. leaf and err are set before done is closed.
type leafLoad struct {
	done chan struct{}
	leaf *manifest.Leaf
	err  error
}

// NewLeaves returns a cache of about maxBytes bytes, and 1 MiB more. Close must be
// called.
func NewLeaves(maxBytes int64) (*Leaves, error) {
	leafCost := int64(manifest.EncodedLeafLen(manifest.LeafBlocks) + leafOverhead)
	memory, err := ristretto.NewCache(&ristretto.Config[uint64, *cachedLeaf]{
		NumCounters:        countersPerLeaf * (maxBytes/leafCost + 1),
		MaxCost:            maxBytes,
		BufferItems:        64, // what ristretto recommends
		IgnoreInternalCost: true,
	})
	if err != nil {
		return nil, fmt.Errorf("leaf cache of %d bytes: %w", maxBytes, err)
	}
	l := &Leaves{memory: memory, loads: make(map[manifest.Hash]*leafLoad)}
	l.ctx, l.stop = context.WithCancel(context.Background())
	return l, nil
}

// Get returns the leaf with that hash, by load if it is not in memory. Callers that
// ask for the same leaf meanwhile share one load and its error, which is not kept.
// load gets a context that ends only with Close, so that a caller who gives up fails
// nobody else; it must verify the leaf, bound its own time, and not call Get. The
// leaf is shared: nobody may change it.
//
// The error is load's, or ctx's, or context.Canceled after Close.
func (l *Leaves) Get(ctx context.Context, hash manifest.Hash, load func(context.Context) (*manifest.Leaf, error)) (*manifest.Leaf, error) {
	if leaf, ok := l.Peek(hash); ok {
		return leaf, nil
	}
	flight, err := l.join(hash, load)
	if err != nil {
		return nil, err
	}
	select {
	case <-flight.done:
		return flight.leaf, flight.err
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for leaf %s: %w", hash, context.Cause(ctx))
	}
}

// Peek returns the leaf with that hash if it is in memory.
func (l *Leaves) Peek(hash manifest.Hash) (*manifest.Leaf, bool) {
	if c, ok := l.memory.Get(leafKey(hash)); ok && c.hash == hash {
		return c.leaf, true
	}
	if c := l.recent[hash[0]%recentLeaves].Load(); c != nil && c.hash == hash {
		return c.leaf, true
	}
	return nil, false
}

// join returns the load of that hash under way, or begins one.
func (l *Leaves) join(hash manifest.Hash, load func(context.Context) (*manifest.Leaf, error)) (*leafLoad, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, fmt.Errorf("load leaf %s: leaf cache is closed: %w", hash, context.Canceled)
	}
	if flight, ok := l.loads[hash]; ok {
		return flight, nil
	}
	flight := &leafLoad{done: make(chan struct{})}
	// A load may have ended between the caller's lookup and now.
	if leaf, ok := l.Peek(hash); ok {
		flight.leaf = leaf
		close(flight.done)
		return flight, nil
	}
	l.loads[hash] = flight
	l.running.Go(func() { l.run(hash, flight, load) })
	return flight, nil
}

func (l *Leaves) run(hash manifest.Hash, flight *leafLoad, load func(context.Context) (*manifest.Leaf, error)) {
	flight.leaf, flight.err = load(l.ctx)
	if flight.err == nil {
		l.keep(&cachedLeaf{hash: hash, leaf: flight.leaf})
	}
	l.mu.Lock()
	delete(l.loads, hash)
	l.mu.Unlock()
	close(flight.done)
}

func (l *Leaves) keep(c *cachedLeaf) {
	l.recent[c.hash[0]%recentLeaves].Store(c)
	cost := int64(manifest.EncodedLeafLen(c.leaf.Len()) + leafOverhead)
	l.memory.Set(leafKey(c.hash), c, cost) // may be refused
	// Leaves in ristretto's queue of 32,768 count towards no bound: let none wait.
	l.memory.Wait()
}

// Close cancels the loads under way, waits for them, and frees the memory. No Get
// may begin meanwhile; one that waits gets its load's error.
func (l *Leaves) Close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.stop()
	l.running.Wait()
	l.memory.Close()
}

// leafKey is ristretto's key of a leaf. Two leaves may share one, so the whole hash
// is compared on a hit.
func leafKey(hash manifest.Hash) uint64 { return binary.LittleEndian.Uint64(hash[:8]) }
