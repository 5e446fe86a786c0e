package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// wantNothingInClear fails the test if any object has 16 bytes of a device, none of
// them common, or the hash of one of its blocks.
func (w *world) wantNothingInClear(devices ...*device) {
	w.t.Helper()
	windows := make(map[string]string)
	for _, d := range devices {
		for block, data := range d.blocks {
			hash := manifest.Sum(data)
			windows[string(hash[:16])] = fmt.Sprintf("the hash of block %d", block)
			windows[string(hash[16:])] = fmt.Sprintf("the hash of block %d", block)
			for off := 0; off+16 <= len(data); off += 16 {
				if part := data[off : off+16]; bytes.Count(part, part[:1]) < 8 {
					windows[string(part)] = fmt.Sprintf("block %d at %d", block, off)
				}
			}
		}
	}
	for key, data := range w.contents() {
		for off := range len(data) - 15 {
			if found, ok := windows[string(data[off:off+16])]; ok {
				w.t.Fatalf("%s has %s in clear, at %d", key, found, off)
			}
		}
	}
}

// A whole life of an encrypted lineage leaves nothing of what is in it in the store:
// no 16 bytes of a block, and no block's hash.
func TestEncryptedLineageHasNothingInClear(t *testing.T) {
	w := newEncryptedWorld(t)
	first := newDevice(leafBytes+40*testBlock).random(1, span(0, 12)...).tiny(1, span(1020, 1050)...)
	second := first.random(2, 3, 4).tiny(2, 1022, 1049)
	third := second.grown(2*leafBytes).random(3, 5, 1100).punched(1)
	one := w.create(nil, nil, first)
	two := w.create(one, first, second)
	three := w.create(two, second, third)
	if err := w.store.SaveTrace(w.ctx, two.ID(), "boot", manifest.Trace{3, 4, 1022}); err != nil {
		t.Fatal(err)
	}
	w.wantNothingInClear(first, second, third)
	w.begin(w.plan(three, third), third, third.random(9, 7)) // under way, for ever
	w.delete(one.ID())
	if r := w.reclaim(); r.Rewritten == 0 {
		t.Error("no pack was rewritten")
	}
	w.wantNothingInClear(first, second, third)

	// A repair writes packs and leaves again.
	has := make(chest)
	w.collect(has, two, second)
	w.collect(has, three, third)
	for key, data := range w.contents() {
		if strings.HasPrefix(key, manifest.DataPrefix(two.ID())) || strings.HasPrefix(key, manifest.DataPrefix(three.ID())) {
			w.overwrite(key, string(data[:len(data)/2]))
		}
	}
	if r := w.repair(has); r.Problems != 0 || len(r.Objects) < 4 {
		t.Fatalf("%v, %v", r.Objects, r.Findings)
	}
	w.wantNothingInClear(first, second, third)
	w.mustHold(w.open(two.ID()), second)
	w.mustHold(w.open(three.ID()), third)

	// That the test can fail.
	plain := newWorld(t)
	plain.create(nil, nil, first)
	found := false
	for _, data := range plain.contents() {
		found = found || bytes.Contains(data, first.blocks[0][:16])
	}
	if !found {
		t.Error("the search finds nothing in clear text either")
	}
}

// Two attempts of the same content have nothing in common: salts are drawn anew.
func TestEqualSnapshotsAreSealedDifferently(t *testing.T) {
	w := newEncryptedWorld(t)
	d := newDevice(20*testBlock).random(1, 0, 1)
	one, two := w.create(nil, nil, d), w.create(nil, nil, d)
	objects := w.contents()
	for _, key := range []func(manifest.SnapshotID) string{
		manifest.RootKey,
		func(id manifest.SnapshotID) string { return manifest.LeavesKey(id, 0) },
		func(id manifest.SnapshotID) string { return manifest.PackKey(id, 0) },
	} {
		a, b := objects[key(one.ID())], objects[key(two.ID())]
		windows := make(map[string]bool)
		for off := 64; off+16 <= len(a); off += 16 { // behind the headers
			windows[string(a[off:off+16])] = true
		}
		if len(windows) == 0 {
			t.Fatal("there is no such object")
		}
		for off := range max(0, len(b)-16) {
			if off >= 64 && windows[string(b[off:off+16])] {
				t.Errorf("%s and that of the other have 16 bytes in common", key(one.ID()))
				break
			}
		}
	}
}

