package blockstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// maxReadCalls is how many calls a ReadRun of one block makes at most: one by the
// hints, then three times two for the slot table and one for the data. The last of
// them is one for each block of a longer run.
const maxReadCalls = 1 + 3*3

func TestReadRunCostsOneRequest(t *testing.T) { plainAndSealed(t, testReadRunCostsOneRequest) }

func testReadRunCostsOneRequest(t *testing.T, key *crypt.Key) {
	store := blockstoretest.NewFaulty(blockstore.NewMem())
	p := newTestPack(t, store, key, 1, 20)
	for _, refs := range [][]manifest.Ref{p.refs, p.refs[3:4], p.refs[5:9], {p.refs[0], p.refs[7], p.refs[19]}} {
		store.Reset()
		p.mustRead(t, newReader(store, key), refs)
		if calls := store.Calls(); len(calls) != 1 || calls[0].Op != blockstoretest.OpReadRange {
			t.Errorf("reading %d blocks made the calls %v", len(refs), calls)
		}
	}
}

func TestReadRunOfNothingAsksNobody(t *testing.T) { plainAndSealed(t, testReadRunOfNothingAsksNobody) }

func testReadRunOfNothingAsksNobody(t *testing.T, key *crypt.Key) {
	store := blockstoretest.NewFaulty(blockstore.NewMem())
	if err := newReader(store, key).ReadRun(t.Context(), nil, nil, nil); err != nil || len(store.Calls()) != 0 {
		t.Errorf("%v, calls %v", err, store.Calls())
	}
}

func TestReadRunFindsBlocksOfARewrittenPack(t *testing.T) {
	plainAndSealed(t, testReadRunFindsBlocksOfARewrittenPack)
}

func testReadRunFindsBlocksOfARewrittenPack(t *testing.T, key *crypt.Key) {
	store := blockstoretest.NewFaulty(blockstore.NewMem())
	p := newTestPack(t, store, key, 1, 20)
	if err := p.rewrite(0, 1, 2, 10); err != nil {
		t.Fatal(err)
	}
	live := slices.Concat(p.refs[3:10], p.refs[11:])
	reader := newReader(store, key)
	p.mustRead(t, reader, live)

	store.Reset()
	p.mustRead(t, reader, live)
	if n := len(store.Calls()); n != 1 {
		t.Errorf("once known to be rewritten, reading the pack still made the calls %v", store.Calls())
	}

	if err := p.rewrite(0, 1, 2, 3, 10); err != nil { // what the reader learned is wrong again
		t.Fatal(err)
	}
	p.mustRead(t, reader, live[1:])
}

// TestReadRunOutrunsARewriter rewrites the pack once before the n-th call of a
// read whose hints hold, or do not, for each n.
func TestReadRunOutrunsARewriter(t *testing.T) { plainAndSealed(t, testReadRunOutrunsARewriter) }

func testReadRunOutrunsARewriter(t *testing.T, key *crypt.Key) {
	for _, before := range [][]uint16{nil, {0}} {
		for n := range maxReadCalls {
			store := blockstoretest.NewFaulty(blockstore.NewMem())
			p := newTestPack(t, store, key, 1, 10)
			if err := p.rewrite(before...); err != nil {
				t.Fatal(err)
			}
			below := &testPack{store: p.store, data: key, key: p.key, number: p.number}
			store.Inject(
				blockstoretest.Rule{Op: blockstoretest.OpReadRange, Skip: n, Times: 1},
				blockstoretest.Fault{Before: func(context.Context, blockstoretest.Call) {
					if err := below.rewrite(0, 1, 5); err != nil {
						t.Error(err)
					}
				}})
			p.mustRead(t, newReader(store, key), slices.Concat(p.refs[2:5], p.refs[6:]))
		}
	}
}

// TestReadRunSurvivesPassingDamage damages what the n-th call returns, for
// each n, also when the pack was rewritten.
func TestReadRunSurvivesPassingDamage(t *testing.T) {
	plainAndSealed(t, testReadRunSurvivesPassingDamage)
}

