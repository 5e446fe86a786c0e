package blockstore

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

const (
	// tableReads is how often a run that does not verify is looked up in the
	// slot table and read again: often enough to overtake a reclaimer that
	// rewrites the pack at that moment, which it does once.
	tableReads = 3

	// maxTables bounds the slot tables of rewritten packs that a BlockReader
	// remembers: 3 MiB of them.
	maxTables = 128
)

// A BlockReader reads blocks out of packs and verifies them. Its fields are
// set before first use; after that it may be used concurrently, and not copied.
type BlockReader struct {
	Store     Store
	Lineage   manifest.LineageID
	BlockSize int        // in bytes
	Key       *crypt.Key // that the lineage's packs are sealed under; nil: they are not

	buffers bufferPool
	tables  tableCache
}

// ReadRun reads blocks that lie in one pack, close to each other and in the
// order of refs. None of these is a hole. It fetches the range from the first
// to the last, bytes in between included, at most [MaxPackSize], with one
// request if the refs' hints still hold. Block i is decoded into dst(i), which
// is BlockSize long, and its SHA-256 checked. dst may be asked again for a
// block that is tried again, and then returns the same.
//
// Then, as soon as its fate is known, done(i, err) is called, exactly once for
// each block, one after the other, on the calling goroutine. Unless err is nil,
// what dst(i) holds is unverified or half decoded and must not be used. The
// error wraps ErrNotExist if the pack is gone, and [manifest.ErrCorrupt], naming the slot,
// if the block cannot be found in it: looking it up in the slot table and
// reading it again, three times, did not help. Any other error is the store's.
//
// ReadRun returns nil or the first error that it gave to done.
func (r *BlockReader) ReadRun(ctx context.Context, refs []manifest.Ref, dst func(i int) []byte, done func(i int, err error)) error {
	if len(refs) == 0 {
		return nil
	}
	run := newRunRead(r, refs, dst, done)
	if err := run.check(); err != nil {
		run.fail(err)
		return run.err
	}
	if table := r.tables.get(run.id); table != nil {
		run.locate(table)
	}
	for try := 0; len(run.pending) > 0; try++ {
		if try > 0 {
			if err := run.lookUp(ctx); err != nil {
				run.fail(err)
				break
			}
		}
		fetch := run.fetch
		if try == tableReads {
			fetch = run.fetchEach // what is cut off behind the others must not take them along
		}
		if err := fetch(ctx); err != nil {
			run.fail(err)
			break
		}
		if try == tableReads {
			run.failCorrupt()
		}
	}
	return run.err
}

// A packID names a pack.
type packID struct {
	owner manifest.SnapshotID
	pack  uint32
}

func (p packID) String() string { return fmt.Sprintf("pack %d of %s", p.pack, p.owner) }

// A runRead is one call of ReadRun.
type runRead struct {
	*BlockReader
	id   packID
	refs []manifest.Ref
	dst  func(i int) []byte
	done func(i int, err error)

	at      []place // where each block is believed to lie
	pending []int   // blocks whose fate is open, ascending
	why     error   // why the last one of them did not verify
	err     error   // the first one given to done
}

// A place is where in a pack a block's stored bytes lie.
type place struct {
	off, n uint32
	raw    bool
}

func (p place) end() int64 { return int64(p.off) + int64(p.n) }

func newRunRead(r *BlockReader, refs []manifest.Ref, dst func(i int) []byte, done func(i int, err error)) *runRead {
	run := &runRead{
		BlockReader: r, refs: refs, dst: dst, done: done,
		id:      packID{manifest.SnapshotID{Lineage: r.Lineage, Serial: refs[0].Owner}, refs[0].Pack},
		at:      make([]place, len(refs)),
		pending: make([]int, len(refs)),
	}
	for i, ref := range refs {
		run.at[i] = place{ref.Offset, ref.Length + uint32(r.Key.Overhead()), ref.Raw}
		run.pending[i] = i
	}
	return run
}

// check refuses what is a bug of the caller.
func (run *runRead) check() error {
	for i, ref := range run.refs {
		if ref.IsHole() || ref.Owner != run.refs[0].Owner || ref.Pack != run.refs[0].Pack {
			return fmt.Errorf("read run: block %d is not one of %s", i, run.id)
		}
	}
	return nil
}

// finish reports the fate of a block, which the caller takes off pending.
func (run *runRead) finish(i int, err error) {
	if run.err == nil {
		run.err = err
	}
	run.done(i, err)
}

// fail reports one error for all blocks whose fate is open.
func (run *runRead) fail(err error) {
	for _, i := range run.pending {
		run.finish(i, err)
	}
	run.pending = nil
}

// failCorrupt gives up on all blocks whose fate is open.
func (run *runRead) failCorrupt() {
	for _, i := range run.pending {
		run.finish(i, fmt.Errorf("read slot %d of %s: %w: tried %d times: %w",
			run.refs[i].Slot, run.id, manifest.ErrCorrupt, tableReads+1, run.why))
	}
	run.pending = nil
}

