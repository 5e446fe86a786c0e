package snapshot_test

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// moment is when what records tell of happened, where that does not matter.
var moment = time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)

// binOf lists what is in the recycle bin.
func (w *world) binOf() (ids []manifest.SnapshotID) {
	w.t.Helper()
	found, err := w.store.ListBin(w.ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, d := range found {
		ids = append(ids, d.ID)
	}
	return ids
}

func (w *world) retire(id manifest.SnapshotID, atLeast, want time.Duration) {
	w.t.Helper()
	until, err := w.store.Retire(w.ctx, id, atLeast)
	if err != nil {
		w.t.Fatal(err)
	}
	if want == 0 != until.IsZero() || want > 0 && time.Until(until).Round(time.Second) != want {
		w.t.Errorf("%s is retained until %v, want %v", id, until, want)
	}
}

// Of the rules of the policy that fit, and what the delete itself says, the
// longest counts.
func TestTheLongestRetentionCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		_, err := w.store.ChangePolicy(w.ctx, func(p *manifest.Policy) error {
			p.Retain = []manifest.RetainRule{{Seconds: 60}, {Tag: "env", Value: "prod", Seconds: 600}, {Tag: "env", Seconds: 300}, {Tag: "other", Seconds: 9000}}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			tags    map[string]string
			atLeast time.Duration
			want    time.Duration
		}{
			{nil, 0, time.Minute},
			{nil, time.Hour, time.Hour},
			{map[string]string{"env": "test"}, 0, 5 * time.Minute},
			{map[string]string{"env": "prod"}, 0, 10 * time.Minute},
			{map[string]string{"env": "prod"}, 9 * time.Minute, 10 * time.Minute},
			{map[string]string{"Env": "prod"}, 0, time.Minute},
		} {
			id := w.create(nil, nil, newDevice(512)).ID()
			if err := w.store.SetTags(w.ctx, id, c.tags, nil); err != nil {
				t.Fatal(err)
			}
			w.retire(id, c.atLeast, c.want)
		}
		id := w.create(nil, nil, newDevice(512)).ID()
		for _, wrong := range []time.Duration{-1, manifest.MaxRetention + 1} {
			if _, err := w.store.Retire(w.ctx, id, wrong); !errors.Is(err, snapshot.ErrRetention) {
				t.Errorf("%v: %v", wrong, err)
			}
		}
	})
}

func TestWhatIsInTheBinIsWholeAndNotFound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := newDevice(3*testBlock).tiny(1, 0, 1, 2)
		parent := w.create(nil, nil, d)
		changed := d.tiny(2, 0)
		child := w.create(parent, d, changed)
		id := parent.ID()
		if _, err := w.store.Share(w.ctx, id, []string{"friend", "all"}, nil); err != nil {
			t.Fatal(err)
		}
		before := w.stored()
		w.retire(id, time.Hour, time.Hour)
		w.reclaim()
		if after := w.stored(); after != before {
			t.Errorf("%d of %d bytes are left", after, before)
		}
		if got := w.binOf(); !slices.Equal(got, []manifest.SnapshotID{id}) {
			t.Errorf("bin: %v", got)
		}
		_, errOpen := w.store.Open(w.ctx, id, snapshot.Holder{ID: "vol-1"})
		_, errDescribe := w.store.Describe(w.ctx, id)
		_, errShare := w.store.Share(w.ctx, id, []string{"x"}, nil)
		_, errLock := w.store.SetLock(w.ctx, id, snapshot.LockRequest{Mode: governance, Days: 1})
		for what, err := range map[string]error{
			"open": errOpen, "describe": errDescribe, "share": errShare, "lock": errLock, "delete": w.store.Delete(w.ctx, id),
		} {
			if !errors.Is(err, snapshot.ErrInBin) || !errors.Is(err, snapshot.ErrNotFound) {
				t.Errorf("%s: %v", what, err)
			}
		}
		w.wantNone("pins/", "tombstones/")
		if found, err := w.store.List(w.ctx, true); err != nil || len(found) != 1 || found[0].ID != child.ID() {
			t.Errorf("list: %v, %v", found, err)
		}
		w.mustVerify(child.ID())
		w.mustHold(child, changed)

		if err := w.store.SetTags(w.ctx, id, map[string]string{"in": "bin"}, nil); err != nil {
			t.Fatal(err)
		}
		if err := w.store.RestoreDeleted(w.ctx, id); err != nil {
			t.Fatal(err)
		}
		if err := w.store.RestoreDeleted(w.ctx, id); !errors.Is(err, snapshot.ErrNotInBin) {
			t.Errorf("restore again: %v", err)
		}
		got, err := w.store.Describe(w.ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]any{map[string]string{"in": "bin"}, []string{"all", "friend"}}, []any{got.Tags, got.Shares}); diff != "" {
			t.Errorf("restored (-want +got):\n%s", diff)
		}
		w.mustHold(w.open(id), d)
	})
}

