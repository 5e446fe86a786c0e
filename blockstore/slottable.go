package blockstore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

const (
	packHeaderLen = manifest.ObjectHeaderLen + 24
	slotLen       = 24

	// MaxSlotTableLen bounds the slot table that a pack begins with, header
	// and checksum included, in bytes; a sealed one is the longest.
	MaxSlotTableLen = packHeaderLen + MaxPackSlots*slotLen + crypt.Overhead + manifest.ChecksumLen

	slotRaw  = 1 << 0
	slotDead = 1 << 1
)

// A Slot is one block of a pack.
type Slot struct {
	Block          int64  // the block's number in the device
	Offset, Length uint32 // where in the pack object its stored bytes lie; sealed, they are longer by [crypt.Overhead]
	Checksum       uint32 // CRC32C of the stored bytes
	Raw            bool   // stored as it is, not compressed

	// Dead slots had their bytes removed by [RewritePack]: of the rest they
	// have the block's number only. A dead slot never comes back to life.
	Dead bool
}

// A SlotTable is what a pack begins with: whose it is, and where the bytes of
// each slot lie. A slot keeps its number for ever; where its bytes lie changes
// when the pack is rewritten.
type SlotTable struct {
	Owner     manifest.SnapshotID
	Pack      uint32
	BlockSize int    // in bytes
	Slots     []Slot // ascending by block; live ones lie one after the other

	// Key seals the slots and the table; nil seals nothing.
	Key *crypt.Key
}

func packFormat() manifest.ObjectFormat {
	return manifest.ObjectFormat{Name: "pack", Magic: "LVPK", Version: 1}
}

// encodedLen is the length of the encoded table: where the first live slot's
// bytes begin.
func (t *SlotTable) encodedLen() int { return SlotTableLen(len(t.Slots), t.Key) }

// SlotTableLen is the length in bytes of the slot table of a pack of so many slots,
// sealed if key is not nil: where the first live slot's bytes begin.
func SlotTableLen(slots int, key *crypt.Key) int {
	return packHeaderLen + slots*slotLen + key.Overhead() + manifest.ChecksumLen
}

// storedLen is how many bytes of the pack a slot takes.
func (t *SlotTable) storedLen(s Slot) int64 {
	if s.Dead {
		return 0
	}
	return int64(s.Length) + int64(t.Key.Overhead())
}

// StoredLen is how many bytes of the pack a slot takes, sealed if it is.
func (t *SlotTable) StoredLen(slot int) uint32 { return uint32(t.storedLen(t.Slots[slot])) }

// slotName is what a sealed slot is bound to.
func slotName(owner manifest.SnapshotID, pack uint32, slot uint16) []byte {
	return fmt.Appendf(nil, "slot %d of %s", slot, packID{owner, pack})
}

// tableName is what a sealed table is bound to: all of the header, which is in clear.
func tableName(header []byte) []byte { return append([]byte("slot table "), header...) }

// PackLen is the length of the whole pack object, in bytes.
func (t *SlotTable) PackLen() int64 {
	n := int64(t.encodedLen())
	for _, slot := range t.Slots {
		n += t.storedLen(slot)
	}
	return n
}

// layOut sets the offsets of the live slots, one after the other.
func (t *SlotTable) layOut() {
	offset := uint32(t.encodedLen())
	for i := range t.Slots {
		if slot := &t.Slots[i]; !slot.Dead {
			slot.Offset = offset
			offset += uint32(t.storedLen(*slot))
		}
	}
}

// encodeTo writes the encoded table to b[:t.encodedLen()]. It panics if the
// table is not valid.
func (t *SlotTable) encodeTo(b []byte) {
	if err := t.validate(); err != nil {
		panic(fmt.Sprintf("blockstore: encode: %v", err))
	}
	if t.Key == nil {
		b = packFormat().AppendHeader(b[:0])
	} else {
		b = packFormat().AppendSealedHeader(b[:0])
	}
	b = binary.LittleEndian.AppendUint32(b, uint32(t.Owner.Lineage))
	b = binary.LittleEndian.AppendUint64(b, t.Owner.Serial)
	b = binary.LittleEndian.AppendUint32(b, t.Pack)
	b = binary.LittleEndian.AppendUint32(b, uint32(t.BlockSize))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(t.Slots)))
	slots := t.encodeSlots()
	b = t.Key.Seal(b, tableName(b), slots)
	packFormat().AppendChecksum(b)
}

