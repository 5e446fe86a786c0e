package snapshot_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A rule of the protocol, and a host that does not keep it.
type rule struct {
	name     string
	scenario string
	host     string
	lie      lie
	limit    cost  // of the schedules, one of which
	breaks   error // this promise
}

// rules returns all of them, in the order of the design.
func rules() []rule {
	const tombstones, pins, intents, outcomes = manifest.KindTombstones, manifest.KindPins, manifest.KindIntents, manifest.KindOutcomes
	return append(custodyRules(), []rule{
		{"commit: the parent's tombstone is looked for", "import", "importer", func(_ *stage, s blockstore.Store) blockstore.Store {
			return blind{s}
		}, cost{2, 0}, errLost},
		{"commit: after the intent", "import", "importer", func(st *stage, s blockstore.Store) blockstore.Store {
			return &hasty{Store: s, tombstone: manifest.TombstoneKey(st.id(5)), before: intents}
		}, cost{2, 0}, errLost},
		{"commit: then the own pin, and not from memory", "volume, forgotten", "vol-1", func(_ *stage, s blockstore.Store) blockstore.Store {
			return confident{s, true}
		}, cost{2, 0}, errLost},
		{"commit: the new root is pinned before its outcome", "volume, new root deleted", "vol-1", func(_ *stage, s blockstore.Store) blockstore.Store {
			return &tardy{Store: s}
		}, cost{1, 0}, errLost},
		{"commit: the old root is unpinned last", "volume", "vol-1", func(st *stage, s blockstore.Store) blockstore.Store {
			return leaving{s, manifest.PinKey(st.id(5), "vol-1")}
		}, cost{1, 0}, errLost},
		{"commit: outcomes are created once", "volume, reaped", "vol-1", func(_ *stage, s blockstore.Store) blockstore.Store {
			return unbound{s, outcomes}
		}, cost{1, 0}, errLost},
		{"commit: who comes second reads the outcome", "volume, reaped", "vol-1", func(_ *stage, s blockstore.Store) blockstore.Store {
			return credulous{s}
		}, cost{1, 0}, errVerdict},
		{"abort: outcomes are created once", "volume, reaped", "reaper", func(_ *stage, s blockstore.Store) blockstore.Store {
			return unbound{s, outcomes}
		}, cost{2, 0}, errLost},
		{"abort: who comes second reads the outcome", "volume", "vol-1", func(_ *stage, s blockstore.Store) blockstore.Store {
			return credulous{s}
		}, cost{0, 1}, errVerdict},
		{"abort: outcomes are never removed", "volume, reaped", "reaper", func(st *stage, s blockstore.Store) blockstore.Store {
			return erasing{s, manifest.RootKey(st.id(3)), manifest.OutcomeKey(st.id(3))}
		}, cost{1, 0}, errLost},
		{"set: its outcome is created once", "set, reaped", "coordinator", func(_ *stage, s blockstore.Store) blockstore.Store {
			return unbound{s, manifest.KindSets}
		}, cost{1, 0}, errHalf},
		{"set: and by who aborts it", "set, reaped", "reaper", func(_ *stage, s blockstore.Store) blockstore.Store {
			return unbound{s, manifest.KindSets}
		}, cost{1, 0}, errBroken},
		{"set: who comes second reads it", "set, reaped", "coordinator", func(_ *stage, s blockstore.Store) blockstore.Store {
			return credulous{s}
		}, cost{1, 0}, errVerdict},
		{"set: who aborts a member aborts it", "set, reaped", "reaper", func(_ *stage, s blockstore.Store) blockstore.Store {
			return selfish{s}
		}, cost{1, 0}, errHalf},
		{"set: a pending member is not deleted alone", "set, member deleted", "deleter of 3", func(_ *stage, s blockstore.Store) blockstore.Store {
			return selfish{s}
		}, cost{1, 0}, errHalf},
		{"set: nor given up alone", "set", "vol-1", func(_ *stage, s blockstore.Store) blockstore.Store {
			return selfish{s}
		}, cost{1, 1}, errBroken},
		{"set: its outcome comes before those of its members", "set", "coordinator", func(_ *stage, s blockstore.Store) blockstore.Store {
			return early{s}
		}, cost{0, 1}, errHalf},
		{"delete: a pending snapshot is aborted", "volume, new root deleted", "deleter of 3", func(_ *stage, s blockstore.Store) blockstore.Store {
			return burying{s}
		}, cost{3, 0}, errLost},
		{"delete: tombstones are never removed", "mount", "deleter of 5", func(st *stage, s blockstore.Store) blockstore.Store {
			return erasing{s, manifest.RootKey(st.id(5)), manifest.TombstoneKey(st.id(5))}
		}, cost{1, 0}, errLost},
		{"mount: the tombstone is looked for", "mount", "mounter", func(_ *stage, s blockstore.Store) blockstore.Store {
			return blind{s}
		}, cost{1, 0}, errLost},
		{"mount: after the pin", "mount", "mounter", func(st *stage, s blockstore.Store) blockstore.Store {
			return &hasty{Store: s, tombstone: manifest.TombstoneKey(st.id(5)), before: pins}
		}, cost{1, 0}, errLost},
		{"mount: and the pin is removed if there is one", "mount", "mounter", func(_ *stage, s blockstore.Store) blockstore.Store {
			return sparing{s, func(keys []string) bool { return isOf(pins, keys[0]) }}
		}, cost{1, 0}, errLeft},
		{"mount: a volume looks for its pin", "volume, returned", "vol-1", func(_ *stage, s blockstore.Store) blockstore.Store {
			return confident{s, true}
		}, cost{1, 0}, errLost},
		{"mount: which does not count before the tombstone was looked for", "volume, returned", "vol-1", func(_ *stage, s blockstore.Store) blockstore.Store {
			return confident{s, false}
		}, cost{0, 1}, errLost},
		{"read: a block that is not where it was is looked up", "mount, packs rewritten", "mounter", func(st *stage, s blockstore.Store) blockstore.Store {
			return &remembering{Store: s, packs: map[string][]byte{manifest.PackKey(st.id(5), 0): st.stored[manifest.PackKey(st.id(5), 0)]}}
		}, cost{1, 0}, errLost},
		{"read: each time", "mount, packs rewritten", "mounter", func(_ *stage, s blockstore.Store) blockstore.Store {
			return &remembering{Store: s, packs: make(map[string][]byte)}
		}, cost{1, 0}, errLost},
		{"reclaim: tombstones before pins", "mount, reclaimed", "reclaimer", func(_ *stage, s blockstore.Store) blockstore.Store {
			return &stale{Store: s, when: tombstones, kinds: []string{pins}}
		}, cost{2, 0}, errLost},
		{"reclaim: tombstones before intents", "import, reclaimed", "reclaimer", func(_ *stage, s blockstore.Store) blockstore.Store {
			return &stale{Store: s, when: tombstones, kinds: []string{intents, outcomes}}
		}, cost{2, 0}, errLost},
		{"reclaim: pins before outcomes", "volume, root deleted", "reclaimer", func(_ *stage, s blockstore.Store) blockstore.Store {
			return &stale{Store: s, when: pins, kinds: []string{intents, outcomes}}
		}, cost{1, 0}, errLost},
		{"reclaim: each to the last page", "volume", "deleter of 5", func(_ *stage, s blockstore.Store) blockstore.Store {
			return impatient{s, pins}
		}, cost{1, 0}, errLost},
		{"reclaim: parents of pending snapshots are roots", "import", "deleter of 5", func(_ *stage, s blockstore.Store) blockstore.Store {
			return orphaning{s}
		}, cost{1, 0}, errLost},
		{"reclaim: what is pending is not dead", "import, reclaimed", "reclaimer", func(_ *stage, s blockstore.Store) blockstore.Store {
			return presuming{s}
		}, cost{1, 0}, errLost},
		{"reclaim: a root that vanished is not empty", "volume, root swept", "reclaimer", func(_ *stage, s blockstore.Store) blockstore.Store {
			return &complacent{Store: s, shown: make(map[string][]blockstore.Info), gone: make(map[string]bool)}
		}, cost{1, 0}, errLost},
		{"reclaim: one that was swept is", "mount, parent deleted", "deleter of 5", func(_ *stage, s blockstore.Store) blockstore.Store {
			return unswept{s}
		}, cost{1, 0}, errFailed},
		{"reclaim: the root object goes first", "mount, parent deleted", "deleter of 6", func(_ *stage, s blockstore.Store) blockstore.Store {
			return sparing{s, func(keys []string) bool { return len(keys) == 1 && strings.HasSuffix(keys[0], "/root") }}
		}, cost{2, 0}, errFailed},
		{"reclaim: packs are rewritten only as they were read", "mount, parent deleted", "deleter of 5", func(_ *stage, s blockstore.Store) blockstore.Store {
			return unbound{s, manifest.KindData}
		}, cost{1, 0}, errLeft},
	}...)
}

