package volume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// newSource returns a snapshot to create volumes from, and its content.
func newSource(w *world, n int) (manifest.SnapshotID, []byte) {
	w.Helper()
	v, data := newRestored(w, n)
	id := *v.Record().Root
	w.must(v.Close())
	w.must(w.host.Delete(w.ctx, v.record.ID))
	return id, data
}

// TestCreateAndOpenAskLittle of the store: as few requests for a large snapshot
// as for a small one, and none for opening.
func TestCreateAndOpenAskLittle(t *testing.T) {
	w := newRealWorld(t)
	source := w.openNew(nil, 2*manifest.LeafBlocks*blockSize)
	w.write(source, noise(pageSize, 1), 0)
	w.write(source, noise(pageSize, 2), manifest.LeafBlocks*blockSize)
	id := w.snapshot(source)
	w.must(source.Close())

	store := w.host.Store
	w.host.Store = storeIn(w.store) // that remembers nothing
	defer func() { w.host.Store = store }()
	w.store.Reset()
	created := w.create(&id, 0)
	if calls := w.store.Calls(); len(calls) > 6 {
		t.Errorf("creating a volume took %d requests: %v", len(calls), calls)
	}
	w.store.Reset()
	v := w.open(created)
	if calls := w.store.Calls(); len(calls) != 0 {
		t.Errorf("opening it took %v", calls)
	}
	w.must(v.Settle(w.ctx))
	if calls := w.store.Calls(); len(calls) > 1 {
		t.Errorf("settling it took %v", calls)
	}
	w.must(v.Close())
}

func TestCreateRefuses(t *testing.T) {
	w := newRealWorld(t)
	id, _ := newSource(w, 2)
	unknown := manifest.NewSnapshotID(id.Lineage)
	for name, c := range map[string]struct {
		from      *manifest.SnapshotID
		size      int64
		blockSize int
		want      error // nil: any
	}{
		"blank without a size":   {nil, 0, blockSize, ErrSize},
		"half a sector":          {nil, 100, blockSize, ErrSize},
		"a negative size":        {nil, -512, blockSize, ErrSize},
		"more than a volume has": {nil, MaxSize + 512, blockSize, ErrSize},
		"smaller than its snap":  {&id, blockSize, 0, ErrTooSmall},
		"an odd block size":      {nil, 512, 1000, nil},
		"an unknown snapshot":    {&unknown, 0, 0, snapshot.ErrNotFound},
	} {
		if _, err := w.host.Create(w.ctx, c.from, c.size, c.blockSize, ""); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	w.remove(id)
	if _, err := w.host.Create(w.ctx, &id, 0, 0, ""); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("a deleted snapshot: %v, want snapshot.ErrNotFound", err)
	}
	w.wantNothing("refused volumes")
}

// wantNothing makes sure that no volume and no volume's pin is there.
func (w *world) wantNothing(what string) {
	w.Helper()
	names, err := w.host.FS.ReadDir(VolumesDir(w.host.State))
	w.must(err)
	if len(names) > 0 {
		w.Errorf("%s left the folders %v", what, names)
	}
	w.must(w.mem.List(w.ctx, "pins/", func(info blockstore.Info) error {
		w.Errorf("%s left the pin %s", what, info.Key)
		return nil
	}))
}

func TestCreateThatMayNotPinLeavesNothing(t *testing.T) {
	w := newRealWorld(t)
	id, _ := newSource(w, 1)
	for _, op := range []blockstoretest.Op{blockstoretest.OpPut, blockstoretest.OpDelete} {
		w.store.Inject(blockstoretest.Rule{Op: op, Prefix: "pins/"}, blockstoretest.Fault{Err: blockstore.ErrDenied})
	}
	if _, err := w.host.Create(w.ctx, &id, 0, 0, ""); !errors.Is(err, blockstore.ErrDenied) {
		t.Errorf("create: %v, want ErrDenied", err)
	}
	w.wantNothing("a volume that may not pin")
}

