package snapshot_test

import (
	"errors"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// Whatever is in use, or locked, keeps its lineage from being shredded; what only
// pins keep goes if that is asked for.
func TestWhatIsInUseIsNotShredded(t *testing.T) {
	w := newEncryptedWorld(t)
	id := w.create(nil, nil, newDevice(4*testBlock).tiny(1, 0, 1)).ID()
	if _, err := w.store.SetLock(w.ctx, id, snapshot.LockRequest{Mode: governance, Days: 1}); err != nil {
		t.Fatal(err)
	}
	if err := w.store.Pin(w.ctx, id, snapshot.Holder{ID: "vol"}); err != nil {
		t.Fatal(err)
	}
	if err := w.store.Shred(w.ctx, w.lineage, false); !errors.Is(err, snapshot.ErrPinned) {
		t.Errorf("pinned: %v", err)
	}
	if err := w.store.Shred(w.ctx, w.lineage, true); !errors.Is(err, snapshot.ErrLocked) {
		t.Errorf("locked: %v", err)
	}
	w.mustHold(w.open(id), newDevice(4*testBlock).tiny(1, 0, 1))
	if err := w.store.Unlock(w.ctx, id); err != nil {
		t.Fatal(err)
	}
	if err := w.store.Shred(w.ctx, w.lineage, true); err != nil {
		t.Fatal(err)
	}
	if _, err := w.reopen().Open(w.ctx, id, snapshot.Holder{}); !errors.Is(err, snapshot.ErrShredded) {
		t.Errorf("opened: %v", err)
	}
	if r := w.reclaim(); r.Bytes == 0 {
		t.Error("nothing was freed")
	}
	w.wantNone("data/")
}

// Of a shredding whose request fails or whose reply is lost, the next try, be it
// within the call, tells that it is done.
func TestShredSurvivesEachFault(t *testing.T) {
	for name, f := range map[string]blockstoretest.Fault{"fails": {Err: blockstore.ErrDenied}, "loses its reply": {LoseReply: true}} {
		t.Run(name, func(t *testing.T) {
			for n, hit := 0, true; hit; n++ {
				w := newEncryptedWorld(t)
				id := w.create(nil, nil, newDevice(4*testBlock).tiny(1, 0, 1)).ID()
				w.faults.Reset()
				w.faults.Inject(blockstoretest.Rule{Skip: n, Times: 1}, f)
				s := storeIn(blockstore.Retry(w.faults, blockstore.RetryPolicy{Base: 1, Max: 1}))
				if _, err := s.Key(w.ctx, w.lineage); err != nil && !errors.Is(err, f.Err) {
					t.Fatal(err)
				}
				err := s.Shred(w.ctx, w.lineage, false)
				hit = len(w.faults.Calls()) > n
				w.faults.Heal()
				if f.Err != nil && errors.Is(err, f.Err) {
					err = s.Shred(w.ctx, w.lineage, false)
				}
				if err != nil {
					t.Errorf("request %d: %v", n, err)
				}
				if _, err := s.Key(w.ctx, w.lineage); !errors.Is(err, snapshot.ErrShredded) {
					t.Errorf("request %d: this process has its key still: %v", n, err)
				}
				record, err := w.reopen().Lineage(w.ctx, w.lineage)
				if err != nil || record.Encryption == nil || len(record.Encryption.WrappedKey) != 0 {
					t.Errorf("request %d: %+v, %v", n, record, err)
				}
				w.wantDescribed(id)
			}
		})
	}
}

// wantDescribed fails the test unless a snapshot's records can be read.
func (w *world) wantDescribed(id manifest.SnapshotID) {
	w.t.Helper()
	if d, err := w.store.Describe(w.ctx, id); err != nil || d.State != snapshot.Completed {
		w.t.Errorf("%+v, %v", d, err)
	}
}
