package blockstore

import (
	"fmt"

	"github.com/pierrec/lz4/v4"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// A Compressor compresses blocks for packs, in lz4's block format. The zero
// Compressor is ready to use. It may be reused, for its tables are large, but
// not concurrently.
type Compressor struct {
	lz4 lz4.Compressor
}

// Compress returns what of a block is to be stored. If lz4 makes it shorter,
// that is the compressed block, in dst's array if its capacity is at least the
// block's length, else in a new one. If not, it is the block itself, and raw.
func (c *Compressor) Compress(dst, block []byte) (stored []byte, raw bool) {
	if len(block) == 0 {
		return block, true
	}
	if cap(dst) < len(block) {
		dst = make([]byte, len(block))
	}
	// Without room for as much as the block takes, lz4 gives up, with or
	// without an error, as soon as it sees that it gains nothing.
	n, err := c.lz4.CompressBlock(block, dst[:len(block)-1])
	if err != nil || n == 0 {
		return block, true
	}
	return dst[:n], false
}

// DecodeSlot fills dst, the length of a block, from what was stored of it in a slot of a
// pack, sealed if key is not nil. Its error is like that of [Decompress].
func DecodeSlot(dst, stored []byte, raw bool, key *crypt.Key, owner manifest.SnapshotID, pack uint32, slot uint16) error {
	if key != nil {
		opened, err := key.Open(make([]byte, 0, len(stored)), slotName(owner, pack, slot), stored)
		if err != nil {
			return fmt.Errorf("%w: slot %d: %w", manifest.ErrCorrupt, slot, err)
		}
		stored = opened
	}
	return Decompress(dst, stored, raw)
}

// Decompress is the inverse of [Compressor.Compress]: it fills dst, the
// length of a block, from what was stored of it. It never reads or writes
// outside of the two, whatever stored holds. If that is not exactly a block it
// fails with [manifest.ErrCorrupt], and what dst then holds is undefined. Only the block's
// hash tells whether it is the right one.
func Decompress(dst, stored []byte, raw bool) error {
	if raw {
		if len(stored) != len(dst) {
			return fmt.Errorf("%w: raw block of %d bytes instead of %d", manifest.ErrCorrupt, len(stored), len(dst))
		}
		copy(dst, stored)
		return nil
	}
	n, err := lz4.UncompressBlock(stored[:len(stored):len(stored)], dst[:len(dst):len(dst)])
	if err != nil {
		return fmt.Errorf("%w: decompress block: %w", manifest.ErrCorrupt, err)
	}
	if n != len(dst) {
		return fmt.Errorf("%w: compressed block of %d bytes instead of %d", manifest.ErrCorrupt, n, len(dst))
	}
	return nil
}
