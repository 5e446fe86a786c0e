package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// The hosts of scenarios in which a snapshot is kept from being deleted, or
// brought back.

// held is what those are told by whom a snapshot was locked or brought back.
const held = "held"

// custodyScenarios are those of locks and the recycle bin.
func custodyScenarios() []*scenario {
	return []*scenario{
		{"lock", one(), func(st *stage) []*host {
			return []*host{st.locker(5), st.deleter(5)}
		}, []cost{{4, 0}, {2, 1}}},
		{"lock, tagged", one(), func(st *stage) []*host {
			return []*host{st.locker(5), st.deleter(5), st.tagger(5)}
		}, []cost{{2, 0}, {1, 1}}},
		{"lock, deleted twice", one(), func(st *stage) []*host {
			return []*host{st.locker(5), st.deleter(5), st.deleter(5), st.reclaimer()}
		}, []cost{{1, 0}, {0, 1}}},
		{"lock, of a parent", two, func(st *stage) []*host {
			return []*host{st.locker(5), st.deleter(5), st.deleter(6)}
		}, []cost{{1, 0}, {0, 1}}},
		{"lock, pending", one("vol-1"), func(st *stage) []*host {
			return []*host{st.volume("vol-1", 5, 3), st.locker(3), st.deleter(3)}
		}, []cost{{1, 0}, {0, 1}}},
		{"bin", binned, func(st *stage) []*host {
			return []*host{st.restorer(5), st.emptier()}
		}, []cost{{4, 0}, {2, 1}}},
		{"bin, emptied twice", binned, func(st *stage) []*host {
			return []*host{st.restorer(5), st.emptier(), st.emptier(), st.mounter(5)}
		}, []cost{{1, 0}, {0, 1}}},
		{"bin, pinned", binnedRoot, func(st *stage) []*host {
			return []*host{st.volume("vol-1", 5, 3), st.emptier(), st.restorer(5)}
		}, []cost{{1, 0}, {0, 1}}},
		{"bin, entered and left", one(), func(st *stage) []*host {
			return []*host{st.binner(5), st.locker(5), st.reclaimer(), st.emptier()}
		}, []cost{{2, 0}, {0, 1}}},
	}
}

// retention is for how long a stage's snapshots go into the recycle bin.
const retention = time.Hour

// binned has its snapshot in the recycle bin.
func binned(st *stage) {
	one()(st)
	st.bin(5)
}

// binnedRoot has a volume besides, which was restored from it.
func binnedRoot(st *stage) {
	one("vol-1")(st)
	st.bin(5)
}

func (st *stage) bin(serial uint64) {
	st.t.Helper()
	if _, err := st.store.Retire(st.ctx, st.id(serial), retention); err != nil {
		st.t.Fatal(err)
	}
}

// locker returns a host that locks a snapshot.
func (st *stage) locker(serial uint64) *host {
	return newHost("locker", func(ctx context.Context, h *host, s *snapshot.Store) error {
		_, err := s.SetLock(ctx, st.id(serial), snapshot.LockRequest{Mode: manifest.LockGovernance, Days: 1})
		switch {
		case err == nil:
			h.told[st.id(serial)] = held
			return nil
		case errors.Is(err, snapshot.ErrNotFound), errors.Is(err, snapshot.ErrAborted):
			return nil
		}
		return h.excuse(errFailed, err)
	})
}

// tagger returns a host that tags a snapshot.
func (st *stage) tagger(serial uint64) *host {
	return newHost("tagger", func(ctx context.Context, h *host, s *snapshot.Store) error {
		err := s.SetTags(ctx, st.id(serial), map[string]string{"tagged": ""}, nil)
		if errors.Is(err, snapshot.ErrNotFound) {
			return nil
		}
		return h.excuse(errFailed, err)
	})
}

