package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// verifier returns a host that checks the store, in which nothing is damaged.
func (st *stage) verifier() *host {
	return newHost("verifier", func(ctx context.Context, h *host, s *snapshot.Store) error {
		report, err := s.Check(ctx, snapshot.Check{Share: 1})
		if err != nil {
			return h.excuse(errFailed, err)
		}
		for _, f := range report.Findings {
			return fmt.Errorf("%w: a false alarm: %w", errVerdict, f)
		}
		if len(report.StrangeKeys) > 0 {
			return fmt.Errorf("%w: said to be strange: %v", errVerdict, report.StrangeKeys)
		}
		return nil
	})
}

// repairer returns a host that repairs the store from what it has.
func (st *stage) repairer(has chest) *host {
	h := newHost("repairer", func(ctx context.Context, h *host, s *snapshot.Store) error {
		_, err := s.Repair(ctx, snapshot.Repair{From: has, Pin: func(ctx context.Context, id manifest.SnapshotID) (func(), error) {
			err := s.Pin(ctx, id, snapshot.Holder{ID: "mount-9"})
			return func() { _ = s.Unpin(ctx, id, "mount-9") }, err // a pin that stays harms nobody here
		}})
		return h.excuse(errFailed, err)
	})
	h.lie = func(s blockstore.Store) blockstore.Store { return &watching{Store: s, host: h} }
	return h
}

// watching breaks a promise when an object of a swept snapshot is made anew.
type watching struct {
	blockstore.Store
	host *host
}

func (s *watching) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	etag, err := s.Store.Put(ctx, key, data, c)
	// What is there may be replaced: others need it.
	if _, owner, found := bytes.Cut([]byte(key), []byte("data/")); err == nil && found && c.Absent() {
		id, idErr := manifest.ParseSnapshotID(string(owner[:len("snap-")+17]))
		root := s.host.written[manifest.RootKey(id)]
		if idErr != nil || root.digest == 0 {
			s.host.broken = errors.Join(fmt.Errorf("%w: %s, which a repair brought back", errLeft, key), idErr)
		}
	}
	return etag, err
}

// tolerant returns a host that deletes and reclaims as deleter does, and may find
// what it is to rewrite damaged.
func (st *stage) tolerant(serial uint64) *host {
	return newHost(fmt.Sprint("deleter of ", serial), func(ctx context.Context, h *host, s *snapshot.Store) error {
		if err := s.Delete(ctx, st.id(serial)); err != nil {
			return h.excuse(errFailed, err)
		}
		h.told[st.id(serial)] = deleted
		_, err := s.Reclaim(ctx, st.lineage)
		if errors.Is(err, manifest.ErrCorrupt) {
			return nil
		}
		return h.excuse(errFailed, err)
	})
}

// damaged sets a stage, and then damages one pack, or removes it.
func damaged(has chest, set func(*stage), owner uint64, change func([]byte) []byte) func(*stage) {
	return func(st *stage) {
		set(st)
		for id, root := range st.roots {
			st.collect(has, imageOf(st.store, root), st.content[id])
		}
		key := manifest.PackKey(st.id(owner), 0)
		data, _, err := st.faults.Get(st.ctx, key, blockstore.MaxPackSize)
		if err == nil && change == nil {
			err = st.faults.Delete(st.ctx, key)
		} else if err == nil {
			st.overwrite(key, string(change(data)))
		}
		if err != nil {
			st.t.Fatal(err)
		}
	}
}

// However a check or a repair interleaves with deletes, reclaims and commits: a
// check raises no false alarm, and a repair loses nothing, brings nothing back,
// and repairs.
func TestSchedulesOfChecksAndRepairs(t *testing.T) {
	collectLess(t)
	last := func(data []byte) []byte {
		data[len(data)-1] ^= 1
		return data
	}
	table := func(data []byte) []byte {
		data[40] ^= 1
		return data
	}
	has := make(chest)
	for _, sc := range []*scenario{
		{"check, deleted", two, func(st *stage) []*host { return []*host{st.verifier(), st.deleter(5)} }, nil},
		{"check, child deleted", two, func(st *stage) []*host { return []*host{st.verifier(), st.deleter(6), st.deleter(5)} }, nil},
		{"check, mounted", one(), func(st *stage) []*host { return []*host{st.verifier(), st.mounter(5), st.deleter(5)} }, nil},
		{"check, volume", one("vol-1"), func(st *stage) []*host { return []*host{st.verifier(), st.volume("vol-1", 5, 3), st.deleter(5)} }, nil},
		{"check, root swept", chain, func(st *stage) []*host { return []*host{st.verifier(), st.reclaimer(), st.deleter(6)} }, nil},
		{"repair of a slot, owner deleted", damaged(has, two, 5, last), func(st *stage) []*host {
			return []*host{st.repairer(has), st.tolerant(5)}
		}, nil},
		{"repair of a table, owner deleted", damaged(has, two, 5, table), func(st *stage) []*host {
			return []*host{st.repairer(has), st.tolerant(5)}
		}, nil},
		{"repair of a missing pack, owner deleted", damaged(has, one(), 5, nil), func(st *stage) []*host {
			return []*host{st.repairer(has), st.tolerant(5)}
		}, nil},
		{"repair of a child's missing pack, both deleted", damaged(has, two, 6, nil), func(st *stage) []*host {
			return []*host{st.repairer(has), st.tolerant(6), st.tolerant(5)}
		}, nil},
		{"two repairs", damaged(has, two, 5, table), func(st *stage) []*host {
			second := st.repairer(has)
			second.name = "second repairer"
			return []*host{st.repairer(has), second, st.tolerant(5)}
		}, nil},
	} {
		t.Run(sc.name, func(t *testing.T) {
			if plan, ok := planFromEnvironment(t, sc.name); ok {
				var f *failure
				e := sc.explore(t)
				bubble(t, func(ctx context.Context) { f = e.replay(ctx, plan) })
				t.Fatal(f)
			}
			limit, seeds := cost{switches: 1}, uint64(20)
			if stressed() {
				limit, seeds = cost{switches: 2}, 5000
			}
			e := sc.explore(t)
			var f *failure
			bubble(t, func(ctx context.Context) {
				f = e.all(ctx, limit)
				for seed := uint64(0); seed < seeds && f == nil; seed++ {
					f = e.random(ctx, seed, 0)
				}
			})
			if f != nil {
				t.Fatal(f)
			}
			t.Log(e)
		})
	}
}
