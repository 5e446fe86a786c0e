package manifest

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
)

const (
	// MaxRootLength bounds an encoded root, in bytes: leaves for 680 TiB of data in blocks of the
	// default size. DecodeRoot refuses more.
	MaxRootLength = 64 << 20

	// LeavesPartSize is where the stream of leaves and sections that a snapshot writes is cut into
	// objects, in bytes, so that neither an object nor a writer's memory grows with the snapshot.
	// Nothing lies across a cut: a writer leaves the rest of a part out instead, and an offset in
	// the stream counts every part as full.
	LeavesPartSize = 16 << 20

	// maxLeavesLength bounds the stream, in bytes: the root has room for offsets of 40 bits.
	maxLeavesLength = 1 << 40
	// maxLeaf bounds the number of a leaf: 48 bits, as the root has room for. The largest device in
	// the smallest blocks has 2³⁷ leaves.
	maxLeaf = 1<<48 - 1

	rootHeaderLen = ObjectHeaderLen + 44
	minRootLength = rootHeaderLen + ChecksumLen
	leafRefLen    = 48
	sectionRefLen = 64
)

// SplitOffset turns an offset in a stream of leaves, as in [LeafRef] and [SectionRef], into the
// part that holds it and the offset in that part's object. The offset is one of a valid root.
func SplitOffset(offset int64) (part uint32, within int64) {
	return uint32(offset / LeavesPartSize), offset % LeavesPartSize
}

// A LeafRef says where an encoded leaf lies: in the stream of leaves of the snapshot of this lineage
// with the serial Owner, from Offset (see [SplitOffset]), EncodedLeafLen(geometry.LeafLen(Leaf))
// bytes.
type LeafRef struct {
	Leaf   int64
	Owner  uint64
	Offset int64
	Hash   Hash // of the encoded leaf
}

// A SectionRef says where an encoded [Section] lies: the one of packs [Section × SectionPacks,
// (Section+1) × SectionPacks) of the snapshot with the serial Owner lies in the stream of leaves of
// the snapshot with the serial Home, from Offset (see [SplitOffset]), Length bytes.
type SectionRef struct {
	Owner   uint64
	Section uint32
	Home    uint64
	Offset  int64
	Length  uint32
	Hash    Hash // of the encoded section
}

// A Root is the index of a snapshot, and its footer. A leaf that is absent is all holes; a section
// that is absent has no live slot.
type Root struct {
	Snapshot   SnapshotID
	Geometry   Geometry
	DataBlocks int64        // blocks that are not holes, over all leaves
	Leaves     []LeafRef    // ascending by Leaf
	Sections   []SectionRef // ascending by Owner, then Section
}

func rootFormat() ObjectFormat {
	return ObjectFormat{Name: "root", Magic: "LVRT", Version: 1}
}

// Find returns where a leaf lies, or false if it is all holes or the device does not have it.
func (r *Root) Find(leaf int64) (LeafRef, bool) {
	i, ok := slices.BinarySearchFunc(r.Leaves, leaf, func(l LeafRef, leaf int64) int {
		return cmp.Compare(l.Leaf, leaf)
	})
	if !ok {
		return LeafRef{}, false
	}
	return r.Leaves[i], true
}

// A LeavesPart is one object that holds leaves and sections: see [LeavesKey].
type LeavesPart struct {
	Owner uint64 // serial of the snapshot that wrote it
	Part  uint32
}

// LeavesParts returns the objects that hold this root's leaves and sections, ascending by owner and
// part, each once.
func (r *Root) LeavesParts() []LeavesPart {
	seen := make(map[LeavesPart]struct{})
	add := func(owner uint64, offset int64) {
		part, _ := SplitOffset(offset)
		seen[LeavesPart{Owner: owner, Part: part}] = struct{}{}
	}
	for _, l := range r.Leaves {
		add(l.Owner, l.Offset)
	}
	for _, s := range r.Sections {
		add(s.Home, s.Offset)
	}
	return slices.SortedFunc(maps.Keys(seen), func(a, b LeavesPart) int {
		return cmp.Or(cmp.Compare(a.Owner, b.Owner), cmp.Compare(a.Part, b.Part))
	})
}

// encodedLen is the length in bytes of the encoded root.
func (r *Root) encodedLen() int {
	return minRootLength + len(r.Leaves)*leafRefLen + len(r.Sections)*sectionRefLen
}

