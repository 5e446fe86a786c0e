package cache

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// indexStride is the distance of leaves in an index file: a full leaf's encoding in
// whole pages, sealed or not.
func indexStride() int64 {
	return pagesOf(int64(manifest.EncodedLeafLen(manifest.LeafBlocks)+crypt.ObjectOverhead)) * manifest.PageSize
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
	g    Geometry
	key  *crypt.Key // that leaves are sealed under; nil: they are not
}

// OpenIndexFile opens the file at path, or creates it with mode 0600, for the leaves
// of a device of geometry g, sealed under a key if that is not nil.
func OpenIndexFile(fsys vfs.FS, path string, g manifest.Geometry, key *crypt.Key) (*IndexFile, error) {
	if err := g.Validate(); err != nil {
		return nil, fmt.Errorf("open index file %s: %w", path, err)
	}
	f, err := fsys.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open index file: %w", err)
	}
	x := &IndexFile{file: f, key: key}
	x.g.Set(g)
	return x, nil
}

// Load returns the leaf that ref names; false: the file does not have it, or not
// intact, or cannot be read.
func (x *IndexFile) Load(ref manifest.LeafRef) (*manifest.Leaf, bool) {
	n := x.g.LeafLen(ref.Leaf)
	if n == 0 {
		return nil, false
	}
	data := make([]byte, manifest.EncodedLeafLen(n)+x.overhead())
	got, err := x.file.ReadAt(data, ref.Leaf*indexStride())
	if err != nil && err != io.EOF {
		return nil, false
	}
	data = leafOf(x.open(data[:got]))
	if sha256.Sum256(data) != ref.Hash {
		return nil, false
	}
	leaf, err := manifest.DecodeLeaf(data)
	return leaf, err == nil
}

// Store keeps the leaf that ref names, which the caller has verified.
func (x *IndexFile) Store(ref manifest.LeafRef, leaf *manifest.Leaf) error {
	if n := x.g.LeafLen(ref.Leaf); n == 0 || leaf.Len() > n {
		return fmt.Errorf("index file: leaf %d has %d blocks, not up to %d", ref.Leaf, leaf.Len(), n)
	}
	if _, err := x.file.WriteAt(x.seal(leaf.Encode()), ref.Leaf*indexStride()); err != nil {
		return fmt.Errorf("index file: store leaf %d: %w", ref.Leaf, err)
	}
	return nil
}

// sealedLen is the length of what a sealed leaf has before it: its own length, u32.
const sealedLen = 4

// indexName is what sealed leaves in an index file are bound to.
const indexName = "local index"

func (x *IndexFile) overhead() int {
	if x.key == nil {
		return 0
	}
	return sealedLen + crypt.ObjectOverhead
}

func (x *IndexFile) seal(leaf []byte) []byte {
	if x.key == nil {
		return leaf
	}
	sealed := x.key.SealObject(indexName, leaf)
	return append(binary.LittleEndian.AppendUint32(nil, uint32(len(sealed))), sealed...)
}

// open returns the leaf that a part of the file begins with, nil if there is none.
func (x *IndexFile) open(data []byte) []byte {
	if x.key == nil {
		return data
	}
	if len(data) < sealedLen {
		return nil
	}
	n := binary.LittleEndian.Uint32(data)
	if data = data[sealedLen:]; uint64(n) > uint64(len(data)) {
		return nil
	}
	leaf, err := x.key.OpenObject(indexName, data[:n])
	if err != nil {
		return nil
	}
	return leaf
}

// leafOf returns the leaf that begins a part of an index file, nil if it is cut off:
// it may have fewer blocks than the device has now.
func leafOf(data []byte) []byte {
	const count = manifest.ObjectHeaderLen // where a leaf has the number of its blocks
	if len(data) < count+4 {
		return nil
	}
	blocks := binary.LittleEndian.Uint32(data[count:])
	if blocks > manifest.LeafBlocks || manifest.EncodedLeafLen(int(blocks)) > len(data) {
		return nil
	}
	return data[:manifest.EncodedLeafLen(int(blocks))]
}

// Close closes the file.
func (x *IndexFile) Close() error { return x.file.Close() }
