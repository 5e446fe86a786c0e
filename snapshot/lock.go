package snapshot

import (
	"context"
	"fmt"
	"time"

	"github.com/lazyvol/lazyvol/manifest"
)

// A LockState is the lock of a snapshot, as it is at some time.
type LockState struct {
	manifest.Lock
	State   string    // one of manifest.LockState…
	Expires time.Time // zero: not known while the snapshot is pending
}

// LockState returns the snapshot's lock as it is at a time of the store's; nil:
// it has none.
func (d Description) LockState(now time.Time) *LockState {
	if d.Lock == nil {
		return nil
	}
	return lockState(*d.Lock, d.End, now)
}

func lockState(l manifest.Lock, ended, now time.Time) *LockState {
	return &LockState{Lock: l, State: l.State(ended, now), Expires: l.Expires(ended)}
}

// refuse is the error of an operation that the lock forbids.
func (l *LockState) refuse(id manifest.SnapshotID) error {
	until := "with no end while it is pending"
	if !l.Expires.IsZero() {
		until = "until " + l.Expires.Format(timeFormat)
	}
	return fmt.Errorf("%w: %s, in state %s, %s", ErrLocked, id, l.State, until)
}

// A LockRequest is how a snapshot is to be locked, by EBS's rules.
type LockRequest struct {
	Mode    string        // manifest.LockGovernance or manifest.LockCompliance
	Days    int           // 1 to manifest.MaxLockDays, from now, or of a pending snapshot from its end on; or
	Until   time.Time     // at least a day and at most manifest.MaxLockDays from now
	CoolOff time.Duration // compliance: for which the lock can be undone, an hour to manifest.MaxCoolOffHours; 0: it takes hold at once
}

const day = 24 * time.Hour

// lock returns the lock that is asked for.
func (r LockRequest) lock(now time.Time, pending bool) (manifest.Lock, error) {
	l := manifest.Lock{Mode: r.Mode, Created: now, Until: r.Until.UTC()}
	switch {
	case r.Mode != manifest.LockGovernance && r.Mode != manifest.LockCompliance:
		return l, fmt.Errorf("%w: mode %q is neither %s nor %s", ErrLock, r.Mode, manifest.LockGovernance, manifest.LockCompliance)
	case (r.Days == 0) == r.Until.IsZero():
		return l, fmt.Errorf("%w: give either a number of days or a date", ErrLock)
	case r.Until.IsZero() && (r.Days < 1 || r.Days > manifest.MaxLockDays):
		return l, fmt.Errorf("%w: %d days; it lasts 1 to %d", ErrLock, r.Days, manifest.MaxLockDays)
	case !r.Until.IsZero() && (r.Until.Before(now.Add(day)) || r.Until.After(now.Add(manifest.MaxLockDays*day))):
		return l, fmt.Errorf("%w: %s is not 1 to %d days from now", ErrLock, r.Until.Format(timeFormat), manifest.MaxLockDays)
	case r.CoolOff != 0 && r.Mode != manifest.LockCompliance:
		return l, fmt.Errorf("%w: only %s has a cool-off period", ErrLock, manifest.LockCompliance)
	case r.CoolOff != 0 && (r.CoolOff < time.Hour || r.CoolOff > manifest.MaxCoolOffHours*time.Hour):
		return l, fmt.Errorf("%w: a cool-off period of %s; it lasts 1 to %d hours", ErrLock, r.CoolOff, manifest.MaxCoolOffHours)
	}
	switch {
	case !r.Until.IsZero():
	case pending:
		l.Days, l.Until = r.Days, time.Time{}
	default:
		l.Until = now.Add(time.Duration(r.Days) * day)
	}
	if r.CoolOff > 0 {
		l.CoolOff = now.Add(r.CoolOff)
	}
	return l, nil
}

