package manifest

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
)

const (
	// SectorSize is the unit of a device's size, in bytes.
	SectorSize = 512
	// PageSize is the unit in which layers on the host keep track of content, in bytes.
	PageSize = 4096

	// MinBlockSize, DefaultBlockSize and MaxBlockSize bound a lineage's block size, in bytes.
	// The default is what AWS Lambda and EBS use: below it requests cost more than bytes.
	MinBlockSize     = 64 << 10
	DefaultBlockSize = 512 << 10
	MaxBlockSize     = 4 << 20

	// LeafBlocks is the number of blocks that a leaf describes; a device's last leaf may have fewer.
	LeafBlocks = 1024

	// MaxDeviceSize is the greatest size of a device, in bytes: whole sectors below 2⁶³.
	MaxDeviceSize = math.MaxInt64 - SectorSize + 1
)

// ErrGeometry is wrapped by the errors of [Geometry.Validate].
var ErrGeometry = errors.New("invalid geometry")

// Geometry is the size of a device and of the blocks that it is cut into, both in bytes. The
// methods other than Validate require a valid Geometry.
type Geometry struct {
	Size      int64
	BlockSize int
}

// Validate reports whether the size is a multiple of [SectorSize] in [0, MaxDeviceSize] and the
// block size a power of two in [MinBlockSize, MaxBlockSize]. Its error wraps [ErrGeometry].
func (g Geometry) Validate() error {
	if g.Size < 0 || g.Size > MaxDeviceSize || g.Size%SectorSize != 0 {
		return fmt.Errorf("%w: size %d is not a multiple of %d from 0 to %d",
			ErrGeometry, g.Size, SectorSize, int64(MaxDeviceSize))
	}
	if !validBlockSize(g.BlockSize) {
		return fmt.Errorf("%w: block size %d is not a power of two from %d to %d",
			ErrGeometry, g.BlockSize, MinBlockSize, MaxBlockSize)
	}
	return nil
}

func validBlockSize(n int) bool {
	return n >= MinBlockSize && n <= MaxBlockSize && bits.OnesCount(uint(n)) == 1
}

// Blocks is the number of blocks of the device, the last of which may lie only partly inside it.
func (g Geometry) Blocks() int64 { return ceilDiv(g.Size, int64(g.BlockSize)) }

// Leaves is the number of leaves that describe all blocks of the device.
func (g Geometry) Leaves() int64 { return ceilDiv(g.Blocks(), LeafBlocks) }

// LeafLen is the number of blocks that a leaf describes: [LeafBlocks], fewer for the device's last
// leaf, and 0 for a leaf the device does not have.
func (g Geometry) LeafLen(leaf int64) int {
	if leaf < 0 || leaf >= g.Leaves() {
		return 0
	}
	return int(min(LeafBlocks, g.Blocks()-leaf*LeafBlocks))
}

// BlockLen is how many bytes of a block lie inside the device: the block size, fewer for the last
// block, and 0 for a block the device does not have.
func (g Geometry) BlockLen(block int64) int {
	if block < 0 || block >= g.Blocks() {
		return 0
	}
	return int(min(int64(g.BlockSize), g.Size-block*int64(g.BlockSize)))
}

// ceilDiv is a/b rounded up, for a ≥ 0 and b > 0, without overflow.
func ceilDiv(a, b int64) int64 {
	q := a / b
	if a%b != 0 {
		q++
	}
	return q
}
