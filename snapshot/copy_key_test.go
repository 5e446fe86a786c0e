package snapshot_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// toyKeys wrap data keys by saying to whom they belong. A name that begins with
// "alias-" is another one for the rest of it.
type toyKeys struct{}

func (toyKeys) Generate(_ context.Context, uri, lineage string) (plain, wrapped []byte, canonical string, err error) {
	plain, canonical = make([]byte, 32), strings.TrimPrefix(uri, "alias-")
	rand.Read(plain) // never fails
	return plain, fmt.Appendf(nil, "%s %s %s", canonical, lineage, plain), canonical, nil
}

func (toyKeys) Unwrap(_ context.Context, uri string, wrapped []byte, lineage string) ([]byte, error) {
	plain, ok := bytes.CutPrefix(wrapped, []byte(uri+" "+lineage+" "))
	if !ok {
		return nil, errors.New("wrong key")
	}
	return bytes.Clone(plain), nil
}

// newSealedWorld returns a world whose lineage is encrypted under a key, unless that is "".
func newSealedWorld(t testing.TB, objects blockstore.Store, key string) *world {
	w := newWorldIn(t, objects)
	w.store.UseKeys(toyKeys{})
	lineage, err := w.store.CreateLineage(w.ctx, testBlock, key)
	if err != nil {
		t.Fatal(err)
	}
	w.lineage = lineage.ID
	return w
}

// mentions reports whether an object of the world's data has a text in it.
func (w *world) mentions(text string) bool {
	w.t.Helper()
	for key := range w.objects("data/") {
		data, _, err := w.faults.Get(w.ctx, key, blockstore.MaxObjectSize)
		if err != nil {
			w.t.Fatal(err)
		}
		if bytes.Contains(data, []byte(text)) {
			return true
		}
	}
	return false
}

func TestCopyIsEncryptedWheneverItsSourceOrAKeySaysSo(t *testing.T) {
	first := newDevice(2*leafBytes).tiny(77, 1, 2, 3, 1030)
	second := first.tiny(78, 2).punched(1030)
	for _, test := range []struct{ source, key, want string }{
		{"", "", ""}, {"", "a", "a"}, {"a", "", "a"}, {"a", "a", "a"}, {"a", "b", "b"}, {"a", "alias-b", "b"},
	} {
		t.Run(fmt.Sprintf("%q to %q", test.source, test.key), func(t *testing.T) {
			c := &copier{from: newSealedWorld(t, blockstore.NewMem(), test.source), to: newSealedWorld(t, blockstore.NewMem(), ""), key: test.key}
			one := c.from.create(nil, nil, first)
			two := c.from.create(one, first, second)
			made := c.copy(one.ID())
			c.to.mustHold(made, first)
			record, err := c.to.store.Lineage(t.Context(), made.ID().Lineage)
			if err != nil {
				t.Fatal(err)
			}
			if e := record.Encryption; (e == nil) != (test.want == "") || e != nil && e.KeyURI != test.want {
				t.Fatalf("%+v", e)
			}
			if c.to.mentions("seed 77") != (test.want == "") {
				t.Errorf("plaintext in the store: %v", test.want != "")
			}
			c.to.store = c.to.reopen()
			c.to.store.UseKeys(toyKeys{})
			child := c.copy(two.ID())
			c.to.mustHold(child, second)
			if !c.incremental || child.Outcome.UploadedBlocks != 1 || child.ID().Lineage != made.ID().Lineage {
				t.Errorf("%+v", child.Outcome)
			}
			c.key = "c"
			other := c.copy(two.ID())
			c.to.mustHold(other, second)
			if c.incremental || other.Outcome.UploadedBlocks != 3 || other.ID().Lineage == made.ID().Lineage {
				t.Errorf("under another key: %+v", other.Outcome)
			}
		})
	}
}