func testReadRunSurvivesPassingDamage(t *testing.T, key *crypt.Key) {
	for name, fault := range map[string]blockstoretest.Fault{
		"flipped bit": {Flip: true},
		"short body":  {Truncate: true},
	} {
		for _, dead := range [][]uint16{nil, {0, 1, 2}} {
			for n := range maxReadCalls {
				store := blockstoretest.NewFaulty(blockstore.NewMem())
				p := newTestPack(t, store, key, 1, 10)
				if err := p.rewrite(dead...); err != nil {
					t.Fatal(err)
				}
				store.Inject(blockstoretest.Rule{Op: blockstoretest.OpReadRange, Skip: n, Times: 1}, fault)
				t.Run(fmt.Sprintf("%s in call %d, %d slots dead", name, n, len(dead)), func(t *testing.T) {
					p.mustRead(t, newReader(store, key), p.refs[3:])
				})
			}
		}
	}
}

func TestDamagedBlockIsCorruptAndItsNeighboursAreNot(t *testing.T) {
	plainAndSealed(t, testDamagedBlockIsCorruptAndItsNeighboursAreNot)
}

func testDamagedBlockIsCorruptAndItsNeighboursAreNot(t *testing.T, key *crypt.Key) {
	store := blockstoretest.NewFaulty(blockstore.NewMem())
	p := newTestPack(t, store, key, 1, 10)
	const damaged = 4
	bad := slices.Clone(p.object)
	bad[p.refs[damaged].Offset+p.refs[damaged].Length/2] ^= 1
	p.put(t, bad)
	store.Reset()
	errs, err := p.read(newReader(store, key), p.refs)
	if err != nil {
		t.Fatal(err)
	}
	for i, err := range errs {
		if i != damaged && err != nil {
			t.Errorf("block %d: %v", i, err)
		}
	}
	err = errs[damaged]
	if !errors.Is(err, manifest.ErrCorrupt) {
		t.Fatalf("damaged block: %v", err)
	}
	for _, name := range []string{packOwner.String(), "pack 1 ", "slot 4 "} {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("the error does not name %q: %v", name, err)
		}
	}
	if n := len(store.Calls()); n > maxReadCalls {
		t.Errorf("it took %d calls to give up", n)
	}
}

func TestCutPackIsCorrupt(t *testing.T) { plainAndSealed(t, testCutPackIsCorrupt) }

func testCutPackIsCorrupt(t *testing.T, key *crypt.Key) {
	p := newTestPack(t, blockstore.NewMem(), key, 1, 10)
	for _, n := range []int{0, 1, 31, 32, 100, len(p.object) / 2, len(p.object) - 1} {
		p.put(t, p.object[:n])
		errs, err := p.read(newReader(p.store, key), p.refs)
		if err != nil {
			t.Fatal(err)
		}
		if err := errs[9]; !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("cut to %d bytes, the last block: %v", n, err)
		}
		for i, ref := range p.refs {
			if whole := int(ref.Offset+ref.Length)+key.Overhead() <= n; whole != (errs[i] == nil) {
				t.Errorf("cut to %d bytes, block %d, which is there: %t, %v", n, i, whole, errs[i])
			}
		}
	}
}

// TestDeadSlotIsCorruptAtOnce also counts: what is dead stays dead, so there is
// nothing to try again.
func TestDeadSlotIsCorruptAtOnce(t *testing.T) { plainAndSealed(t, testDeadSlotIsCorruptAtOnce) }

func testDeadSlotIsCorruptAtOnce(t *testing.T, key *crypt.Key) {
	store := blockstoretest.NewFaulty(blockstore.NewMem())
	p := newTestPack(t, store, key, 1, 10)
	if err := p.rewrite(3); err != nil {
		t.Fatal(err)
	}
	reader := newReader(store, key)
	for _, calls := range []int{4, 1} { // hints, table in two, data; then the data alone
		store.Reset()
		errs, err := p.read(reader, p.refs[2:5])
		if err != nil {
			t.Fatal(err)
		}
		if errs[0] != nil || errs[2] != nil || !errors.Is(errs[1], manifest.ErrCorrupt) {
			t.Errorf("around the dead slot: %v", errs)
		}
		if n := len(store.Calls()); n != calls {
			t.Errorf("%d calls instead of %d: %v", n, calls, store.Calls())
		}
	}
}

func TestSlotThatNeverWasIsCorrupt(t *testing.T) { plainAndSealed(t, testSlotThatNeverWasIsCorrupt) }

func testSlotThatNeverWasIsCorrupt(t *testing.T, key *crypt.Key) {
	p := newTestPack(t, blockstore.NewMem(), key, 1, 10)
	refs := slices.Clone(p.refs)
	refs[9].Slot, refs[9].Hash = 10, manifest.Sum([]byte("something else"))
	errs, err := p.read(newReader(p.store, key), refs[8:])
	if err != nil {
		t.Fatal(err)
	}
	if errs[0] != nil || !errors.Is(errs[1], manifest.ErrCorrupt) {
		t.Errorf("%v", errs)
	}
}

