package volume

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// cleanData returns how much space the bytes of all clean layers take.
func (w *world) cleanData() int64 {
	w.Helper()
	total := int64(0)
	add := func(dir string) error {
		n, err := w.host.FS.Allocated(filepath.Join(dir, "data"))
		total += n
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	w.must(w.host.Budget.eachBase(add))
	w.must(w.host.Budget.eachVolume(func(dir string) error { return add(cleanDir(dir)) }))
	return total
}

// fill leaves so many bytes of the disk.
func (w *world) fill(leave int64) { w.crash.SetCapacity(w.crash.Used() + leave) }

func TestWritesToAFullDiskTakeTheSpaceOfCleanBytes(t *testing.T) {
	for name, prepare := range map[string]func(w *world) (closeIt func()){
		"of an unused base": func(w *world) func() { w.idleBases(16, 9); return func() {} },
		"of a volume that nobody has open": func(w *world) func() {
			v, data := newRestored(w, 16)
			w.overwrite(v, data, len(data), 0, 5)
			w.snapshot(v)
			w.must(v.Close())
			return func() {
				v := w.open(v.record.ID)
				w.equal(v.Device, data, "the volume that nobody had open")
			}
		},
		"of a base in use": func(w *world) func() {
			id, data := w.source(16, 9)
			d := w.mountAs("mnt-9", id)
			w.must(w.hydrate(d))
			return func() { w.equal(d, data, "the base in use") }
		},
		"of a base that another process uses": func(w *world) func() {
			id, data := w.source(16, 9)
			other := w.process()
			d := other.mountAs("mnt-9", id)
			w.must(other.hydrate(d))
			return func() { w.equal(d, data, "the base that another process uses"); other.abandon() }
		},
		"of the volume's own clean layer": func(w *world) func() {
			v, data := newRestored(w, 16)
			w.overwrite(v, data, len(data), 0, 5)
			w.snapshot(v)
			return func() { w.equal(v.Device, data, "the volume whose clean bytes went") }
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, 1)
			v := w.openNew(nil, 32*blockSize)
			data := make([]byte, 32*blockSize)
			closeIt := prepare(w)
			w.fill(4 * blockSize)
			written := 0
			for ; written < 32; written++ {
				if _, err := v.WriteAt(w.ctx, noise(blockSize, uint64(written)), int64(written)*blockSize); err != nil {
					if !vfs.IsFull(err) {
						t.Fatalf("write %d: %v", written, err)
					}
					break
				}
				copy(data[written*blockSize:], noise(blockSize, uint64(written)))
			}
			if written < 18 || written > 21 || w.cleanData() != 0 {
				t.Errorf("%d blocks were written, in the room for 4 and 16 clean ones, of which %d bytes are left", written, w.cleanData())
			}
			w.equal(v.Device, data[:written*blockSize], "what was written")
			w.must(v.Sync(w.ctx))
			w.crash.SetCapacity(0)
			w.overwrite(v, data, len(data), 0, 77)
			w.equal(v.Device, data, "written with room again")
			closeIt()
			w.abandon()
		})
	}
}

// TestEveryCallOfASnapshotMayFindTheDiskFull: one after the other, with clean bytes to
// evict. It is made all the same.
func TestEveryCallOfASnapshotMayFindTheDiskFull(t *testing.T) {
	for step := 0; ; step += *stride {
		w := newWorld(t, uint64(step))
		w.idleBases(4, 9)
		v, data := newRestored(w, 3)
		w.overwrite(v, data, blockSize+100, 50, 2)
		w.crash.FailCall(step, syscall.ENOSPC)
		outcome, err := v.Snapshot(w.ctx, SnapshotOptions{})
		happened := w.crash.Faulted()
		w.crash.ClearFault()
		// Syncs tell of a failure once, so they are not tried again; nor are calls
		// that only look.
		if err != nil && !vfs.IsFull(err) {
			t.Fatalf("call %d: %v", step, err)
		}
		if err == nil {
			w.equalSnapshot(outcome.Snapshot, data, fmt.Sprintf("call %d: snapshot", step))
		}
		w.equal(v.Device, data, fmt.Sprintf("call %d", step))
		w.abandon()
		if !happened {
			break
		}
	}
}

// A tight is a simulation on a disk that is too small for what is done on it.
type tight struct {
	*world
	rng  *rand.Rand
	id   manifest.VolumeID
	v    *Volume
	data []byte
	full int // calls that found the disk full, with nothing clean left
}

// refused checks an error: only a disk that is full and has nothing clean is a reason.
func (s *tight) refused(what string, err error) {
	s.Helper()
	if !vfs.IsFull(err) {
		s.Fatalf("%s: %v", what, err)
	}
	full, left := err, s.cleanData()
	if s.v != nil && s.v.hasSealed() { // some of them are the snapshot's
		left, err = s.host.FS.Allocated(filepath.Join(s.v.base.dir, "data"))
		s.must(err) // open, so there
	}
	if left > 0 {
		s.Fatalf("%s: %v, and there are %d clean bytes", what, full, left)
	}
	s.full++
}

func (s *tight) write() {
	off := s.rng.Int64N(int64(len(s.data)))
	n := min(int64(len(s.data))-off, 1+s.rng.Int64N(3*blockSize))
	if s.rng.IntN(2) == 0 {
		off = off / pageSize * pageSize
		n = min((n+pageSize-1)/pageSize*pageSize, int64(len(s.data))-off)
	}
	p := noise(int(n), s.rng.Uint64())
	var err error
	if s.rng.IntN(4) == 0 {
		clear(p)
		err = s.v.Zero(s.ctx, off, n)
	} else {
		_, err = s.v.WriteAt(s.ctx, p, off)
	}
	if err == nil {
		copy(s.data[off:], p)
		return
	}
	s.refused("write", err)
	got := make([]byte, n)
	if _, err := s.v.ReadAt(s.ctx, got, off); err != nil {
		s.Fatalf("read after a refused write: %v", err)
	}
	for i := range got {
		if got[i] != p[i] && got[i] != s.data[off+int64(i)] {
			s.Fatalf("a refused write left a third content at %d", off+int64(i))
		}
	}
	copy(s.data[off:], got)
}

