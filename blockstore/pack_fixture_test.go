package blockstore_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

const packBlockSize = manifest.MinBlockSize

var packOwner = manifest.SnapshotID{Lineage: 0x1a2b3c4d, Serial: 0x123456789}

// plainAndSealed runs a test with packs that are not sealed and with ones that are.
func plainAndSealed(t *testing.T, test func(t *testing.T, key *crypt.Key)) {
	t.Run("plain", func(t *testing.T) { test(t, nil) })
	t.Run("sealed", func(t *testing.T) { test(t, newKey(t, 1)) })
}

// newKey returns a data key, the same for the same seed.
func newKey(t testing.TB, seed byte) *crypt.Key {
	t.Helper()
	key, err := crypt.NewKey(bytes.Repeat([]byte{seed}, crypt.KeyLen))
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// A testPack is a pack in a store, and what its slots hold.
type testPack struct {
	store  blockstore.Store
	data   *crypt.Key // that it is sealed under; nil: it is not
	key    string
	number uint32
	object []byte
	refs   []manifest.Ref
	blocks [][]byte
}

// A failer is what a helper needs of a *testing.T, a *testing.B or a *rapid.T.
type failer interface {
	Helper()
	Fatal(args ...any)
	Errorf(format string, args ...any)
}

// testBlock returns the content of a block: one in three does not compress,
// the others do, to different lengths.
func testBlock(seed uint64) []byte {
	rng := rand.New(rand.NewPCG(seed, 0))
	block := make([]byte, packBlockSize)
	random := block
	if seed%3 != 0 {
		random = block[:8+rng.IntN(packBlockSize/2)]
	}
	for ; len(random) >= 8; random = random[8:] {
		binary.LittleEndian.PutUint64(random, rng.Uint64())
	}
	return block
}

// newTestPack stores a pack of n blocks, numbered 0, 10, 20, …, sealed under a key if
// that is not nil.
func newTestPack(tb failer, store blockstore.Store, data *crypt.Key, number uint32, n int) *testPack {
	tb.Helper()
	p := &testPack{store: store, data: data, key: manifest.PackKey(packOwner, number), number: number}
	b := blockstore.NewPackBuilder(packOwner, number, packBlockSize, data)
	var c blockstore.Compressor
	for i := range n {
		block := testBlock(uint64(number)<<32 + uint64(i))
		stored, raw := c.Compress(nil, block)
		b.Add(10*int64(i), manifest.Sum(block), stored, raw)
		p.blocks = append(p.blocks, block)
	}
	p.object, p.refs = b.Finish()
	p.put(tb, p.object)
	return p
}

// in returns the same pack in another store.
func (p *testPack) in(tb failer, store blockstore.Store) *testPack {
	tb.Helper()
	c := *p
	c.store = store
	c.put(tb, p.object)
	return &c
}

// put replaces the pack, with anything.
func (p *testPack) put(tb failer, object []byte) {
	tb.Helper()
	if _, err := p.store.Put(context.Background(), p.key, object, blockstore.Condition{}); err != nil {
		tb.Fatal(err)
	}
}

// get returns the pack as it is stored now.
func (p *testPack) get(tb failer) []byte {
	tb.Helper()
	object, _, err := p.store.Get(context.Background(), p.key, blockstore.MaxPackSize)
	if err != nil {
		tb.Fatal(err)
	}
	return object
}

// rewrite rewrites the pack without some slots.
func (p *testPack) rewrite(dead ...uint16) error {
	_, err := blockstore.RewritePack(context.Background(), p.store, packOwner, p.number, p.data, func(slot uint16) bool {
		return !slices.Contains(dead, slot)
	})
	return err
}

// newReader returns a reader of a store that has what the packs need.
func newReader(store blockstore.Store, data *crypt.Key) *blockstore.BlockReader {
	return &blockstore.BlockReader{Store: store, Lineage: packOwner.Lineage, BlockSize: packBlockSize, Key: data}
}

// read reads refs and returns the error of each. It fails unless each is done
// exactly once, without error only with the content that its slot has, and
// ReadRun returns the first error.
func (p *testPack) read(r *blockstore.BlockReader, refs []manifest.Ref) ([]error, error) {
	dst, errs, done := make([][]byte, len(refs)), make([]error, len(refs)), make([]int, len(refs))
	for i := range dst {
		dst[i] = make([]byte, packBlockSize)
	}
	var first error
	err := r.ReadRun(context.Background(), refs, func(i int) []byte { return dst[i] }, func(i int, err error) {
		done[i]++
		errs[i] = err
		if first == nil {
			first = err
		}
	})
	if err != first {
		return nil, fmt.Errorf("ReadRun returned %v, not the first error %v", err, first)
	}
	for i, ref := range refs {
		if done[i] != 1 {
			return nil, fmt.Errorf("block %d is done %d times", i, done[i])
		}
		if errs[i] == nil && !bytes.Equal(dst[i], p.blocks[ref.Slot]) {
			return nil, fmt.Errorf("block %d is not what slot %d holds", i, ref.Slot)
		}
	}
	return errs, nil
}

// mustRead reads refs without an error.
func (p *testPack) mustRead(tb failer, r *blockstore.BlockReader, refs []manifest.Ref) {
	tb.Helper()
	errs, err := p.read(r, refs)
	if err != nil {
		tb.Fatal(err)
	}
	for i, err := range errs {
		if err != nil {
			tb.Errorf("block %d: %v", i, err)
		}
	}
}

// samePack reports whether two objects are the same pack: the same bytes or, of a
// sealed one, whose seals are never the same twice, whole and with the same slots.
func samePack(a, b []byte, owner manifest.SnapshotID, number uint32, key *crypt.Key) bool {
	if key == nil || bytes.Equal(a, b) {
		return bytes.Equal(a, b)
	}
	slotsA, errA := openedSlots(a, owner, number, key)
	slotsB, errB := openedSlots(b, owner, number, key)
	return errA == nil && errB == nil && slices.Equal(slotsA, slotsB)
}

// openedSlots describes all slots of a pack, and what they hold.
func openedSlots(object []byte, owner manifest.SnapshotID, number uint32, key *crypt.Key) ([]string, error) {
	table, err := blockstore.DecodePack(object, owner, number, key)
	if err != nil {
		return nil, err
	}
	var slots []string
	for i, slot := range table.Slots {
		block := make([]byte, table.BlockSize)
		if !slot.Dead {
			stored := object[slot.Offset:][:table.StoredLen(i)]
			if sum := manifest.Checksum(stored); sum != slot.Checksum {
				return nil, fmt.Errorf("slot %d: wrong checksum", i)
			}
			if err := blockstore.DecodeSlot(block, stored, slot.Raw, key, owner, number, uint16(i)); err != nil {
				return nil, err
			}
		}
		slot.Checksum = 0
		slots = append(slots, fmt.Sprintf("%+v %x", slot, manifest.Sum(block)))
	}
	return slots, nil
}