// TestCreateOrDeleteInterruptedLeavesWhatDeleteRemoves goes through all steps of
// creating a volume, and of deleting one, and has each fail or be the last.
func TestCreateOrDeleteInterruptedLeavesWhatDeleteRemoves(t *testing.T) {
	type fault struct {
		name   string
		inject func(w *world, step int)
		hit    func(w *world, step int) bool
		after  func(w *world)
	}
	lives := func(*world) {}
	dies := func(w *world) { w.kill() }
	down := func(w *world) {
		w.store.Inject(blockstoretest.Rule{Match: func(blockstoretest.Call) bool { return w.crash.Stopped() }}, blockstoretest.Fault{Err: errInjected})
	}
	request := func(f blockstoretest.Fault, times int) func(*world, int) {
		return func(w *world, step int) {
			w.store.Reset()
			w.store.Inject(blockstoretest.Rule{Skip: step, Times: times}, f)
		}
	}
	wasRequest := func(w *world, step int) bool { return len(w.store.Calls()) > step }
	wasCall := func(w *world, _ int) bool { return w.crash.Faulted() }
	faults := []fault{
		{"request fails", request(blockstoretest.Fault{Err: blockstore.ErrUnavailable}, 1), wasRequest, lives},
		{"reply lost", request(blockstoretest.Fault{LoseReply: true}, 1), wasRequest, lives},
		{"store goes down", request(blockstoretest.Fault{LoseReply: true}, 0), wasRequest, lives},
		{"file call fails", func(w *world, step int) { w.crash.FailCall(step, syscall.EIO) }, wasCall, lives},
		{"killed", func(w *world, step int) { down(w); w.crash.StopCall(step) }, wasCall, dies},
		{"power cut", func(w *world, step int) { down(w); w.crash.StopCall(step) }, wasCall, func(w *world) { w.powerCut() }},
	}
	for _, f := range faults {
		for _, what := range []string{"create", "delete"} {
			t.Run(f.name+"/"+what, func(t *testing.T) {
				for step := 0; ; step++ {
					w := newWorld(t, uint64(step))
					id, data := newSource(w, 1)
					var err error
					if what == "create" {
						f.inject(w, step)
						_, err = w.host.Create(w.ctx, &id, 0, 0, "")
					} else {
						v := w.openNew(&id, 0)
						w.must(w.hydrate(v.Device)) // so that the base has what the volume changes
						w.overwrite(v, data, pageSize, 0, 7)
						w.snapshot(v)
						w.leavePending(v, data)
						f.inject(w, step)
						err = w.host.Delete(w.ctx, v.record.ID)
					}
					hit := f.hit(w, step)
					w.store.Heal()
					w.crash.ClearFault()
					if err == nil && !hit && what == "delete" {
						w.wantNothing("a deleted volume")
					}
					f.after(w)
					w.deleteAll(data)
					if t.Failed() {
						t.Fatalf("at step %d", step)
					}
					w.end()
					if !hit {
						return
					}
					step += thinning / 4
				}
			})
		}
	}
}

// leavePending changes a volume, of the given content, and leaves it, synced and
// closed, with an attempt that is not settled.
func (w *world) leavePending(v *Volume, data []byte) {
	w.Helper()
	w.overwrite(v, data, pageSize, pageSize, 2)
	w.store.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "outcomes/"}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
	if _, err := v.Snapshot(w.ctx, SnapshotOptions{}); !errors.Is(err, blockstore.ErrUnavailable) {
		w.Fatalf("snapshot without an outcome: %v", err)
	}
	w.store.Heal()
	if v.Record().Pending == nil {
		w.Fatalf("nothing is pending")
	}
	w.must(v.Sync(w.ctx))
	w.must(v.Close())
}

// deleteAll deletes every volume that is listed, which has the given content for as
// long as it can be opened, and makes sure that nothing is left but empty folders of
// volumes that never were.
func (w *world) deleteAll(data []byte) {
	w.Helper()
	records, failed, err := List(w.host.FS, w.host.State)
	w.must(errors.Join(append(failed, err)...))
	for _, r := range records {
		if v, err := w.host.OpenVolume(r.ID); err == nil {
			w.equal(v.Device, data, "a volume that can be opened")
			w.must(v.Settle(w.ctx))
			w.must(v.Close())
		} else if !r.Creating && !r.Deleting {
			w.Errorf("open what is neither half made nor half deleted: %v", err)
		}
		w.must(w.host.Delete(w.ctx, r.ID))
	}
	names, err := w.host.FS.ReadDir(VolumesDir(w.host.State))
	w.must(err)
	for _, name := range names {
		inside, err := w.host.FS.ReadDir(filepath.Join(VolumesDir(w.host.State), name))
		w.must(err)
		for _, file := range inside {
			if !slices.Contains([]string{"lock", "layers", "volume.json.tmp"}, file) {
				w.Errorf("%s was left behind", filepath.Join(name, file))
			}
		}
	}
	w.must(w.mem.List(w.ctx, "pins/", func(info blockstore.Info) error {
		if strings.Contains(info.Key, "vol-") {
			w.Errorf("the pin %s was left behind", info.Key)
		}
		return nil
	}))
	w.wantNonePending()
}