// change returns the lock after the request, or why that may not be. A lock in
// compliance mode whose cool-off is over can only be extended.
func (r LockRequest) change(old *manifest.Lock, d Description, now time.Time) (*manifest.Lock, error) {
	wanted, err := r.lock(now, d.State == Pending)
	if err != nil || old == nil {
		return &wanted, err
	}
	held := lockState(*old, d.End, now)
	switch held.State {
	case manifest.LockStateExpired:
		return &wanted, nil
	case manifest.LockStateGovernance, manifest.LockStateCoolOff:
		wanted.Created = old.Created
		return &wanted, nil
	}
	expires := wanted.Expires(d.End)
	var shorter bool
	switch {
	case wanted.Days > 0 && old.Days > 0: // of a pending one
		shorter = wanted.Days < old.Days
	case held.Expires.IsZero() || expires.IsZero(): // a date and a number of days that do not count yet
		return nil, fmt.Errorf("%w; while it is pending, extend it in the way it was locked", held.refuse(d.ID))
	default:
		shorter = expires.Before(held.Expires)
	}
	switch {
	case r.CoolOff != 0:
		return nil, fmt.Errorf("%w: its cool-off period is over, and there is no other", held.refuse(d.ID))
	case r.Mode != manifest.LockCompliance, shorter:
		return nil, fmt.Errorf("%w: it can only be extended", held.refuse(d.ID))
	}
	wanted.Created, wanted.CoolOff = old.Created, old.CoolOff
	return &wanted, nil
}

// SetLock locks a snapshot, or changes its lock: from then on no lazyvol deletes
// it before the lock expires. One that is pending can be locked too. ErrLocked:
// the lock there is does not allow the change.
//
// When it returns, the lock stands, durably, and nobody deleted the snapshot
// before: of a lock and a delete at the same time, one is refused.
func (s *Store) SetLock(ctx context.Context, id manifest.SnapshotID, r LockRequest) (*LockState, error) {
	state, err := s.changeLock(ctx, id, func(old *manifest.Lock, d Description, now time.Time) (*manifest.Lock, error) {
		return r.change(old, d, now)
	})
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", id, err)
	}
	return state, nil
}

// Unlock takes a snapshot's lock away. ErrLocked: the lock does not allow it.
// ErrNotLocked: there is none, or it has expired.
func (s *Store) Unlock(ctx context.Context, id manifest.SnapshotID) error {
	tried := false
	_, err := s.changeLock(ctx, id, func(old *manifest.Lock, d Description, now time.Time) (*manifest.Lock, error) {
		switch {
		case old == nil && tried: // perhaps by ourselves, and the reply was lost
			return nil, nil
		case old == nil:
			return nil, fmt.Errorf("%w: %s", ErrNotLocked, id)
		}
		switch held := lockState(*old, d.End, now); held.State {
		case manifest.LockStateExpired:
			return nil, fmt.Errorf("%w any more: %s, since %s", ErrNotLocked, id, held.Expires.Format(timeFormat))
		case manifest.LockStateCompliance:
			return nil, fmt.Errorf("%w: nobody can unlock it before", held.refuse(id))
		}
		tried = true
		return nil, nil
	})
	if err != nil {
		return fmt.Errorf("unlock %s: %w", id, err)
	}
	return nil
}

// changeLock changes a snapshot's lock, and returns it.
func (s *Store) changeLock(ctx context.Context, id manifest.SnapshotID, change func(*manifest.Lock, Description, time.Time) (*manifest.Lock, error)) (*LockState, error) {
	d, err := s.existing(ctx, id)
	if err != nil {
		return nil, err
	}
	now, err := s.Now(ctx)
	if err != nil {
		return nil, err
	}
	var lock *manifest.Lock
	err = s.changeMeta(ctx, d, func(m *manifest.Meta) (err error) {
		if err := checkBin(id, m); err != nil {
			return err
		}
		lock, err = change(m.Lock, d, now)
		m.Lock = lock
		return err
	})
	if err != nil {
		return nil, err
	}
	// Rule: the lock first, then the tombstone. Whoever deletes swaps that into
	// meta first, where either the swap or the lock is refused. But when all is
	// deleted a reclaim removes meta, and the lock was put on nothing: the
	// tombstone came before that, and stays.
	if _, err := s.existing(ctx, id); err != nil || lock == nil {
		return nil, err
	}
	return lockState(*lock, d.End, now), nil
}
