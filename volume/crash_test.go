package volume

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A drill is one run of a scene in which something goes wrong at one step: a
// volume with a root, with blocks changed in whole, in part, and discarded, is
// snapshotted.
type drill struct {
	*world
	v    *Volume
	data []byte // what the volume should hold
	torn []tear // what it may hold instead

	// Of the snapshot that the scene makes:
	id  manifest.SnapshotID
	cut []byte // what it should hold if it is committed

	mate *Volume               // of a set; nil: the scene makes none
	made []manifest.SnapshotID // of the set, as far as they were begun
}

// A tear is a write of which any part may be there: it failed, or it was not
// synced, and the disk told so or lost power.
type tear struct {
	off       int64
	old, new  []byte
	powerOnly bool
}

// A scene is a snapshot being made in some way.
type scene struct {
	name     string
	writes   bool // after the cut
	abort    bool // by somebody else, while it is uploaded
	noRoom   bool // for clean copies
	reopened bool // an earlier attempt was aborted without a write in between
	set      bool // with another volume
}

var scenes = []scene{
	{name: "commit"},
	{name: "commit with writes", writes: true},
	{name: "commit without room", noRoom: true},
	{name: "merge back", writes: true, abort: true},
	{name: "reopen", abort: true},
	{name: "commit after reopen", reopened: true},
	{name: "commit a set", set: true, writes: true},
	{name: "abort a set", set: true, abort: true},
}

const drillSize = blockSize*3 + pageSize + 512

func newDrill(t testing.TB, seed uint64, s scene) *drill {
	t.Helper()
	w := newWorld(t, seed)
	d := &drill{world: w, data: make([]byte, drillSize)}
	first := w.openNew(nil, blockSize*3)
	w.write(first, noise(blockSize*3, 1), 0)
	from := w.snapshot(first)
	w.must(first.Close())

	d.v = w.openNew(&from, drillSize)
	copy(d.data, noise(blockSize*3, 1))
	d.set(noise(blockSize, 2), 0)
	d.id, d.cut = w.snapshot(d.v), bytes.Clone(d.data) // so that block 0 diverged
	d.set(noise(pageSize, 3), pageSize)
	d.set(noise(1000, 4), blockSize+500)
	w.must(d.v.Zero(w.ctx, 2*blockSize, blockSize))
	clear(d.data[2*blockSize : 3*blockSize])
	d.set(noise(700, 5), drillSize-700)
	if s.reopened {
		w.store.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "data/", Times: 1}, blockstoretest.Fault{Err: errInjected})
		if _, err := d.v.Snapshot(w.ctx, SnapshotOptions{}); !errors.Is(err, errInjected) {
			t.Fatalf("snapshot with a failing pack: %v", err)
		}
	}
	if s.noRoom {
		d.setLimit(1)
	}
	if s.set {
		d.openMate()
	}
	w.must(d.v.Sync(w.ctx))
	return d
}

func (d *drill) set(p []byte, off int64) {
	d.Helper()
	d.write(d.v, p, off)
	copy(d.data[off:], p)
}

// play makes the scene's snapshot.
func (d *drill) play(s scene) error {
	cut := bytes.Clone(d.data)
	make := d.v.Snapshot
	if s.set {
		make = d.snapshotSet
	}
	outcome, err := make(d.ctx, SnapshotOptions{Cut: func(a *snapshot.Attempt) {
		d.id, d.cut = a.ID(), cut
		if s.writes {
			d.tryWrite(noise(pageSize, 6), 2*pageSize)
			d.tryWrite(noise(100, 7), blockSize+9*pageSize+10)
		}
		if s.abort {
			d.must(storeIn(d.mem).Delete(d.ctx, a.ID()))
		}
	}})
	if err == nil && outcome.Snapshot != d.id {
		d.Fatalf("committed %s, began %s", outcome.Snapshot, d.id)
	}
	return err
}