// Copies that race for their lineage all use the data key that is on record.
func TestEncryptedCopiesAtOnceUseTheKeyOnRecord(t *testing.T) {
	c := &copier{from: newWorld(t), to: newSealedWorld(t, blockstore.NewMem(), ""), key: "a"}
	d := newDevice(leafBytes).tiny(1, 1, 2)
	source := c.from.create(nil, nil, d)
	rival := &copier{from: c.from, to: &world{t: t, ctx: t.Context(), faults: c.to.faults, store: c.to.reopen()}, key: "a"}
	rival.to.store.UseKeys(toyKeys{})
	c.to.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "lineages/", Times: 1}, blockstoretest.Fault{
		Before: func(ctx context.Context, _ blockstoretest.Call) {
			if _, err := rival.run(ctx, source.ID()); err != nil {
				t.Error(err)
			}
		},
	})
	made := c.copy(source.ID())
	elsewhere := c.to.reopen()
	elsewhere.UseKeys(toyKeys{})
	img, err := elsewhere.Open(t.Context(), made.ID(), snapshot.Holder{})
	if err != nil {
		t.Fatal(err)
	}
	c.to.mustHold(img, d)
}

func TestKilledEncryptedCopyIsGoneOnWith(t *testing.T) {
	from := newWorld(t)
	whole := threePacks()
	source := from.create(nil, nil, whole)
	objects := &mortalStore{Store: blockstore.NewMem(), lives: 2, puts: make(map[string]int), fate: func() bool { return true }}
	c := &copier{from: from, to: newSealedWorld(t, objects, ""), key: "a"}
	if _, err := c.run(t.Context(), source.ID()); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	objects.rise(-1, func() bool { return true })
	c.to.store = c.to.reopen()
	c.to.store.UseKeys(toyKeys{})
	from.faults.Reset()
	made := c.copy(source.ID())
	if n := from.asked(blockstoretest.OpReadRange, "/packs/"); n > 2 {
		t.Errorf("%d requests for blocks", n)
	}
	c.to.mustHold(made, whole)
}

func TestCopyDoesNotUseAShreddedLineage(t *testing.T) {
	c := &copier{from: newWorld(t), to: newSealedWorld(t, blockstore.NewMem(), ""), key: "a"}
	d := newDevice(leafBytes).tiny(1, 1, 2)
	source := c.from.create(nil, nil, d)
	shredded := c.copy(source.ID()).ID().Lineage
	record, err := c.to.store.Lineage(t.Context(), shredded)
	if err != nil {
		t.Fatal(err)
	}
	record.Encryption = &manifest.Encryption{KeyURI: "a", Shredded: true}
	c.to.put(manifest.LineageKey(shredded), record)
	c.to.store = c.to.reopen()
	c.to.store.UseKeys(toyKeys{})
	made := c.copy(source.ID())
	if made.ID().Lineage == shredded {
		t.Errorf("%s is of the lineage whose key was shredded", made.ID())
	}
	c.to.mustHold(made, d)
}

// Who can write the destination cannot have a copy go on in clear.
func TestResumedCopyStaysEncrypted(t *testing.T) {
	from := newWorld(t)
	source := from.create(nil, nil, newDevice(leafBytes).tiny(77, 1, 2))
	c := &copier{from: from, to: newSealedWorld(t, blockstore.NewMem(), ""), key: "a"}
	c.to.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "data/", Times: 1}, blockstoretest.Fault{Err: errKilled})
	if _, err := c.run(t.Context(), source.ID()); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	record, err := c.to.store.Lineage(t.Context(), c.record.Snapshot.Lineage)
	if err != nil {
		t.Fatal(err)
	}
	record.Encryption = nil
	c.to.put(manifest.LineageKey(record.ID), record)
	c.to.store = c.to.reopen()
	c.to.store.UseKeys(toyKeys{})
	made := c.copy(source.ID())
	if made.ID().Lineage == record.ID || c.to.mentions("seed 77") {
		t.Errorf("%s is in clear", made.ID())
	}
}
