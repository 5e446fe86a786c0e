package blockstore

import (
	"fmt"
	"slices"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

const (
	// PackTarget is the number of stored bytes at which a pack is full: large
	// enough that a whole volume costs few requests, small enough that a
	// pack is uploaded again, or held in memory, without a thought.
	PackTarget = 16 << 20

	// MaxPackSize bounds a pack object, in bytes.
	MaxPackSize = manifest.MaxPackSize

	// MaxPackSlots bounds the slots of a pack, which is full at that too.
	MaxPackSlots = manifest.MaxPackSlots
)

// smallPack is what a PackBuilder allocates, in bytes, before it takes the whole
// of a full pack: many snapshots change little.
const smallPack = 1 << 20

// A PackBuilder makes one pack out of blocks that come in address order. It
// holds the pack in memory, and is not safe for concurrent use.
type PackBuilder struct {
	table  SlotTable
	hashes []manifest.Hash
	// buf holds the stored bytes, behind room for the largest slot table, so
	// that they need not move when the size of the table is known.
	buf []byte
}

// NewPackBuilder begins the pack with a number, at most [manifest.MaxPack], of
// the snapshot that owns it, sealed under a key if that is not nil.
func NewPackBuilder(owner manifest.SnapshotID, number uint32, blockSize int, key *crypt.Key) *PackBuilder {
	return &PackBuilder{
		table: SlotTable{Owner: owner, Pack: number, BlockSize: blockSize, Key: key},
		buf:   make([]byte, MaxSlotTableLen, smallPack),
	}
}

// Add puts a block into the next slot. Stored and raw are what
// [Compressor.Compress] returned for it; hash is of the block itself. Add keeps
// nothing of stored. It panics if the block does not follow the one before, if
// stored has a length that the block cannot have, or if no slot is left: see
// Full.
func (b *PackBuilder) Add(block int64, hash manifest.Hash, stored []byte, raw bool) {
	slot := Slot{Block: block, Length: uint32(len(stored)), Raw: raw}
	n, size := len(b.table.Slots), len(stored)+b.table.Key.Overhead()
	b.table.Slots = append(b.table.Slots, slot)
	if err := b.table.validateSlot(n); err != nil || n >= MaxPackSlots || len(b.buf)+size > MaxPackSize {
		panic(fmt.Sprintf("blockstore: add block %d of %d bytes to a pack of %d slots and %d bytes: %v",
			block, len(stored), n, b.Len(), err))
	}
	b.hashes = append(b.hashes, hash)
	if len(b.buf)+size > smallPack {
		b.buf = slices.Grow(b.buf, max(0, MaxSlotTableLen+PackTarget+b.table.BlockSize+crypt.Overhead-len(b.buf)))
	}
	begin := len(b.buf)
	b.buf = b.table.Key.Seal(b.buf, slotName(b.table.Owner, b.table.Pack, uint16(n)), stored)
	b.table.Slots[n].Checksum = manifest.Checksum(b.buf[begin:])
}

// Len is the number of stored bytes so far.
func (b *PackBuilder) Len() int { return len(b.buf) - MaxSlotTableLen }

// Slots is the number of slots so far: the number of the next one.
func (b *PackBuilder) Slots() int { return len(b.table.Slots) }

// Full reports whether the pack is to be finished before another block is
// added: it has reached [PackTarget] or [MaxPackSlots].
func (b *PackBuilder) Full() bool { return b.Len() >= PackTarget || b.Slots() >= MaxPackSlots }

// Finish returns the pack, to be stored under [manifest.PackKey], and the refs
// of its blocks, by slot. The builder may not be used any more. Finish panics
// if nothing was added: there are no empty packs.
func (b *PackBuilder) Finish() (object []byte, refs []manifest.Ref) {
	b.table.layOut()
	object = b.buf[MaxSlotTableLen-b.table.encodedLen():]
	b.table.encodeTo(object)
	refs = make([]manifest.Ref, len(b.table.Slots))
	for i, slot := range b.table.Slots {
		refs[i] = manifest.Ref{
			Owner: b.table.Owner.Serial, Pack: b.table.Pack, Slot: uint16(i), Raw: slot.Raw,
			Offset: slot.Offset, Length: slot.Length, Hash: b.hashes[i],
		}
	}
	b.buf = nil
	return object, refs
}