func (t *SlotTable) encodeSlots() []byte {
	b := make([]byte, 0, len(t.Slots)*slotLen)
	for _, slot := range t.Slots {
		var flags uint32
		if slot.Raw {
			flags |= slotRaw
		}
		if slot.Dead {
			flags |= slotDead
		}
		b = binary.LittleEndian.AppendUint64(b, uint64(slot.Block))
		b = binary.LittleEndian.AppendUint32(b, slot.Offset)
		b = binary.LittleEndian.AppendUint32(b, slot.Length)
		b = binary.LittleEndian.AppendUint32(b, slot.Checksum)
		b = binary.LittleEndian.AppendUint32(b, flags)
	}
	return b
}

// DecodeSlotTable decodes and validates the slot table that a pack begins
// with, from a prefix of the pack; need is the length of the table. If the
// prefix is too short to tell, or shorter than the table, the table is nil and
// need how long a prefix to try next: at most [MaxSlotTableLen]. It keeps
// nothing of prefix and allocates no more than thrice that. Its error wraps
// [manifest.ErrCorrupt] or [manifest.ErrVersion].
func DecodeSlotTable(prefix []byte, key *crypt.Key) (table *SlotTable, need int, err error) {
	if len(prefix) < packHeaderLen {
		return nil, packHeaderLen, nil
	}
	format := packFormat()
	if err := format.CheckSealed(prefix, key != nil); err != nil {
		return nil, 0, err
	}
	slots := binary.LittleEndian.Uint32(prefix[packHeaderLen-4:])
	if slots < 1 || slots > MaxPackSlots {
		return nil, 0, packCorrupt("%d slots", slots)
	}
	need = SlotTableLen(int(slots), key)
	if len(prefix) < need {
		return nil, need, nil
	}
	body, err := format.CutChecksum(prefix[:need])
	if err != nil {
		return nil, 0, err
	}
	header := body[manifest.ObjectHeaderLen:]
	entries, err := key.Open(nil, tableName(body[:packHeaderLen]), body[packHeaderLen:])
	if err != nil {
		return nil, 0, packCorrupt("slot table: %v", err)
	}
	table = &SlotTable{
		Owner: manifest.SnapshotID{
			Lineage: manifest.LineageID(binary.LittleEndian.Uint32(header[0:])),
			Serial:  binary.LittleEndian.Uint64(header[4:]),
		},
		Pack: binary.LittleEndian.Uint32(header[12:]),
		// Cut to an int on any machine, and then no valid size.
		BlockSize: int(min(binary.LittleEndian.Uint32(header[16:]), manifest.MaxBlockSize+1)),
		Slots:     make([]Slot, slots),
		Key:       key,
	}
	for i := range table.Slots {
		b := entries[i*slotLen:][:slotLen]
		flags := binary.LittleEndian.Uint32(b[20:])
		if flags&^(slotRaw|slotDead) != 0 {
			return nil, 0, packCorrupt("slot %d: unknown flags %#08x", i, flags)
		}
		table.Slots[i] = Slot{
			Block:    int64(binary.LittleEndian.Uint64(b[0:])),
			Offset:   binary.LittleEndian.Uint32(b[8:]),
			Length:   binary.LittleEndian.Uint32(b[12:]),
			Checksum: binary.LittleEndian.Uint32(b[16:]),
			Raw:      flags&slotRaw != 0,
			Dead:     flags&slotDead != 0,
		}
	}
	if err := table.validate(); err != nil {
		return nil, 0, err
	}
	return table, need, nil
}