// binner returns a host that deletes a snapshot into the recycle bin.
func (st *stage) binner(serial uint64) *host {
	return newHost("binner", func(ctx context.Context, h *host, s *snapshot.Store) error {
		until, err := s.Retire(ctx, st.id(serial), retention)
		switch {
		case err == nil && until.IsZero():
			return fmt.Errorf("%w: %s was not binned", errVerdict, st.id(serial))
		case err == nil, errors.Is(err, snapshot.ErrNotFound), errors.Is(err, snapshot.ErrLocked):
			return nil
		}
		return h.excuse(errFailed, err)
	})
}

// restorer returns a host that brings a snapshot back from the recycle bin.
func (st *stage) restorer(serial uint64) *host {
	return newHost("restorer", func(ctx context.Context, h *host, s *snapshot.Store) error {
		err := s.RestoreDeleted(ctx, st.id(serial))
		switch {
		case err == nil:
			h.told[st.id(serial)] = held
			return nil
		case errors.Is(err, snapshot.ErrNotFound):
			return nil
		}
		return h.excuse(errFailed, err)
	})
}

// emptier returns a host that reclaims when the time of every snapshot in the
// recycle bin is over.
func (st *stage) emptier() *host {
	return newHost("emptier", func(ctx context.Context, h *host, s *snapshot.Store) error {
		return st.reclaim(ctx, h, snapshot.New(overdue{s.Objects()}))
	})
}

// overdue is a store whose clock is a century ahead.
type overdue struct{ blockstore.Store }

func (s overdue) List(ctx context.Context, prefix string, fn func(blockstore.Info) error) error {
	return s.Store.List(ctx, prefix, func(info blockstore.Info) error {
		info.Listed = info.Listed.AddDate(100, 0, 0)
		return fn(info)
	})
}

// forgetful takes each change of a meta for done, and does none.
type forgetful struct{ blockstore.Store }

func (s forgetful) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	if isOf(manifest.KindMeta, key) {
		return "forgotten", nil
	}
	return s.Store.Put(ctx, key, data, c)
}

// custodyRules are those by which of a delete and what keeps from it one wins.
func custodyRules() []rule {
	return []rule{
		{"delete: recorded in meta", "lock", "deleter of 5", func(_ *stage, s blockstore.Store) blockstore.Store {
			return forgetful{s}
		}, cost{1, 0}, errVerdict},
		{"delete: as that was read", "lock", "deleter of 5", func(_ *stage, s blockstore.Store) blockstore.Store {
			return unbound{s, manifest.KindMeta}
		}, cost{2, 0}, errVerdict},
		{"lock: in meta as that was read", "lock", "locker", func(_ *stage, s blockstore.Store) blockstore.Store {
			return unbound{s, manifest.KindMeta}
		}, cost{2, 0}, errVerdict},
		{"lock: the tombstone is looked for", "lock", "locker", func(_ *stage, s blockstore.Store) blockstore.Store {
			return blind{s}
		}, cost{2, 0}, errVerdict},
		{"lock: after that", "lock", "locker", func(st *stage, s blockstore.Store) blockstore.Store {
			return &hasty{Store: s, tombstone: manifest.TombstoneKey(st.id(5)), before: manifest.KindMeta, err: blockstore.ErrNotExist}
		}, cost{2, 0}, errVerdict},
		{"reclaim: the end in the bin is recorded in meta", "bin", "emptier", func(_ *stage, s blockstore.Store) blockstore.Store {
			return forgetful{s}
		}, cost{2, 0}, errVerdict},
		{"reclaim: as that was read", "bin", "emptier", func(_ *stage, s blockstore.Store) blockstore.Store {
			return unbound{s, manifest.KindMeta}
		}, cost{2, 0}, errVerdict},
		{"restore: the tombstone is looked for", "bin", "restorer", func(_ *stage, s blockstore.Store) blockstore.Store {
			return blind{s}
		}, cost{1, 0}, errFailed},
		{"restore: out of meta as that was read", "bin", "restorer", func(_ *stage, s blockstore.Store) blockstore.Store {
			return unbound{s, manifest.KindMeta}
		}, cost{2, 0}, errVerdict},
	}
}
