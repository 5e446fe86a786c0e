package volume

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
)

// maxProblems is how many recent problems a device remembers for its status.
const maxProblems = 8

// counters are what a device counts of itself.
type counters struct {
	demandFetches atomic.Int64 // requests that reads caused
	fetchedBytes  atomic.Int64 // asked of the store, by reads and in the background

	mu       sync.Mutex // guards problems
	problems []Problem  // newest last
}

// A Problem is something that went wrong, and when last.
type Problem struct {
	Time    time.Time `json:"time"`
	Message string    `json:"message"`

	passing bool // over as soon as the store answers again
}

// note remembers a problem, and reports whether it is a new one.
func (c *counters) note(err error) bool {
	p := Problem{Time: time.Now().UTC(), Message: err.Error(), passing: isPassing(err)}
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
	return errors.Is(err, blockstore.ErrUnavailable) || errors.Is(err, errDeadline) || errors.Is(err, context.DeadlineExceeded)
}

// heal forgets what the store's answer, just now, shows to be over.
func (c *counters) heal() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.problems = slices.DeleteFunc(c.problems, func(p Problem) bool { return p.passing })
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
}

// Stats returns the device's counters. What is hydrated is counted for it,
// which takes at most a moment: of a device with hundreds of gigabytes cached
// it tells an earlier count.
func (d *Device) Stats() Stats {
	v := d.view.acquire()
	defer v.release()
	s := Stats{
		Size: d.geometry.Size, BlockSize: d.geometry.BlockSize, DirtyBytes: min(v.dirtyBytes(), d.geometry.Size),
		DemandFetches: d.stats.demandFetches.Load(), FetchedBytes: d.stats.fetchedBytes.Load(),
		Lost: d.trusted(),
	}
	if v.image != nil {
		s.Root = v.image.ID().String()
		s.TotalBytes = v.image.Root.DataBlocks * int64(d.geometry.BlockSize)
		s.HydratedBytes = min(d.hydratedBlocks()*int64(d.geometry.BlockSize), s.TotalBytes)
	}
	d.stats.mu.Lock()
	defer d.stats.mu.Unlock()
	s.Errors = slices.Clone(d.stats.problems)
	return s
}
