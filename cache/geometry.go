package cache

import (
	"sync/atomic"

	"github.com/lazyvol/lazyvol/manifest"
)

// A Geometry is a [manifest.Geometry] of a device that may grow while it is in use.
// Whoever looks twice may find it larger the second time, never smaller. All methods
// but Set are safe for concurrent use.
type Geometry struct {
	BlockSize int // in bytes; never changes
	size      atomic.Int64
}

// Set makes it that of a device, before anybody looks.
func (g *Geometry) Set(to manifest.Geometry) {
	g.BlockSize = to.BlockSize
	g.size.Store(to.Size)
}

// Grow makes it that of a device of size bytes.
func (g *Geometry) Grow(size int64) { g.size.Store(size) }

// Get returns the geometry as it is now.
func (g *Geometry) Get() manifest.Geometry {
	return manifest.Geometry{Size: g.size.Load(), BlockSize: g.BlockSize}
}

// Size, Blocks, BlockLen and LeafLen are what Get has now.
func (g *Geometry) Size() int64              { return g.size.Load() }
func (g *Geometry) Blocks() int64            { return g.Get().Blocks() }
func (g *Geometry) BlockLen(block int64) int { return g.Get().BlockLen(block) }
func (g *Geometry) LeafLen(leaf int64) int   { return g.Get().LeafLen(leaf) }
