package volume

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// holdLimit is for how long a volume's writers are held, at most: then whoever
// holds them is taken for dead. A set is cut in some milliseconds.
const holdLimit = time.Second

// ErrResumed: a volume's writers went on by themselves, so that what is cut of it
// is of another moment than the rest of its set.
var ErrResumed = errors.New("its writers were held for too long and went on")

// errOrder: a member was told to do something before, or instead of, something else.
var errOrder = errors.New("a member of a set was told to do things in another order")

// A Member is a volume's part in a set: snapshots of several volumes that are cut
// at one moment, and are all committed or none. Whoever makes the set calls, of
// each member, Ready; when all are ready, Hold; when all are held, Cut; when all
// are cut, Release; then Upload; and when all are uploaded, commits the set in the
// store. Whatever failed, the last call is Finish. The calls come one after the
// other; reads go on meanwhile, and writes but between Hold and Release.
//
// Rule: nobody is cut before all are held, and nobody released before all are cut.
// A write that was made because another one, to another member, had been
// acknowledged is then in the set only with that one.
type Member struct {
	v   *Volume
	set manifest.SetID

	ready    bool // v.making is held
	sealed   bool // by Cut, and not uploaded
	next     *cache.WriteLayer
	geometry manifest.Geometry // at the cut; v.sizing is held while there is next

	keeping sync.WaitGroup     // of who keeps the attempt alive
	stop    context.CancelFunc // of that; nil: nobody does

	mu      sync.Mutex // guards the fields below
	held    bool       // fill and writes.cut of the volume are held
	since   time.Time
	stopped time.Duration // for how long they were
	limit   *time.Timer
}

// Join takes the volume into a set, and changes nothing yet. ErrBusy: a snapshot
// of it is being made.
func (v *Volume) Join(set manifest.SetID) (*Member, error) {
	if !v.snapshotting.TryLock() {
		return nil, fmt.Errorf("%w: %s", ErrBusy, v.name)
	}
	return &Member{v: v, set: set}, nil
}

// Ready does what can be done before writers are held, and may take a while.
func (m *Member) Ready(ctx context.Context) error {
	if m.ready {
		return errOrder
	}
	v := m.v
	v.making.Lock() // waits for a Settle
	m.ready = true
	if v.closed {
		return errClosed
	}
	if _, err := v.settle(ctx); err != nil {
		return fmt.Errorf("%s: settle the attempt before: %w", v.name, err)
	}
	v.sizing.Lock()
	var err error
	if m.next, m.geometry, err = v.openNext(); err != nil {
		v.sizing.Unlock()
		return fmt.Errorf("%s: %w", v.name, err)
	}
	return nil
}

// Hold returns when no write is under way, and none begins: those that come wait
// until Release, or for a second.
func (m *Member) Hold() error {
	if m.next == nil || m.limit != nil {
		return errOrder
	}
	v := m.v
	v.fill.Lock()
	begin := time.Now()
	v.writes.cut.Lock()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.held, m.since = true, begin
	m.limit = time.AfterFunc(holdLimit-time.Since(begin), func() { m.resume() })
	return nil
}

// Cut makes what the volume holds now the content of its snapshot. ErrResumed.
func (m *Member) Cut() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.next == nil || m.limit == nil:
		return errOrder
	case !m.held:
		return fmt.Errorf("%w: %s", ErrResumed, m.v.name)
	}
	now := m.v.view.acquire()
	defer now.release()
	m.v.view.replace(newView(m.next, now.open, now.image))
	m.next, m.sealed = nil, true
	m.v.sizing.Unlock()
	return nil
}

// Release lets writers go on, and returns for how long they were held.
// ErrResumed: they did before.
func (m *Member) Release() (stopped time.Duration, err error) {
	if !m.resume() {
		return m.stopped, fmt.Errorf("%w: %s", ErrResumed, m.v.name)
	}
	return m.stopped, nil
}

// resume lets writers go on if they are held.
func (m *Member) resume() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.held {
		return false
	}
	m.limit.Stop()
	m.held, m.stopped = false, time.Since(m.since)
	m.v.writes.cut.Unlock()
	m.v.fill.Unlock()
	return true
}

// Upload puts the snapshot into the store, all but the outcome, which it returns:
// the set's is to list it. o.Cut is called as for Snapshot. Until Finish the
// snapshot stays pending.
func (m *Member) Upload(ctx context.Context, o SnapshotOptions) (manifest.Outcome, error) {
	if !m.sealed {
		return manifest.Outcome{}, errOrder
	}
	m.sealed = false
	told := o.Cut
	o.set = m.set
	o.Cut = func(attempt *snapshot.Attempt) {
		alive, stop := context.WithCancel(context.WithoutCancel(ctx))
		m.stop = stop
		m.keeping.Go(func() { attempt.KeepAlive(alive) })
		if told != nil {
			told(attempt)
		}
	}
	attempt, err := m.v.put(ctx, o, m.geometry, m.stopped)
	if err != nil {
		return manifest.Outcome{}, err
	}
	return attempt.Prepare(ctx)
}

// Finish ends the member: the store's outcome of the set decides whether the
// volume moves on to its snapshot, or takes its changes back. If there is none yet
// the set is aborted. It reports whether the snapshot is committed; an error says
// that the store could not be asked, and then the attempt is settled later.
func (m *Member) Finish(ctx context.Context) (committed bool, err error) {
	v := m.v
	defer v.snapshotting.Unlock()
	m.resume()
	if m.stop != nil {
		m.stop()
		m.keeping.Wait()
	}
	if !m.ready {
		return false, nil
	}
	defer v.making.Unlock()
	if v.closed {
		return false, nil
	}
	if m.next != nil { // on record, and never used
		v.tidied(m.next.Close())
		v.sizing.Unlock()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	outcome, err := v.settle(ctx)
	if outcome != nil {
		v.finishLater(*outcome, err)
		v.host.Log.Info("snapshot committed", "volume", v.name, "snapshot", outcome.Snapshot, "set", m.set)
		return true, nil
	}
	if err != nil {
		err = fmt.Errorf("%s: the changes are kept and the attempt will be settled later: %w", v.name, err)
	}
	return false, err
}