// validate reports whether the table can be encoded.
func (t *SlotTable) validate() error {
	if !t.Owner.Valid() || t.Pack > manifest.MaxPack {
		return packCorrupt("pack %d of %s is out of range", t.Pack, t.Owner)
	}
	if err := (manifest.Geometry{BlockSize: t.BlockSize}).Validate(); err != nil {
		return packCorrupt("block size %d", t.BlockSize)
	}
	if len(t.Slots) < 1 || len(t.Slots) > MaxPackSlots {
		return packCorrupt("%d slots", len(t.Slots))
	}
	offset := uint64(t.encodedLen())
	for i, slot := range t.Slots {
		if err := t.validateSlot(i); err != nil {
			return err
		}
		if slot.Dead {
			continue
		}
		if uint64(slot.Offset) != offset {
			return packCorrupt("slot %d: offset is %d, not %d", i, slot.Offset, offset)
		}
		offset += uint64(t.storedLen(slot))
	}
	if offset > MaxPackSize {
		return packCorrupt("%d bytes are more than %d", offset, MaxPackSize)
	}
	return nil
}

// validateSlot checks everything of a slot but its offset.
func (t *SlotTable) validateSlot(i int) error {
	slot := t.Slots[i]
	switch {
	case slot.Block < 0 || slot.Block > manifest.MaxDeviceSize/int64(t.BlockSize):
		return packCorrupt("slot %d: block %d is out of range", i, slot.Block)
	case i > 0 && slot.Block <= t.Slots[i-1].Block:
		return packCorrupt("slot %d: block %d after block %d", i, slot.Block, t.Slots[i-1].Block)
	case slot.Dead && slot != Slot{Block: slot.Block, Dead: true}:
		return packCorrupt("slot %d: dead, and yet it lies somewhere", i)
	case slot.Raw && int64(slot.Length) != int64(t.BlockSize):
		return packCorrupt("slot %d: raw length %d", i, slot.Length)
	case !slot.Raw && !slot.Dead && (slot.Length == 0 || int64(slot.Length) >= int64(t.BlockSize)):
		return packCorrupt("slot %d: compressed length %d", i, slot.Length)
	}
	return nil
}

// check reports whether the table is that of a given pack.
func (t *SlotTable) check(owner manifest.SnapshotID, pack uint32) error {
	if t.Owner != owner || t.Pack != pack {
		return packCorrupt("it says that it is pack %d of %s", t.Pack, t.Owner)
	}
	return nil
}

func packCorrupt(format string, args ...any) error {
	return fmt.Errorf("pack: %w: %s", manifest.ErrCorrupt, fmt.Sprintf(format, args...))
}

// ReadSlotTable reads the slot table of a pack, in two requests. Its error
// wraps ErrNotExist if the pack is gone, [manifest.ErrCorrupt] or
// [manifest.ErrVersion] if it does not begin with its table, or else is the store's.
func ReadSlotTable(ctx context.Context, s Store, owner manifest.SnapshotID, pack uint32, key *crypt.Key) (*SlotTable, error) {
	table, err := readSlotTable(ctx, s, owner, pack, key)
	if errors.Is(err, ErrShort) {
		err = fmt.Errorf("%w: %w", manifest.ErrCorrupt, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read slot table of pack %d of %s: %w", pack, owner, err)
	}
	return table, nil
}

func readSlotTable(ctx context.Context, s Store, owner manifest.SnapshotID, pack uint32, key *crypt.Key) (*SlotTable, error) {
	name := manifest.PackKey(owner, pack)
	var prefix []byte
	// A rewrite in between does no harm: it keeps the number of slots, and
	// the second request reads all of the table.
	for {
		table, need, err := DecodeSlotTable(prefix, key)
		if err != nil {
			return nil, err
		}
		if table != nil {
			return table, table.check(owner, pack)
		}
		if need <= len(prefix) {
			return nil, packCorrupt("table of %d bytes does not fit in %d", need, len(prefix))
		}
		prefix = make([]byte, need)
		if err := s.ReadRange(ctx, name, 0, prefix); err != nil {
			return nil, err
		}
	}
}
