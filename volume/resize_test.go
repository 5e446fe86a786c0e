package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func enlarged(data []byte, size int64) []byte {
	return append(bytes.Clone(data), make([]byte, size-int64(len(data)))...)
}

// Leaves of one length in the parent and of another in the child, and a child that
// differs in nothing but its size.
func TestSnapshotsOfAVolumeThatGrowsAreWholeByThemselves(t *testing.T) {
	w := newWorld(t, 1)
	defer func() { w.abandon() }()
	data := make([]byte, 600*blockSize+512) // a short leaf, block and page
	v := w.openNew(nil, int64(len(data)))
	w.overwrite(v, data, 3*blockSize, 0, 1)
	w.overwrite(v, data, 700, int64(len(data)-700), 2)
	first := w.snapshot(v)
	small := bytes.Clone(data)

	w.must(v.Resize(1500*blockSize + 1024))
	data = enlarged(data, 1500*blockSize+1024)
	w.equal(v.Device, data, "grown")
	second := w.snapshot(v)
	larger := bytes.Clone(data)

	w.must(v.Resize(1600 * blockSize))
	data = enlarged(data, 1600*blockSize)
	w.overwrite(v, data, 2*pageSize, 600*blockSize, 3) // the former short block
	w.overwrite(v, data, 100, 1030*blockSize+50, 4)    // another leaf
	w.overwrite(v, data, pageSize, 1600*blockSize-pageSize, 5)
	third := w.snapshot(v)
	w.equal(v.Device, data, "grown again")

	w.equalSnapshot(first, small, "before")
	w.equalSnapshot(second, larger, "only grown")
	w.remove(first)
	w.remove(second)
	w.equalSnapshot(third, data, "by itself")
	w.must(v.Close())
	w.equal(w.open(v.Record().ID).Device, data, "opened again")
	w.powerCut()
	w.equal(w.open(v.Record().ID).Device, data, "after a power cut")
}

// What is cached of the block at the former end can be read with the store down, and
// so can what is new.
func TestGrownVolumeReadsWhatItHasWithTheStoreDown(t *testing.T) {
	w := newWorld(t, 1)
	defer func() { w.abandon() }()
	data := noise(2*blockSize+pageSize+512, 1)
	v := w.openNew(nil, int64(len(data)))
	w.write(v, data, 0)
	w.snapshot(v) // now it is clean bytes, of blocks that diverged
	w.store.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
	for _, size := range []int64{2*blockSize + pageSize + 1024, 3 * blockSize, 7 * blockSize} {
		w.must(v.Resize(size))
		data = enlarged(data, size)
		w.equal(v.Device, data, "grown with the store down")
	}
	w.overwrite(v, data, 300, 2*blockSize+pageSize+400, 2) // a part of the page at the former end
	w.equal(v.Device, data, "written")
	w.must(v.Close())
	w.equal(w.open(v.Record().ID).Device, data, "opened again")
}

// A process that dies between the record and the rest leaves a volume of the new
// size, of which nothing is lost; and whatever call fails, the volume goes on, and
// may be resized again.
func TestResizeThatFailsAtAnyCallChangesNothing(t *testing.T) {
	for _, fault := range []error{syscall.EIO, syscall.ENOSPC} {
		for n := 0; ; n++ {
			w := newWorld(t, uint64(n))
			data := noise(2*blockSize+512, 1)
			v := w.openNew(nil, int64(len(data)))
			w.write(v, data[:blockSize], 0)
			w.snapshot(v)
			w.write(v, data, 0)
			w.must(v.Sync(w.ctx))
			w.crash.FailCall(n, fault)
			err := v.Resize(5 * blockSize)
			faulted := w.crash.Faulted()
			w.crash.ClearFault()
			if !faulted {
				w.must(err)
				if n < 6 {
					t.Errorf("a resize makes %d calls only", n)
				}
				w.abandon()
				break
			}
			if err == nil { // only what is cached may get lost without an error
				w.abandon()
				continue
			}
			if !errors.Is(err, fault) || v.Size() != int64(len(data)) {
				t.Fatalf("call %d: %v, and %d bytes", n, err, v.Size())
			}
			w.equal(v.Device, data, fmt.Sprintf("after call %d failed", n))
			w.kill()
			v = w.open(v.Record().ID)
			if size := v.Size(); size != int64(len(data)) && size != 5*blockSize {
				t.Fatalf("call %d: %d bytes when it is opened again", n, size)
			}
			w.equal(v.Device, enlarged(data, v.Size()), "opened again")
			w.must(v.Resize(6 * blockSize))
			w.equalSnapshot(w.snapshot(v), enlarged(data, 6*blockSize), "resized again")
			w.abandon()
		}
	}
}

