package snapshot_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// prepareSet makes two snapshots of a set, all but the outcome.
func prepareSet(w *world, set manifest.SetID) (ids []manifest.SnapshotID, devices []*device, members []manifest.Outcome) {
	w.t.Helper()
	for i := range 2 {
		d := newDevice(4*testBlock).tiny(i, 0, 1, 2)
		p := w.plan(nil, d)
		p.Set, p.Description, p.Tags = set, "together", map[string]string{"k": "v"}
		p.Holder = snapshot.Holder{ID: "vol-" + string(rune('a'+i))}
		o, err := w.begin(p, nil, d).Prepare(w.ctx)
		if err != nil {
			w.t.Fatal(err)
		}
		ids, devices, members = append(ids, p.ID), append(devices, d), append(members, o)
	}
	return ids, devices, members
}

// What a set has committed is, to every reader, a snapshot like any other, whether
// or not that was recorded; and so it is when one of them is deleted.
func TestMembersOfACommittedSetAreCompleted(t *testing.T) {
	t.Parallel()
	for name, record := range map[string]bool{"recorded": true, "not recorded": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			set := manifest.NewSetID()
			ids, devices, members := prepareSet(w, set)
			if err := w.store.CommitSet(w.ctx, set, members); err != nil {
				t.Fatal(err)
			}
			if record {
				if err := w.store.RecordMembers(w.ctx, members); err != nil {
					t.Fatal(err)
				}
			}
			for i, id := range ids {
				d, err := w.store.Describe(w.ctx, id)
				if err != nil || d.State != snapshot.Completed || d.Set != set || d.Description != "together" || d.Tags["k"] != "v" {
					t.Errorf("described as %+v, %v", d, err)
				}
				w.mustHold(w.open(id), devices[i])
				w.mustVerify(id)
				if _, err := w.store.UniqueBytes(w.ctx, id); err != nil {
					t.Error(err)
				}
			}
			list, err := w.store.List(w.ctx, false)
			if err != nil || len(list) != 2 || list[0].State != snapshot.Completed || list[1].State != snapshot.Completed {
				t.Errorf("listed: %+v, %v", list, err)
			}
			report, err := w.store.Check(w.ctx, snapshot.Check{})
			if err != nil || len(report.Findings) > 0 || len(report.Pending) > 0 || len(report.StrangeKeys) > 0 || len(report.Snapshots) != 2 {
				t.Errorf("check: %+v, %v", report, err)
			}

			w.delete(ids[0])
			for _, holder := range []string{"vol-a", "vol-b"} {
				if _, err := w.store.Forget(w.ctx, holder); err != nil {
					t.Fatal(err)
				}
			}
			w.reclaim()
			w.wantNone(manifest.DataPrefix(ids[0]))
			w.mustHold(w.open(ids[1]), devices[1])
			for _, id := range ids {
				if len(w.objects(manifest.OutcomeKey(id))) == 0 {
					t.Errorf("nobody recorded the outcome of %s", id)
				}
			}
			if report, err := w.store.Check(w.ctx, snapshot.Check{}); err != nil || len(report.Findings) > 0 {
				t.Errorf("check after the delete: %+v, %v", report, err)
			}
		})
	}
}

// Whoever aborts one of a set aborts them all, for ever.
func TestAbortedMemberAbortsItsSet(t *testing.T) {
	t.Parallel()
	for name, abort := range map[string]func(*world, manifest.SetID, manifest.Outcome) error{
		"the coordinator": func(w *world, set manifest.SetID, _ manifest.Outcome) error {
			_, err := w.store.AbortSet(w.ctx, set, "interrupted")
			return err
		},
		"a delete": func(w *world, _ manifest.SetID, m manifest.Outcome) error { return w.store.Delete(w.ctx, m.Snapshot) },
		"its volume": func(w *world, _ manifest.SetID, m manifest.Outcome) error {
			_, _, err := w.store.Resolve(w.ctx, m.Snapshot, m.Nonce, "interrupted")
			return err
		},
		"its volume, which never began": func(w *world, set manifest.SetID, m manifest.Outcome) error {
			never := manifest.SnapshotID{Lineage: m.Snapshot.Lineage, Serial: m.Snapshot.Serial ^ 1}
			_, _, err := w.store.ResolveMember(w.ctx, set, never, manifest.NewNonce(), "interrupted")
			return err
		},
		"a reclaim": func(w *world, _ manifest.SetID, _ manifest.Outcome) error {
			_, err := snapshot.New(later{w.faults}).Reclaim(w.ctx, w.lineage)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			set := manifest.NewSetID()
			ids, _, members := prepareSet(w, set)
			if err := abort(w, set, members[0]); err != nil {
				t.Fatal(err)
			}
			if err := w.store.CommitSet(w.ctx, set, members); !errors.Is(err, snapshot.ErrAborted) {
				t.Errorf("commit of an aborted set: %v", err)
			}
			for _, id := range ids {
				if d, err := w.store.Describe(w.ctx, id); err != nil || d.State != snapshot.Aborted || d.Why == "" {
					t.Errorf("described as %+v, %v", d, err)
				}
				if _, err := w.store.Open(w.ctx, id, snapshot.Holder{}); !errors.Is(err, snapshot.ErrAborted) && !errors.Is(err, snapshot.ErrNotFound) {
					t.Errorf("opened: %v", err)
				}
				if err := w.store.Delete(w.ctx, id); !errors.Is(err, snapshot.ErrNotFound) {
					t.Errorf("deleted: %v", err)
				}
			}
			w.reclaim()
			w.wantNone("data/", "pins/")
			if report, err := w.store.Check(w.ctx, snapshot.Check{}); err != nil || len(report.Findings) > 0 || len(report.Pending) > 0 {
				t.Errorf("check: %+v, %v", report, err)
			}
		})
	}
}

