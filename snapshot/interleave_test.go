package snapshot_test

import (
	"context"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
)

// A scenario is what some hosts do to one lineage at the same time.
type scenario struct {
	name   string
	set    func(*stage)
	cast   func(*stage) []*host // afresh for each schedule
	limits []cost               // the schedules of which all are run
}

// scenarios returns all of them. Of the snapshots that are to be made, listings
// show 2 and 3 before those that are there, and 8 and 9 after.
func scenarios() []*scenario {
	return append(custodyScenarios(), []*scenario{
		{"volume", one("vol-1"), func(st *stage) []*host {
			return []*host{st.volume("vol-1", 5, 3), st.deleter(5)}
		}, []cost{{3, 0}, {1, 1}}},
		{"two volumes", one("vol-1", "vol-2"), func(st *stage) []*host {
			return []*host{st.volume("vol-1", 5, 3), st.volume("vol-2", 5, 8), st.deleter(5)}
		}, []cost{{1, 0}, {0, 1}}},
		{"volume twice", one("vol-1"), func(st *stage) []*host {
			return []*host{st.volume("vol-1", 5, 3, 8), st.deleter(5), st.deleter(3)}
		}, []cost{{1, 0}, {0, 1}}},
		{"volume, root deleted", rootDeleted, func(st *stage) []*host {
			return []*host{st.volume("vol-1", 5, 3), st.reclaimer()}
		}, []cost{{2, 0}, {1, 1}}},
		{"volume, root swept", chain, func(st *stage) []*host {
			return []*host{st.volume("vol-1", 6, 3), st.reclaimer(), st.deleter(6)}
		}, []cost{{1, 0}, {0, 1}}},
		{"volume, new root deleted", one("vol-1"), func(st *stage) []*host {
			return []*host{st.volume("vol-1", 5, 3), st.deleter(3)}
		}, []cost{{3, 0}, {1, 1}}},
		{"volume, reaped", one("vol-1"), func(st *stage) []*host {
			return []*host{st.volume("vol-1", 5, 3), st.reaper(), st.deleter(5)}
		}, []cost{{2, 0}, {0, 1}}},
		{"volume, forgotten", one("vol-1"), func(st *stage) []*host {
			return []*host{st.forgotten("vol-1", 5, 3, 2), st.deleter(5, "vol-1")}
		}, []cost{{2, 0}, {0, 1}}},
		{"volume, returned", wide, func(st *stage) []*host {
			return []*host{st.returned("vol-1", 5, 3, 2), st.deleter(5)}
		}, []cost{{2, 0}, {0, 1}}},
		{"import", one(), func(st *stage) []*host {
			return []*host{st.importer(3, 5), st.deleter(5)}
		}, []cost{{4, 0}, {1, 1}}},
		{"import, reclaimed", one(), func(st *stage) []*host {
			return []*host{st.importer(3, 5), st.deleter(5), st.reclaimer()}
		}, []cost{{2, 0}, {0, 1}}},
		{"import, reaped", one(), func(st *stage) []*host {
			return []*host{st.importer(3, 5), st.deleter(5), st.reaper()}
		}, []cost{{2, 0}, {0, 1}}},
		{"mount", one(), func(st *stage) []*host {
			return []*host{st.mounter(5), st.deleter(5)}
		}, []cost{{4, 0}, {2, 1}}},
		{"mount, reclaimed", one(), func(st *stage) []*host {
			return []*host{st.mounter(5), st.deleter(5), st.reclaimer()}
		}, []cost{{3, 0}, {1, 1}}},
		{"mount, parent deleted", two, func(st *stage) []*host {
			return []*host{st.mounter(6), st.deleter(5), st.deleter(6)}
		}, []cost{{2, 0}, {0, 1}}},
		{"mount, packs rewritten", three(), func(st *stage) []*host {
			return []*host{st.mounter(7), st.deleter(5), st.deleter(6)}
		}, []cost{{1, 0}, {0, 1}}},
		{"mount, deleted twice", three(), func(st *stage) []*host {
			return []*host{st.mounter(6), st.deleter(5), st.deleter(5)}
		}, []cost{{1, 0}, {0, 1}}},
		{"set", pair("vol-1", "vol-2"), func(st *stage) []*host {
			return st.together(st.restored("vol-1", 5, 3), st.restored("vol-2", 6, 8))
		}, []cost{{2, 0}, {0, 1}}},
		{"set, root deleted", pair("vol-1", "vol-2"), func(st *stage) []*host {
			return append(st.together(st.restored("vol-1", 5, 3), st.restored("vol-2", 6, 8)), st.deleter(5))
		}, []cost{{1, 0}}},
		{"set, member deleted", pair("vol-1", "vol-2"), func(st *stage) []*host {
			return append(st.together(st.restored("vol-1", 5, 3), st.restored("vol-2", 6, 8)), st.deleter(3))
		}, []cost{{1, 0}, {0, 1}}},
		{"set, reaped", pair("vol-1", "vol-2"), func(st *stage) []*host {
			return append(st.together(st.restored("vol-1", 5, 3), st.restored("vol-2", 6, 8)), st.reaper())
		}, []cost{{1, 0}, {0, 1}}},
		{"set, forgotten", pair("vol-1", "vol-2"), func(st *stage) []*host {
			return append(st.together(st.restored("vol-1", 5, 3, 2).aloof(), st.restored("vol-2", 6, 8)), st.deleter(5, "vol-1"))
		}, []cost{{1, 0}}},
		{"set of two lineages", apart, func(st *stage) []*host {
			return append(st.together(st.restored("vol-1", 5, 3), st.restored("vol-2", elsewhere+5, elsewhere+3)), st.deleter(3))
		}, []cost{{1, 0}, {0, 1}}},
		{"set of two lineages, reaped", apart, func(st *stage) []*host {
			return append(st.together(st.restored("vol-1", 5, 3), st.restored("vol-2", elsewhere+5, elsewhere+3)), st.reaper())
		}, []cost{{1, 0}}},
		{"all", all, func(st *stage) []*host { // too much for all schedules
			return []*host{
				st.volume("vol-1", 5, 3), st.volume("vol-2", 6, 8), st.importer(9, 6), st.mounter(7),
				st.deleter(5), st.deleter(6), st.deleter(3), st.reaper(),
			}
		}, nil},
	}...)
}

