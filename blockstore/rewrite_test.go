package blockstore_test

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestRewriteKeepsLiveSlotsAndFreesTheOthers(t *testing.T) {
	plainAndSealed(t, testRewriteKeepsLiveSlotsAndFreesTheOthers)
}

func testRewriteKeepsLiveSlotsAndFreesTheOthers(t *testing.T, key *crypt.Key) {
	const n = 12
	pack := newTestPack(t, blockstore.NewMem(), key, 1, n)
	rapid.Check(t, func(t *rapid.T) {
		store := blockstoretest.NewFaulty(blockstore.NewMem())
		p := pack.in(t, store)
		dead := make(map[uint16]bool) // what some rewrite was told
		for range rapid.IntRange(1, 4).Draw(t, "rewrites") {
			now := rapid.SliceOfDistinct(rapid.Uint16Range(0, n-1), rapid.ID).Draw(t, "dead")
			var want int64
			for _, slot := range now {
				if !dead[slot] {
					want += int64(p.refs[slot].Length) + int64(key.Overhead())
				}
				dead[slot] = true
			}
			store.Reset()
			before := len(p.get(t))
			freed, err := blockstore.RewritePack(context.Background(), store, packOwner, 1, key, func(slot uint16) bool { return !slices.Contains(now, slot) })
			if err != nil || freed != want || int64(before-len(p.get(t))) != want {
				t.Fatalf("freed %d of %d bytes, %v", freed, want, err)
			}
			if puts := store.Count(blockstoretest.OpPut); want == 0 && puts != 0 {
				t.Fatalf("nothing to free, and yet %d writes", puts)
			}
		}
		table, err := blockstore.ReadSlotTable(context.Background(), store, packOwner, 1, key)
		if err != nil {
			t.Fatal(err)
		}
		object := p.get(t)
		if table.PackLen() != int64(len(object)) || len(table.Slots) != n {
			t.Fatalf("table of %d slots and %d bytes, pack of %d and %d", len(table.Slots), table.PackLen(), n, len(object))
		}
		for i, slot := range table.Slots {
			if slot.Dead != dead[uint16(i)] || slot.Block != 10*int64(i) {
				t.Fatalf("slot %d is %+v", i, slot)
			}
			ref := p.refs[i]
			if !slot.Dead && !bytes.Equal(object[slot.Offset:][:table.StoredLen(i)], p.object[ref.Offset:][:table.StoredLen(i)]) {
				t.Fatalf("the bytes of slot %d changed", i)
			}
		}
	})
}

// TestRewriteNeverUndoesWhatHappenedMeanwhile lets something happen to the pack
// between the read and the write of a rewrite.
func TestRewriteNeverUndoesWhatHappenedMeanwhile(t *testing.T) {
	plainAndSealed(t, testRewriteNeverUndoesWhatHappenedMeanwhile)
}

func testRewriteNeverUndoesWhatHappenedMeanwhile(t *testing.T, key *crypt.Key) {
	for name, meanwhile := range map[string]func(*testing.T, *testPack){
		"deleted": func(t *testing.T, p *testPack) {
			if err := p.store.Delete(t.Context(), p.key); err != nil {
				t.Error(err)
			}
		},
		"rewritten": func(t *testing.T, p *testPack) {
			if err := p.rewrite(0, 2); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			mem := blockstore.NewMem()
			p := newTestPack(t, mem, key, 1, 10)
			store := blockstoretest.NewFaulty(mem)
			store.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut}, blockstoretest.Fault{
				Before: func(context.Context, blockstoretest.Call) { meanwhile(t, p) },
			})
			late := *p
			late.store = store
			if err := late.rewrite(0, 1); !errors.Is(err, blockstore.ErrChanged) {
				t.Errorf("rewrote: %v", err)
			}
			table, err := blockstore.ReadSlotTable(t.Context(), mem, packOwner, 1, key)
			if name == "deleted" {
				if !errors.Is(err, blockstore.ErrNotExist) {
					t.Errorf("a deleted pack came back: %v, %v", table, err)
				}
				return
			}
			if err != nil || !table.Slots[0].Dead || table.Slots[1].Dead || !table.Slots[2].Dead {
				t.Errorf("the other rewrite was undone: %+v, %v", table, err)
			}
		})
	}
}

// etagless forgets the ETags of what it gets.
type etagless struct{ blockstore.Store }

func (s etagless) Get(ctx context.Context, key string, limit int64) ([]byte, string, error) {
	data, _, err := s.Store.Get(ctx, key, limit)
	return data, "", err
}