// A set's outcome, once it is there, is the one: also of a commit whose reply was
// lost.
func TestSetIsDecidedOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	set := manifest.NewSetID()
	ids, _, members := prepareSet(w, set)
	for _, id := range ids {
		if d, err := w.store.Describe(w.ctx, id); err != nil || d.State != snapshot.Pending || d.Set != set {
			t.Errorf("before: %+v, %v", d, err)
		}
	}
	w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "sets/", Times: 1}, blockstoretest.Fault{LoseReply: true})
	_ = w.store.CommitSet(w.ctx, set, members)
	if err := w.store.CommitSet(w.ctx, set, members); err != nil {
		t.Errorf("commit again: %v", err)
	}
	if committed, err := w.store.AbortSet(w.ctx, set, "too late"); !committed || err != nil {
		t.Errorf("abort of a committed set: %t, %v", committed, err)
	}
	for i, id := range ids {
		committed, o, err := w.store.ResolveMember(w.ctx, set, id, members[i].Nonce, "too late")
		if !committed || err != nil || !bytes.Equal(o.Root, members[i].Root) {
			t.Errorf("resolve: %t, %v, %v", committed, o.State, err)
		}
	}
}

// A set whose parent was deleted goes on with a full snapshot: the attempt that was
// given up is not one of it.
func TestMemberWithoutParentIsReplacedInItsSet(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	before := newDevice(2*testBlock).tiny(1, 0, 1)
	parent := w.create(nil, nil, before)
	w.delete(parent.ID())
	set := manifest.NewSetID()
	p := w.plan(parent, before)
	p.Set = set
	if _, err := w.store.Begin(w.ctx, p); !errors.Is(err, snapshot.ErrParentGone) {
		t.Fatalf("began on a deleted parent: %v", err)
	}
	ids, devices, members := prepareSet(w, set)
	if err := w.store.CommitSet(w.ctx, set, members); err != nil {
		t.Fatal(err)
	}
	if d, err := w.store.Describe(w.ctx, p.ID); err != nil || d.State != snapshot.Aborted {
		t.Errorf("given up: %+v, %v", d, err)
	}
	w.mustHold(w.open(ids[0]), devices[0])
}

// A damaged outcome of a set is found, and no reclaim goes on as if its snapshots
// were not there; when they are deleted it does no harm.
func TestDamagedOutcomeOfASetIsNeverTakenForNone(t *testing.T) {
	t.Parallel()
	for name, record := range map[string]bool{"recorded": true, "not recorded": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			set := manifest.NewSetID()
			ids, devices, members := prepareSet(w, set)
			if err := w.store.CommitSet(w.ctx, set, members); err != nil {
				t.Fatal(err)
			}
			if record {
				if err := w.store.RecordMembers(w.ctx, members); err != nil {
					t.Fatal(err)
				}
			}
			w.overwrite(manifest.SetOutcomeKey(set), "{")
			report, err := w.store.Check(w.ctx, snapshot.Check{})
			found := slices.ContainsFunc(report.Findings, func(f snapshot.Finding) bool { return f.Object == manifest.SetOutcomeKey(set) })
			if err != nil || !found {
				t.Errorf("check: %+v, %v", report.Findings, err)
			}
			if record {
				w.mustHold(w.open(ids[0]), devices[0]) // it has its own
				return
			}
			if _, err := w.store.Describe(w.ctx, ids[0]); !errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("described: %v", err)
			}
			if _, _, err := w.store.Resolve(w.ctx, ids[0], members[0].Nonce, "?"); !errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("resolved: %v", err)
			}
			if _, err := w.store.Reclaim(w.ctx, w.lineage); !errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("reclaimed: %v", err)
			}
			for _, holder := range []string{"vol-a", "vol-b"} {
				if _, err := w.store.Forget(w.ctx, holder); err != nil {
					t.Fatal(err)
				}
			}
			w.delete(ids...)
			w.reclaim()
			w.wantNone("data/")
		})
	}
}

// A member whose outcome cannot be recorded, as its root is damaged, can be
// deleted, and then stands in nobody's way.
func TestMemberWithADamagedRootIsDeleted(t *testing.T) {
	t.Parallel()
	for name, damage := range map[string]func(*world, manifest.SnapshotID){
		"damaged": func(w *world, id manifest.SnapshotID) { w.overwrite(manifest.RootKey(id), "?") },
		"gone": func(w *world, id manifest.SnapshotID) {
			if err := w.faults.Delete(w.ctx, manifest.RootKey(id)); err != nil {
				w.t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			set := manifest.NewSetID()
			ids, devices, members := prepareSet(w, set)
			if err := w.store.CommitSet(w.ctx, set, members); err != nil {
				t.Fatal(err)
			}
			for _, holder := range []string{"vol-a", "vol-b"} {
				if _, err := w.store.Forget(w.ctx, holder); err != nil {
					t.Fatal(err)
				}
			}
			damage(w, ids[0])
			if _, err := w.store.Open(w.ctx, ids[0], snapshot.Holder{}); !errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("opened: %v", err)
			}
			if _, err := w.store.Reclaim(w.ctx, w.lineage); !errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("reclaimed: %v", err)
			}
			w.delete(ids[0])
			w.reclaim()
			w.wantNone(manifest.DataPrefix(ids[0]))
			w.mustHold(w.open(ids[1]), devices[1])
		})
	}
}
