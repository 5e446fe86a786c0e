package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A secret is what nobody without the key may see: 16 bytes of it in a row are found
// wherever they are.
type secret struct {
	mu      sync.Mutex // guards the fields below
	windows map[string]string
	found   []string
}

// add makes bytes secret, but for windows of which most are one byte.
func (s *secret) add(what string, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for off := 0; off+16 <= len(p); off += 16 {
		if part := p[off : off+16]; bytes.Count(part, part[:1]) < 8 {
			s.windows[string(part)] = fmt.Sprintf("%s from %d", what, off)
		}
	}
}

// look notes where bytes, which go to a place, are secret.
func (s *secret) look(place string, p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for off := range len(p) - 15 {
		if what, ok := s.windows[string(p[off:off+16])]; ok && len(s.found) < 5 {
			s.found = append(s.found, fmt.Sprintf("%s, at %d: %s", place, off, what))
		}
	}
}

// A watchedFS looks at all that is written to files, however long they live.
type watchedFS struct {
	vfs.FS
	secret *secret
}

func (w watchedFS) OpenFile(name string, flag int, perm fs.FileMode) (vfs.File, error) {
	f, err := w.FS.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	return watchedFile{f, name, w.secret}, nil
}

type watchedFile struct {
	vfs.File
	name   string
	secret *secret
}

func (f watchedFile) WriteAt(p []byte, off int64) (int, error) {
	f.secret.look(f.name, p)
	return f.File.WriteAt(p, off)
}

// A watchedStore looks at all that is put into a store.
type watchedStore struct {
	blockstore.Store
	secret *secret
}

func (w watchedStore) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	w.secret.look(key, data)
	return w.Store.Put(ctx, key, data, c)
}

// watch makes a world, whose host has not written anything yet, look for a secret.
func (w *world) watch() *secret {
	w.Helper()
	s := &secret{windows: make(map[string]string)}
	w.host.FS = watchedFS{w.host.FS, s}
	w.store = blockstoretest.NewFaulty(watchedStore{w.mem, s})
	w.host.Demand, w.host.Background = w.store, w.store
	w.end()
	w.start()
	return s
}

// A life of encrypted volumes, with parts of pages, snapshots, restored volumes,
// hydration, evictions, growth, kills and power cuts, in which every byte that goes to
// a disk or to the store is looked at.
func TestNothingOfAnEncryptedVolumeIsInClear(t *testing.T) {
	live := func(w *world) *secret {
		s := w.watch()
		defer func() { w.abandon() }()
		var seed uint64
		put := func(v *Volume, data []byte, n int, off int64) {
			seed++
			p := noise(n, 1000+seed)
			s.add(fmt.Sprint("write ", seed), p)
			w.write(v, p, off)
			copy(data[off:], p)
			first, end := off/blockSize*blockSize, min((off+int64(n)+blockSize-1)/blockSize*blockSize, int64(len(data)))
			for at := first; at < end; at += blockSize {
				block := make([]byte, blockSize)
				copy(block, data[at:min(at+blockSize, int64(len(data)))])
				hash := manifest.Sum(block)
				s.add(fmt.Sprint("hash of block ", at/blockSize), hash[:])
			}
		}
		const size = 6*blockSize + 3*pageSize + 512
		data := make([]byte, size)
		v := w.openNew(nil, size)
		put(v, data, 3*blockSize, 0)
		put(v, data, 100, 5*blockSize+50)
		put(v, data, 5000, 4*blockSize+300)
		w.must(v.Sync(w.ctx))
		one := w.snapshot(v)
		put(v, data, 700, 10)
		w.must(v.Zero(w.ctx, blockSize, pageSize))
		clear(data[blockSize : blockSize+pageSize])
		two := w.snapshot(v)
		w.equal(v.Device, data, "the volume")
		w.must(v.Resize(size + 2*blockSize))
		data = append(data, make([]byte, 2*blockSize)...)
		put(v, data, 2000, size+100)
		w.must(v.Sync(w.ctx))

		restored := bytes.Clone(data[:size])
		clear(restored[blockSize : blockSize+pageSize])
		r := w.openNew(&two, 0)
		w.must(w.hydrate(r.Device))
		put(r, restored, 3*pageSize, 100)
		if w.crash == nil {
			w.must(v.Close())
			w.must(r.Close())
		} else {
			w.must(r.Sync(w.ctx))
			w.kill()
		}
		v, r = w.open(v.record.ID), w.open(r.record.ID)
		w.equal(v.Device, data, "opened again")
		w.equal(r.Device, restored, "the restored one, opened again")
		three := w.snapshot(r)
		w.must(v.Sync(w.ctx))
		if w.crash != nil {
			w.powerCut()
			v, r = w.open(v.record.ID), w.open(r.record.ID)
			w.must(r.Settle(w.ctx))
			w.equal(v.Device, data, "after a power cut")
			w.equal(r.Device, restored, "the restored one, after a power cut")
		}
		w.remove(one)
		w.equalSnapshot(three, restored, "the last snapshot")
		four := w.snapshot(v)
		w.equalSnapshot(four, data, "the grown volume's")
		w.must(v.Close())
		w.must(r.Close())
		return s
	}
	for name, w := range map[string]*world{"in memory": newEncryptedWorld(t), "in a folder": worldInAFolder(t)} {
		s := live(w)
		for _, found := range s.found {
			t.Errorf("%s: %s", name, found)
		}
		if w.crash == nil {
			w.must(filepath.WalkDir(w.host.State, func(path string, d fs.DirEntry, err error) error {
				if err != nil || d.IsDir() {
					return err
				}
				data, err := os.ReadFile(path)
				s.look(path, data)
				return err
			}))
			for _, found := range s.found {
				t.Errorf("%s, left: %s", name, found)
			}
		}
	}
	if s := live(newWorld(t, 1)); len(s.found) == 0 {
		t.Error("the search finds nothing of a plain volume either")
	}
}