// Validate reports whether the root can be encoded: ids, geometry and references within their
// bounds, leaves and sections ascending, the count of data blocks possible, and the encoding no
// longer than [MaxRootLength]. Who builds a root for a device of a user's choosing calls it before
// Encode. Its error wraps [ErrCorrupt].
func (r *Root) Validate() error {
	if !r.Snapshot.Valid() {
		return corrupt("root", "snapshot %s is no id", r.Snapshot)
	}
	if err := r.Geometry.Validate(); err != nil {
		return fmt.Errorf("root: %w: %w", ErrCorrupt, err)
	}
	if n := r.encodedLen(); n > MaxRootLength {
		return corrupt("root", "%d bytes are more than %d", n, MaxRootLength)
	}
	if err := r.validateLeaves(); err != nil {
		return err
	}
	return r.validateSections()
}

func (r *Root) validateLeaves() error {
	var room int64 // blocks of the leaves present; fits, as the device's blocks do
	leaves := r.Geometry.Leaves()
	for i, l := range r.Leaves {
		switch {
		case l.Leaf < 0 || l.Leaf >= leaves || l.Leaf > maxLeaf:
			return corrupt("root", "leaf %d of a device of %d", l.Leaf, leaves)
		case i > 0 && l.Leaf <= r.Leaves[i-1].Leaf:
			return corrupt("root", "leaf %d after leaf %d", l.Leaf, r.Leaves[i-1].Leaf)
		case !validSerial(l.Owner):
			return corrupt("root", "leaf %d: owner %#x is out of range", l.Leaf, l.Owner)
		}
		n := r.Geometry.LeafLen(l.Leaf)
		if !validExtent(l.Offset, EncodedLeafLen(n)) {
			return corrupt("root", "leaf %d: offset %d is out of range", l.Leaf, l.Offset)
		}
		room += int64(n)
	}
	// A leaf is present only for what is in it, so each has a data block at least.
	if r.DataBlocks < int64(len(r.Leaves)) || r.DataBlocks > room {
		return corrupt("root", "%d data blocks in %d leaves of %d blocks", r.DataBlocks, len(r.Leaves), room)
	}
	return nil
}

func (r *Root) validateSections() error {
	for i, s := range r.Sections {
		switch {
		case !validSerial(s.Owner) || !validSerial(s.Home):
			return corrupt("root", "section of owner %#x in home %#x: serial out of range", s.Owner, s.Home)
		case s.Section > maxSection:
			return corrupt("root", "section %d of owner %09x is out of range", s.Section, s.Owner)
		case i > 0 && compareSections(r.Sections[i-1], s) >= 0:
			return corrupt("root", "section %d of owner %09x is out of order", s.Section, s.Owner)
		case s.Length < minSectionLength || s.Length > MaxSectionLength:
			return corrupt("root", "section %d of owner %09x: length %d is out of range", s.Section, s.Owner, s.Length)
		case !validExtent(s.Offset, int(s.Length)):
			return corrupt("root", "section %d of owner %09x: offset %d is out of range", s.Section, s.Owner, s.Offset)
		}
	}
	return nil
}

// validExtent reports whether n bytes at an offset lie inside the longest stream of leaves and
// inside one part of it.
func validExtent(offset int64, n int) bool {
	if offset < 0 || offset >= maxLeavesLength {
		return false
	}
	_, within := SplitOffset(offset)
	return within+int64(n) <= LeavesPartSize
}

func compareSections(a, b SectionRef) int {
	return cmp.Or(cmp.Compare(a.Owner, b.Owner), cmp.Compare(a.Section, b.Section))
}

// Encode returns the root's encoding, which the caller owns. It panics if the root is not valid.
func (r *Root) Encode() []byte {
	if err := r.Validate(); err != nil {
		panic(fmt.Sprintf("manifest: encode: %v", err))
	}
	b := make([]byte, 0, r.encodedLen())
	b = rootFormat().AppendHeader(b)
	b = binary.LittleEndian.AppendUint32(b, uint32(r.Snapshot.Lineage))
	b = binary.LittleEndian.AppendUint64(b, r.Snapshot.Serial)
	b = binary.LittleEndian.AppendUint64(b, uint64(r.Geometry.Size))
	b = binary.LittleEndian.AppendUint32(b, uint32(r.Geometry.BlockSize))
	b = binary.LittleEndian.AppendUint64(b, uint64(r.DataBlocks))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(r.Leaves)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(r.Sections)))
	for _, l := range r.Leaves {
		b = appendUint48(b, uint64(l.Leaf))
		b = appendUint40(b, l.Owner)
		b = appendUint40(b, uint64(l.Offset))
		b = append(b, l.Hash[:]...)
	}
	for _, s := range r.Sections {
		b = binary.LittleEndian.AppendUint64(b, s.Owner)
		b = binary.LittleEndian.AppendUint64(b, s.Home)
		b = binary.LittleEndian.AppendUint64(b, uint64(s.Offset))
		b = binary.LittleEndian.AppendUint32(b, s.Section)
		b = binary.LittleEndian.AppendUint32(b, s.Length)
		b = append(b, s.Hash[:]...)
	}
	return rootFormat().AppendChecksum(b)
}

