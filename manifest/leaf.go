package manifest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
)

const (
	// MaxPackSize bounds a pack object, and so where in one a block can lie, in bytes. Packs are
	// cut at half of this; the rest is room for the last block and the slot table.
	MaxPackSize = 32 << 20
	// MaxPackSlots bounds the slots of a pack. A pack of blocks that compress extremely well is
	// cut there, far below its usual size: this bounds slot tables and sections.
	MaxPackSlots = 1024
	// MaxPack is the greatest number of a pack of one snapshot: eight decimal digits, as in its key.
	MaxPack = maxNumber
)

// A Ref says where a block's bytes lie and what they are. The zero Ref is a hole: a block of zeros,
// which is stored nowhere.
type Ref struct {
	Owner uint64 // serial of the snapshot that uploaded the block
	Pack  uint32 // number of the pack among the owner's
	Slot  uint16 // number of the slot in the pack: never changes meaning
	Raw   bool   // stored as it is, not compressed

	// Offset and Length are where in the pack the stored bytes lay when it was uploaded. They are
	// hints: a rewritten pack has moved them, and its slot table tells where.
	Offset, Length uint32

	// Hash is the SHA-256 of the whole plaintext block, a device's last one padded with zeros.
	Hash Hash
}

// IsHole reports whether r is a hole.
func (r Ref) IsHole() bool { return r == Ref{} }

// IsZero reports whether a block is all zeros, and so a hole.
func IsZero(block []byte) bool {
	// Comparing a slice with itself one byte on is a memequal, which is vectorised; the first
	// byte anchors it.
	return len(block) == 0 || block[0] == 0 && bytes.Equal(block[1:], block[:len(block)-1])
}

// Validate reports whether r is a hole or within the bounds that a leaf can hold: Owner in
// [1, MaxSerial], Pack ≤ MaxPack, Slot < MaxPackSlots, the stored bytes inside MaxPackSize, and
// their length that of a block if raw, else from 1 to less than the largest block. Its error wraps
// [ErrCorrupt].
func (r Ref) Validate() error {
	switch {
	case r.IsHole():
		return nil
	case !validSerial(r.Owner):
		return corrupt("ref", "owner %#x is out of range", r.Owner)
	case r.Pack > MaxPack:
		return corrupt("ref", "pack %d is out of range", r.Pack)
	case r.Slot >= MaxPackSlots:
		return corrupt("ref", "slot %d is out of range", r.Slot)
	case r.Raw && !validBlockSize(int(r.Length)):
		return corrupt("ref", "raw length %d is no block size", r.Length)
	case !r.Raw && (r.Length == 0 || r.Length >= MaxBlockSize):
		return corrupt("ref", "compressed length %d is out of range", r.Length)
	case uint64(r.Offset)+uint64(r.Length) > MaxPackSize:
		return corrupt("ref", "bytes [%d, +%d) reach past the largest pack", r.Offset, r.Length)
	}
	return nil
}

const (
	refLen  = 56
	flagRaw = 1 << 0

	leafHeaderLen = ObjectHeaderLen + 4 // and the number of entries
)

// putRef encodes r into b[:refLen]. It leaves nothing of what was there.
func putRef(b []byte, r Ref) {
	binary.LittleEndian.PutUint64(b[0:], r.Owner)
	binary.LittleEndian.PutUint32(b[8:], r.Pack)
	binary.LittleEndian.PutUint16(b[12:], r.Slot)
	var flags uint16
	if r.Raw {
		flags = flagRaw
	}
	binary.LittleEndian.PutUint16(b[14:], flags)
	binary.LittleEndian.PutUint32(b[16:], r.Offset)
	binary.LittleEndian.PutUint32(b[20:], r.Length)
	copy(b[24:refLen], r.Hash[:])
}

// getRef decodes b[:refLen], which may hold anything.
func getRef(b []byte) Ref {
	return Ref{
		Owner:  binary.LittleEndian.Uint64(b[0:]),
		Pack:   binary.LittleEndian.Uint32(b[8:]),
		Slot:   binary.LittleEndian.Uint16(b[12:]),
		Raw:    b[14]&flagRaw != 0,
		Offset: binary.LittleEndian.Uint32(b[16:]),
		Length: binary.LittleEndian.Uint32(b[20:]),
		Hash:   Hash(b[24:refLen]),
	}
}

func leafFormat() ObjectFormat {
	return ObjectFormat{Name: "leaf", Magic: "LVLF", Version: 1}
}

