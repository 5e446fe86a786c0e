package snapshot

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

const (
	// eventLateness is for how long an event may appear among those with greater
	// keys: S3 refuses hosts whose clocks are off by more than 15 minutes, which
	// makes 30 between two, and one has taken a while to be written.
	eventLateness = 31 * time.Minute

	// maxSeenEvents bounds what a follower remembers: some 8 MiB.
	maxSeenEvents = 1 << 16
)

// An EventFollower hands over each event of a store once, as they appear. Events
// are keyed by the clocks of the hosts that wrote them, and a clock may be behind:
// so it looks at the keys of the last half hour again, and remembers which of
// them it has handed over. It is for one goroutine.
type EventFollower struct {
	store *Store
	floor string          // keys up to this one were handed over, or are not waited for any more
	seen  map[string]bool // keys above the floor that were handed over
}

// FollowEvents returns a follower of the events from a time on.
func (s *Store) FollowEvents(since time.Time) *EventFollower {
	return &EventFollower{store: s, floor: manifest.EventKeysFrom(since), seen: make(map[string]bool)}
}

// FollowNewEvents returns a follower of the events that appear from now on,
// whatever their times.
func (s *Store) FollowNewEvents(ctx context.Context) (*EventFollower, error) {
	f := s.FollowEvents(time.Now().Add(-eventLateness))
	err := s.listEvents(ctx, f.floor, func(info blockstore.Info) error {
		f.seen[info.Key] = true
		f.bound()
		return nil
	})
	return f, err
}

// Poll hands over the events that appeared since the last Poll, in the order of
// their keys. After an error the next one goes on where this one stopped.
func (f *EventFollower) Poll(ctx context.Context, handle HandleEvent) error {
	horizon := manifest.EventKeysFrom(time.Now().Add(-eventLateness))
	err := f.store.eventsAfter(ctx, f.floor, f.seen, func(key string, e Event, damaged error) error {
		if !errors.Is(damaged, blockstore.ErrNotExist) { // else it was removed meanwhile
			if err := handle(e, damaged); err != nil {
				return err
			}
		}
		f.handed(key, horizon)
		return nil
	})
	if err == nil {
		f.raise(max(f.floor, horizon))
	}
	return err
}

// handed notes that an event was handed over: in the order of keys, so that
// nothing older than the horizon is still to come below it.
func (f *EventFollower) handed(key, horizon string) {
	if key < horizon {
		f.floor = key
		return
	}
	f.seen[key] = true
	f.bound()
}

// raise raises the floor and forgets what is below it.
func (f *EventFollower) raise(floor string) {
	f.floor = floor
	maps.DeleteFunc(f.seen, func(key string, _ bool) bool { return key <= floor })
}

// bound forgets the older half when there is too much to remember: what appears
// among those is lost, rather than handed over twice.
func (f *EventFollower) bound() {
	if len(f.seen) <= maxSeenEvents {
		return
	}
	keys := slices.Sorted(maps.Keys(f.seen))
	f.raise(keys[len(keys)/2])
}