func TestRewriteIsNeverUnconditional(t *testing.T) {
	plainAndSealed(t, testRewriteIsNeverUnconditional)
}

func testRewriteIsNeverUnconditional(t *testing.T, key *crypt.Key) {
	p := newTestPack(t, blockstore.NewMem(), key, 1, 3)
	p.store = etagless{p.store}
	if err := p.rewrite(0); err == nil {
		t.Error("rewrote without an ETag")
	}
	if !bytes.Equal(p.get(t), p.object) {
		t.Error("the pack was changed")
	}
}

func TestRewriteOfAMissingPackIsNotExist(t *testing.T) {
	plainAndSealed(t, testRewriteOfAMissingPackIsNotExist)
}

func testRewriteOfAMissingPackIsNotExist(t *testing.T, key *crypt.Key) {
	p := newTestPack(t, blockstore.NewMem(), key, 1, 3)
	if err := p.store.Delete(t.Context(), p.key); err != nil {
		t.Fatal(err)
	}
	if err := p.rewrite(0); !errors.Is(err, blockstore.ErrNotExist) {
		t.Error(err)
	}
}

// TestDamagedPackIsNotRewritten damages the pack, or what is read of it, in
// every place that matters.
func TestDamagedPackIsNotRewritten(t *testing.T) { plainAndSealed(t, testDamagedPackIsNotRewritten) }

func testDamagedPackIsNotRewritten(t *testing.T, key *crypt.Key) {
	p := newTestPack(t, blockstore.NewMem(), key, 1, 10)
	other := newTestPack(t, p.store, key, 2, 10)
	damaged := map[string][]byte{
		"empty":           {},
		"header only":     p.object[:32],
		"cut short":       p.object[:len(p.object)-1],
		"a byte too many": append(slices.Clone(p.object), 0),
		"another pack":    other.object,
	}
	for name, at := range map[string]uint32{
		"in the header": 9, "in the table": 100, "in its checksum": p.refs[0].Offset - 1,
		"first live byte": p.refs[1].Offset, "last live byte": uint32(len(p.object) - 1),
	} {
		object := slices.Clone(p.object)
		object[at] ^= 4
		damaged[name] = object
	}
	for name, object := range damaged {
		p.put(t, object)
		if err := p.rewrite(0); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(p.get(t), object) {
			t.Errorf("%s: the pack was changed", name)
		}
	}

	object := slices.Clone(p.object)
	object[p.refs[0].Offset] ^= 4
	p.put(t, object)
	if err := p.rewrite(0); err != nil {
		t.Errorf("damage in a slot that goes away: %v", err)
	}
}

// TestRewriteFailsWithoutATrace fails each call of a rewrite in each way: what
// is stored then is the old pack or the new one, and rewriting again ends well.
func TestRewriteFailsWithoutATrace(t *testing.T) { plainAndSealed(t, testRewriteFailsWithoutATrace) }

func testRewriteFailsWithoutATrace(t *testing.T, key *crypt.Key) {
	want := newTestPack(t, blockstore.NewMem(), key, 1, 10)
	if err := want.rewrite(0, 5); err != nil {
		t.Fatal(err)
	}
	rewritten := want.get(t)
	is := func(a, b []byte) bool { return samePack(a, b, packOwner, 1, key) }
	faults := map[string]blockstoretest.Fault{
		"fails":      {Err: blockstore.ErrUnavailable},
		"loses":      {LoseReply: true},
		"flips":      {Flip: true},
		"cuts short": {Truncate: true},
	}
	for _, name := range slices.Sorted(maps.Keys(faults)) {
		for n := range 2 {
			store := blockstoretest.NewFaulty(blockstore.NewMem())
			p := newTestPack(t, store, key, 1, 10)
			store.Reset()
			store.Inject(blockstoretest.Rule{Match: func(c blockstoretest.Call) bool { return c.Keys[0] == p.key }, Skip: n, Times: 1}, faults[name])
			err := p.rewrite(0, 5)
			store.Heal()
			got := p.get(t)
			if !is(got, rewritten) && (err == nil || !bytes.Equal(got, p.object)) {
				t.Errorf("call %d %s: %v, and the pack is neither the old nor the new one", n, name, err)
			}
			if err := p.rewrite(0, 5); err != nil || !is(p.get(t), rewritten) {
				t.Errorf("call %d %s: rewriting again: %v", n, name, err)
			}
		}
	}
}
