package cache

import (
	"crypto/sha256"
	"fmt"
	"os"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// indexStride is the distance of leaves in an index file: a full leaf's encoding in
// whole pages.
func indexStride() int64 {
	return pagesOf(int64(manifest.EncodedLeafLen(manifest.LeafBlocks))) * manifest.PageSize
}

// An IndexFile keeps leaves of one root on disk, so that blocks that are there can be
// found with the store down. It is a sparse file with leaf n at a fixed offset. Each
// leaf is verified by its hash when it is loaded, so a hole, damage, and another
// root's leaf are all the same: a miss. Nothing is synced.
//
// The file holds one leaf per number: volumes with different roots should not share
// one. All methods but Close are safe for concurrent use, also in several processes.
type IndexFile struct {
	file vfs.File
	g    manifest.Geometry
}

// OpenIndexFile opens the file at path, or creates it with mode 0600, for the leaves
// of a device of geometry g.
func OpenIndexFile(fsys vfs.FS, path string, g manifest.Geometry) (*IndexFile, error) {
	if err := g.Validate(); err != nil {
		return nil, fmt.Errorf("open index file %s: %w", path, err)
	}
	f, err := fsys.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open index file: %w", err)
	}
	return &IndexFile{file: f, g: g}, nil
}

// Load returns the leaf that ref names; false: the file does not have it, or not
// intact, or cannot be read.
func (x *IndexFile) Load(ref manifest.LeafRef) (*manifest.Leaf, bool) {
	n := x.g.LeafLen(ref.Leaf)
	if n == 0 {
		return nil, false
	}
	data := make([]byte, manifest.EncodedLeafLen(n))
	if _, err := x.file.ReadAt(data, ref.Leaf*indexStride()); err != nil {
		return nil, false
	}
	if sha256.Sum256(data) != ref.Hash {
		return nil, false
	}
	leaf, err := manifest.DecodeLeaf(data)
	return leaf, err == nil
}

// Store keeps the leaf that ref names, which the caller has verified.
func (x *IndexFile) Store(ref manifest.LeafRef, leaf *manifest.Leaf) error {
	if n := x.g.LeafLen(ref.Leaf); n == 0 || leaf.Len() != n {
		return fmt.Errorf("index file: leaf %d has %d blocks, not %d", ref.Leaf, leaf.Len(), n)
	}
	if _, err := x.file.WriteAt(leaf.Encode(), ref.Leaf*indexStride()); err != nil {
		return fmt.Errorf("index file: store leaf %d: %w", ref.Leaf, err)
	}
	return nil
}

// Close closes the file.
func (x *IndexFile) Close() error { return x.file.Close() }
