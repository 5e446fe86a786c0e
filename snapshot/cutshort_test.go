package snapshot_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// slowStore holds up the first reads of index objects until their context ends,
// and then fails as S3 does: with the cause of that. The reads of one snapshot's
// go on when the others are held up.
type slowStore struct {
	blockstore.Store
	but  manifest.SnapshotID
	hold atomic.Int64   // reads that may still be held up
	held sync.WaitGroup // done when they are
}

func (s *slowStore) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	switch {
	case !strings.Contains(key, "/leaves/"):
	case strings.Contains(key, s.but.String()):
		s.held.Wait()
	case s.hold.Add(-1) >= 0:
		s.held.Done()
		<-ctx.Done()
	}
	if ctx.Err() != nil {
		return fmt.Errorf("%w: read %s", context.Cause(ctx), key)
	}
	return s.Store.ReadRange(ctx, key, off, p)
}

// That one root was swept says nothing of the others whose reading its failure
// cut short: they are pinned and stay whole.
func TestRootsAreNotTakenForSweptAsAnotherIs(t *testing.T) {
	w := newWorld(t)
	d := newDevice(8*testBlock).random(1, span(0, 8)...)
	base := w.create(nil, nil, d)
	var pinned []*snapshot.Image
	var held []*device
	for i := range 3 {
		changed := d.clone().random(uint64(10+i), int64(i))
		img := w.create(base, d, changed)
		if err := w.store.Pin(w.ctx, img.ID(), snapshot.Holder{ID: fmt.Sprintf("vol-%017x", i)}); err != nil {
			t.Fatal(err)
		}
		pinned, held = append(pinned, img), append(held, changed)
	}
	for _, img := range append(pinned, base) {
		if err := w.store.Delete(w.ctx, img.ID()); err != nil {
			t.Fatal(err)
		}
	}
	// The first was swept: its pin came too late.
	for key := range w.objects("data/" + pinned[0].ID().String()) {
		if err := w.faults.Delete(w.ctx, key); err != nil {
			t.Fatal(err)
		}
	}
	slow := &slowStore{Store: w.faults, but: pinned[0].ID()}
	slow.hold.Store(2)
	slow.held.Add(2)
	if _, err := storeIn(slow).Reclaim(w.ctx, base.ID().Lineage); err != nil {
		t.Fatal(err)
	}
	for i := 1; i < 3; i++ {
		w.mustHold(pinned[i], held[i])
	}
}