// fetch gets the bytes of all pending blocks and takes those that verify off
// pending. An error ends the run; nil with blocks pending means that they may
// lie elsewhere.
func (run *runRead) fetch(ctx context.Context) error {
	if len(run.pending) == 0 {
		return nil
	}
	first, end := run.at[run.pending[0]].off, int64(0)
	for _, i := range run.pending {
		first, end = min(first, run.at[i].off), max(end, run.at[i].end())
	}
	if end > MaxPackSize { // leaves are decoded with this bound: a bug, but not worth the memory
		run.why = fmt.Errorf("the hint reaches to %d", end)
		return nil
	}
	buffer := run.buffers.get(int(end - int64(first)))
	defer run.buffers.put(buffer)
	err := run.Store.ReadRange(ctx, manifest.PackKey(run.id.owner, run.id.pack), int64(first), *buffer)
	if errors.Is(err, ErrShort) {
		run.why = err
		return nil
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", run.id, err)
	}
	still := run.pending[:0]
	for _, i := range run.pending {
		at := run.at[i]
		stored := (*buffer)[at.off-first:][:at.n]
		if err := run.verify(i, stored, at.raw); err != nil {
			run.why = err
			still = append(still, i)
			continue
		}
		run.finish(i, nil)
	}
	run.pending = still
	return nil
}

// fetchEach is fetch with a request for each pending block.
func (run *runRead) fetchEach(ctx context.Context) error {
	all := run.pending
	var still []int
	for n, i := range all {
		run.pending = []int{i}
		if err := run.fetch(ctx); err != nil {
			run.pending = append(still, all[n:]...)
			return err
		}
		still = append(still, run.pending...)
	}
	run.pending = still
	return nil
}

// verify decodes a block and compares its hash.
func (run *runRead) verify(i int, stored []byte, raw bool) error {
	block := run.dst(i)[:run.BlockSize]
	if run.Key != nil {
		buffer := run.buffers.get(len(stored))
		defer run.buffers.put(buffer)
		opened, err := run.Key.Open((*buffer)[:0], slotName(run.id.owner, run.id.pack, run.refs[i].Slot), stored)
		if err != nil {
			return fmt.Errorf("%w: %w", manifest.ErrCorrupt, err)
		}
		stored = opened
	}
	if err := Decompress(block, stored, raw); err != nil {
		return err
	}
	if manifest.Sum(block) != run.refs[i].Hash {
		return errors.New("wrong SHA-256")
	}
	return nil
}

// lookUp reads the slot table and learns from it where the pending blocks lie.
// An error ends the run. A table that cannot be decoded does not: it may be
// read better next time.
func (run *runRead) lookUp(ctx context.Context) error {
	table, err := ReadSlotTable(ctx, run.Store, run.id.owner, run.id.pack, run.Key)
	if errors.Is(err, manifest.ErrCorrupt) || errors.Is(err, manifest.ErrVersion) {
		run.why = err
		return nil
	}
	if err != nil {
		return err
	}
	run.tables.put(run.id, table)
	run.locate(table)
	return nil
}

// locate learns from a slot table where the pending blocks lie, and gives up
// on those that do not any more: what is dead stays dead.
func (run *runRead) locate(table *SlotTable) {
	still := run.pending[:0]
	for _, i := range run.pending {
		n := int(run.refs[i].Slot)
		if n >= len(table.Slots) || table.Slots[n].Dead {
			run.finish(i, fmt.Errorf("read slot %d of %s: %w: the slot is dead or was never there", n, run.id, manifest.ErrCorrupt))
			continue
		}
		slot := table.Slots[n]
		run.at[i] = place{slot.Offset, uint32(table.storedLen(slot)), slot.Raw}
		still = append(still, i)
	}
	run.pending = still
}

// A tableCache remembers the slot tables of packs in which hints did not hold,
// so that each run of a rewritten pack does not find that out anew. What it
// remembers is a hint again.
type tableCache struct {
	mu     sync.Mutex
	tables map[packID]*SlotTable // guarded by mu; at most maxTables; tables never change
}

func (c *tableCache) get(id packID) *SlotTable {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tables[id]
}

func (c *tableCache) put(id packID, table *SlotTable) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tables == nil {
		c.tables = make(map[packID]*SlotTable)
	}
	c.tables[id] = table
	for other := range c.tables {
		if len(c.tables) <= maxTables {
			return
		}
		if other != id {
			delete(c.tables, other)
		}
	}
}

// A bufferPool lends buffers for what is fetched, by powers of two: a demand
// for one block shall not hold the buffer of a whole pack.
type bufferPool struct {
	classes [26]sync.Pool // of *[]byte with capacity 1<<i; MaxPackSize is 1<<25
}

// get returns a buffer of n bytes, at most MaxPackSize, with any content.
func (p *bufferPool) get(n int) *[]byte {
	class := bits.Len(uint(max(n-1, 0)))
	if b, ok := p.classes[class].Get().(*[]byte); ok {
		*b = (*b)[:n]
		return b
	}
	b := make([]byte, n, 1<<class)
	return &b
}

func (p *bufferPool) put(b *[]byte) {
	p.classes[bits.Len(uint(cap(*b)-1))].Put(b)
}