// EncodedLeafLen is the length in bytes of an encoded leaf of n blocks.
func EncodedLeafLen(n int) int { return leafHeaderLen + n*refLen + ChecksumLen }

// A Leaf is the refs of up to [LeafBlocks] neighbouring blocks. It keeps them encoded, in
// EncodedLeafLen(Len()) bytes, so that a cache full of leaves is one allocation each and nothing
// for the garbage collector to walk; Ref decodes on access, without allocating.
type Leaf struct {
	buf  []byte // header and valid entries; the checksum is made by Encode
	data int    // entries that are not holes
}

// NewLeaf returns a leaf of n holes, n from 1 to [LeafBlocks].
func NewLeaf(n int) *Leaf {
	if n < 1 || n > LeafBlocks {
		panic(fmt.Sprintf("manifest: leaf of %d blocks", n))
	}
	buf := make([]byte, 0, leafHeaderLen+n*refLen)
	buf = leafFormat().AppendHeader(buf)
	buf = binary.LittleEndian.AppendUint32(buf, uint32(n))
	return &Leaf{buf: buf[:cap(buf)]}
}

// DecodeLeaf decodes a leaf and validates every ref in it. It takes ownership of data and allocates
// nothing else. Its error wraps [ErrCorrupt] or [ErrVersion].
func DecodeLeaf(data []byte) (*Leaf, error) {
	format := leafFormat()
	if err := format.CheckHeader(data); err != nil {
		return nil, err
	}
	if len(data) < leafHeaderLen {
		return nil, corrupt("leaf", "%d bytes are too short for a header", len(data))
	}
	n := binary.LittleEndian.Uint32(data[ObjectHeaderLen:])
	if n < 1 || n > LeafBlocks {
		return nil, corrupt("leaf", "%d blocks", n)
	}
	if len(data) != EncodedLeafLen(int(n)) {
		return nil, corrupt("leaf", "%d bytes for %d blocks", len(data), n)
	}
	body, err := format.CutChecksum(data)
	if err != nil {
		return nil, err
	}
	l := &Leaf{buf: body}
	for i := range int(n) {
		if flags := binary.LittleEndian.Uint16(l.entry(i)[14:]); flags&^flagRaw != 0 {
			return nil, corrupt("leaf", "block %d: unknown flags %#04x", i, flags)
		}
		ref := l.Ref(i)
		if err := ref.Validate(); err != nil {
			return nil, fmt.Errorf("leaf: block %d: %w", i, err)
		}
		if !ref.IsHole() {
			l.data++
		}
	}
	return l, nil
}

// Len is the number of blocks, holes included.
func (l *Leaf) Len() int { return (len(l.buf) - leafHeaderLen) / refLen }

// DataBlocks is the number of blocks that are not holes.
func (l *Leaf) DataBlocks() int { return l.data }

// Ref returns the ref of the leaf's i-th block. It panics if there is no such block.
func (l *Leaf) Ref(i int) Ref { return getRef(l.entry(i)) }

// Set replaces the ref of the leaf's i-th block. It panics if there is no such block or r is not
// valid.
func (l *Leaf) Set(i int, r Ref) {
	if err := r.Validate(); err != nil {
		panic(fmt.Sprintf("manifest: leaf: set block %d: %v", i, err))
	}
	entry := l.entry(i)
	if !getRef(entry).IsHole() {
		l.data--
	}
	if !r.IsHole() {
		l.data++
	}
	putRef(entry, r)
}

func (l *Leaf) entry(i int) []byte {
	if i < 0 || i >= l.Len() {
		panic(fmt.Sprintf("manifest: block %d of a leaf of %d", i, l.Len()))
	}
	return l.buf[leafHeaderLen+i*refLen:][:refLen]
}

// Clone returns a copy that shares nothing with l.
func (l *Leaf) Clone() *Leaf { return &Leaf{buf: slices.Clone(l.buf), data: l.data} }

// Encode returns the leaf's encoding, EncodedLeafLen(Len()) bytes, which the caller owns.
func (l *Leaf) Encode() []byte {
	b := make([]byte, len(l.buf), len(l.buf)+ChecksumLen)
	copy(b, l.buf)
	return leafFormat().AppendChecksum(b)
}

// Hash is the SHA-256 of the leaf's encoding.
func (l *Leaf) Hash() Hash { return Sum(l.Encode()) }