// serve makes a snapshot's root what somebody says, and lets the records, which are in
// clear and signed by nobody, agree.
func (w *world) serve(id manifest.SnapshotID, root []byte) {
	w.t.Helper()
	var outcome manifest.Outcome
	data := w.contents()[manifest.OutcomeKey(id)]
	outcome, err := manifest.DecodeRecord[manifest.Outcome](data)
	if err != nil {
		w.t.Fatal(err)
	}
	outcome.RootHash, outcome.RootLength, outcome.Root = manifest.HexHash(manifest.Sum(root)), int64(len(root)), nil
	if len(root) <= manifest.InlineRootMax {
		outcome.Root = root
	}
	w.put(manifest.OutcomeKey(id), outcome)
	w.overwrite(manifest.RootKey(id), string(root))
}

// readsWrong opens and reads a snapshot as another host does. It fails the test if that
// succeeds, or yields a byte that is not of d.
func (w *world) readsWrong(what string, id manifest.SnapshotID, d *device) {
	w.t.Helper()
	img, err := w.reopen().Open(w.ctx, id, snapshot.Holder{})
	if err == nil {
		err = holds(w.ctx, img, d)
		if err != nil && strings.Contains(err.Error(), "differs") {
			w.t.Errorf("%s: other bytes are read: %v", what, err)
		}
	}
	if err == nil {
		w.t.Errorf("%s: it is read as if nothing were", what)
	} else if !errors.Is(err, manifest.ErrCorrupt) && !errors.Is(err, manifest.ErrVersion) {
		w.t.Errorf("%s: %v", what, err)
	}
}

