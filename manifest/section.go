package manifest

import (
	"encoding/binary"
	"fmt"
	"iter"
	"math/bits"
	"slices"
)

const (
	// SectionPacks is the number of packs of one owner that a section describes.
	SectionPacks = 1024

	// MaxSectionLength bounds an encoded section, in bytes: every slot of every pack live.
	MaxSectionLength = sectionHeaderLen + SectionPacks*(sectionPackLen+MaxPackSlots/8+4*MaxPackSlots) + ChecksumLen

	maxSection       = MaxPack / SectionPacks
	sectionHeaderLen = ObjectHeaderLen + 16
	sectionPackLen   = 4 // pack's number in the section, length of its bitmap
	minSectionLength = sectionHeaderLen + ChecksumLen
)

// A Section holds which slots are live in the packs [number × SectionPacks, (number+1) ×
// SectionPacks) of one owner, and how many bytes each live one has stored: live as seen from one
// snapshot, whose footer the section is part of. It takes 24 KiB and 4 bytes a slot: about 4 MiB at
// most.
type Section struct {
	owner  uint64
	number uint32
	// lengths holds, by pack and slot, the stored bytes of live slots and 0 for the others. A
	// pack's last element is never 0.
	lengths [SectionPacks][]uint32
	live    int
	bytes   int64
}

// A PackLive is a pack with its live slots, ascending. There is at least one.
type PackLive struct {
	Pack  uint32
	Slots []LiveSlot
}

// A LiveSlot is a slot that is live, and how many bytes it has stored.
type LiveSlot struct {
	Slot   uint16
	Length uint32
}

func sectionFormat() ObjectFormat {
	return ObjectFormat{Name: "section", Magic: "LVSC", Version: 1}
}

// NewSection returns a section without live slots. Owner is a serial, number at most MaxPack /
// SectionPacks; it panics if they are not.
func NewSection(owner uint64, number uint32) *Section {
	if !validSerial(owner) || number > maxSection {
		panic(fmt.Sprintf("manifest: section %d of owner %#x", number, owner))
	}
	return &Section{owner: owner, number: number}
}

// Owner is the serial of the snapshot that uploaded the packs.
func (s *Section) Owner() uint64 { return s.owner }

// Number tells which of the owner's packs the section describes.
func (s *Section) Number() uint32 { return s.number }

// Empty reports whether no slot is live. Such a section is left out of a footer.
func (s *Section) Empty() bool { return s.live == 0 }

// Bytes is the sum of the stored bytes of all live slots.
func (s *Section) Bytes() int64 { return s.bytes }

// Live reports whether a slot is live. It is false for packs of other sections.
func (s *Section) Live(pack uint32, slot uint16) bool {
	if pack/SectionPacks != s.number {
		return false
	}
	lengths := s.lengths[pack%SectionPacks]
	return int(slot) < len(lengths) && lengths[slot] != 0
}

// Add makes a slot live, with length stored bytes, from 1 to [MaxBlockSize]. It is an error, which
// wraps [ErrCorrupt], if the slot is live already, is not of this section, or exceeds a bound.
func (s *Section) Add(pack uint32, slot uint16, length uint32) error {
	switch {
	case pack > MaxPack || pack/SectionPacks != s.number:
		return s.corrupt(pack, slot, "the pack is not of this section")
	case slot >= MaxPackSlots:
		return s.corrupt(pack, slot, "the slot is out of range")
	case length == 0 || length > MaxBlockSize:
		return s.corrupt(pack, slot, fmt.Sprintf("length %d is out of range", length))
	case s.Live(pack, slot):
		return s.corrupt(pack, slot, "the slot is live already")
	}
	lengths := &s.lengths[pack%SectionPacks]
	if grow := int(slot) + 1 - len(*lengths); grow > 0 {
		*lengths = append(*lengths, make([]uint32, grow)...)
	}
	(*lengths)[slot] = length
	s.live++
	s.bytes += int64(length)
	return nil
}

// Remove makes a slot not live. It is an error, which wraps [ErrCorrupt], if it was not: then the
// footer and the leaves of the snapshot disagree.
func (s *Section) Remove(pack uint32, slot uint16) error {
	if !s.Live(pack, slot) {
		return s.corrupt(pack, slot, "the slot is not live")
	}
	lengths := s.lengths[pack%SectionPacks]
	s.live--
	s.bytes -= int64(lengths[slot])
	lengths[slot] = 0
	end := len(lengths)
	for end > 0 && lengths[end-1] == 0 {
		end--
	}
	s.lengths[pack%SectionPacks] = lengths[:end]
	return nil
}

func (s *Section) corrupt(pack uint32, slot uint16, why string) error {
	return corrupt("section", "section %d of owner %09x: pack %d slot %d: %s", s.number, s.owner, pack, slot, why)
}

