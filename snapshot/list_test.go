package snapshot_test

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// memRecords is a RecordCache in memory.
type memRecords struct {
	mu     sync.Mutex // guards the fields below
	stores map[string]map[string][]byte
	saves  int
}

func (m *memRecords) Load(store string) map[string][]byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.stores[store])
}

func (m *memRecords) Save(store string, records map[string][]byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.stores == nil {
		m.stores = make(map[string]map[string][]byte)
	}
	m.stores[store] = maps.Clone(records)
	m.saves++
}

// cachedStore returns the store as a host sees it that has a record cache.
func (w *world) cachedStore(c snapshot.RecordCache) *snapshot.Store {
	s := w.reopen()
	s.CacheRecords(c)
	return s
}

func (w *world) list(s *snapshot.Store, all bool) []snapshot.Description {
	w.t.Helper()
	found, err := s.List(w.ctx, all)
	if err != nil {
		w.t.Fatal(err)
	}
	return found
}

// recordThousand puts the records of a thousand committed snapshots, without data,
// as if another one's were theirs.
func (w *world) recordThousand() {
	w.t.Helper()
	outcome := w.create(nil, nil, newDevice(testBlock).tiny(1, 0)).Outcome
	for n := range 999 {
		o := outcome
		o.Snapshot.Serial = uint64(n + 1)
		o.Start = o.Start.Add(time.Duration(n) * time.Second)
		w.put(manifest.OutcomeKey(o.Snapshot), o)
		w.put(manifest.IntentKey(o.Snapshot), manifest.Intent{
			Version: o.Version, Snapshot: o.Snapshot, Size: o.Size, BlockSize: o.BlockSize, Nonce: o.Nonce, Start: o.Start,
		})
	}
}

func (w *world) calledOps() map[blockstoretest.Op]int {
	n := make(map[blockstoretest.Op]int)
	for _, c := range w.faults.Calls() {
		n[c.Op]++
	}
	return n
}

// One listing for each kind of record, and nothing of what has ended: whatever the
// number of snapshots, but for the pages of a listing.
func TestSecondListOfAThousandAsksForListingsOnly(t *testing.T) {
	w := newWorld(t)
	w.recordThousand()
	w.begin(w.plan(nil, newDevice(testBlock)), nil, newDevice(testBlock))
	cache := &memRecords{}
	cold := w.list(w.cachedStore(cache), false)
	if len(cold) != 1001 {
		t.Fatalf("%d snapshots are listed", len(cold))
	}
	for _, d := range cold {
		if d.Outcome.Root != nil {
			t.Fatalf("the root of %s is part of the list", d.ID)
		}
	}
	w.faults.Reset()
	warm := w.list(w.cachedStore(cache), false)
	if diff := cmp.Diff(cold, warm); diff != "" {
		t.Errorf("the second list differs (-first +second)\n%s", diff)
	}
	want := map[blockstoretest.Op]int{blockstoretest.OpList: 6, blockstoretest.OpGet: 2} // store.json, and the progress of what is pending
	if diff := cmp.Diff(want, w.calledOps()); diff != "" {
		t.Errorf("requests (-want +got)\n%s", diff)
	}
	if cache.saves != 1 {
		t.Errorf("the cache was saved %d times", cache.saves)
	}
}

// A thousand records with nothing cached are sixteen rounds of requests.
func TestColdListOfAThousandTakesTwentyRoundTrips(t *testing.T) {
	outside := newWorld(t)
	outside.recordThousand()
	synctest.Test(t, func(t *testing.T) {
		w := outside.in(t)
		w.faults.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Delay: time.Second})
		start := time.Now()
		if n := len(w.list(w.cachedStore(&memRecords{}), false)); n != 1000 {
			t.Errorf("%d snapshots are listed", n)
		}
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("took %v with a second for each request", took)
		}
	})
}

// Whatever is done to snapshots, from wherever, who has a cache sees the same as
// who has none: each as it is, and no deleted one.
func TestCachedListIsTheList(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	w := newWorld(t)
	cache := &memRecords{}
	d := newDevice(testBlock).tiny(1, 0)
	var pending []*snapshot.Attempt
	var made []manifest.SnapshotID
	aborted := make(map[manifest.SnapshotID]bool)
	for step := range 150 {
		switch what := rng.IntN(7); {
		case what == 0:
			pending = append(pending, w.begin(w.plan(nil, d), nil, d))
		case what == 1 && len(pending) > 0:
			a := pending[0]
			pending = pending[1:]
			if _, err := a.Commit(w.ctx); err != nil {
				t.Fatal(err)
			}
			made = append(made, a.ID())
		case what == 2 && len(pending) > 0:
			if err := pending[0].Abort(w.ctx, "enough"); err != nil {
				t.Fatal(err)
			}
			aborted[pending[0].ID()] = true
			pending = pending[1:]
		case what == 3 && len(made) > 0:
			w.delete(made[0])
			made = made[1:]
		case what == 4 && len(made) > 0:
			tags := map[string]string{"step": fmt.Sprint(step)}
			if err := w.store.SetTags(w.ctx, made[rng.IntN(len(made))], tags, nil); err != nil {
				t.Fatal(err)
			}
		case what == 5:
			w.reclaim()
		case what == 6:
			made = append(made, w.create(nil, nil, d).ID())
		}
		all := step%2 == 0
		found := w.list(w.cachedStore(cache), all)
		if diff := cmp.Diff(w.list(w.reopen(), all), found); diff != "" {
			t.Fatalf("step %d (-list +cached)\n%s", step, diff)
		}
		want, got := make(map[manifest.SnapshotID]snapshot.State), make(map[manifest.SnapshotID]snapshot.State)
		for _, id := range made {
			want[id] = snapshot.Completed
		}
		for _, a := range pending {
			want[a.ID()] = snapshot.Pending
		}
		for id := range aborted {
			if all {
				want[id] = snapshot.Aborted
			}
		}
		for _, d := range found {
			got[d.ID] = d.State
		}
		if !maps.Equal(want, got) {
			t.Fatalf("step %d: %v are listed, want %v", step, got, want)
		}
	}
}

