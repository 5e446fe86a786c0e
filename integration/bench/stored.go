package main

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"github.com/lazyvol/lazyvol/manifest"
)

// stored says where in the server the blocks of a snapshot lie: what a bare
// client has to know that fetches the same bytes as lazyvol.
type stored struct {
	id     manifest.SnapshotID
	refs   map[int64]manifest.Ref // of the blocks that are not holes
	blocks []int64                // their numbers, ascending
	bytes  int64                  // stored, of all blocks
	size   int                    // of a block
	packs  []object
}

// An object is a key in the store's bucket, and its length.
type object struct {
	key    string
	length int64
}

// readStored reads the index of a snapshot without parent from the folder that
// holds its store.
func readStored(dir, snap string) (*stored, error) {
	id, err := manifest.ParseSnapshotID(snap)
	if err != nil {
		return nil, err
	}
	s := &stored{id: id, refs: make(map[int64]manifest.Ref)}
	data, err := os.ReadFile(filepath.Join(dir, manifest.RootKey(id)))
	if err != nil {
		return nil, err
	}
	root, err := manifest.DecodeRoot(data)
	if err != nil {
		return nil, err
	}
	s.size = root.Geometry.BlockSize
	for _, ref := range root.Leaves {
		if err := s.addLeaf(dir, root.Geometry, ref); err != nil {
			return nil, err
		}
	}
	packs, err := os.ReadDir(filepath.Join(dir, manifest.DataPrefix(id), "packs"))
	if err != nil {
		return nil, err
	}
	for _, e := range packs {
		info, err := e.Info()
		if err != nil {
			return nil, err
		}
		s.packs = append(s.packs, object{manifest.DataPrefix(id) + "packs/" + e.Name(), info.Size()})
	}
	return s, nil
}

func (s *stored) addLeaf(dir string, g manifest.Geometry, at manifest.LeafRef) error {
	part, off := manifest.SplitOffset(at.Offset)
	f, err := os.Open(filepath.Join(dir, manifest.LeavesKey(s.id, part)))
	if err != nil {
		return err
	}
	defer f.Close()
	encoded := make([]byte, manifest.EncodedLeafLen(g.LeafLen(at.Leaf)))
	if _, err := f.ReadAt(encoded, off); err != nil {
		return err
	}
	leaf, err := manifest.DecodeLeaf(encoded)
	if err != nil {
		return fmt.Errorf("leaf %d of %s: %w", at.Leaf, s.id, err)
	}
	for i := range leaf.Len() {
		ref := leaf.Ref(i)
		if ref.IsHole() {
			continue
		}
		block := at.Leaf*manifest.LeafBlocks + int64(i)
		s.refs[block] = ref
		s.blocks = append(s.blocks, block)
		s.bytes += int64(ref.Length)
	}
	return nil
}

// dataBytes is the length of all blocks that are not holes.
func (s *stored) dataBytes() int64 { return int64(len(s.blocks)) * int64(s.size) }

// object returns the key of the pack in which a block lies.
func (s *stored) object(block int64) string { return manifest.PackKey(s.id, s.refs[block].Pack) }

// pages returns the offset of one page of each block that is not a hole, in an
// order that is random and depends on seed alone.
func (s *stored) pages(seed uint64) []int64 {
	r := rand.New(rand.NewPCG(seed, 0))
	pages := make([]int64, len(s.blocks))
	for i, at := range r.Perm(len(s.blocks)) {
		page := r.Int64N(int64(s.size / pageSize))
		pages[i] = s.blocks[at]*int64(s.size) + page*pageSize
	}
	return pages
}

// block returns the block in which an offset lies.
func (s *stored) block(off int64) int64 { return off / int64(s.size) }