// Who has the store but not the key can deny, and nothing else: no sealed object
// passes for another one, and nothing that is not sealed passes at all.
func TestHostileStoreCannotMoveWhatIsSealed(t *testing.T) {
	t.Parallel()
	w := newEncryptedWorld(t)
	first := newDevice(leafBytes).random(1, span(0, 6)...)
	second := first.random(2, span(0, 6)...)
	one := w.create(nil, nil, first)
	two := w.create(one, first, second) // all blocks differ: as many packs and leaves
	alien := newEncryptedWorld(t)       // under another data key
	three := alien.create(nil, nil, second)
	plain := newWorld(t)
	four := plain.create(nil, nil, second)
	for _, img := range []*snapshot.Image{one, two} {
		if err := w.store.SaveTrace(w.ctx, img.ID(), "boot", manifest.Trace{int64(img.ID().Serial % 5)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.store.SaveTrace(w.ctx, two.ID(), "other", manifest.Trace{4}); err != nil {
		t.Fatal(err)
	}
	good := w.contents()
	reset := func() {
		for key, data := range good {
			w.overwrite(key, string(data))
		}
	}
	root := func(w *world, img *snapshot.Image) []byte { return w.contents()[manifest.RootKey(img.ID())] }
	leaves := func(img *snapshot.Image) string { return manifest.LeavesKey(img.ID(), 0) }
	pack := func(img *snapshot.Image) string { return manifest.PackKey(img.ID(), 0) }
	// A root as an attacker would write it: of the right snapshot, and not sealed.
	forged := *four.Root
	forged.Snapshot = two.ID()
	flagged := forged.Encode()
	flagged[6] |= 1 // says that it is sealed

	for what, attack := range map[string]func(){
		"the root of the parent":                 func() { w.serve(two.ID(), root(w, one)) },
		"a root of another lineage":              func() { w.serve(two.ID(), root(alien, three)) },
		"a root in clear":                        func() { w.serve(two.ID(), forged.Encode()) },
		"a root in clear that says it is sealed": func() { w.serve(two.ID(), flagged) },
		"the roots of two swapped": func() {
			w.serve(one.ID(), good[manifest.RootKey(two.ID())])
			w.serve(two.ID(), good[manifest.RootKey(one.ID())])
		},
		"leaves of the parent":      func() { w.overwrite(leaves(two), string(good[leaves(one)])) },
		"leaves of another lineage": func() { w.overwrite(leaves(two), string(alien.contents()[leaves(three)])) },
		"leaves in clear":           func() { w.overwrite(leaves(two), string(plain.contents()[leaves(four)])) },
		"a pack of the parent":      func() { w.overwrite(pack(two), string(good[pack(one)])) },
		"a pack of another lineage": func() { w.overwrite(pack(two), string(alien.contents()[pack(three)])) },
		"a pack in clear":           func() { w.overwrite(pack(two), string(plain.contents()[pack(four)])) },
		"a pack cut short":          func() { w.overwrite(pack(two), string(good[pack(two)][:len(good[pack(two)])-1])) },
	} {
		attack()
		w.readsWrong(what, two.ID(), second)
		if report, err := w.reopen().Check(w.ctx, snapshot.Check{Share: 1}); err != nil || report.Problems == 0 {
			t.Errorf("%s: a check finds nothing (%v)", what, err)
		}
		reset()
	}
	w.mustHold(w.open(two.ID()), second)

	trace := func(id manifest.SnapshotID, name string) string { return manifest.TraceKey(id, name) }
	clearTrace, err := manifest.Trace{1}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for what, from := range map[string][]byte{
		"the parent's": good[trace(one.ID(), "boot")], "one of another name": good[trace(two.ID(), "other")], "one in clear": clearTrace,
		"a root": good[manifest.RootKey(two.ID())],
	} {
		w.overwrite(trace(two.ID(), "boot"), string(from))
		if got, err := w.reopen().Trace(w.ctx, two.ID(), "boot"); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("trace, %s: %v, %v", what, got, err)
		}
	}
	reset()
}

// setEncryption changes what the lineage's record says of its key.
func (w *world) setEncryption(e *manifest.Encryption) {
	w.t.Helper()
	w.setEncryptionOf(w.lineageRecord(), e)
}

func (w *world) setEncryptionOf(record manifest.LineageRecord, e *manifest.Encryption) {
	w.t.Helper()
	record.Encryption = e
	w.put(manifest.LineageKey(w.lineage), record)
}

func (w *world) lineageRecord() manifest.LineageRecord {
	w.t.Helper()
	record, err := w.reopen().Lineage(w.ctx, w.lineage)
	if err != nil {
		w.t.Fatal(err)
	}
	return record
}

// A store that denies that a lineage is encrypted, to be given blocks in clear, gets
// nothing from a host that knows better: reads fail, and what is written is sealed.
func TestDenialOfTheKeyGetsNothing(t *testing.T) {
	w := newEncryptedWorld(t)
	first := newDevice(leafBytes).random(1, span(0, 4)...)
	second := first.random(2, 1, 2)
	one := w.create(nil, nil, first)
	key, record := one.Key(), w.lineageRecord()
	w.setEncryption(nil)

	w.readsWrong("without the key", one.ID(), first)
	stranger := w.reopen()
	if _, err := stranger.Load(w.ctx, one.Outcome); err == nil {
		t.Error("loaded in clear")
	}
	// A volume remembers its key, whether or not it has a root yet.
	w.store = w.reopen()
	w.store.Recall(record)
	for name, parent := range map[string]*snapshot.Image{"blank": nil, "with a root": one} {
		plan := w.plan(parent, second)
		before := first
		if parent == nil {
			before = nil
		}
		outcome, err := w.store.Create(w.ctx, plan, second.since(before), nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		img, err := w.store.ImageOf(outcome.Snapshot, outcome.Root, manifest.Hash(outcome.RootHash), key)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		w.mustHold(img, second)
	}
	// An image knows its key without the volume's.
	if _, err := w.store.Create(w.ctx, w.plan(one, second), second.since(first), nil); err != nil {
		t.Fatal(err)
	}
	w.wantNothingInClear(first, second)
}

// What a store has said before it cannot take back within a process: traces of what
// was opened, and what is resumed, stay sealed.
func TestKeyOnceHadIsKept(t *testing.T) {
	w := newEncryptedWorld(t)
	d := newDevice(leafBytes).random(1, span(0, 4)...)
	one := w.create(nil, nil, d)
	record := w.lineageRecord()
	for name, knows := range map[string]func(*snapshot.Store) error{
		"opened":   func(s *snapshot.Store) error { _, err := s.Open(w.ctx, one.ID(), snapshot.Holder{}); return err },
		"recalled": func(s *snapshot.Store) error { s.Recall(record); _, err := s.Key(w.ctx, w.lineage); return err },
	} {
		s := w.reopen()
		if err := knows(s); err != nil {
			t.Fatal(err)
		}
		w.setEncryption(nil)
		if key, err := s.Key(w.ctx, w.lineage); key == nil || err != nil {
			t.Errorf("%s: there is no key: %v", name, err)
		}
		if err := s.SaveTrace(w.ctx, one.ID(), "boot", manifest.Trace{1, 2, 3}); err != nil {
			t.Fatal(err)
		}
		want, err := manifest.Trace{1, 2, 3}.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if got := w.contents()[manifest.TraceKey(one.ID(), "boot")]; bytes.Contains(got, want[8:]) || len(got) <= len(want) {
			t.Errorf("%s: the trace is in clear", name)
		}
		if _, err := s.Load(w.ctx, one.Outcome); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		w.setEncryption(record.Encryption)
	}
}

// Nor can it take back that it has recorded a lineage as encrypted, before the first
// block is sent there.
func TestLineageThatWasJustMadeStaysEncrypted(t *testing.T) {
	from := newWorld(t)
	source := from.create(nil, nil, newDevice(leafBytes).tiny(77, 1, 2))
	c := &copier{from: from, to: newSealedWorld(t, blockstore.NewMem(), ""), key: "a"}
	deny := func() {
		for key, data := range c.to.contents() {
			if !strings.HasPrefix(key, "lineages/") {
				continue
			}
			record, err := manifest.DecodeRecord[manifest.LineageRecord](data)
			if err != nil {
				t.Error(err)
			}
			record.Encryption = nil
			c.to.put(key, record)
		}
	}
	denied := &denying{Store: c.to.faults, deny: deny}
	c.to.store = storeIn(denied)
	made, err := c.run(t.Context(), source.ID())
	if c.to.mentions("seed 77") {
		t.Errorf("%s is in clear (%v)", made, err)
	}
	if denied.times == 0 {
		t.Error("nothing was denied")
	}
}

// A denying store says, as soon as a lineage's record was put, that it is not encrypted.
type denying struct {
	blockstore.Store
	deny  func()
	times int
}

func (d *denying) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	etag, err := d.Store.Put(ctx, key, data, c)
	if strings.HasPrefix(key, "lineages/") {
		d.times++
		d.deny()
	}
	return etag, err
}

// The wrapped key of a lineage is bound to it: in another's record it opens nothing.
func TestWrappedKeyOfAnotherLineageIsRefused(t *testing.T) {
	w := newEncryptedWorld(t)
	d := newDevice(leafBytes).random(1, span(0, 4)...)
	one := w.create(nil, nil, d)
	own := w.lineageRecord().Encryption
	other, err := w.store.CreateLineage(w.ctx, testBlock, "toy")
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, err := w.store.CreateLineage(w.ctx, testBlock, "key of an attacker")
	if err != nil {
		t.Fatal(err)
	}
	for name, e := range map[string]*manifest.Encryption{
		"of another lineage":      other.Encryption,
		"under another key":       elsewhere.Encryption,
		"by another name":         {KeyURI: "poy", WrappedKey: own.WrappedKey},
		"damaged":                 {KeyURI: own.KeyURI, WrappedKey: own.WrappedKey[1:]},
		"shredded, if we believe": {KeyURI: own.KeyURI, Shredded: true},
	} {
		w.setEncryption(e)
		before := w.objects("")
		s := w.reopen()
		if img, err := s.Open(w.ctx, one.ID(), snapshot.Holder{ID: "vol-1"}); err == nil {
			t.Errorf("%s: opened %v", name, img.ID())
		}
		if _, err := s.Create(w.ctx, w.plan(nil, d), d.since(nil), nil); err == nil {
			t.Errorf("%s: a snapshot was made", name)
		}
		if after := w.objects(""); len(after) != len(before) {
			t.Errorf("%s: %d objects were left", name, len(after)-len(before))
		}
	}
	// All of another's record: its key can be unwrapped, and is not this lineage's.
	w.put(manifest.LineageKey(w.lineage), other)
	stranger := w.reopen()
	if key, err := stranger.Key(w.ctx, w.lineage); key != nil || !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("the whole record of another lineage: a key: %t, %v", key != nil, err)
	}
	w.setEncryptionOf(manifest.LineageRecord{Version: other.Version, ID: w.lineage, BlockSize: other.BlockSize, Created: other.Created}, own)
	w.mustHold(w.open(one.ID()), d)
}

// With crypt's own keys, and a key file.
func TestLineageEncryptedUnderAKeyFile(t *testing.T) {
	uri, _, err := crypt.CreateKeyFile(filepath.Join(t.TempDir(), "key"))
	if err != nil {
		t.Fatal(err)
	}
	objects := blockstore.NewMem()
	w := newWorldIn(t, objects)
	host := func() *snapshot.Store {
		s := snapshot.New(w.faults)
		s.UseKeys(crypt.NewKeys(crypt.Options{}))
		return s
	}
	w.store = host()
	lineage, err := w.store.CreateLineage(w.ctx, testBlock, uri)
	if err != nil {
		t.Fatal(err)
	}
	w.lineage = lineage.ID
	d := newDevice(leafBytes).random(1, span(0, 4)...)
	one := w.create(nil, nil, d)
	w.store = host()
	w.mustHold(w.open(one.ID()), d)
	w.mustVerify(one.ID())
	w.wantNothingInClear(d)

	nobody := snapshot.New(w.faults)
	if _, err := nobody.Open(w.ctx, one.ID(), snapshot.Holder{}); !errors.Is(err, snapshot.ErrNoKey) {
		t.Errorf("without keys: %v", err)
	}
	moved := lineage.Encryption.KeyURI + ".gone"
	w.setEncryption(&manifest.Encryption{KeyURI: moved, WrappedKey: lineage.Encryption.WrappedKey})
	if _, err := host().Open(w.ctx, one.ID(), snapshot.Holder{}); !errors.Is(err, crypt.ErrKeyNotFound) || !strings.Contains(err.Error(), w.lineage.String()) {
		t.Errorf("with the key file gone: %v", err)
	}
	other, _, err := crypt.CreateKeyFile(filepath.Join(t.TempDir(), "key"))
	if err != nil {
		t.Fatal(err)
	}
	w.setEncryption(&manifest.Encryption{KeyURI: other, WrappedKey: lineage.Encryption.WrappedKey})
	if _, err := host().Open(w.ctx, one.ID(), snapshot.Holder{}); !errors.Is(err, crypt.ErrWrongKey) {
		t.Errorf("with another key file: %v", err)
	}
	second, err := w.store.CreateLineage(w.ctx, testBlock, uri)
	if err != nil {
		t.Fatal(err)
	}
	w.setEncryption(second.Encryption) // under the same key file
	if _, err := host().Open(w.ctx, one.ID(), snapshot.Holder{}); !errors.Is(err, crypt.ErrWrongKey) {
		t.Errorf("with the wrapped key of another lineage: %v", err)
	}
}

// A lineage whose key cannot be had can be listed, described and deleted; reclaim
// fails rather than to take anything for garbage.
func TestWithoutTheKeyNothingIsLost(t *testing.T) {
	w := newEncryptedWorld(t)
	first := newDevice(20*testBlock).random(1, span(0, 20)...)
	second := first.random(2, span(0, 10)...)
	one := w.create(nil, nil, first)
	two := w.create(one, first, second)
	s := snapshot.New(w.faults)
	if found, err := s.List(w.ctx, true); err != nil || len(found) != 2 {
		t.Errorf("listed %d, %v", len(found), err)
	}
	if err := s.Delete(w.ctx, one.ID()); err != nil {
		t.Errorf("deleted: %v", err)
	}
	before := w.objects("data/")
	if r, err := s.Reclaim(w.ctx, w.lineage); !errors.Is(err, snapshot.ErrNoKey) {
		t.Errorf("reclaimed %+v, %v", r, err)
	}
	if after := w.objects("data/"); len(after) != len(before) {
		t.Errorf("it removed %d objects", len(before)-len(after))
	}
	if r := w.reclaim(); r.Rewritten == 0 {
		t.Errorf("with the key: %+v", r)
	}
	w.mustHold(w.open(two.ID()), second)
}

// The key service is asked once for a lineage, however much is done.
func TestKeyIsUnwrappedOnce(t *testing.T) {
	w := newEncryptedWorld(t)
	d := newDevice(leafBytes).random(1, span(0, 4)...)
	one := w.create(nil, nil, d)
	keys := &countingKeys{Keys: toyKeys{}}
	s := snapshot.New(w.faults)
	s.UseKeys(keys)
	for range 3 {
		img, err := s.Open(w.ctx, one.ID(), snapshot.Holder{})
		if err != nil {
			t.Fatal(err)
		}
		w.mustHold(img, d)
	}
	if n := keys.unwraps.Load(); n != 1 {
		t.Errorf("it was asked %d times", n)
	}
	// Nor does a failure stick.
	keys = &countingKeys{Keys: toyKeys{}, fail: crypt.ErrKeyUnavailable}
	s = snapshot.New(w.faults)
	s.UseKeys(keys)
	if _, err := s.Open(w.ctx, one.ID(), snapshot.Holder{}); !errors.Is(err, crypt.ErrKeyUnavailable) {
		t.Errorf("%v", err)
	}
	keys.fail = nil
	if _, err := s.Open(w.ctx, one.ID(), snapshot.Holder{}); err != nil {
		t.Errorf("when it answers again: %v", err)
	}
}

// countingKeys count how often a key is unwrapped.
type countingKeys struct {
	snapshot.Keys
	fail    error
	unwraps atomic.Int64
}

func (k *countingKeys) Unwrap(ctx context.Context, uri string, wrapped []byte, lineage string) ([]byte, error) {
	k.unwraps.Add(1)
	if k.fail != nil {
		return nil, k.fail
	}
	return k.Keys.Unwrap(ctx, uri, wrapped, lineage)
}

// An upload that is retried puts the same bytes: were it sealed anew, a salt would be
// used for nothing, and a reply that was lost would look like somebody else's object.
func TestRetriedUploadPutsTheSameBytes(t *testing.T) {
	w := newEncryptedWorld(t)
	d := newDevice(leafBytes).random(1, span(0, 4)...)
	puts := make(map[string][][]byte)
	w.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "data/", Times: 3}, blockstoretest.Fault{LoseReply: true})
	s := storeIn(blockstore.Retry(&recordedPuts{Store: w.faults, puts: puts}, blockstore.RetryPolicy{Base: 1, Max: 1}))
	outcome, err := s.Create(w.ctx, w.plan(nil, d), d.since(nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	w.mustHold(w.open(outcome.Snapshot), d)
	again := 0
	for key, bodies := range puts {
		again += len(bodies) - 1
		if !slices.EqualFunc(bodies[1:], bodies[:len(bodies)-1], bytes.Equal) {
			t.Errorf("%s was put with different bytes", key)
		}
	}
	if again == 0 {
		t.Error("nothing was put again")
	}
}

// recordedPuts records what is put below data/.
type recordedPuts struct {
	blockstore.Store
	mu   sync.Mutex // guards puts
	puts map[string][][]byte
}

func (r *recordedPuts) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	if strings.HasPrefix(key, "data/") {
		r.mu.Lock()
		r.puts[key] = append(r.puts[key], bytes.Clone(data))
		r.mu.Unlock()
	}
	return r.Store.Put(ctx, key, data, c)
}