// What the cache has of a record and cannot be one is asked for again; so is what
// it has of another content of the record, and what it lost.
func TestDamagedCachedRecordIsFetchedAgain(t *testing.T) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	id := w.create(nil, nil, d).ID()
	if err := w.store.SetTags(w.ctx, id, map[string]string{"a": "b"}, nil); err != nil {
		t.Fatal(err)
	}
	w.begin(w.plan(nil, d), nil, d)
	want := w.list(w.reopen(), true)
	cache := &memRecords{}
	w.list(w.cachedStore(cache), true)
	store := slices.Collect(maps.Keys(cache.stores))[0]
	good := cache.Load(store)
	for name, record := range good {
		for what, bad := range map[string][]byte{
			"empty": nil, "cut": record[:len(record)-1], "of another version": bytes.Replace(record, []byte(`"version":1`), []byte(`"version":2`), 1),
		} {
			damaged := maps.Clone(good)
			damaged[name] = bad
			cache.Save(store, damaged)
			if diff := cmp.Diff(want, w.list(w.cachedStore(cache), true)); diff != "" {
				t.Errorf("with %s %s (-want +got)\n%s", name, what, diff)
			}
			if diff := cmp.Diff(good, cache.Load(store)); diff != "" {
				t.Errorf("%s %s stays in the cache (-want +got)\n%s", name, what, diff)
			}
		}
		missing := maps.Clone(good)
		delete(missing, name)
		cache.Save(store, missing)
		if diff := cmp.Diff(want, w.list(w.cachedStore(cache), true)); diff != "" {
			t.Errorf("without %s (-want +got)\n%s", name, diff)
		}
	}
}

// A damaged record in the store is not cached: once repaired it is seen, also if
// that leaves its ETag.
func TestDamagedRecordIsNotCached(t *testing.T) {
	w := newWorld(t)
	id := w.create(nil, nil, newDevice(testBlock).tiny(1, 0)).ID()
	want := w.list(w.reopen(), false)
	cache := &memRecords{}
	w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpGet, Prefix: manifest.OutcomeKey(id)}, blockstoretest.Fault{Truncate: true})
	if found, err := w.cachedStore(cache).List(w.ctx, false); err == nil || len(found) != 0 {
		t.Errorf("found %v, %v with a damaged outcome", found, err)
	}
	w.faults.Heal()
	if diff := cmp.Diff(want, w.list(w.cachedStore(cache), false)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// Another store's records, at the same keys, are not taken for this one's.
func TestRecordsOfAnotherStoreAreNotShown(t *testing.T) {
	w := newWorld(t)
	id := w.create(nil, nil, newDevice(testBlock).tiny(1, 0)).ID()
	cache := &memRecords{}
	w.list(w.cachedStore(cache), false)
	other := newWorldIn(t, blockstore.NewMem())
	if found := other.list(other.cachedStore(cache), true); len(found) != 0 {
		t.Errorf("an empty store lists %v", found)
	}
	if found := w.list(w.cachedStore(cache), false); len(found) != 1 || found[0].ID != id {
		t.Errorf("listed %v", found)
	}
}

// An error of the store is one of the list, and what it kept from being read is
// not taken for absent.
func TestListFailsWithTheStore(t *testing.T) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	w.create(nil, nil, d)
	w.begin(w.plan(nil, d), nil, d)
	w.faults.Reset()
	w.list(w.cachedStore(&memRecords{}), true)
	for _, c := range w.faults.Calls() {
		w.faults.Inject(blockstoretest.Rule{Op: c.Op, Match: func(o blockstoretest.Call) bool { return o.String() == c.String() }},
			blockstoretest.Fault{Err: blockstore.ErrUnavailable})
		if found, err := w.cachedStore(&memRecords{}).List(w.ctx, true); err == nil || found != nil {
			t.Errorf("with %s failing: %v, %v", c, found, err)
		}
		w.faults.Heal()
	}
}

func TestOwnerIsRecorded(t *testing.T) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	w.store.SetOwner("backup@example.org")
	one := w.create(nil, nil, d).ID()
	pending := w.begin(w.plan(nil, d), nil, d).ID()
	aborted := w.begin(w.plan(nil, d), nil, d)
	if err := aborted.Abort(context.Background(), "enough"); err != nil {
		t.Fatal(err)
	}
	w.store = w.reopen()
	nobody := w.create(nil, nil, d).ID()
	want := map[manifest.SnapshotID]string{one: "backup@example.org", pending: "backup@example.org", aborted.ID(): "backup@example.org", nobody: ""}
	got := make(map[manifest.SnapshotID]string)
	for _, f := range w.list(w.store, true) {
		got[f.ID] = f.Owner
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	w.mustVerify(one)
	w.store.SetOwner("not an owner")
	if _, err := w.store.Create(w.ctx, w.plan(nil, d), d.since(nil), nil); err == nil {
		t.Error("recorded an owner that cannot be one")
	}
}
