package snapshot_test

import (
	"context"
	"testing"
	"time"
	"os"
	"runtime/debug"
)

func baseStage(t *testing.T) *stage {
	st := newStage(t)
	base := newDevice(6*testBlock).tiny(1, 0, 1, 2)
	st.commit(5, 0, base)
	st.expect(3, base.tiny(2, 1))
	st.expect(2, base.tiny(2, 1))
	st.expect(8, base.tiny(3, 4))
	st.expect(9, base.tiny(3, 4))
	return st
}
func parentStage(t *testing.T) *stage {
	st := baseStage(t)
	st.pin(5, "vol-1")
	return st.set()
}
func twoStage(t *testing.T) *stage {
	st := baseStage(t)
	st.pin(5, "vol-1")
	st.pin(5, "vol-2")
	return st.set()
}
func siblingStage(t *testing.T) *stage {
	st := baseStage(t)
	st.commit(6, 5, st.content[st.id(5)].tiny(5, 0))
	st.commit(7, 6, st.content[st.id(6)].tiny(6, 1))
	return st.set()
}
func chainStage(t *testing.T) *stage {
	st := baseStage(t)
	st.commit(4, 5, st.content[st.id(5)].tiny(5, 0))
	st.delete(st.id(5))
	st.pin(4, "vol-1")
	st.expect(3, st.content[st.id(4)].tiny(5, 1))
	return st.set()
}
func nextStage(t *testing.T) *stage {
	st := baseStage(t)
	st.pin(5, "vol-1")
	st.expect(8, st.content[st.id(3)].tiny(5, 2))
	return st.set()
}
func twoLeaves(t *testing.T) *stage {
	st := newStage(t)
	base := newDevice(leafBytes + 6*testBlock).tiny(1, 0, 1, 2)
	st.commit(5, 0, base)
	st.expect(3, base.tiny(2, 1026))
	st.expect(2, base.tiny(2, 1026))
	return st.set()
}

func unpinnedStage(t *testing.T) *stage { return baseStage(t).set() }

func host1(v *volume, h *host) *host { return h }
func returns(v *volume, h *host) *host { v.returns = true; return h }
func forgotten(v *volume, h *host) *host { v.forgotten = true; return h }
func twice2(v *volume, h *host) *host { v.snapshots = 2; return h }

func TestProto(t *testing.T) {
	t.Cleanup(func(old int) func() { return func() { debug.SetGCPercent(old) } }(debug.SetGCPercent(800)))
	for name, sc := range map[string]scenario{
		"volume+deleter": {parentStage, func(st *stage) []*host { return []*host{host1(st.volume("vol-1", 5, 3)), st.deleter(5)} }, []cost{{3, 0},{1,1}}},
		"importer+deleter": {unpinnedStage, func(st *stage) []*host { return []*host{st.importer(3, 5), st.deleter(5)} }, []cost{{4, 0},{1,1}}},
		"mounter+deleter": {unpinnedStage, func(st *stage) []*host { return []*host{st.mounter(5), st.deleter(5)} }, []cost{{4, 0},{2,1}}},
		"two volumes": {twoStage, func(st *stage) []*host { return []*host{host1(st.volume("vol-1", 5, 3)), host1(st.volume("vol-2", 5, 8)), st.deleter(5)} }, []cost{{2, 0},{0,1}}},
		"fresh": {parentStage, func(st *stage) []*host { return []*host{host1(st.volume("vol-1", 5, 3)), st.deleter(3)} }, []cost{{3, 0},{1,1}}},
		"reaper": {parentStage, func(st *stage) []*host { return []*host{host1(st.volume("vol-1", 5, 3)), st.reaper(), st.deleter(5)} }, []cost{{2, 0},{0,1}}},
		"reaped import": {unpinnedStage, func(st *stage) []*host { return []*host{st.importer(3, 5), st.reaper(), st.deleter(5)} }, []cost{{2, 0},{0,1}}},
		"two deleters": {siblingStage, func(st *stage) []*host { return []*host{st.mounter(6), st.deleter(5), st.deleter(5)} }, []cost{{2, 0},{0,1}}},
		"family": {siblingStage, func(st *stage) []*host { return []*host{st.mounter(7), st.deleter(5), st.deleter(6)} }, []cost{{2, 0},{0,1}, {1,1}}},
		"chain": {chainStage, func(st *stage) []*host { return []*host{host1(st.volume("vol-1", 4, 3)), st.reclaimer(), st.deleter(4)} }, []cost{{2, 0},{0,1}}},
		"next": {nextStage, func(st *stage) []*host { return []*host{twice2(st.volume("vol-1", 5, 3, 8)), st.deleter(3), st.deleter(5)} }, []cost{{2, 0},{0,1}}},
		"returns": {twoLeaves, func(st *stage) []*host { return []*host{returns(st.volume("vol-1", 5, 3, 2)), st.deleter(5)} }, []cost{{2, 0},{1,1}}},
		"forgotten": {parentStage, func(st *stage) []*host { return []*host{forgotten(st.volume("vol-1", 5, 3, 2)), st.deleter(5, "vol-1")} }, []cost{{3, 0},{1,1}}},
	} {
		st := sc.stage(t)
		if s := os.Getenv("SC"); s != "" && s != name { continue }
		for _, limit := range sc.limit {
			start := time.Now()
			bubble(t, func(ctx context.Context) {
				e := newExploration(name, st, func() []*host { return sc.cast(st) })
				if p, ok := replay(t, name); ok {
					f := e.run(ctx, func(_ *schedule, point int, _ []option) (i int) { i, p = p.take(point); return i })
					t.Log(f)
					return
				}
				f := e.all(ctx, limit)
				if f != nil {
					t.Error(f)
				}
				t.Logf("%s %v: %d runs, %d cut, %d ends, %d states", name, limit, e.runs, e.cut, len(e.ends), len(e.seen))
			})
			t.Log(time.Since(start))
		}
	}
}
