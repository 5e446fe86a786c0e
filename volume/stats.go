package volume

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
)

// maxProblems is how many recent problems a device remembers for its status.
const maxProblems = 8

// counters are what a device counts of itself.
type counters struct {
	demandFetches atomic.Int64 // requests that reads caused
	fetchedBytes  atomic.Int64 // asked of the store, by reads and in the background
	waits         waits

	mu       sync.Mutex // guards problems
	problems []Problem  // newest last
}

// A Problem is something that went wrong, and when last.
type Problem struct {
	Time    time.Time `json:"time"`
	Message string    `json:"message"`

	passing bool        // over as soon as the store answers again
	of      *blockError // over as soon as this block can be had; nil if it is about none
}

// A blockError is why one block could not be had.
type blockError struct {
	doing string
	block int64
	index bool // its leaf could not be read, so that nobody knows what it is
	err   error
}

func (e *blockError) Error() string { return fmt.Sprintf("%s block %d: %v", e.doing, e.block, e.err) }
func (e *blockError) Unwrap() error { return e.err }

// note remembers a problem, and reports whether it is a new one.
func (c *counters) note(err error) bool {
	p := Problem{Time: time.Now().UTC(), Message: err.Error(), passing: isPassing(err)}
	errors.As(err, &p.of)
	c.mu.Lock()
	defer c.mu.Unlock()
	before := len(c.problems)
	c.problems = slices.DeleteFunc(c.problems, func(q Problem) bool { return q.Message == p.Message })
	isNew := len(c.problems) == before
	if len(c.problems) == maxProblems {
		c.problems = slices.Delete(c.problems, 0, 1)
	}
	c.problems = append(c.problems, p)
	return isNew
}

func isPassing(err error) bool {
	for _, passing := range []error{
		blockstore.ErrUnavailable, blockstore.ErrDenied, blockstore.ErrNoStore, errDeadline, context.DeadlineExceeded,
	} {
		if errors.Is(err, passing) {
			return true
		}
	}
	return false
}

// heal forgets what is over, as a block that just came from the store shows.
func (c *counters) heal(block int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.problems = slices.DeleteFunc(c.problems, func(p Problem) bool { return p.passing || p.of != nil && p.of.block == block })
}

// Stats is a device's state at one moment. Sizes are in bytes.
type Stats struct {
	Root          string // the snapshot that cold blocks come from; "" if none
	Size          int64
	BlockSize     int
	TotalBytes    int64     // of the root's blocks that are not holes
	HydratedBytes int64     // of these, what this host has
	DirtyBytes    int64     // written or discarded since the last snapshot, on this host only
	DemandFetches int64     // requests that reads caused
	FetchedBytes  int64     // asked of the store, by reads and in the background
	Errors        []Problem // recent ones, oldest first
	Lost          error     // not nil: the root cannot be trusted any more

	// How long reads, and writes that have to read first, waited for the store.
	DemandWait    time.Duration // while at least one did: never more than has passed
	DemandWaits   int64         // how many did; those that still do are not counted
	DemandWaitSum time.Duration // of all of these
	DemandLatency DemandLatencies
}

// Stats returns the device's counters. What is hydrated is counted for it,
// which takes at most a moment: of a device with hundreds of gigabytes cached
// it tells an earlier count.
func (d *Device) Stats() Stats {
	v := d.view.acquire()
	defer v.release()
	s := Stats{
		Size: d.geometry.Size(), BlockSize: d.geometry.BlockSize, DirtyBytes: min(v.dirtyBytes(), d.geometry.Size()),
		DemandFetches: d.stats.demandFetches.Load(), FetchedBytes: d.stats.fetchedBytes.Load(),
		Lost: d.trusted(),
	}
	d.stats.waits.tell(&s)
	if v.image != nil {
		s.Root = v.image.ID().String()
		s.TotalBytes = v.image.Root.DataBlocks * int64(d.geometry.BlockSize)
		s.HydratedBytes = min(d.hydratedBlocks()*int64(d.geometry.BlockSize), s.TotalBytes)
	}
	s.Errors = slices.DeleteFunc(d.stats.recent(), func(p Problem) bool { return p.of != nil && d.overcome(v, p.of) })
	return s
}

// Cached returns what the device's root is, "" if none, and how much space its clean
// layers take, in bytes. If both are as before, or there is more, nothing was evicted
// that another one did not bring back.
func (d *Device) Cached() (root string, bytes int64) {
	v := d.view.acquire()
	defer v.release()
	if v.image != nil {
		root = v.image.ID().String()
	}
	for _, l := range d.shared {
		n, err := cache.CleanAllocated(d.host.FS, l.dir)
		if err != nil {
			return root, 0 // so that somebody looks what is there
		}
		bytes += n
	}
	return root, bytes
}

// Full returns why no more is cached in the background.
func (d *Device) Full() error { return fmt.Errorf("%w: %w", ErrFull, errNoRoom) }

// recent returns the problems that are remembered.
func (c *counters) recent() []Problem {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.problems)
}

// overcome reports whether this host has by now, whoever brought it, what a block
// could not be had for.
func (d *Device) overcome(v *view, e *blockError) bool {
	if layer, _ := d.place(e.block); layer != nil {
		if has, err := layer.Has(e.block); has && err == nil {
			return true
		}
	}
	if !e.index || v.image == nil {
		return false
	}
	leaf, ok := v.image.Root.Find(e.block / manifest.LeafBlocks)
	if ok {
		_, ok = d.localLeaf(leaf)
	}
	return ok
}
