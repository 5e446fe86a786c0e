package snapshot_test

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

const (
	governance = manifest.LockGovernance
	compliance = manifest.LockCompliance

	oneDay = 24 * time.Hour
)

// locking is a snapshot and its lock, in a bubble.
type locking struct {
	*world
	id manifest.SnapshotID
}

func newLocking(t *testing.T) *locking {
	w := newWorld(t)
	return &locking{w, w.create(nil, nil, newDevice(testBlock).tiny(1, 0)).ID()}
}

// lock changes the lock, which is then in a state and expires after some time;
// or for a reason does not.
func (l *locking) lock(r snapshot.LockRequest, state string, expires time.Duration, refused error) {
	l.t.Helper()
	got, err := l.store.SetLock(l.ctx, l.id, r)
	if !errors.Is(err, refused) {
		l.t.Fatalf("lock %+v: %v, want %v", r, err, refused)
	}
	if err != nil {
		return
	}
	if got.State != state || time.Until(got.Expires).Round(time.Second) != expires {
		l.t.Errorf("lock %+v: %s for %v, want %s for %v", r, got.State, time.Until(got.Expires), state, expires)
	}
	l.held(state)
}

// held checks the state of the lock, and that a delete heeds it.
func (l *locking) held(state string) {
	l.t.Helper()
	d, err := l.store.Describe(l.ctx, l.id)
	if err != nil {
		l.t.Fatal(err)
	}
	if got := d.LockState(time.Now()).State; got != state {
		l.t.Errorf("the lock is %s, want %s", got, state)
	}
	if state == manifest.LockStateExpired {
		return
	}
	l.refusesDelete()
}

// refusesDelete checks that nothing deletes the snapshot, and nothing is left of the
// attempt.
func (l *locking) refusesDelete() {
	l.t.Helper()
	before := l.objects("")
	if err := l.store.Delete(l.ctx, l.id); !errors.Is(err, snapshot.ErrLocked) {
		l.t.Errorf("delete: %v", err)
	}
	if _, err := l.store.Retire(l.ctx, l.id, oneDay); !errors.Is(err, snapshot.ErrLocked) {
		l.t.Errorf("delete into the bin: %v", err)
	}
	l.reclaim()
	if after := l.objects(""); len(after) != len(before) {
		l.t.Errorf("refused deletes left %v of %v", after, before)
	}
}

func (l *locking) unlock(refused error) {
	l.t.Helper()
	if err := l.store.Unlock(l.ctx, l.id); !errors.Is(err, refused) {
		l.t.Errorf("unlock: %v, want %v", err, refused)
	}
}

func TestGovernanceCanBeChangedAndUnlocked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocking(t)
		l.unlock(snapshot.ErrNotLocked)
		l.lock(snapshot.LockRequest{Mode: governance, Days: 7}, manifest.LockStateGovernance, 7*oneDay, nil)
		l.lock(snapshot.LockRequest{Mode: governance, Days: 2}, manifest.LockStateGovernance, 2*oneDay, nil)
		l.lock(snapshot.LockRequest{Mode: governance, Until: time.Now().Add(3 * oneDay)}, manifest.LockStateGovernance, 3*oneDay, nil)
		l.unlock(nil)
		l.unlock(snapshot.ErrNotLocked)
		l.lock(snapshot.LockRequest{Mode: governance, Days: 1}, manifest.LockStateGovernance, oneDay, nil)
		time.Sleep(oneDay - time.Second)
		l.held(manifest.LockStateGovernance)
		time.Sleep(time.Second)
		l.held(manifest.LockStateExpired)
		l.unlock(snapshot.ErrNotLocked)
		l.lock(snapshot.LockRequest{Mode: compliance, Days: 1}, manifest.LockStateCompliance, oneDay, nil)
		time.Sleep(oneDay)
		l.delete(l.id)
	})
}

