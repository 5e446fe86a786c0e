package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"sync"
	"sync/atomic"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// divergedHeaderLen is the object header and the number of blocks, u64. The bitmap
// follows, lowest bit first, in whole u64, and a CRC32C of everything.
const divergedHeaderLen = manifest.ObjectHeaderLen + 8

func divergedFormat() manifest.ObjectFormat {
	return manifest.ObjectFormat{Name: "diverged blocks", Magic: "LVDV", Version: 1}
}

// Diverged is the durable set of a volume's blocks that must not be looked up in its
// base any more. Blocks are only ever added. It is one file, replaced as a whole, and
// a bitmap in memory: 16 MiB for 64 TiB in blocks of 512 KiB.
//
// All methods are safe for concurrent use; the file must have one user at a time.
type Diverged struct {
	fs     vfs.FS
	path   string
	blocks int64 // of the device; guarded by addMu

	// bits is nil for the empty set. What it points to never changes. It may be shorter
	// than the device has blocks now.
	bits atomic.Pointer[[]uint64]

	addMu sync.Mutex // one Add at a time
}

// LoadDiverged reads the set of a device of so many blocks from the file at path; a
// missing file is the empty set. A damaged one is manifest.ErrCorrupt: a block that
// is missing from the set would be read with its content of long ago.
func LoadDiverged(fsys vfs.FS, path string, blocks int64) (*Diverged, error) {
	d := &Diverged{fs: fsys, path: path, blocks: blocks}
	data, err := vfs.ReadFile(fsys, path, d.encodedLen())
	if errors.Is(err, fs.ErrNotExist) {
		return d, nil
	}
	if err != nil {
		return nil, fmt.Errorf("load diverged blocks: %w", err)
	}
	set, err := decodeDiverged(data, blocks)
	if err != nil {
		return nil, fmt.Errorf("load %s: %w", path, err)
	}
	d.bits.Store(&set)
	return d, nil
}

func decodeDiverged(data []byte, blocks int64) ([]uint64, error) {
	format := divergedFormat()
	if err := format.CheckHeader(data); err != nil {
		return nil, err
	}
	body, err := format.CutChecksum(data)
	if err != nil {
		return nil, err
	}
	if len(body) < divergedHeaderLen {
		return nil, corrupt("%s: %d bytes", format.Name, len(data))
	}
	n := binary.LittleEndian.Uint64(body[manifest.ObjectHeaderLen:])
	if n > uint64(blocks) { // fewer if the device has grown since
		return nil, corrupt("%s: of a device of %d blocks, not %d", format.Name, n, blocks)
	}
	words := body[divergedHeaderLen:]
	if int64(len(words)) != divergedWords(int64(n))*8 {
		return nil, corrupt("%s: %d bytes for %d blocks", format.Name, len(data), n)
	}
	set := make([]uint64, len(words)/8)
	for i := range set {
		set[i] = binary.LittleEndian.Uint64(words[i*8:])
	}
	return set, nil
}

// Has reports whether a block of the device has diverged. It takes no lock.
func (d *Diverged) Has(block int64) bool {
	set := d.bits.Load()
	return set != nil && block/64 < int64(len(*set)) && (*set)[block/64]>>(block%64)&1 != 0
}

// Add adds blocks of the device to the set. They are durable before Has reports the
// first of them; Has reports all or none. After an error none is visible, but all may
// be there after the next load: too many is harmless, as they are then looked up
// through the volume's root.
func (d *Diverged) Add(blocks iter.Seq[int64]) error {
	d.addMu.Lock()
	defer d.addMu.Unlock()
	set := make([]uint64, divergedWords(d.blocks))
	if old := d.bits.Load(); old != nil {
		copy(set, *old)
	}
	changed := false
	for b := range blocks {
		if b < 0 || b >= d.blocks {
			return fmt.Errorf("add diverged block %d of %d", b, d.blocks)
		}
		if bit := uint64(1) << (b % 64); set[b/64]&bit == 0 {
			set[b/64] |= bit
			changed = true
		}
	}
	if !changed {
		return nil
	}
	if err := vfs.WriteFileAtomic(d.fs, d.path, d.encode(set)); err != nil {
		return fmt.Errorf("add diverged blocks: %w", err)
	}
	d.bits.Store(&set)
	return nil
}

func (d *Diverged) encode(set []uint64) []byte {
	format := divergedFormat()
	b := format.AppendHeader(make([]byte, 0, d.encodedLen()))
	b = binary.LittleEndian.AppendUint64(b, uint64(d.blocks))
	for _, word := range set {
		b = binary.LittleEndian.AppendUint64(b, word)
	}
	return format.AppendChecksum(b)
}

func (d *Diverged) encodedLen() int64 {
	return divergedHeaderLen + divergedWords(d.blocks)*8 + manifest.ChecksumLen
}

func divergedWords(blocks int64) int64 { return ceilDiv(blocks, 64) }