// Hash is the SHA-256 of the root's encoding. It panics if the root is not valid.
func (r *Root) Hash() Hash { return Sum(r.Encode()) }

// DecodeRoot decodes and validates a root. It keeps nothing of data, and allocates no more than a
// quarter more than its length. Its error wraps [ErrCorrupt] or [ErrVersion].
func DecodeRoot(data []byte) (*Root, error) {
	format := rootFormat()
	if err := format.CheckHeader(data); err != nil {
		return nil, err
	}
	if len(data) < minRootLength || len(data) > MaxRootLength {
		return nil, corrupt("root", "%d bytes", len(data))
	}
	body, err := format.CutChecksum(data)
	if err != nil {
		return nil, err
	}
	header := body[ObjectHeaderLen:]
	blockSize := binary.LittleEndian.Uint32(header[20:])
	leaves := binary.LittleEndian.Uint64(header[32:])
	sections := binary.LittleEndian.Uint32(header[40:])
	entries := body[rootHeaderLen:]
	if leaves > MaxRootLength ||
		uint64(len(entries)) != leaves*leafRefLen+uint64(sections)*sectionRefLen {
		return nil, corrupt("root", "%d bytes for %d leaves and %d sections", len(data), leaves, sections)
	}
	r := &Root{
		Snapshot: SnapshotID{
			Lineage: LineageID(binary.LittleEndian.Uint32(header[0:])),
			Serial:  binary.LittleEndian.Uint64(header[4:]),
		},
		Geometry: Geometry{
			Size:      int64(binary.LittleEndian.Uint64(header[12:])),
			BlockSize: int(min(blockSize, MaxBlockSize+1)), // an int on any machine, and no valid size if cut
		},
		DataBlocks: int64(binary.LittleEndian.Uint64(header[24:])),
		Leaves:     make([]LeafRef, leaves),
		Sections:   make([]SectionRef, sections),
	}
	for i := range r.Leaves {
		b := entries[i*leafRefLen:][:leafRefLen]
		r.Leaves[i] = LeafRef{
			Leaf:   int64(uint48(b[0:])),
			Owner:  uint40(b[6:]),
			Offset: int64(uint40(b[11:])),
			Hash:   Hash(b[16:]),
		}
	}
	entries = entries[len(r.Leaves)*leafRefLen:]
	for i := range r.Sections {
		b := entries[i*sectionRefLen:][:sectionRefLen]
		r.Sections[i] = SectionRef{
			Owner:   binary.LittleEndian.Uint64(b[0:]),
			Home:    binary.LittleEndian.Uint64(b[8:]),
			Offset:  int64(binary.LittleEndian.Uint64(b[16:])),
			Section: binary.LittleEndian.Uint32(b[24:]),
			Length:  binary.LittleEndian.Uint32(b[28:]),
			Hash:    Hash(b[32:]),
		}
	}
	if err := r.Validate(); err != nil {
		return nil, err
	}
	return r, nil
}

func appendUint40(b []byte, v uint64) []byte {
	return append(binary.LittleEndian.AppendUint32(b, uint32(v)), byte(v>>32))
}

func uint40(b []byte) uint64 {
	return uint64(binary.LittleEndian.Uint32(b)) | uint64(b[4])<<32
}

func appendUint48(b []byte, v uint64) []byte {
	return binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint32(b, uint32(v)), uint16(v>>32))
}

func uint48(b []byte) uint64 {
	return uint64(binary.LittleEndian.Uint32(b)) | uint64(binary.LittleEndian.Uint16(b[4:]))<<32
}

// Next returns the first leaf, at or after the given one, that is not all holes.
func (r *Root) Next(leaf int64) (LeafRef, bool) {
	i, _ := slices.BinarySearchFunc(r.Leaves, leaf, func(ref LeafRef, leaf int64) int { return cmp.Compare(ref.Leaf, leaf) })
	if i == len(r.Leaves) {
		return LeafRef{}, false
	}
	return r.Leaves[i], true
}