// worldInAFolder is newEncryptedRealWorld, whose process the test ends itself.
func worldInAFolder(t testing.TB) *world {
	t.Helper()
	w := &world{tester: t, key: "toy"}
	w.begin(vfs.OS(), t.TempDir())
	return w
}

// lineageOf returns the record of a volume's lineage, and what changes it.
func (w *world) lineageOf(v *Volume) (record manifest.LineageRecord, set func(manifest.LineageRecord)) {
	w.Helper()
	record, err := storeIn(w.mem).Lineage(w.ctx, v.record.Lineage)
	w.must(err)
	return record, func(r manifest.LineageRecord) {
		w.Helper()
		data, err := manifest.EncodeRecord(r)
		w.must(err)
		_, err = w.mem.Put(w.ctx, manifest.LineageKey(r.ID), data, blockstore.Condition{})
		w.must(err)
	}
}

// A store that denies that a volume's lineage is encrypted must not be sent a byte in
// clear: what the volume remembers counts. A blank one has nothing else to go by.
func TestStoreThatDeniesTheKeyGetsNoPlaintext(t *testing.T) {
	for name, prepare := range map[string]func(w *world) *Volume{
		"blank": func(w *world) *Volume { return w.openNew(nil, 4*blockSize) },
		"with a root": func(w *world) *Volume {
			v := w.openNew(nil, 4*blockSize)
			w.write(v, noise(2*blockSize, 1), 0)
			w.snapshot(v)
			return v
		},
		"restored": func(w *world) *Volume {
			v := w.openNew(nil, 4*blockSize)
			w.write(v, noise(2*blockSize, 1), 0)
			id := w.snapshot(v)
			w.must(v.Close())
			return w.openNew(&id, 0)
		},
		"with a root that is lost": func(w *world) *Volume {
			v := w.openNew(nil, 4*blockSize)
			w.write(v, noise(2*blockSize, 1), 0)
			id := w.snapshot(v)
			w.must(w.host.Store.Unpin(w.ctx, id, v.holder.ID))
			w.must(storeIn(w.mem).Delete(w.ctx, id))
			return v
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newEncryptedWorld(t)
			s := w.watch()
			s.add("block 0", noise(2*blockSize, 1))
			v := prepare(w)
			record, set := w.lineageOf(v)
			if record.Encryption == nil {
				t.Fatal("the test is wrong: the lineage is not encrypted")
			}
			set(manifest.LineageRecord{Version: record.Version, ID: record.ID, BlockSize: record.BlockSize, Created: record.Created})
			w.must(v.Sync(w.ctx))
			w.kill() // what it has read of the store is forgotten
			defer func() { w.abandon() }()
			v = w.open(v.record.ID)
			want := make([]byte, 4*blockSize)
			if name != "blank" {
				copy(want, noise(2*blockSize, 1))
			}
			w.overwrite(v, want, blockSize+100, blockSize, 7)
			s.add("written", noise(blockSize+100, 7))
			id := w.snapshot(v)
			w.equal(v.Device, want, "the volume")
			s.mu.Lock()
			for _, found := range s.found {
				t.Error(found)
			}
			s.mu.Unlock()
			w.must(v.Close())
			set(record)
			w.equalSnapshot(id, want, "the snapshot")
		})
	}
}

