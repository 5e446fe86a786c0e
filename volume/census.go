package volume

import (
	"context"
	"iter"
	"sync"
	"time"
)

const (
	// censusPatience is how long Stats waits for a count: long enough for some
	// 300 GiB of cached blocks.
	censusPatience = 100 * time.Millisecond

	// censusShare bounds the time spent on counting, when somebody watches: a
	// pause is so many times as long as the count before it, which on a busy
	// machine may have taken long for a small device. Counts of less than
	// censusQuick need no pause.
	censusShare = 10
	censusQuick = time.Millisecond
)

// A census is how many of the root's blocks this host has. It is counted anew
// from the clean layers' maps, as other processes that share the base fill it
// too; in the background, as that takes ten seconds for 16 TiB.
type census struct {
	mu     sync.Mutex // guards the fields below
	blocks int64
	due    time.Time     // of the next count
	stale  bool          // the one under way began too early
	done   chan struct{} // closed when the one under way has ended; nil if none is
}

// hydratedBlocks returns the count of now, or of an earlier moment if counting
// takes long.
func (d *Device) hydratedBlocks() int64 {
	if done := d.beginCensus(); done != nil {
		patience := time.NewTimer(censusPatience)
		defer patience.Stop()
		select {
		case <-done:
		case <-patience.C:
		}
	}
	d.census.mu.Lock()
	defer d.census.mu.Unlock()
	return d.census.blocks
}

// beginCensus begins a count if it is time, and returns when the one under way
// will be done, nil if there is none.
func (d *Device) beginCensus() <-chan struct{} {
	c := &d.census
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done != nil || time.Now().Before(c.due) {
		return c.done
	}
	done := make(chan struct{})
	c.stale = false
	if d.work.start(func(ctx context.Context) { d.takeCensus(ctx, done) }) {
		c.done = done
	}
	return c.done
}

func (d *Device) takeCensus(ctx context.Context, done chan<- struct{}) {
	defer close(done)
	begin := time.Now()
	blocks, err := d.countHydrated(ctx)
	if err != nil && ctx.Err() == nil { // it only informs
		d.host.Log.Warn("could not count what is cached", "device", d.name, "error", err)
	}
	c := &d.census
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done = nil
	if took := time.Since(begin); took > censusQuick && !c.stale {
		c.due = time.Now().Add(censusShare * took)
	}
	if err == nil {
		c.blocks = blocks
	}
}

// countHydrated counts the blocks that reads find in the base, and those that
// they find in the volume's own clean layer.
func (d *Device) countHydrated(ctx context.Context) (int64, error) {
	blocks := int64(0)
	count := func(present iter.Seq2[int64, error], own bool) error {
		for block, err := range present {
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				return err
			}
			if layer, _ := d.place(block); own == (d.writes != nil && layer == d.writes.clean) {
				blocks++
			}
		}
		return nil
	}
	if d.base != nil {
		if err := count(d.base.Present(), false); err != nil {
			return 0, err
		}
	}
	if d.writes == nil {
		return blocks, nil
	}
	return blocks, count(d.writes.clean.Present(), true)
}

// Recount makes the next Stats count anew what this host has of the root.
func (d *Device) Recount() {
	d.census.mu.Lock()
	defer d.census.mu.Unlock()
	d.census.due, d.census.stale = time.Time{}, true
}
