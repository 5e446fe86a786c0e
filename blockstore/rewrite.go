package blockstore

import (
	"context"
	"fmt"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// RewritePack replaces a pack by one without the bytes of the slots that are
// not live, and returns by how many bytes that made it smaller. Every slot
// keeps its number, and live ones their bytes. If all slots in the pack are
// live, or dead already, nothing is written. A slot that is dead already stays
// so, whatever live says: another host has rewritten the pack, knowing more.
//
// The pack is replaced only if it is still the one that was read: ErrChanged
// says that somebody else replaced or deleted it, and ErrNotExist that it was
// gone to begin with. The bytes of live slots are checked before they are
// written back: [manifest.ErrCorrupt] says that the pack is damaged, and it is left
// alone. Calls for one pack may run concurrently, on any number of hosts.
func RewritePack(ctx context.Context, s Store, owner manifest.SnapshotID, pack uint32, key *crypt.Key, live func(slot uint16) bool) (freed int64, err error) {
	freed, err = rewritePack(ctx, s, owner, pack, key, live)
	if err != nil {
		return 0, fmt.Errorf("rewrite pack %d of %s: %w", pack, owner, err)
	}
	return freed, nil
}

func rewritePack(ctx context.Context, s Store, owner manifest.SnapshotID, pack uint32, key *crypt.Key, live func(slot uint16) bool) (freed int64, err error) {
	name := manifest.PackKey(owner, pack)
	object, etag, err := s.Get(ctx, name, MaxPackSize)
	if err != nil {
		return 0, err
	}
	table, err := DecodePack(object, owner, pack, key)
	if err != nil {
		return 0, err
	}
	rewritten, err := withoutDead(object, table, live)
	if err != nil || rewritten == nil {
		return 0, err
	}
	// Without the condition this could bring back a pack that was deleted
	// meanwhile, or slots that another rewrite removed.
	if _, err := s.Put(ctx, name, rewritten, IfMatch(etag)); err != nil {
		return 0, err
	}
	return int64(len(object) - len(rewritten)), nil
}

// DecodePack decodes and validates the slot table of a pack that was read whole,
// and checks that it is that of the pack asked for and that the object ends with
// its last slot. The bytes of the slots it does not check. Its error wraps
// [manifest.ErrCorrupt] or [manifest.ErrVersion].
func DecodePack(object []byte, owner manifest.SnapshotID, pack uint32, key *crypt.Key) (*SlotTable, error) {
	table, need, err := DecodeSlotTable(object, key)
	if err != nil {
		return nil, err
	}
	if table == nil {
		return nil, packCorrupt("%d bytes are too short for a table of %d", len(object), need)
	}
	if err := table.check(owner, pack); err != nil {
		return nil, err
	}
	if n := table.PackLen(); n != int64(len(object)) {
		return nil, packCorrupt("%d bytes instead of %d", len(object), n)
	}
	return table, nil
}

// withoutDead returns the pack with those slots dead that are not live, or nil
// if it is that pack already.
func withoutDead(object []byte, table *SlotTable, live func(slot uint16) bool) ([]byte, error) {
	rewritten := &SlotTable{Owner: table.Owner, Pack: table.Pack, BlockSize: table.BlockSize, Key: table.Key, Slots: make([]Slot, len(table.Slots))}
	var died bool
	for i, slot := range table.Slots {
		if !slot.Dead && !live(uint16(i)) {
			slot = Slot{Block: slot.Block, Dead: true}
			died = true
		}
		rewritten.Slots[i] = slot
	}
	if !died {
		return nil, nil
	}
	rewritten.layOut()
	out := make([]byte, rewritten.PackLen())
	rewritten.encodeTo(out)
	for i, slot := range rewritten.Slots {
		if slot.Dead {
			continue
		}
		stored := object[table.Slots[i].Offset:][:table.storedLen(slot)]
		if sum := manifest.Checksum(stored); sum != slot.Checksum {
			return nil, packCorrupt("slot %d: checksum is %08x, not %08x", i, sum, slot.Checksum)
		}
		copy(out[slot.Offset:], stored)
	}
	return out, nil
}