func TestAnotherPackUnderTheKeyIsCorrupt(t *testing.T) {
	plainAndSealed(t, testAnotherPackUnderTheKeyIsCorrupt)
}

func testAnotherPackUnderTheKeyIsCorrupt(t *testing.T, key *crypt.Key) {
	store := blockstore.NewMem()
	p, other := newTestPack(t, store, key, 1, 10), newTestPack(t, store, key, 2, 10)
	p.put(t, other.object)
	errs, err := p.read(newReader(store, key), p.refs)
	if err != nil {
		t.Fatal(err)
	}
	for i, err := range errs {
		if !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("block %d: %v", i, err)
		}
	}
}

// TestMissingPackIsNotExist deletes the pack before the n-th call of a read
// that needs all it may make.
func TestMissingPackIsNotExist(t *testing.T) { plainAndSealed(t, testMissingPackIsNotExist) }

func testMissingPackIsNotExist(t *testing.T, key *crypt.Key) {
	for n := range 4 {
		mem := blockstore.NewMem()
		store := blockstoretest.NewFaulty(mem)
		p := newTestPack(t, store, key, 1, 10)
		refs := slices.Clone(p.refs)
		for i := range refs { // so that the read would go on to the end
			refs[i].Hash = manifest.Sum([]byte("nothing"))
		}
		store.Inject(blockstoretest.Rule{Op: blockstoretest.OpReadRange, Skip: n, Times: 1},
			blockstoretest.Fault{Before: func(ctx context.Context, _ blockstoretest.Call) {
				if err := mem.Delete(ctx, p.key); err != nil {
					t.Error(err)
				}
			}})
		errs, err := p.read(newReader(store, key), refs)
		if err != nil {
			t.Fatal(err)
		}
		for i, err := range errs {
			if !errors.Is(err, blockstore.ErrNotExist) || errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("deleted before call %d, block %d: %v", n, i, err)
			}
		}
	}
}

func TestErrorOfTheStoreEndsAReadAtOnce(t *testing.T) {
	plainAndSealed(t, testErrorOfTheStoreEndsAReadAtOnce)
}

func testErrorOfTheStoreEndsAReadAtOnce(t *testing.T, key *crypt.Key) {
	for _, cause := range []error{blockstore.ErrUnavailable, blockstore.ErrDenied, context.Canceled} {
		for n := range 4 {
			store := blockstoretest.NewFaulty(blockstore.NewMem())
			p := newTestPack(t, store, key, 1, 10)
			if err := p.rewrite(0); err != nil {
				t.Fatal(err)
			}
			store.Reset()
			store.Inject(blockstoretest.Rule{Op: blockstoretest.OpReadRange, Skip: n, Times: 1}, blockstoretest.Fault{Err: cause})
			errs, err := p.read(newReader(store, key), p.refs[1:])
			if err != nil {
				t.Fatal(err)
			}
			for i, err := range errs {
				if !errors.Is(err, cause) || errors.Is(err, manifest.ErrCorrupt) {
					t.Errorf("%v in call %d, block %d: %v", cause, n, i, err)
				}
			}
			if calls := len(store.Calls()); calls != n+1 {
				t.Errorf("%v in call %d was followed by others: %v", cause, n, store.Calls())
			}
		}
	}
}

func TestRefsThatAreNotOfOnePackAreRefused(t *testing.T) {
	plainAndSealed(t, testRefsThatAreNotOfOnePackAreRefused)
}

func testRefsThatAreNotOfOnePackAreRefused(t *testing.T, key *crypt.Key) {
	p := newTestPack(t, blockstore.NewMem(), key, 1, 3)
	pack, owner := p.refs[1], p.refs[1]
	pack.Pack++
	owner.Owner++
	for _, odd := range []manifest.Ref{pack, owner, {}} {
		errs, err := p.read(newReader(p.store, key), []manifest.Ref{p.refs[0], odd})
		if err != nil {
			t.Fatal(err)
		}
		if errs[0] == nil || errs[1] == nil {
			t.Errorf("%+v: %v", odd, errs)
		}
	}
}

// TestReadRunBelievesNoHint reads with hints that are anything, as a hostile
// leaf can have them: all slots are there, so all are read.
func TestReadRunBelievesNoHint(t *testing.T) { plainAndSealed(t, testReadRunBelievesNoHint) }