// The stages. What they begin with is snapshot 5, and volumes that were restored
// from it and pin it.

func one(volumes ...string) func(*stage) {
	return func(st *stage) {
		st.first(5, newDevice(4*testBlock).tiny(5, 0, 1))
		st.pin(5, volumes...)
	}
}

// pair has two first snapshots, and a volume of each.
func pair(volumes ...string) func(*stage) {
	return func(st *stage) {
		st.first(5, newDevice(2*testBlock).tiny(5, 0, 1))
		st.first(6, newDevice(2*testBlock).tiny(6, 0, 1))
		st.pin(5, volumes[0])
		st.pin(6, volumes[1])
	}
}

// apart has them in two lineages.
func apart(st *stage) {
	st.another()
	st.first(5, newDevice(2*testBlock).tiny(5, 0, 1))
	st.first(elsewhere+5, newDevice(2*testBlock).tiny(6, 0, 1))
	st.pin(5, "vol-1")
	st.pin(elsewhere+5, "vol-2")
}

// two has a child of 5.
func two(st *stage) {
	one()(st)
	st.next(6, 5, 0)
}

// three has a child and a grandchild, which need less and less of 5.
func three(volumes ...string) func(*stage) {
	return func(st *stage) {
		st.first(5, newDevice(4*testBlock).tiny(5, 0, 1, 2))
		st.next(6, 5, 0)
		st.next(7, 6, 1)
		st.pin(5, volumes...)
	}
}

// all has two volumes besides.
func all(st *stage) {
	three("vol-1")(st)
	st.pin(6, "vol-2")
}

// rootDeleted has a volume whose root was deleted.
func rootDeleted(st *stage) {
	one("vol-1")(st)
	st.delete(st.id(5))
}

// chain has a volume that was restored from the child of a snapshot that was
// deleted. What is made needs a block of that, and nothing of the child: neither
// blocks nor leaves nor sections.
func chain(st *stage) {
	st.changes = []int64{0, manifest.LeafBlocks}
	st.first(5, newDevice(leafBytes+testBlock).tiny(5, 0, 1, manifest.LeafBlocks))
	st.next(6, 5, 0)
	st.pin(6, "vol-1")
	st.delete(st.id(5))
}

// wide has two leaves. What is made changes the one that holds nothing yet, and
// so reads nothing of its parent.
func wide(st *stage) {
	st.changes = []int64{manifest.LeafBlocks}
	st.first(5, newDevice(leafBytes+testBlock).tiny(5, 0, 1))
}

// collectLess makes garbage be collected more rarely: each schedule makes some
// mebibytes of it, and nothing else.
func collectLess(t *testing.T) {
	old := debug.SetGCPercent(800)
	t.Cleanup(func() { debug.SetGCPercent(old) })
}

// stressed reports whether there are hours for the test.
func stressed() bool { return os.Getenv("LAZYVOL_STRESS") != "" }

// However the store calls of hosts interleave, no promise of the protocol is
// broken: with a few switches between them, each of which may lie anywhere, and
// a fault that may befall any call.
func TestAllSchedulesKeepThePromises(t *testing.T) {
	collectLess(t)
	for _, sc := range scenarios() {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			if plan, ok := planFromEnvironment(t, sc.name); ok {
				var f *failure
				bubble(t, func(ctx context.Context) { f = sc.explore(t).replay(ctx, plan) })
				t.Fatal(f)
			}
			for _, limit := range sc.limits {
				if stressed() {
					limit.switches++
				} else {
					limit.switches = max(0, limit.switches-thinner)
				}
				e := sc.explore(t)
				var f *failure
				bubble(t, func(ctx context.Context) { f = e.all(ctx, limit) })
				if f != nil {
					t.Fatal(f)
				}
				t.Logf("%d switches and %d faults: %v", limit.switches, limit.faults, e)
			}
		})
	}
}

// The same with any number of switches, and some faults, drawn at random.
func TestRandomSchedulesKeepThePromises(t *testing.T) {
	collectLess(t)
	seeds, first := uint64(randomSeeds), uint64(0)
	if stressed() {
		seeds, first = 20_000, rand.Uint64() // new ones each time; what fails is printed
	}
	for _, sc := range scenarios() {
		t.Run(sc.name, func(t *testing.T) {
			t.Parallel()
			e := sc.explore(t)
			var f *failure
			bubble(t, func(ctx context.Context) {
				for seed := first; seed < first+seeds && f == nil; seed++ {
					f = e.random(ctx, seed, int(seed%3))
				}
			})
			if f != nil {
				t.Fatal(f)
			}
			t.Log(e)
		})
	}
}

// explore sets the stage for many schedules. It may be told to run one only.
func (sc *scenario) explore(t *testing.T) *exploration {
	st := newStage(t, sc.set)
	return newExploration(sc.name, st, func() []*host { return sc.cast(st) })
}