// A snapshot leaves the bin for good when its time is over and somebody reclaims,
// not before; until then it can come back.
func TestTheBinIsEmptiedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		d := newDevice(testBlock).tiny(1, 0)
		id, other := w.create(nil, nil, d).ID(), w.create(nil, nil, d).ID()
		w.retire(id, time.Hour, time.Hour)
		w.retire(other, time.Hour, time.Hour)
		time.Sleep(time.Hour - time.Second)
		if r := w.reclaim(); r.Expired != 0 {
			t.Errorf("%+v", r)
		}
		time.Sleep(time.Second)
		if err := w.store.RestoreDeleted(w.ctx, other); err != nil {
			t.Errorf("restore what nobody reclaimed: %v", err)
		}
		if r := w.reclaim(); r.Expired != 1 || r.Dead != 1 {
			t.Errorf("%+v", r)
		}
		w.wantNone(manifest.DataPrefix(id), manifest.MetaKey(id))
		if err := w.store.RestoreDeleted(w.ctx, id); !errors.Is(err, snapshot.ErrNotFound) {
			t.Errorf("restore what is gone: %v", err)
		}
		w.mustHold(w.open(other), d)
		if got := w.binOf(); len(got) != 0 {
			t.Errorf("bin: %v", got)
		}
	})
}

// A delete that was interrupted before its tombstone is finished by a reclaim.
func TestAnInterruptedDeleteIsFinished(t *testing.T) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	id := w.create(nil, nil, d).ID()
	pending := w.begin(w.plan(nil, d), nil, d)
	for _, id := range []manifest.SnapshotID{id, pending.ID()} {
		w.put(manifest.MetaKey(id), manifest.Meta{Version: 1, Bin: &manifest.Bin{Entered: moment, Until: moment, Expired: true}})
	}
	if _, err := w.store.Open(w.ctx, id, snapshot.Holder{}); !errors.Is(err, snapshot.ErrNotFound) || errors.Is(err, snapshot.ErrInBin) {
		t.Errorf("open: %v", err)
	}
	if err := w.store.RestoreDeleted(w.ctx, id); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("restore: %v", err)
	}
	if r := w.reclaim(); r.Expired != 2 || r.Dead != 2 {
		t.Errorf("%+v", r)
	}
	w.wantNone("data/", "meta/")
	if _, err := pending.Commit(w.ctx); !errors.Is(err, snapshot.ErrAborted) {
		t.Errorf("commit: %v", err)
	}
}

// A pending snapshot has nothing that could come back: it is aborted, whatever the
// policy.
func TestADeletedPendingSnapshotIsNotBinned(t *testing.T) {
	w := newWorld(t)
	d := newDevice(testBlock).tiny(1, 0)
	pending := w.begin(w.plan(nil, d), nil, d)
	w.retire(pending.ID(), time.Hour, 0)
	if _, err := pending.Commit(w.ctx); !errors.Is(err, snapshot.ErrAborted) {
		t.Errorf("commit: %v", err)
	}
	if got := w.binOf(); len(got) != 0 {
		t.Errorf("bin: %v", got)
	}
}