// A stoppingFS stops the process when it syncs a folder from which it has removed
// something, or when it removes it.
type stoppingFS struct {
	vfs.FS
	crash  *vfs.Crash
	folder string
	synced bool // stop at the removal only

	removed bool
}

func (s *stoppingFS) SyncDir(name string) error {
	if name == s.folder && s.removed && !s.synced {
		s.crash.StopCall(0)
	}
	return s.FS.SyncDir(name)
}

func (s *stoppingFS) RemoveAll(name string) error {
	if name == s.folder {
		s.crash.StopCall(0)
	}
	s.removed = true
	return s.FS.RemoveAll(name)
}

// TestRecordOfADeletedVolumeGoesLast: whatever of its folder a power cut brings back,
// nothing is there without the record by which it is found and deleted.
func TestRecordOfADeletedVolumeGoesLast(t *testing.T) {
	for _, synced := range []bool{false, true} {
		for seed := range uint64(40) {
			w := newWorld(t, seed)
			v, _ := newRestored(w, 1)
			w.must(v.Close())
			w.host.FS = &stoppingFS{FS: w.crash, crash: w.crash, folder: v.dir, synced: synced}
			if err := w.host.Delete(w.ctx, v.record.ID); !errors.Is(err, vfs.ErrStopped) {
				t.Errorf("seed %d: delete: %v, want ErrStopped", seed, err)
			}
			w.powerCut()
			names, err := w.host.FS.ReadDir(v.dir)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
			recorded := slices.Contains(names, recordName)
			for _, name := range names {
				if name != recordName && name != lockName && (synced || !recorded) {
					t.Errorf("synced %t, seed %d: of the folder there is %v", synced, seed, names)
				}
			}
			w.end()
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	w := newRealWorld(t)
	id := w.create(nil, blockSize)
	dir := Dir(w.host.State, id)
	v := w.open(id)
	if _, err := w.host.OpenVolume(id); !errors.Is(err, ErrInUse) {
		t.Errorf("a volume that is open: %v, want ErrInUse", err)
	}
	if err := w.host.Delete(w.ctx, id); !errors.Is(err, ErrInUse) {
		t.Errorf("deleting a volume that is open: %v, want ErrInUse", err)
	}
	w.must(v.Close())
	record := v.Record()
	for name, c := range map[string]struct {
		data string
		want error
	}{
		"a newer version": {`{"version": 2, "size": "none"}`, manifest.ErrVersion},
		"no JSON":         {`{"version": 1`, manifest.ErrCorrupt},
		"another volume":  {strings.Replace(encodeRecord(t, record), string(id), string(manifest.NewVolumeID()), 1), manifest.ErrCorrupt},
		"no layers":       {strings.Replace(encodeRecord(t, record), `"layers": [`, `"lairs": [`, 1), manifest.ErrCorrupt},
	} {
		w.must(vfs.WriteFileAtomic(w.host.FS, filepath.Join(dir, recordName), []byte(c.data)))
		if _, err := w.host.OpenVolume(id); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
		records, failed, err := List(w.host.FS, w.host.State)
		if len(records) != 0 || len(failed) != 1 || err != nil {
			t.Errorf("%s: listed %v, failed %v, %v", name, records, failed, err)
		}
	}
	w.must(record.save(w.host.FS, dir))
	w.must(w.host.Delete(w.ctx, id))
	if _, err := w.host.OpenVolume(id); !errors.Is(err, ErrNotFound) {
		t.Errorf("a deleted volume: %v, want ErrNotFound", err)
	}
	if err := w.host.Delete(w.ctx, id); !errors.Is(err, ErrNotFound) {
		t.Errorf("deleting a deleted volume: %v, want ErrNotFound", err)
	}
}

func encodeRecord(t *testing.T, r Record) string {
	t.Helper()
	disk := vfs.NewCrash(0)
	if err := r.save(disk, "/"); err != nil {
		t.Fatal(err)
	}
	data, err := vfs.ReadFile(disk, "/"+recordName, maxRecordLength)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestWrongStoreIsRefused: there the volume's pins would not be found.
func TestWrongStoreIsRefused(t *testing.T) {
	w := newRealWorld(t)
	id, _ := newSource(w, 1)
	v := w.openNew(&id, 0)
	w.must(v.Close())
	other := *w.host
	objects := blockstore.NewMem()
	var err error
	other.Store, err = snapshot.Init(context.Background(), objects)
	w.must(err)
	if err := other.Delete(w.ctx, v.record.ID); err == nil {
		t.Error("deleted with another store")
	}
	elsewhere, err := other.OpenVolume(v.record.ID)
	w.must(err)
	if err := elsewhere.Settle(w.ctx); err == nil {
		t.Error("settled with another store")
	}
	w.must(elsewhere.Close())
	w.must(w.host.Delete(w.ctx, v.record.ID))
	w.wantNothing("a deleted volume")
}

func TestEmptyImage(t *testing.T) {
	w := newRealWorld(t)
	lineage, err := w.host.Store.CreateLineage(w.ctx, blockSize, "")
	w.must(err)
	plan := snapshot.NewPlan(lineage.ID)
	plan.Geometry = manifest.Geometry{BlockSize: blockSize}
	outcome, err := w.host.Store.Create(w.ctx, plan, snapshot.Source{Extents: func(func(snapshot.Extent, error) bool) {}}, nil)
	w.must(err)
	d, closeIt := w.mount(outcome.Snapshot)
	w.must(w.hydrate(d))
	w.equal(d, nil, "empty snapshot")
	closeIt()

	v := w.openNew(&outcome.Snapshot, 0)
	if v.Size() != 0 || v.Allocated() != 0 {
		t.Errorf("size %d, allocated %d", v.Size(), v.Allocated())
	}
	if n, err := v.WriteAt(w.ctx, []byte{1}, 0); n != 0 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("write to an empty volume: %d, %v", n, err)
	}
	w.must(v.Sync(w.ctx))
	w.equalSnapshot(w.snapshot(v), nil, "snapshot of an empty volume")
	w.must(v.Close())

	larger := w.openNew(&outcome.Snapshot, blockSize+512)
	data := append(noise(100, 1), make([]byte, blockSize+412)...)
	w.write(larger, data[:100], 0)
	w.equal(larger.Device, data, "a larger volume")
	w.equalSnapshot(w.snapshot(larger), data, "its snapshot")
	w.must(larger.Close())
}

// TestVolumeOfManyLeaves grows across the end of a leaf and changes both.
func TestVolumeOfManyLeaves(t *testing.T) {
	w := newRealWorld(t)
	const leaf = manifest.LeafBlocks * blockSize
	first := w.openNew(nil, leaf-3*blockSize-512)
	w.write(first, noise(10000, 1), 5000)
	w.write(first, noise(10000, 2), leaf-3*blockSize-512-10000)
	id := w.snapshot(first)
	w.must(first.Close())

	v := w.openNew(&id, 2*leaf+512)
	w.write(v, noise(2*blockSize, 3), leaf-blockSize)
	w.write(v, noise(512, 4), 2*leaf)
	grown := w.snapshot(v)
	d, closeIt := w.mount(grown)
	for _, c := range []struct {
		off  int64
		n    int
		seed uint64
	}{{5000, 10000, 1}, {leaf - 3*blockSize - 512 - 10000, 10000, 2}, {leaf - blockSize, 2 * blockSize, 3}, {2 * leaf, 512, 4}} {
		for name, dev := range map[string]*Device{"volume": v.Device, "snapshot": d} {
			p := make([]byte, c.n)
			if _, err := dev.ReadAt(w.ctx, p, c.off); err != nil {
				t.Errorf("%s at %d: %v", name, c.off, err)
			} else if i := firstDifference(p, noise(c.n, c.seed)); i >= 0 {
				t.Errorf("%s at %d: wrong at %d", name, c.off, i)
			}
		}
	}
	var extents []string
	for at, err := d.NextData(w.ctx, 0); err == nil; at, err = d.NextData(w.ctx, at) {
		hole, err := d.NextHole(w.ctx, at)
		w.must(err)
		extents = append(extents, fmt.Sprintf("%d+%d", at/blockSize, (hole-at+blockSize-1)/blockSize))
		at = hole
		if at == d.Size() {
			break
		}
	}
	if want := []string{"0+1", "1020+1", "1023+2", "2048+1"}; !slices.Equal(extents, want) {
		t.Errorf("data in blocks %v, want %v", extents, want)
	}
	if n := d.Allocated(); n != 5*blockSize {
		t.Errorf("allocated %d, want 5 blocks", n)
	}
	closeIt()
	w.must(v.Close())
}
