package snapshot_test

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// What a snapshot costs in requests, exactly: these are the promise.
func TestRequestsOfASnapshot(t *testing.T) {
	w := newWorld(t)
	d := newDevice(20*testBlock).random(1, span(0, 20)...)

	w.faults.Reset()
	outcome, err := w.store.Create(w.ctx, w.plan(nil, d), d.since(nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	made := w.calls()
	slices.Sort(made[1:3]) // packs and leaves go together
	first := []string{"intents", "data/leaves/00000000", "data/packs/00000000", "data/root", "outcomes"}
	if diff := cmp.Diff(calls("put", first...), made); diff != "" {
		t.Errorf("a first snapshot (-want +got):\n%s", diff)
	}
	parent := w.open(outcome.Snapshot)

	second := d.random(2, 3, 4, 9)
	plan := w.plan(parent, second)
	plan.Holder = snapshot.Holder{ID: "vol-1"}
	w.faults.Reset()
	if _, err := w.store.Create(w.ctx, plan, second.since(d), nil); err != nil {
		t.Fatal(err)
	}
	want := append(calls("put", "intents"), calls("get", "tombstones")...)
	want = append(want, calls("read", "data/leaves/00000000", "data/leaves/00000000")...) // a leaf and a section
	want = append(want, calls("put", "data/packs/00000000", "data/leaves/00000000", "data/root", "pins/vol-1", "outcomes")...)
	if diff := cmp.Diff(slices.Sorted(slices.Values(want)), slices.Sorted(slices.Values(w.calls()))); diff != "" {
		t.Errorf("an increment (-want +got):\n%s", diff)
	}
}

// calls names calls of one kind.
func calls(op string, keys ...string) []string {
	var names []string
	for _, key := range keys {
		names = append(names, op+" "+key)
	}
	return names
}

// Whatever the size of the image, it is open after two round trips.
func TestOpenTakesTwoRoundTrips(t *testing.T) {
	t.Parallel()
	outside := newWorld(t)
	small := newDevice(testBlock).tiny(1, 0)
	large := sparse(345) // a root of more than 16 KiB, which is not in the outcome
	for name, d := range map[string]*device{"small": small, "large": large} {
		id := outside.create(nil, nil, d).ID()
		for _, h := range []snapshot.Holder{{}, {ID: "mount-1"}} {
			t.Run(name+h.ID, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := outside.in(t)
					w.faults.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Delay: time.Second})
					w.faults.Reset()
					start := time.Now()
					img, err := w.reopen().Open(w.ctx, id, h)
					if err != nil {
						t.Fatal(err)
					}
					if took := time.Since(start); took > 2*time.Second {
						t.Errorf("took %v with a second for each request", took)
					}
					if n := len(w.faults.Calls()); n > 7 {
						t.Errorf("%d requests: %v", n, w.faults.Calls())
					}
					if img.Root.DataBlocks != int64(len(d.blocks)) {
						t.Errorf("%d blocks of data", img.Root.DataBlocks)
					}
				})
			})
		}
	}
}