func testReadRunBelievesNoHint(t *testing.T, key *crypt.Key) {
	p := newTestPack(t, blockstore.NewMem(), key, 1, 10)
	rapid.Check(t, func(t *rapid.T) {
		refs := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) manifest.Ref {
			ref := rapid.SampledFrom(p.refs).Draw(t, "ref")
			if rapid.Bool().Draw(t, "lie") {
				ref.Raw = rapid.Bool().Draw(t, "raw")
				ref.Length = rapid.Uint32().Draw(t, "length")
				ref.Offset = rapid.Uint32Range(0, 2*uint32(len(p.object))).Draw(t, "offset")
			}
			return ref
		}), 1, 5).Draw(t, "refs")
		errs, err := p.read(newReader(p.store, key), refs)
		if err != nil {
			t.Fatal(err)
		}
		for i, err := range errs {
			if err != nil {
				t.Fatalf("block %d: %v", i, err)
			}
		}
	})
}

// TestReadRunNeverHandsOutOtherBytes reads while anything happens to the pack
// and to what the store returns: each block comes out right or not at all.
func TestReadRunNeverHandsOutOtherBytes(t *testing.T) {
	plainAndSealed(t, testReadRunNeverHandsOutOtherBytes)
}

func testReadRunNeverHandsOutOtherBytes(t *testing.T, key *crypt.Key) {
	pack := newTestPack(t, blockstore.NewMem(), key, 1, 8)
	rapid.Check(t, func(t *rapid.T) {
		mem := blockstore.NewMem()
		store := blockstoretest.NewFaulty(mem)
		p := pack.in(t, mem)
		slots := rapid.SliceOfDistinct(rapid.Uint16Range(0, 7), rapid.ID)
		for range rapid.IntRange(0, 6).Draw(t, "faults") {
			dead := slots.Draw(t, "dead")
			at := rapid.IntRange(0, maxReadCalls).Draw(t, "call")
			damage := rapid.IntRange(0, len(p.object)-1).Draw(t, "damage")
			fault := rapid.SampledFrom([]blockstoretest.Fault{
				{Flip: true}, {Truncate: true}, {Err: blockstore.ErrUnavailable},
				{Before: func(context.Context, blockstoretest.Call) {
					// It fails on a pack that is damaged: fine.
					_ = p.rewrite(dead...)
				}},
				{Before: func(ctx context.Context, _ blockstoretest.Call) {
					object := bytes.Clone(p.object)
					object[damage] ^= 0x40
					if _, err := mem.Put(ctx, p.key, object, blockstore.Condition{}); err != nil {
						t.Error(err)
					}
				}},
			}).Draw(t, "fault")
			store.Inject(blockstoretest.Rule{Skip: at, Times: 1}, fault)
		}
		reader := newReader(store, key)
		for range 2 {
			if _, err := p.read(reader, p.refs); err != nil {
				t.Fatal(err)
			}
		}
		if n := len(store.Calls()); n > 2*(maxReadCalls+len(p.refs)-1) {
			t.Fatalf("%d calls", n)
		}
	})
}

func TestReadsAndRewritesRunConcurrently(t *testing.T) {
	plainAndSealed(t, testReadsAndRewritesRunConcurrently)
}

func testReadsAndRewritesRunConcurrently(t *testing.T, key *crypt.Key) {
	store := blockstore.NewMem()
	reader := newReader(store, key)
	packs := []*testPack{newTestPack(t, store, key, 1, 12), newTestPack(t, store, key, 2, 12)}
	var wg sync.WaitGroup
	for _, p := range packs {
		for range 3 {
			wg.Go(func() {
				for from := range 8 {
					errs, err := p.read(reader, p.refs[4:5+from])
					if err != nil {
						t.Error(err)
					}
					for i, err := range errs {
						if err != nil {
							t.Errorf("block %d: %v", i, err)
						}
					}
				}
			})
		}
		wg.Go(func() {
			for dead := range uint16(2) { // fewer rewrites than a read tries
				if err := p.rewrite(0, 1+dead); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func BenchmarkReadRun(b *testing.B) {
	p := newTestPack(b, blockstore.NewMem(), nil, 1, 64)
	reader, block := newReader(p.store, nil), make([]byte, packBlockSize)
	b.SetBytes(int64(len(p.refs) * packBlockSize))
	b.ReportAllocs()
	for b.Loop() {
		err := reader.ReadRun(b.Context(), p.refs, func(int) []byte { return block }, func(int, error) {})
		if err != nil {
			b.Fatal(err)
		}
	}
}