// Who has the store can forge an outcome, as nobody signs those. But a volume moves on
// to no root that is not sealed under its key.
func TestVolumeMovesOnToNoForgedRoot(t *testing.T) {
	for name, denied := range map[string]bool{"the lineage's record as it is": false, "the lineage's record says: not encrypted": true} {
		t.Run(name, func(t *testing.T) {
			w := newEncryptedWorld(t)
			defer func() { w.abandon() }()
			v := w.openNew(nil, 4*blockSize)
			want := make([]byte, 4*blockSize)
			w.overwrite(v, want, blockSize, 0, 1)
			// The attempt ends when its outcome is to be put.
			w.store.Inject(blockstoretest.Rule{Prefix: "outcomes/"}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
			if _, err := v.Snapshot(w.ctx, SnapshotOptions{}); err == nil {
				t.Fatal("the snapshot was made")
			}
			w.store.Heal()
			pending := v.Record().Pending
			if pending == nil {
				t.Fatal("no attempt is pending")
			}
			record, set := w.lineageOf(v)
			root := &manifest.Root{Snapshot: pending.Snapshot, Geometry: v.geometry.Get()} // all holes
			forged := root.Encode()
			outcome := manifest.Outcome{
				Version: manifest.RecordVersion, Snapshot: pending.Snapshot, State: manifest.StateCommitted, Nonce: pending.Nonce,
				Volume: v.record.ID, Size: 4 * blockSize, BlockSize: blockSize, Start: record.Created, End: record.Created,
				RootHash: manifest.HexHash(manifest.Sum(forged)), RootLength: int64(len(forged)), Root: forged, StoredBytes: int64(len(forged)),
			}
			data, err := manifest.EncodeRecord(outcome)
			w.must(err)
			_, err = w.mem.Put(w.ctx, manifest.OutcomeKey(pending.Snapshot), data, blockstore.Condition{})
			w.must(err)
			if denied {
				record.Encryption = nil
				set(record)
			}
			w.kill()
			v = w.open(v.record.ID)
			if err := v.Settle(w.ctx); !errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("it settles: %v", err)
			}
			if r := v.Record(); r.Root != nil {
				t.Errorf("it has moved on to %s", r.Root)
			}
			w.equal(v.Device, want, "the volume")
			w.must(v.Close())
		})
	}
}

// Without its key a volume does not open, and nothing of it changes; with the key it
// opens as it was.
func TestVolumeWhoseKeyCannotBeHadStaysAsItIs(t *testing.T) {
	w := newEncryptedRealWorld(t)
	v := w.openNew(nil, 4*blockSize)
	want := make([]byte, 4*blockSize)
	w.overwrite(v, want, 2*blockSize, 100, 1)
	w.snapshot(v)
	w.overwrite(v, want, 5000, 3*blockSize+50, 2)
	w.must(v.Close())
	before := w.files()
	w.end()
	w.keys.down.Store(true)
	w.start()
	for range 2 {
		if _, err := w.host.OpenVolume(v.record.ID); !errors.Is(err, errNoKeyService) || !strings.Contains(err.Error(), v.record.Lineage.String()) {
			t.Fatalf("opened: %v", err)
		}
	}
	if _, err := w.host.Create(w.ctx, nil, blockSize, blockSize, "toy"); !errors.Is(err, errNoKeyService) {
		t.Errorf("a blank one is created: %v", err)
	}
	if _, err := w.host.Create(w.ctx, v.record.Root, 0, 0, ""); err == nil {
		t.Error("one of a snapshot is created")
	}
	if diff := differentFiles(before, w.files()); len(diff) > 0 {
		t.Errorf("what changed: %v", diff)
	}
	w.keys.down.Store(false)
	v = w.open(v.record.ID)
	w.equal(v.Device, want, "with the key")
	w.must(v.Close())
}

