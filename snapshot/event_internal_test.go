package snapshot

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// Memory is bounded whatever is in the store, and nothing is handed over twice.
func TestFollowerRemembersABoundedNumberOfEvents(t *testing.T) {
	f := New(blockstore.NewMem()).FollowEvents(time.Time{})
	begin := time.Now()
	horizon := manifest.EventKeysFrom(begin)
	var last string
	for i := range 2*maxSeenEvents + 10 {
		last = manifest.EventKey(begin.Add(time.Duration(i)), fmt.Sprintf("%08x-0000-4000-8000-000000000000", i))
		f.handed(last, horizon)
		if len(f.seen) > maxSeenEvents {
			t.Fatalf("%d are remembered", len(f.seen))
		}
		if !f.seen[last] && last > f.floor {
			t.Fatalf("%s would be handed over again", last)
		}
	}
}

func TestFollowerForgetsWhatCannotAppearAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := New(blockstore.NewMem())
		f := store.FollowEvents(time.Time{})
		for _, want := range []int{1, 0} {
			if want == 1 {
				if err := store.AppendEvent(t.Context(), store.VolumeCreated("vol-0123456789abcdef0", nil)); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.Poll(t.Context(), func(Event, error) error { return nil }); err != nil || len(f.seen) != want {
				t.Errorf("%d are remembered, want %d: %v", len(f.seen), want, err)
			}
			time.Sleep(time.Hour)
		}
		if before := manifest.EventKeysFrom(time.Now().Add(-2 * time.Hour)); f.floor <= before {
			t.Errorf("it lists from %s on, after %s", f.floor, before)
		}
	})
}