func (s *tight) reopen(end func()) {
	end()
	s.v = nil
	v, err := s.host.OpenVolume(s.id)
	if err != nil {
		s.refused("open", err)
		s.fill(16 * blockSize)
		v, err = s.host.OpenVolume(s.id)
		s.must(err)
	}
	s.v = v
	s.lived = append(s.lived, v.Device)
}

func (s *tight) step() {
	switch s.rng.IntN(14) {
	case 0, 1, 2, 3:
		s.write()
	case 4:
		s.fill(s.rng.Int64N(4 * blockSize))
	case 5:
		if s.rng.IntN(2) == 0 {
			s.crash.SetCapacity(s.crash.Used() * 3 / 2)
		}
	case 6, 7:
		if err := s.hydrate(s.v.Device); err != nil && !errors.Is(err, ErrFull) {
			s.Fatalf("hydrate: %v", err)
		}
	case 8:
		image := bytes.Clone(s.data)
		outcome, err := s.v.Snapshot(s.ctx, SnapshotOptions{})
		if err != nil {
			s.refused("snapshot", err)
			break
		}
		s.equalSnapshot(outcome.Snapshot, image, "snapshot")
	case 9:
		limits := []int64{noLimit, 0, 6 * blockSize}
		s.setLimit(limits[s.rng.IntN(len(limits))])
	case 10:
		if err := s.v.Sync(s.ctx); err != nil {
			s.Fatalf("sync: %v", err)
		}
	case 11:
		switch s.rng.IntN(3) {
		case 0:
			s.reopen(func() { s.must(s.v.Close()) })
		case 1:
			s.reopen(s.kill)
		default:
			s.must(s.v.Sync(s.ctx))
			s.reopen(s.powerCut)
		}
	default:
		s.equal(s.v.Device, s.data, "device")
	}
}

// TestFullDiskRefusesWritesAndNothingElse does random things on a disk that is too
// small: nothing that was acknowledged is ever lost, writes are refused only when
// nothing clean is left, and when there is room again everything goes on.
func TestFullDiskRefusesWritesAndNothingElse(t *testing.T) {
	refused, evictions := 0, int64(0)
	t.Run("seeds", func(t *testing.T) {
		for seed := range *tightSeeds {
			t.Run(fmt.Sprint(seed), func(t *testing.T) {
				w := newWorld(t, seed)
				s := &tight{world: w, rng: rand.New(rand.NewPCG(seed, 3))}
				s.v, s.data = newRestored(w, 12)
				s.id = s.v.record.ID
				for range 80 {
					s.step()
				}
				s.crash.SetCapacity(0)
				s.setLimit(noLimit)
				s.equal(s.v.Device, s.data, "in the end")
				s.must(s.v.Settle(s.ctx))
				s.equalSnapshot(s.snapshot(s.v), s.data, "the last snapshot")
				s.must(s.hydrate(s.v.Device))
				if st := s.v.Stats(); st.HydratedBytes != st.TotalBytes {
					s.Fatalf("%d of %d bytes are hydrated", st.HydratedBytes, st.TotalBytes)
				}
				s.equal(s.v.Device, s.data, "hydrated")
				evictions += s.host.Budget.rounds.Load()
				refused += s.full
				s.must(s.v.Close())
				s.end()
			})
		}
	})
	if !t.Failed() && (refused == 0 || evictions == 0) {
		t.Errorf("%d calls were refused, and %d evictions: the test does not test anything", refused, evictions)
	}
}

var tightSeeds = flag.Uint64("tight-seeds", max(12, 40/thinning), "how many simulations TestFullDiskRefusesWritesAndNothingElse runs")

// A fullForRecords has no room for the record of any volume.
type fullForRecords struct{ vfs.FS }

func (f fullForRecords) OpenFile(name string, flag int, perm fs.FileMode) (vfs.File, error) {
	if filepath.Base(name) == recordName+".tmp" {
		return nil, &fs.PathError{Op: "open", Path: name, Err: syscall.ENOSPC}
	}
	return f.FS.OpenFile(name, flag, perm)
}

// TestDeleteThatNeverFindsRoomToBeginHarmsNothing, although it takes what is clean of
// the volume for that.
func TestDeleteThatNeverFindsRoomToBeginHarmsNothing(t *testing.T) {
	w := newWorld(t, 1)
	v, data := newRestored(w, 2)
	base := *v.Record().Root
	w.overwrite(v, data, pageSize, 0, 2)
	w.snapshot(v)
	w.must(v.Close())
	disk := w.host.FS
	w.host.FS = fullForRecords{disk}
	if err := w.host.Delete(w.ctx, v.record.ID); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("delete: %v, want ENOSPC", err)
	}
	w.host.FS = disk
	if n, err := cache.CleanAllocated(disk, cleanDir(v.dir)); n != 0 || err != nil {
		t.Errorf("%d clean bytes are left, %v", n, err)
	}
	d := w.mountAs("mnt-1", base)
	w.must(w.hydrate(d)) // so that the base has what the volume changed
	v = w.open(v.record.ID)
	w.equal(v.Device, data, "the volume that could not be deleted")
	w.must(errors.Join(v.Close(), d.Close()))
	w.must(w.host.Delete(w.ctx, v.record.ID))
	w.end()
}