// files returns the content of all files of the host, of which locks have none.
func (w *world) files() map[string]string {
	w.Helper()
	all := make(map[string]string)
	w.must(filepath.WalkDir(w.host.State, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		all[path] = string(data)
		return err
	}))
	return all
}

func differentFiles(a, b map[string]string) []string {
	var names []string
	for name, data := range a {
		if other, ok := b[name]; !ok || other != data {
			names = append(names, name)
		}
	}
	for name, data := range b {
		if _, ok := a[name]; !ok && data != "" {
			names = append(names, name)
		}
	}
	return names
}

// Once a volume is open nobody asks for its key again: neither reads nor snapshots,
// nor settling when the store was away.
func TestMountedVolumeNeedsNoKeyService(t *testing.T) {
	w := newEncryptedRealWorld(t)
	v := w.openNew(nil, 4*blockSize)
	want := make([]byte, 4*blockSize)
	w.overwrite(v, want, 2*blockSize, 100, 1)
	w.snapshot(v)
	w.must(v.Close())
	w.end()
	w.start()
	v = w.open(v.record.ID)
	w.keys.down.Store(true)
	asked := w.keys.asked.Load()
	w.must(v.Settle(w.ctx))
	w.equal(v.Device, want, "warm")
	w.must(v.writes.clean.EvictRange(0, 4))
	w.equal(v.Device, want, "cold")
	w.overwrite(v, want, 5000, 3*blockSize+50, 2)
	w.store.Inject(blockstoretest.Rule{}, blockstoretest.Fault{Err: blockstore.ErrUnavailable})
	w.equal(v.Device, want, "with the store down")
	if _, err := v.Snapshot(w.ctx, SnapshotOptions{}); err == nil {
		t.Error("a snapshot was made")
	}
	w.store.Heal()
	w.must(v.Settle(w.ctx))
	id := w.snapshot(v)
	w.equal(v.Device, want, "after all")
	w.must(v.Close())
	if n := w.keys.asked.Load(); n != asked {
		t.Errorf("the key service was asked %d times", n-asked)
	}
	w.keys.down.Store(false)
	w.equalSnapshot(id, want, "the snapshot")
}

// Of an encrypted snapshot no volume is made that would not remember its key.
func TestVolumeIsNotCreatedWithoutItsKey(t *testing.T) {
	w := newEncryptedRealWorld(t)
	v := w.openNew(nil, blockSize)
	w.write(v, noise(blockSize, 1), 0)
	id := w.snapshot(v)
	record, set := w.lineageOf(v)
	w.must(v.Close())
	denied := record
	denied.Encryption = nil
	set(denied)
	w.end()
	w.start()
	before := w.files()
	if made, err := w.host.Create(w.ctx, &id, 0, 0, ""); !errors.Is(err, manifest.ErrCorrupt) && !errors.Is(err, manifest.ErrVersion) {
		t.Errorf("without it: %s, %v", made, err)
	}
	if diff := differentFiles(before, w.files()); len(diff) > 0 {
		t.Errorf("without it: what changed: %v", diff)
	}
	w.host.Store.Recall(record) // as the process has that knows another volume of the lineage
	made := w.open(w.create(&id, 0))
	if made.record.Encryption == nil || made.key == nil {
		t.Error("the volume does not remember its key")
	}
	w.equal(made.Device, noise(blockSize, 1), "the volume")
	w.must(made.Close())
}

