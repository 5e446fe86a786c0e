package snapshot_test

import (
	"errors"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// Whichever answer of the store is wrong, an operation may fail, and shows
// nothing wrong, does no harm, and works when it is tried again.
func TestEveryAnswerMayBeWrong(t *testing.T) {
	t.Parallel()
	reads := func(c blockstoretest.Call) bool {
		return c.Op == blockstoretest.OpGet || c.Op == blockstoretest.OpReadRange
	}
	all := func(blockstoretest.Call) bool { return true }
	for what, c := range map[string]struct {
		which func(blockstoretest.Call) bool
		blockstoretest.Fault
	}{
		"a bit is flipped":             {reads, blockstoretest.Fault{Flip: true}},
		"half of it is missing":        {reads, blockstoretest.Fault{Truncate: true}},
		"the object is not there":      {reads, blockstoretest.Fault{Err: blockstore.ErrNotExist}},
		"the object is too short":      {reads, blockstoretest.Fault{Err: blockstore.ErrShort}},
		"the object is too large":      {reads, blockstoretest.Fault{Err: blockstore.ErrTooLarge}},
		"the credentials have expired": {all, blockstoretest.Fault{Err: blockstore.ErrDenied}},
		"the store is not there":       {all, blockstoretest.Fault{Err: blockstore.ErrNoStore}},
	} {
		for name, operate := range operations {
			t.Run(name+" while "+what, func(t *testing.T) {
				t.Parallel()
				template := newScene(t)
				for n := 0; ; n++ {
					s := template.copy()
					s.faults.Inject(blockstoretest.Rule{Match: c.which, Skip: n, Times: 1}, c.Fault)
					s.faults.Reset()
					err := operate(s.ctx, s)
					calls := 0
					for _, call := range s.faults.Calls() {
						if c.which(call) {
							calls++
						}
					}
					hit := calls > n
					s.faults.Heal()
					if err != nil && !hit {
						t.Fatalf("failed without a fault: %v", err)
					}
					if err := operate(s.ctx, s); err != nil {
						t.Fatalf("again after answer %d: %v", n, err)
					}
					s.mustHoldAll()
					s.mustVerifyAll()
					s.mustEndEmpty()
					if !hit {
						return
					}
				}
			})
		}
	}
}

// Whoever opens a snapshot in vain knows whether there may be a pin to remove.
func TestFailedOpenTellsOfAPinThatIsLeft(t *testing.T) {
	t.Parallel()
	for name, removable := range map[string]bool{"and it is removed": true, "and it cannot be removed": false} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			id := w.create(nil, nil, newDevice(testBlock).tiny(1, 0)).ID()
			w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpGet, Prefix: "outcomes/"}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
			if !removable {
				w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpDelete}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
			}
			_, err := w.reopen().Open(w.ctx, id, snapshot.Holder{ID: "mount-1"})
			if !errors.Is(err, blockstore.ErrUnavailable) || errors.Is(err, snapshot.ErrPinLeft) == removable {
				t.Errorf("open: %v", err)
			}
			if pins := w.objects("pins/"); (len(pins) == 0) != removable {
				t.Errorf("pins: %v", pins)
			}
		})
	}
}