// Whichever rule of the protocol one host breaks, there is a schedule that
// breaks a promise.
func TestEachRuleIsNeeded(t *testing.T) {
	collectLess(t)
	all := scenarios()
	for _, r := range rules() {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			i := slices.IndexFunc(all, func(sc *scenario) bool { return sc.name == r.scenario })
			e := all[i].explore(t)
			e.without(r)
			var f *failure
			bubble(t, func(ctx context.Context) { f = e.all(ctx, r.limit) })
			switch {
			case f == nil:
				t.Errorf("no promise is broken: %v", e)
			case !errors.Is(f.err, r.breaks):
				t.Errorf("broke another promise: %v", f)
			default:
				t.Logf("after %d schedules: %v, by%v", e.runs, f.err, f.plan)
			}
		})
	}
}

// without makes a host break a rule.
func (e *exploration) without(r rule) {
	cast := e.cast
	e.cast = func() []*host {
		hosts := cast()
		for _, h := range hosts {
			if h.name == r.host {
				h.lie = func(s blockstore.Store) blockstore.Store { return r.lie(e.stage, s) }
			}
		}
		return hosts
	}
	// What never changes may do so, if that is the rule.
	switch r.lie(e.stage, nil).(type) {
	case unbound, erasing:
		e.eager = false
	}
}
