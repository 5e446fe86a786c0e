package volume

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// changes are what a guest can do to a block, whose page 1 was written before
// the cut and whose others are cold.
var changes = map[string]func(w *world, v *Volume, data []byte, seed uint64){
	"the written page again": func(w *world, v *Volume, data []byte, seed uint64) { change(w, v, data, pageSize, pageSize, seed) },
	"a part of it":           func(w *world, v *Volume, data []byte, seed uint64) { change(w, v, data, 700, pageSize+100, seed) },
	"a cold page":            func(w *world, v *Volume, data []byte, seed uint64) { change(w, v, data, pageSize, 3*pageSize, seed) },
	"the whole block":        func(w *world, v *Volume, data []byte, seed uint64) { change(w, v, data, blockSize, 0, seed) },
	"the page to zeros":      func(w *world, v *Volume, data []byte, _ uint64) { discard(w, v, data, pageSize, pageSize) },
	"a part of it to zeros":  func(w *world, v *Volume, data []byte, _ uint64) { discard(w, v, data, 700, pageSize+100) },
	"all to zeros":           func(w *world, v *Volume, data []byte, _ uint64) { discard(w, v, data, blockSize, 0) },
	"all to zeros, and the page again": func(w *world, v *Volume, data []byte, seed uint64) {
		discard(w, v, data, blockSize, 0)
		change(w, v, data, pageSize, pageSize, seed)
	},
}

// change writes n bytes at off of block 1.
func change(w *world, v *Volume, data []byte, n int, off int64, seed uint64) {
	w.Helper()
	w.overwrite(v, data, n, blockSize+off, seed)
}

// discard makes n bytes at off of block 1 zeros.
func discard(w *world, v *Volume, data []byte, n, off int64) {
	w.Helper()
	w.must(v.Zero(w.ctx, blockSize+off, n))
	clear(data[blockSize+off:][:n])
}

// TestBlockChangedWhileItIsHydratedAndUploaded, in each way: first while its
// hydration and the snapshot's own fetch are under way, then while the pack that
// holds it is. Whether the snapshot is committed or aborted, the snapshot has the
// bytes of the cut, and the volume the newest.
func TestBlockChangedWhileItIsHydratedAndUploaded(t *testing.T) {
	for first, early := range changes {
		for _, second := range []string{"the written page again", "a part of it", "all to zeros", "all to zeros, and the page again"} {
			late := changes[second]
			for _, abort := range []bool{false, true} {
				name := first + ", then " + second
				if abort {
					name += ", and abort"
				}
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					w := newRealWorld(t)
					v, data := newRestored(w, 3)
					change(w, v, data, pageSize, pageSize, 2)
					cut := append([]byte(nil), data...)
					fetches, fetching := new(atomic.Int64), make(chan struct{})
					w.store.Inject(packReads(), blockstoretest.Fault{Before: func(context.Context, blockstoretest.Call) {
						fetches.Add(1)
						<-fetching
					}})
					packing, stored := make(chan struct{}), make(chan struct{})
					w.store.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "data/", Times: 1}, blockstoretest.Fault{
						Before: func(context.Context, blockstoretest.Call) {
							close(packing)
							<-stored
						},
					})
					warmed := make(chan error, 1)
					go func() { warmed <- v.Warm(w.ctx, []int64{1}) }()
					w.eventually("hydration", func() bool { return fetches.Load() == 1 })
					var id manifest.SnapshotID
					made := make(chan error, 1)
					go func() {
						_, err := v.Snapshot(w.ctx, SnapshotOptions{Cut: func(a *snapshot.Attempt) { id = a.ID() }})
						made <- err
					}()
					w.eventually("the snapshot's fetch", func() bool { return fetches.Load() == 2 })
					early(w, v, data, 3)

					close(fetching)
					<-packing
					w.must(<-warmed)
					late(w, v, data, 4)
					if abort {
						w.must(storeIn(w.mem).Delete(w.ctx, id))
					}
					close(stored)
					if err := <-made; abort != errors.Is(err, snapshot.ErrAborted) || !abort && err != nil {
						t.Fatalf("the snapshot: %v; aborted %t", err, abort)
					}
					w.equal(v.Device, data, "volume")
					if !abort {
						w.equalSnapshot(id, cut, "the snapshot")
					}
					w.equalSnapshot(w.snapshot(v), data, "the next snapshot")
					w.must(v.writes.clean.Evict(1))
					w.equal(v.Device, data, "volume, block 1 fetched again")
					w.must(v.Close())
				})
			}
		}
	}
}