func TestComplianceCanOnlyBeExtendedAfterItsCoolOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocking(t)
		l.lock(snapshot.LockRequest{Mode: compliance, Days: 7, CoolOff: 2 * time.Hour}, manifest.LockStateCoolOff, 7*oneDay, nil)
		l.lock(snapshot.LockRequest{Mode: governance, Days: 7}, manifest.LockStateGovernance, 7*oneDay, nil)
		l.lock(snapshot.LockRequest{Mode: compliance, Days: 7, CoolOff: time.Hour}, manifest.LockStateCoolOff, 7*oneDay, nil)
		l.unlock(nil)
		l.lock(snapshot.LockRequest{Mode: compliance, Days: 7, CoolOff: time.Hour}, manifest.LockStateCoolOff, 7*oneDay, nil)
		l.lock(snapshot.LockRequest{Mode: compliance, Days: 3, CoolOff: time.Hour}, manifest.LockStateCoolOff, 3*oneDay, nil)
		time.Sleep(time.Hour)
		l.held(manifest.LockStateCompliance)
		l.unlock(snapshot.ErrLocked)
		l.lock(snapshot.LockRequest{Mode: compliance, Days: 2}, "", 0, snapshot.ErrLocked)
		l.lock(snapshot.LockRequest{Mode: governance, Days: 9}, "", 0, snapshot.ErrLocked)
		l.lock(snapshot.LockRequest{Mode: compliance, Days: 9, CoolOff: time.Hour}, "", 0, snapshot.ErrLocked)
		l.lock(snapshot.LockRequest{Mode: compliance, Until: time.Now().Add(oneDay)}, "", 0, snapshot.ErrLocked)
		l.held(manifest.LockStateCompliance)
		l.lock(snapshot.LockRequest{Mode: compliance, Days: 9}, manifest.LockStateCompliance, 9*oneDay, nil)
		time.Sleep(9 * oneDay)
		l.held(manifest.LockStateExpired)
		l.delete(l.id)
		l.lock(snapshot.LockRequest{Mode: governance, Days: 1}, "", 0, snapshot.ErrNotFound)
	})
}

func TestALockThatCannotBeIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocking(t)
		now := time.Now()
		for _, r := range []snapshot.LockRequest{
			{Days: 1}, {Mode: "strict", Days: 1}, {Mode: governance}, {Mode: governance, Days: -1}, {Mode: governance, Days: 36501},
			{Mode: governance, Days: 1, Until: now.Add(5 * oneDay)}, {Mode: governance, Until: now.Add(oneDay - time.Second)},
			{Mode: governance, Until: now.Add(36501 * oneDay)}, {Mode: governance, Days: 1, CoolOff: time.Hour},
			{Mode: compliance, Days: 1, CoolOff: time.Minute}, {Mode: compliance, Days: 1, CoolOff: 73 * time.Hour},
		} {
			l.lock(r, "", 0, snapshot.ErrLock)
		}
		l.wantNone("meta/")
		l.lock(snapshot.LockRequest{Mode: compliance, Days: 36500, CoolOff: 72 * time.Hour}, manifest.LockStateCoolOff, 36500*oneDay, nil)
	})
}

func TestALockOfAPendingSnapshotCountsFromItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLocking(t)
		d := newDevice(testBlock).tiny(2, 0)
		a := l.begin(l.plan(nil, d), nil, d)
		l.id = a.ID()
		got, err := l.store.SetLock(l.ctx, l.id, snapshot.LockRequest{Mode: compliance, Days: 2})
		if err != nil || got.State != manifest.LockStateCompliance || !got.Expires.IsZero() {
			t.Fatalf("%+v, %v", got, err)
		}
		l.lock(snapshot.LockRequest{Mode: compliance, Days: 1}, "", 0, snapshot.ErrLocked)
		l.lock(snapshot.LockRequest{Mode: compliance, Until: time.Now().Add(90 * oneDay)}, "", 0, snapshot.ErrLocked)
		time.Sleep(20 * time.Minute)
		l.held(manifest.LockStateCompliance)
		if _, err := a.Commit(l.ctx); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2*oneDay - time.Second)
		l.held(manifest.LockStateCompliance)
		time.Sleep(time.Second)
		l.held(manifest.LockStateExpired)
	})
}

