package volume

import (
	"fmt"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// TestWrongAnswerLosesNothing has one answer of the store be wrong, or all from
// one on, while a snapshot is made: it may fail, and a later one works.
func TestWrongAnswerLosesNothing(t *testing.T) {
	reads := func(c blockstoretest.Call) bool {
		return c.Op == blockstoretest.OpGet || c.Op == blockstoretest.OpReadRange
	}
	// Of records, absence is an answer.
	data := func(c blockstoretest.Call) bool { return reads(c) && strings.HasPrefix(c.Keys[0], "data/") }
	for what, c := range map[string]struct {
		match func(blockstoretest.Call) bool // nil: every call
		blockstoretest.Fault
	}{
		"a bit is flipped":        {reads, blockstoretest.Fault{Flip: true}},
		"half of it is missing":   {reads, blockstoretest.Fault{Truncate: true}},
		"the object is not there": {data, blockstoretest.Fault{Err: blockstore.ErrNotExist}},
		"access is denied":        {nil, blockstoretest.Fault{Err: blockstore.ErrDenied}},
		"the store is not there":  {nil, blockstoretest.Fault{Err: blockstore.ErrNoStore}},
	} {
		for _, times := range []int{1, 0} {
			t.Run(fmt.Sprintf("%s,times=%d", what, times), func(t *testing.T) {
				eachStep(t, func(t *testing.T, s scene, step int) bool {
					d := newDrill(t, uint64(step), s)
					d.store.Reset()
					d.store.Inject(blockstoretest.Rule{Match: c.match, Skip: step, Times: times}, c.Fault)
					if err := d.play(s); err == nil && s.abort {
						t.Fatal("an aborted snapshot succeeded")
					}
					hit := -step
					for _, call := range d.store.Calls() {
						if c.match == nil || c.match(call) {
							hit++
						}
					}
					d.store.Heal()
					d.setLimit(noLimit)
					d.check(fmt.Sprintf("answer %d was wrong", step))
					return hit > 0
				})
			})
		}
	}
}