func TestResizeRefusesWhatNoVolumeCanHave(t *testing.T) {
	w := newWorld(t, 1)
	defer func() { w.abandon() }()
	v := w.openNew(nil, 3*blockSize)
	for size, want := range map[int64]error{
		2 * blockSize: ErrShrink, 512: ErrShrink, 3*blockSize - 512: ErrShrink,
		3*blockSize + 1: ErrSize, 0: ErrSize, -512: ErrSize, MaxSize + 512: ErrSize, 3 * blockSize: nil,
	} {
		if err := v.Resize(size); !errors.Is(err, want) {
			t.Errorf("%d bytes: %v, want %v", size, err, want)
		}
	}
	if v.Size() != 3*blockSize || v.Record().Size != 3*blockSize {
		t.Errorf("%d bytes, on record %d", v.Size(), v.Record().Size)
	}
	w.must(v.Close())
	if err := v.Resize(4 * blockSize); !errors.Is(err, errClosed) {
		t.Errorf("of a closed volume: %v", err)
	}
}

// The snapshot has the size of its cut to the byte, also if the volume grows, and is
// written over its former end, while it is made; and also if it has to be made without
// its parent, or is taken back.
func TestVolumeMayGrowWhileASnapshotIsMade(t *testing.T) {
	for _, fate := range []string{"committed", "full", "aborted", "aborted and killed"} {
		t.Run(fate, func(t *testing.T) {
			w := newWorld(t, 1)
			defer func() { w.abandon() }()
			data := noise(2*blockSize+512, 1)
			v := w.openNew(nil, int64(len(data)))
			w.write(v, data, 0)
			root := w.snapshot(v)
			w.overwrite(v, data, 512, 2*blockSize, 2)
			if fate == "full" {
				w.must(w.mem.Delete(w.ctx, "pins/"+root.String()+"/"+v.name))
				w.must(storeIn(w.mem).Delete(w.ctx, root))
				// Between the cut and the attempt without a parent.
				w.store.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "intents/", Times: 1}, blockstoretest.Fault{
					Before: func(context.Context, blockstoretest.Call) { w.must(v.Resize(3 * blockSize)) },
				})
			}
			cut := bytes.Clone(data)
			outcome, err := v.Snapshot(w.ctx, SnapshotOptions{Cut: func(a *snapshot.Attempt) {
				w.must(v.Resize(4*blockSize + 1024))
				data = enlarged(data, 4*blockSize+1024)
				w.equal(v.Device, data, "grown after the cut")
				w.overwrite(v, data, 700, 2*blockSize+300, 3)
				w.overwrite(v, data, 512, 4*blockSize+512, 4)
				if fate == "aborted" || fate == "aborted and killed" {
					w.must(storeIn(w.mem).Delete(w.ctx, a.ID()))
				}
				if fate == "aborted and killed" {
					w.store.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
				}
			}})
			w.store.Heal()
			switch fate {
			case "aborted and killed":
				w.kill()
				v = w.open(v.Record().ID)
				w.equal(v.Device, data, "after a kill, with a sealed layer of the former size")
				w.must(v.Settle(w.ctx))
			case "aborted":
				if !errors.Is(err, snapshot.ErrAborted) {
					t.Fatal(err)
				}
			default:
				w.must(err)
				w.equalSnapshot(outcome.Snapshot, cut, "the cut")
			}
			w.equal(v.Device, data, "afterwards")
			w.equalSnapshot(w.snapshot(v), data, "the next")
		})
	}
}

// A write to the end is of a whole page when it is asked for, and of a part when it is
// carried out.
func TestWritersAtTheEndGoOnWhileTheVolumeGrows(t *testing.T) {
	w := newWorld(t, 1)
	defer func() { w.abandon() }()
	v := w.openNew(nil, 512)
	var want []byte
	done := make(chan struct{})
	work := func(do func(n uint64, size int64) error) func() {
		return func() {
			for n := uint64(0); ; n++ {
				select {
				case <-done:
					return
				default:
				}
				if err := do(n, v.Size()); err != nil {
					t.Error(err)
					return
				}
			}
		}
	}
	var working sync.WaitGroup
	working.Go(work(func(n uint64, size int64) error {
		off := max(0, size-size%pageSize-int64(n%3)*pageSize)
		p := noise(int(size-off), n)
		want = enlarged(want, max(size, int64(len(want))))
		if n%4 == 0 {
			clear(want[off:size])
			return v.Zero(w.ctx, off, size-off)
		}
		copy(want[off:], p)
		_, err := v.WriteAt(w.ctx, p, off)
		return err
	}))
	working.Go(work(func(_ uint64, size int64) error {
		_, err := v.ReadAt(w.ctx, make([]byte, size), 0)
		if err == nil {
			_, err = v.NextHole(w.ctx, 0)
		}
		return err
	}))
	working.Go(work(func(uint64, int64) error { return v.Sync(w.ctx) }))
	for size := int64(1024); size <= 60*pageSize; size += 512 {
		w.must(v.Resize(size))
	}
	close(done)
	working.Wait()
	w.equal(v.Device, enlarged(want, v.Size()), "in the end")
	w.must(v.Close())
}