// A lock that cannot be read is none that has expired.
func TestNothingIsDeletedWhoseLockCannotBeRead(t *testing.T) {
	l := newLocking(t)
	key := manifest.MetaKey(l.id)
	for _, damaged := range []string{"", "{", `{"version":77}`, `{"version":1,"lock":{"mode":"none"}}`} {
		l.overwrite(key, damaged)
		if err := l.store.Delete(l.ctx, l.id); !errors.Is(err, manifest.ErrCorrupt) && !errors.Is(err, manifest.ErrVersion) {
			t.Errorf("%q: %v", damaged, err)
		}
		if _, err := l.store.Reclaim(l.ctx, l.lineage); err == nil {
			t.Errorf("%q: nobody is told", damaged)
		}
		if !strings.Contains(damaged, "77") {
			l.mustHold(l.open(l.id), newDevice(testBlock).tiny(1, 0))
		}
	}
	if err := l.faults.Delete(l.ctx, key); err != nil {
		t.Fatal(err)
	}
	l.delete(l.id)
}

// Whichever request of a change fails, the next try makes it; and whichever reply
// is lost, the change is made, and told so.
func TestChangesOfMetaSurviveEachFault(t *testing.T) {
	change := map[string]func(*locking, *snapshot.Store) error{
		"lock": func(l *locking, s *snapshot.Store) error {
			_, err := s.SetLock(l.ctx, l.id, snapshot.LockRequest{Mode: compliance, Days: 1})
			return err
		},
		"unlock": func(l *locking, s *snapshot.Store) error { return s.Unlock(l.ctx, l.id) },
		"bin": func(l *locking, s *snapshot.Store) error {
			_, err := s.Retire(l.ctx, l.id, time.Hour)
			return err
		},
		"delete": func(l *locking, s *snapshot.Store) error { return s.Delete(l.ctx, l.id) },
		"share": func(l *locking, s *snapshot.Store) error {
			_, err := s.Share(l.ctx, l.id, []string{"all"}, nil)
			return err
		},
		"policy": func(l *locking, s *snapshot.Store) error {
			_, err := s.ChangePolicy(l.ctx, func(p *manifest.Policy) error {
				p.PublicAccess = manifest.PublicBlockNew
				return nil
			})
			return err
		},
		"restore": func(l *locking, s *snapshot.Store) error { return s.RestoreDeleted(l.ctx, l.id) },
	}
	for name, change := range change {
		for fault, f := range map[string]blockstoretest.Fault{"fails": {Err: blockstore.ErrDenied}, "loses its reply": {LoseReply: true}} {
			t.Run(name+", "+fault, func(t *testing.T) {
				t.Parallel()
				for n, hit := 0, true; hit; n++ {
					l := newLocking(t)
					var err error
					switch name {
					case "restore":
						_, err = l.store.Retire(l.ctx, l.id, time.Hour)
					case "unlock":
						_, err = l.store.SetLock(l.ctx, l.id, snapshot.LockRequest{Mode: governance, Days: 1})
					}
					if err != nil {
						t.Fatal(err)
					}
					l.faults.Reset()
					l.faults.Inject(blockstoretest.Rule{Skip: n, Times: 1}, f)
					s := snapshot.New(blockstore.Retry(l.faults, blockstore.RetryPolicy{Base: time.Microsecond}))
					err = change(l, s)
					hit = len(l.faults.Calls()) > n
					if f.Err != nil && hit {
						if !errors.Is(err, f.Err) {
							t.Errorf("request %d: %v", n, err)
						}
						err = change(l, s)
					}
					if f.Err != nil && (errors.Is(err, snapshot.ErrNotInBin) || errors.Is(err, snapshot.ErrNotLocked)) {
						_, err = l.store.Describe(l.ctx, l.id) // the first try made the change, and could not be sure
					}
					if err != nil {
						t.Errorf("request %d: %v", n, err)
					}
				}
			})
		}
	}
}
