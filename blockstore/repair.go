package blockstore

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// A NeededSlot is a slot of a pack that somebody refers to, and the ref.
type NeededSlot struct {
	Block int64
	manifest.Ref
}

// A PackRepair says what a damaged pack is to hold again.
type PackRepair struct {
	Owner     manifest.SnapshotID
	Pack      uint32
	BlockSize int        // in bytes
	Key       *crypt.Key // that the pack is sealed under; nil: it is not

	// Needed are the slots that somebody refers to, ascending; one at least.
	// Partial says that there may be more of them.
	Needed  []NeededSlot
	Partial bool

	// Create says that the pack may be made if it is gone.
	Create bool

	// Find fills dst with the block of a slot, from elsewhere, and reports
	// whether it could.
	Find func(slot NeededSlot, dst []byte) bool
}

// A RepairedPack is what RepairPack came to.
type RepairedPack struct {
	Written  bool
	Repaired []NeededSlot // that were not sound before, and are now
	Lost     []NeededSlot // that cannot be read
}

// repairTries bounds how often RepairPack begins again because somebody else
// replaced the pack meanwhile.
const repairTries = 8

var (
	// ErrNoCreate: an object is gone and may not be made anew.
	ErrNoCreate = errors.New("the object is gone and is not made anew")

	// ErrPartial: without its slot table a pack cannot be made anew, as not all
	// slots that are needed are known.
	ErrPartial = errors.New("the pack's slot table is lost, and not all slots that are needed are known")
)

// RepairPack writes a damaged pack again, under its key and with the same slots,
// so that as many as possible of those that are needed can be read. It takes
// their bytes from the pack itself where these are right, and else asks Find; the
// SHA-256 of each is checked. Of other slots it keeps what the slot table tells,
// and without one they are dead. A slot that is dead in a sound table stays
// dead.
//
// A slot that cannot be recovered keeps its bytes, or gets zeros if there are
// none, with a checksum that they do not have: it can be repaired later, and
// nobody takes it for sound. Nothing is written if nothing gets better.
//
// The pack is replaced only if it is still the one that was read, and made only
// if there still is none; if somebody else was faster RepairPack begins again.
// It returns after it has read back what it wrote.
func RepairPack(ctx context.Context, s Store, p PackRepair) (RepairedPack, error) {
	r := &packRepair{PackRepair: p, store: s, found: make(map[uint16]stored)}
	var err error
	for range repairTries {
		var result RepairedPack
		result, err = r.try(ctx)
		if err == nil {
			return result, nil
		}
		if !errors.Is(err, ErrChanged) && !errors.Is(err, ErrExists) {
			break
		}
	}
	return RepairedPack{}, fmt.Errorf("repair pack %d of %s: %w", p.Pack, p.Owner, err)
}

// packRepair is one call of RepairPack.
type packRepair struct {
	PackRepair
	store Store

	found      map[uint16]stored // what Find found
	compressor Compressor
}

// stored are the bytes of a slot, sealed if they are to be; nil if there are none.
type stored struct {
	data []byte
	raw  bool
}

// A brokenPack is what is left of a pack.
type brokenPack struct {
	object []byte
	etag   string
	gone   bool
	table  *SlotTable // nil: none that can be believed
	sound  bool       // table and length are right
}

func (r *packRepair) read(ctx context.Context) (b brokenPack, err error) {
	b.object, b.etag, err = r.store.Get(ctx, manifest.PackKey(r.Owner, r.Pack), MaxObjectSize)
	if errors.Is(err, ErrNotExist) {
		return brokenPack{gone: true}, nil
	}
	if err != nil {
		return b, err
	}
	if b.table, err = DecodePack(b.object, r.Owner, r.Pack, r.Key); err == nil && b.table.BlockSize == r.BlockSize {
		b.sound = true
		return b, nil
	}
	// One whose end is cut off or too long has a table that is right.
	b.table, _, err = DecodeSlotTable(b.object, r.Key)
	if err != nil || b.table == nil || b.table.check(r.Owner, r.Pack) != nil || b.table.BlockSize != r.BlockSize {
		b.table = nil
	}
	return b, nil
}

// try repairs the pack as it is now.
func (r *packRepair) try(ctx context.Context) (RepairedPack, error) {
	broken, err := r.read(ctx)
	if err != nil {
		return RepairedPack{}, err
	}
	if broken.gone && !r.Create {
		return RepairedPack{}, ErrNoCreate
	}
	if broken.table == nil && r.Partial {
		return RepairedPack{}, ErrPartial
	}
	var result RepairedPack
	slots := make(map[uint16]stored) // of those needed
	readable := 0
	for _, need := range r.Needed {
		at, sound, ok := r.there(broken, need)
		if sound {
			slots[need.Slot] = at
			readable++
			continue
		}
		if elsewhere, found := r.recover(need); found {
			at, ok = elsewhere, true
		}
		if !ok || r.isDead(broken, need) {
			result.Lost = append(result.Lost, need)
			continue
		}
		slots[need.Slot] = at
		result.Repaired = append(result.Repaired, need)
	}
	better := len(result.Repaired) > 0 || !broken.gone && !broken.sound && readable > 0
	if !better {
		return result, nil
	}
	object, err := r.assemble(broken, slots)
	if err != nil {
		return RepairedPack{}, err
	}
	condition := IfMatch(broken.etag)
	if broken.gone {
		condition = IfAbsent
	}
	if _, err := r.store.Put(ctx, manifest.PackKey(r.Owner, r.Pack), object, condition); err != nil {
		return RepairedPack{}, err
	}
	result.Written = true
	return result, r.readBack(ctx, slots)
}