// tryWrite writes, and makes it durable, unless the disk fails.
func (d *drill) tryWrite(p []byte, off int64) {
	t := tear{off: off, old: bytes.Clone(d.data[off:][:len(p)]), new: p}
	if _, err := d.v.WriteAt(d.ctx, p, off); err != nil {
		d.torn = append(d.torn, t)
		return
	}
	copy(d.data[off:], p)
	if d.v.Sync(d.ctx) != nil {
		t.powerOnly = d.crash.Stopped() // else the disk has lost it, and told so
		d.torn = append(d.torn, t)
	}
}

// adopt takes for granted what became of torn writes.
func (d *drill) adopt(power bool) {
	for _, t := range d.torn {
		if t.powerOnly && !power {
			continue
		}
		got := make([]byte, len(t.old))
		if _, err := d.v.ReadAt(d.ctx, got, t.off); err != nil {
			d.Fatalf("read a torn write: %v", err)
		}
		for i := range got {
			if got[i] == t.old[i] || got[i] == t.new[i] {
				d.data[t.off+int64(i)] = got[i]
			}
		}
	}
}

// check makes sure that nothing was lost: the volume holds what it should, the
// scene's snapshot what it should or is not there, and another snapshot works.
func (d *drill) check(what string) {
	d.Helper()
	d.equal(d.v.Device, d.data, what+": before Settle")
	d.must(d.v.Settle(d.ctx))
	if d.v.hasSealed() || len(d.v.Record().Layers) != 1 || d.v.Record().Pending != nil {
		d.Fatalf("%s: settled, with %+v", what, d.v.Record())
	}
	d.equal(d.v.Device, d.data, what+": after Settle")
	if d.mate != nil { // before anybody settles it
		d.wantWhole(what)
	}
	described, err := d.host.Store.Describe(d.ctx, d.id)
	switch {
	case err != nil && !errors.Is(err, snapshot.ErrNotFound):
		d.Fatalf("%s: %v", what, err)
	case err == nil && described.State == snapshot.Completed:
		d.equalSnapshot(d.id, d.cut, what+": snapshot")
	case err == nil && described.State == snapshot.Pending:
		d.Fatalf("%s: %s is pending for ever", what, d.id)
	}
	d.equalSnapshot(d.snapshot(d.v), d.data, what+": next snapshot")
	d.equal(d.v.Device, d.data, what+": after the next snapshot")
	if pins := d.pins(string(d.v.name)); len(pins) != 1 || pins[0] != d.v.Record().Root.String() {
		d.Fatalf("%s: pins %v, root %s", what, pins, d.v.Record().Root)
	}
	d.checkMate(what)
	d.must(d.v.Close())
	d.end()
}

// pins returns the snapshots that a volume pins.
func (w *world) pins(holder string) []string {
	w.Helper()
	var ids []string
	w.must(w.mem.List(w.ctx, "pins/", func(info blockstore.Info) error {
		id, by, err := manifest.ParsePinKey(info.Key)
		if by == holder {
			ids = append(ids, id.String())
		}
		return err
	}))
	return ids
}

// dies makes all requests fail once the process has died.
func (d *drill) dies() {
	d.store.Inject(blockstoretest.Rule{Match: func(blockstoretest.Call) bool { return d.crash.Faulted() }},
		blockstoretest.Fault{Err: errInjected})
}

func (d *drill) restart(s scene, power bool) {
	d.store.Heal()
	d.setLimit(noLimit)
	if power {
		d.powerCut()
	} else {
		d.kill()
	}
	d.v = d.open(d.v.Record().ID)
	if d.mate != nil {
		d.mate = d.open(d.mate.Record().ID)
	}
	d.adopt(power)
}

var stride = flag.Int("stride", 3*thinning, "the crash tests take one of so many steps")

// eachStep plays scenes with something going wrong at their steps, until there
// are no more: do returns whether it did go wrong. The tests take turns with the
// steps, unless -stride=1.
func eachStep(t *testing.T, do func(t *testing.T, s scene, step int) bool) {
	for i, s := range scenes {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			for step := (i + len(t.Name())) % *stride; do(t, s, step); step += *stride {
				if step > 2000 {
					t.Fatal("it has no end")
				}
			}
		})
	}
}