// Packs yields the packs that have live slots, ascending. The section must not change meanwhile.
func (s *Section) Packs() iter.Seq[PackLive] {
	return func(yield func(PackLive) bool) {
		for i, lengths := range s.lengths {
			var slots []LiveSlot
			for slot, length := range lengths {
				if length != 0 {
					slots = append(slots, LiveSlot{Slot: uint16(slot), Length: length})
				}
			}
			if len(slots) > 0 && !yield(PackLive{Pack: s.number*SectionPacks + uint32(i), Slots: slots}) {
				return
			}
		}
	}
}

// Clone returns a copy that shares nothing with s.
func (s *Section) Clone() *Section {
	c := *s
	for i, lengths := range s.lengths {
		c.lengths[i] = slices.Clone(lengths)
	}
	return &c
}

// Encode returns the section's encoding, at most [MaxSectionLength] bytes, which the caller owns.
func (s *Section) Encode() []byte {
	b := sectionFormat().AppendHeader(nil)
	b = binary.LittleEndian.AppendUint64(b, s.owner)
	b = binary.LittleEndian.AppendUint32(b, s.number)
	var packs uint32
	b = binary.LittleEndian.AppendUint32(b, packs) // patched below
	for i, lengths := range s.lengths {
		if len(lengths) == 0 {
			continue
		}
		packs++
		bitmapLen := (len(lengths) + 7) / 8
		b = binary.LittleEndian.AppendUint16(b, uint16(i))
		b = binary.LittleEndian.AppendUint16(b, uint16(bitmapLen))
		bitmap := len(b)
		b = append(b, make([]byte, bitmapLen)...)
		for slot, length := range lengths {
			if length != 0 {
				b[bitmap+slot/8] |= 1 << (slot % 8)
				b = binary.LittleEndian.AppendUint32(b, length)
			}
		}
	}
	binary.LittleEndian.PutUint32(b[sectionHeaderLen-4:], packs)
	return sectionFormat().AppendChecksum(b)
}

// Hash is the SHA-256 of the section's encoding.
func (s *Section) Hash() Hash { return Sum(s.Encode()) }

// DecodeSection decodes and validates a section. It keeps nothing of data, and allocates no more
// than any section takes, about 4 MiB. Its error wraps [ErrCorrupt] or [ErrVersion].
func DecodeSection(data []byte) (*Section, error) {
	format := sectionFormat()
	if err := format.CheckHeader(data); err != nil {
		return nil, err
	}
	if len(data) < minSectionLength || len(data) > MaxSectionLength {
		return nil, corrupt("section", "%d bytes", len(data))
	}
	body, err := format.CutChecksum(data)
	if err != nil {
		return nil, err
	}
	owner := binary.LittleEndian.Uint64(body[ObjectHeaderLen:])
	number := binary.LittleEndian.Uint32(body[ObjectHeaderLen+8:])
	packs := binary.LittleEndian.Uint32(body[ObjectHeaderLen+12:])
	if !validSerial(owner) || number > maxSection || packs > SectionPacks {
		return nil, corrupt("section", "number %d of owner %#x with %d packs is out of range", number, owner, packs)
	}
	s := NewSection(owner, number)
	rest := body[sectionHeaderLen:]
	next := 0 // the least number in the section that the next pack may have
	for range packs {
		var pack int
		if pack, rest, err = s.decodePack(rest); err != nil {
			return nil, err
		}
		if pack < next {
			return nil, corrupt("section", "pack %d is out of order", pack)
		}
		next = pack + 1
	}
	if len(rest) > 0 {
		return nil, corrupt("section", "%d bytes left over", len(rest))
	}
	return s, nil
}

// decodePack decodes the pack that b begins with into s and returns its number in the section and
// the bytes after it.
func (s *Section) decodePack(b []byte) (pack int, rest []byte, err error) {
	if len(b) < sectionPackLen {
		return 0, nil, corrupt("section", "pack is cut short")
	}
	pack = int(binary.LittleEndian.Uint16(b[0:]))
	bitmapLen := int(binary.LittleEndian.Uint16(b[2:]))
	b = b[sectionPackLen:]
	if pack >= SectionPacks || bitmapLen < 1 || bitmapLen > MaxPackSlots/8 || len(b) < bitmapLen {
		return 0, nil, corrupt("section", "pack %d with a bitmap of %d bytes", pack, bitmapLen)
	}
	bitmap, b := b[:bitmapLen], b[bitmapLen:]
	if bitmap[bitmapLen-1] == 0 {
		return 0, nil, corrupt("section", "pack %d: the bitmap ends in a zero byte", pack)
	}
	for i, bitmapByte := range bitmap {
		for ; bitmapByte != 0; bitmapByte &= bitmapByte - 1 {
			if len(b) < 4 {
				return 0, nil, corrupt("section", "pack %d: lengths are cut short", pack)
			}
			slot := uint16(8*i + bits.TrailingZeros8(bitmapByte))
			if err := s.Add(s.number*SectionPacks+uint32(pack), slot, binary.LittleEndian.Uint32(b)); err != nil {
				return 0, nil, err
			}
			b = b[4:]
		}
	}
	return pack, b, nil
}