// isDead reports whether a slot is dead in a table that can be believed.
func (r *packRepair) isDead(b brokenPack, need NeededSlot) bool {
	return b.table != nil && (int(need.Slot) >= len(b.table.Slots) || b.table.Slots[need.Slot].Dead)
}

// there looks for the right bytes of a slot in the pack: where the table says,
// and where they were when the pack was uploaded. They are sound if they have the
// checksum in the table too, should there be one: a rewrite asks for that.
func (r *packRepair) there(b brokenPack, need NeededSlot) (at stored, sound, ok bool) {
	if r.isDead(b, need) {
		return stored{}, false, false
	}
	places := []place{{need.Offset, need.Length + uint32(r.Key.Overhead()), need.Raw}}
	if b.table != nil {
		slot := b.table.Slots[need.Slot]
		places = append(places, place{slot.Offset, uint32(b.table.storedLen(slot)), slot.Raw})
	}
	block := make([]byte, r.BlockSize)
	for _, p := range places {
		if p.end() > int64(len(b.object)) {
			continue
		}
		data := b.object[p.off:p.end()]
		if DecodeSlot(block, data, p.raw, r.Key, r.Owner, r.Pack, need.Slot) == nil && manifest.Sum(block) == need.Hash {
			return stored{data, p.raw}, b.table == nil || b.table.Slots[need.Slot].Checksum == manifest.Checksum(data), true
		}
	}
	return stored{}, false, false
}

// recover asks for a block elsewhere.
func (r *packRepair) recover(need NeededSlot) (stored, bool) {
	if at, ok := r.found[need.Slot]; ok {
		return at, at.data != nil
	}
	block := make([]byte, r.BlockSize)
	at := stored{}
	if r.Find(need, block) && manifest.Sum(block) == need.Hash {
		at.data, at.raw = r.compressor.Compress(nil, block)
		at.data = r.Key.Seal(nil, slotName(r.Owner, r.Pack, need.Slot), at.data)
	}
	r.found[need.Slot] = at
	return at, at.data != nil
}

// assemble makes the pack anew.
func (r *packRepair) assemble(b brokenPack, slots map[uint16]stored) ([]byte, error) {
	t := &SlotTable{Owner: r.Owner, Pack: r.Pack, BlockSize: r.BlockSize, Key: r.Key}
	if b.table != nil {
		t.Slots = slices.Clone(b.table.Slots)
	} else {
		t.Slots = make([]Slot, int(r.Needed[len(r.Needed)-1].Slot)+1)
		r.numberBlocks(t.Slots)
	}
	data := make([][]byte, len(t.Slots))
	for i := range t.Slots {
		// What the table tells of slots that nobody asked for holds. Where their
		// bytes are cut off they are lost, as their checksum says, and not dead:
		// that is for reclaim to decide.
		slot := &t.Slots[i]
		data[i] = make([]byte, t.storedLen(*slot))
		if int64(slot.Offset) < int64(len(b.object)) {
			copy(data[i], b.object[slot.Offset:])
		}
	}
	for _, need := range r.Needed {
		if r.isDead(b, need) {
			continue
		}
		slot, old := &t.Slots[need.Slot], data[need.Slot]
		*slot = Slot{Block: need.Block}
		if at, ok := slots[need.Slot]; ok {
			slot.Raw, data[need.Slot] = at.raw, at.data
			slot.Checksum = manifest.Checksum(at.data)
		} else {
			slot.Raw = need.Raw
			data[need.Slot] = r.placeholder(b, need, old)
			slot.Checksum = ^manifest.Checksum(data[need.Slot])
		}
		slot.Length = uint32(len(data[need.Slot]) - r.Key.Overhead())
	}
	t.layOut()
	if err := t.validate(); err != nil {
		return nil, fmt.Errorf("its blocks cannot be put into one pack: %w", err)
	}
	object := make([]byte, t.PackLen())
	t.encodeTo(object)
	for i, slot := range t.Slots {
		copy(object[slot.Offset:], data[i])
	}
	return object, nil
}

// placeholder returns bytes for a slot that is lost: those that are there, for
// whoever can make sense of them, or zeros.
func (r *packRepair) placeholder(b brokenPack, need NeededSlot, old []byte) []byte {
	n := int64(need.Length) + int64(r.Key.Overhead())
	if int64(len(old)) == n {
		return old
	}
	if end := int64(need.Offset) + n; end <= int64(len(b.object)) {
		return b.object[need.Offset:end]
	}
	return make([]byte, n)
}

// numberBlocks sets the blocks of slots of which there is no table: those that
// are needed are known, and the others lie between them, whatever they were.
func (r *packRepair) numberBlocks(slots []Slot) {
	next := 0
	for i := range slots {
		need := r.Needed[next]
		slots[i] = Slot{Block: need.Block - int64(int(need.Slot)-i), Dead: true}
		if i == int(need.Slot) {
			next++
		}
	}
}

// readBack checks that what was written can be read.
func (r *packRepair) readBack(ctx context.Context, slots map[uint16]stored) error {
	b, err := r.read(ctx)
	if err != nil {
		return err
	}
	if !b.sound {
		return packCorrupt("it is not as it was written")
	}
	for _, need := range r.Needed {
		if _, expected := slots[need.Slot]; !expected {
			continue
		}
		if _, sound, _ := r.there(b, need); !sound {
			return packCorrupt("slot %d is not as it was written", need.Slot)
		}
	}
	return nil
}