// The nonce of a page that has one content for ever may be its number; with contents
// that follow each other it would give both away.
func TestPagesOfAVolumeAreSealedAnewEachTime(t *testing.T) {
	w := newEncryptedRealWorld(t)
	v := w.openNew(nil, blockSize)
	var seals [2][]byte
	for i := range seals {
		w.write(v, noise(blockSize, uint64(i)), 0)
		w.snapshot(v)
		marks, err := os.ReadFile(filepath.Join(cleanDir(v.dir), "map"))
		w.must(err)
		seals[i] = marks[manifest.PageSize+4:][:12] // of the first page: behind the header and the mark
		if bytes.Equal(seals[i], make([]byte, 12)) {
			t.Fatal("the page is not there, or its nonce is 0")
		}
	}
	if bytes.Equal(seals[0], seals[1]) {
		t.Error("two contents of a page are sealed under one nonce")
	}
	w.must(v.Close())

	key := v.key
	id, other := manifest.NewSnapshotID(v.record.Lineage), manifest.NewSnapshotID(v.record.Lineage)
	page, s := noise(pageSize, 1), new(crypt.PageScratch)
	sealed := func(p *crypt.Pages) string {
		dst, seal := make([]byte, pageSize), make([]byte, crypt.PageSealLen)
		p.Seal(dst, seal, 0, page, s)
		return string(dst)
	}
	first, second := basePages(key, id), basePages(key, id)
	if sealed(first) != sealed(second) {
		t.Error("two processes seal a page of one base differently")
	}
	if sealed(first) == sealed(basePages(key, other)) {
		t.Error("two bases, which have different pages, are sealed under one key")
	}
}

// A host's evictor frees the layers of lineages of which it has no key, also those that
// another process has open.
func TestEvictorNeedsNoKey(t *testing.T) {
	w := newEncryptedRealWorld(t)
	v := w.openNew(nil, 8*blockSize)
	want := make([]byte, 8*blockSize)
	w.overwrite(v, want, 8*blockSize, 0, 1)
	id := w.snapshot(v)
	w.must(v.Close())
	d, done := w.mount(id)
	w.must(w.hydrate(d))
	w.equal(d, want, "the mount")
	other := w.process()
	other.host.Store = snapshot.New(w.store) // without keys
	defer other.end()
	b := other.host.Budget
	b.evicting.Lock()
	freed := b.evict(1<<40, shared)
	freed += b.evict(1<<40, shared) // the first round may only note what was used
	b.evicting.Unlock()
	if freed == 0 {
		t.Error("nothing was freed")
	}
	left := 0
	for _, err := range d.base.Present() {
		if err != nil {
			t.Fatal(err)
		}
		left++
	}
	if left >= 8 {
		t.Errorf("%d of 8 blocks are left", left)
	}
	w.equal(d, want, "the mount, evicted")
	done()
}

// A salvage finds what is sealed on the host, and without the key finds nothing.
func TestSalvageOfAnEncryptedLineage(t *testing.T) {
	w := newEncryptedRealWorld(t)
	v := w.openNew(nil, 4*blockSize)
	want := make([]byte, 4*blockSize)
	w.overwrite(v, want, 4*blockSize, 0, 1)
	id := w.snapshot(v)
	w.must(v.Close())
	w.end() // another process, which has the leaf from the store, and not from the volume's memory
	w.start()
	d, done := w.mount(id)
	w.must(w.hydrate(d))
	done()
	r := v.Record()
	img, err := w.host.Store.Open(w.ctx, id, snapshot.Holder{})
	w.must(err)
	for name, keyOf := range map[string]func(manifest.LineageID) (*crypt.Key, error){
		"with the key": func(id manifest.LineageID) (*crypt.Key, error) { return w.host.Store.Key(w.ctx, id) },
		"without":      func(manifest.LineageID) (*crypt.Key, error) { return nil, errNoKeyService },
	} {
		s := OpenSalvage(w.host.FS, w.host.State, r.StoreID, keyOf)
		p := make([]byte, blockSize)
		for block := range int64(4) {
			plain := want[block*blockSize:][:blockSize]
			found := s.Block(r.Lineage, block, manifest.Sum(plain), p)
			if found != (name == "with the key") || found && !bytes.Equal(p, plain) {
				t.Errorf("%s: block %d is found: %t", name, block, found)
			}
		}
		ref := img.Root.Leaves[0]
		if leaf, found := s.Leaf(r.Lineage, ref, 4); found != (name == "with the key") || found && manifest.Sum(leaf) != ref.Hash {
			t.Errorf("%s: the leaf is found: %t", name, found)
		}
		if root, found := s.Root(id, manifest.Hash(img.Outcome.RootHash)); !found || !bytes.Equal(root, img.StoredRoot()) {
			t.Errorf("%s: the root, as it is stored, is found: %t", name, found)
		}
		w.must(s.Close())
	}
}
