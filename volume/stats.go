package volume

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// maxErrors is how many recent errors a device remembers for its status.
const maxErrors = 8

// counters are what a device counts of itself.
type counters struct {
	demandFetches atomic.Int64 // requests that reads caused
	fetchedBytes  atomic.Int64 // asked of the store, by reads and in the background
	hydrated      atomic.Int64 // bytes of the root's blocks that this host has

	mu     sync.Mutex // guards errors
	errors []Problem
}

// A Problem is something that went wrong, and when.
type Problem struct {
	Time    time.Time `json:"time"`
	Message string    `json:"message"`
}

// note remembers an error; one just like the last replaces it.
func (c *counters) note(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := Problem{Time: time.Now().UTC(), Message: err.Error()}
	c.errors = slices.DeleteFunc(c.errors, func(q Problem) bool { return q.Message == p.Message })
	if len(c.errors) == maxErrors {
		c.errors = slices.Delete(c.errors, 0, 1)
	}
	c.errors = append(c.errors, p)
}

// heal forgets the errors once the store answers again.
func (c *counters) heal() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.errors = nil
}

// Stats is a device's state at one moment. Sizes are in bytes.
type Stats struct {
	Root          string // the snapshot that cold blocks come from; "" if none
	Size          int64
	BlockSize     int
	TotalBytes    int64 // of the root's blocks that are not holes
	HydratedBytes int64 // of these, what this host has
	DirtyBytes    int64 // written since the last snapshot, on this host only
	DemandFetches int64
	FetchedBytes  int64
	Errors        []Problem
	Lost          error // not nil: the root cannot be trusted any more
}

// Stats returns the device's counters.
func (d *Device) Stats() Stats {
	v := d.view.acquire()
	defer v.release()
	s := Stats{
		Size: d.geometry.Size, BlockSize: d.geometry.BlockSize,
		DemandFetches: d.stats.demandFetches.Load(), FetchedBytes: d.stats.fetchedBytes.Load(),
		Lost: d.trusted(),
	}
	if v.image != nil {
		s.Root = v.image.ID().String()
		s.TotalBytes = v.image.Root.DataBlocks * int64(d.geometry.BlockSize)
		s.HydratedBytes = min(max(d.stats.hydrated.Load(), 0), s.TotalBytes)
	}
	if v.open != nil {
		s.DirtyBytes += v.open.DirtyBytes()
	}
	if v.sealed != nil {
		s.DirtyBytes += v.sealed.DirtyBytes()
	}
	d.stats.mu.Lock()
	defer d.stats.mu.Unlock()
	s.Errors = slices.Clone(d.stats.errors)
	return s
}

// recount counts anew what this host has of the root.
func (d *Device) recount() {
	blocks, err := d.countCached()
	if err != nil { // it only informs
		d.host.Log.Warn("could not count what is cached", "device", d.name, "error", err)
	}
	d.stats.hydrated.Store(blocks * int64(d.geometry.BlockSize))
}

func (d *Device) countCached() (int64, error) {
	blocks := int64(0)
	if d.base != nil {
		n, err := d.base.CountPresent()
		if err != nil {
			return 0, err
		}
		blocks = n
	}
	if d.writes == nil {
		return blocks, nil
	}
	n, err := d.writes.countDiverged(d.base)
	return blocks + n, err
}