func TestKillAtAnyFileCallLosesNothing(t *testing.T) {
	stopAtEachCall(t, "killed", false)
}

func TestPowerCutAtAnyFileCallLosesNothingSynced(t *testing.T) {
	stopAtEachCall(t, "power cut", true)
}

func stopAtEachCall(t *testing.T, how string, power bool) {
	eachStep(t, func(t *testing.T, s scene, step int) bool {
		d := newDrill(t, uint64(step), s)
		d.dies()
		d.crash.StopCall(step)
		_ = d.play(s) // whatever it returns, nobody hears it
		stopped := d.crash.Faulted()
		d.restart(s, power)
		d.check(fmt.Sprintf("%s at file call %d", how, step))
		return stopped
	})
}

func TestKillAtAnyRequestLosesNothing(t *testing.T) {
	for _, power := range []bool{false, true} {
		for _, applied := range []bool{false, true} {
			t.Run(fmt.Sprintf("power=%t,applied=%t", power, applied), func(t *testing.T) {
				eachStep(t, func(t *testing.T, s scene, step int) bool {
					d := newDrill(t, uint64(step), s)
					d.dies()
					d.store.Inject(blockstoretest.Rule{Skip: step, Times: 1}, blockstoretest.Fault{
						LoseReply: applied,
						Err:       errUnless(applied),
						Before:    func(context.Context, blockstoretest.Call) { d.stop() },
					})
					_ = d.play(s)
					stopped := d.crash.Faulted()
					d.restart(s, power)
					d.check(fmt.Sprintf("killed at request %d", step))
					return stopped
				})
			})
		}
	}
}

func errUnless(applied bool) error {
	if applied {
		return nil
	}
	return errInjected
}

// stop stops the process now.
func (d *drill) stop() {
	d.crash.StopCall(0)
	_, _ = d.crash.ReadDir("/") // is told so
}

// TestRequestFailureLosesNothing has one request fail, or everything from one
// on, while the process lives: it goes on, and a later snapshot works.
func TestRequestFailureLosesNothing(t *testing.T) {
	for _, times := range []int{1, 0} {
		for _, lost := range []bool{false, true} {
			t.Run(fmt.Sprintf("times=%d,lost=%t", times, lost), func(t *testing.T) {
				eachStep(t, func(t *testing.T, s scene, step int) bool {
					d := newDrill(t, uint64(step), s)
					d.store.Reset()
					fault := blockstoretest.Fault{LoseReply: true}
					if !lost {
						fault = blockstoretest.Fault{Err: blockstore.ErrUnavailable}
					}
					d.store.Inject(blockstoretest.Rule{Skip: step, Times: times}, fault)
					err := d.play(s)
					failed := len(d.store.Calls()) > step
					if err == nil && s.abort {
						t.Fatalf("an aborted snapshot succeeded")
					}
					d.store.Heal()
					d.setLimit(noLimit)
					d.check(fmt.Sprintf("request %d failed", step))
					return failed
				})
			})
		}
	}
}

// TestFileFailureLosesNothing has one call of the filesystem fail while the
// process lives. After it, a kill or a power cut.
func TestFileFailureLosesNothing(t *testing.T) {
	for _, power := range []bool{false, true} {
		t.Run(fmt.Sprintf("power=%t", power), func(t *testing.T) {
			eachStep(t, func(t *testing.T, s scene, step int) bool {
				d := newDrill(t, uint64(step), s)
				d.crash.FailCall(step, syscall.EIO)
				err := d.play(s)
				failed := d.crash.Faulted()
				d.crash.ClearFault()
				what := fmt.Sprintf("file call %d failed", step)
				if err != nil && !s.abort && !errors.Is(err, syscall.EIO) {
					t.Fatalf("%s: %v", what, err)
				}
				d.adopt(false)
				d.equal(d.v.Device, d.data, what)
				if !s.writes { // so only the sealed layer can be one that failed
					d.must(d.v.Sync(d.ctx))
				}
				d.tryWrite(noise(pageSize, 8), blockSize)
				d.restart(s, power)
				d.check(what)
				return failed
			})
		})
	}
}
