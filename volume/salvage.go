package volume

import (
	"errors"
	"io"
	"io/fs"
	"path/filepath"
	"sync"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// A Salvage is what a host has of the snapshots of one store: the blocks and
// leaves in its bases and in the clean layers of its volumes, and their copies
// of roots. All of it is found by its hash, so that what is stale or damaged is
// just not there. It may be used concurrently, and while volumes are mounted.
type Salvage struct {
	fs    vfs.FS
	state string
	store string // its id

	// keyOf returns the key of a lineage, nil if that is not encrypted.
	keyOf func(manifest.LineageID) (*crypt.Key, error)

	mu       sync.Mutex // guards the fields below
	lineages map[manifest.LineageID][]*wreck
}

// A wreck is one clean layer with its leaves.
type wreck struct {
	clean  *cache.Clean
	leaves *cache.IndexFile
	g      manifest.Geometry
	lock   io.Closer // of a base; nil for a volume's own
}

// OpenSalvage returns what the host with a state directory has of a store. keyOf
// returns the key of a lineage, nil if that is not encrypted. Close must be called.
func OpenSalvage(fsys vfs.FS, state, storeID string, keyOf func(manifest.LineageID) (*crypt.Key, error)) *Salvage {
	return &Salvage{fs: fsys, state: state, store: storeID, keyOf: keyOf, lineages: make(map[manifest.LineageID][]*wreck)}
}

// Block fills p with a block of a device of the lineage that has the hash, and
// reports whether this host has it.
func (s *Salvage) Block(lineage manifest.LineageID, block int64, hash manifest.Hash, p []byte) bool {
	for _, w := range s.of(lineage) {
		if w.g.BlockSize != len(p) || block >= w.g.Blocks() {
			continue
		}
		n := w.g.BlockLen(block)
		hit, err := w.clean.ReadAt(p[:n], block*int64(w.g.BlockSize))
		if err != nil || !hit {
			continue // whatever the reason, it is not here
		}
		clear(p[n:])
		if manifest.Sum(p) == hash {
			return true
		}
	}
	return false
}

// Leaf returns the encoded leaf of a number of blocks that ref names; false: this
// host does not have it.
func (s *Salvage) Leaf(lineage manifest.LineageID, ref manifest.LeafRef, blocks int) ([]byte, bool) {
	for _, w := range s.of(lineage) {
		if w.leaves == nil || w.g.LeafLen(ref.Leaf) != blocks {
			continue
		}
		if leaf, ok := w.leaves.Load(ref); ok {
			return leaf.Encode(), true
		}
	}
	return nil, false
}

// Root returns the encoded root of a snapshot that has the hash; false: this host
// has no copy.
func (s *Salvage) Root(id manifest.SnapshotID, hash manifest.Hash) ([]byte, bool) {
	for _, r := range s.volumes(id.Lineage) {
		data, err := vfs.ReadFile(s.fs, rootPath(Dir(s.state, r.ID), id), manifest.MaxRootLength+crypt.ObjectOverhead)
		if err == nil && manifest.Sum(data) == hash {
			return data, true
		}
	}
	return nil, false
}

// volumes returns the records of the host's volumes of a lineage.
func (s *Salvage) volumes(lineage manifest.LineageID) []Record {
	all, _, err := List(s.fs, s.state)
	if err != nil {
		return nil
	}
	var found []Record
	for _, r := range all {
		if r.StoreID == s.store && r.Lineage == lineage && !r.Creating {
			found = append(found, r)
		}
	}
	return found
}

// of opens what there is of a lineage, once. What cannot be opened is not here.
func (s *Salvage) of(lineage manifest.LineageID) []*wreck {
	s.mu.Lock()
	defer s.mu.Unlock()
	if found, ok := s.lineages[lineage]; ok {
		return found
	}
	var found []*wreck
	key, err := s.keyOf(lineage)
	if err != nil {
		s.lineages[lineage] = nil // without it there is nothing to be found
		return nil
	}
	bases := filepath.Join(basesDir(s.state), s.store)
	names, err := s.fs.ReadDir(bases)
	if err != nil {
		names = nil
	}
	for _, name := range names {
		if id, err := manifest.ParseSnapshotID(name); err == nil && id.Lineage == lineage {
			if w := s.openBase(filepath.Join(bases, name), basePages(key, id), key); w != nil {
				found = append(found, w)
			}
		}
	}
	for _, r := range s.volumes(lineage) {
		if w := s.openLayer(cleanDir(Dir(s.state, r.ID)), ownPages(key, r.ID), key); w != nil {
			found = append(found, w)
		}
	}
	s.lineages[lineage] = found
	return found
}

// openBase opens a base, holding its lock so that nobody evicts it meanwhile.
func (s *Salvage) openBase(dir string, pages *crypt.Pages, key *crypt.Key) *wreck {
	lock, err := s.fs.Lock(filepath.Join(dir, lockName), false)
	if err != nil {
		return nil // being evicted
	}
	w := s.openLayer(dir, pages, key)
	if w == nil {
		_ = lock.Close() // nothing was done under it
		return nil
	}
	w.lock = lock
	return w
}

// openLayer opens a clean layer that is there; nil if it cannot.
func (s *Salvage) openLayer(dir string, pages *crypt.Pages, key *crypt.Key) *wreck {
	g, err := cache.CleanGeometry(s.fs, dir) // does not make it
	if err != nil {
		return nil
	}
	w := &wreck{g: g}
	if w.clean, err = cache.OpenClean(s.fs, dir, g, pages); err != nil {
		return nil
	}
	if _, err := s.fs.Allocated(indexPath(dir)); errors.Is(err, fs.ErrNotExist) {
		return w
	}
	if w.leaves, err = cache.OpenIndexFile(s.fs, indexPath(dir), g, key); err != nil {
		w.leaves = nil
	}
	return w
}

// Close closes what was opened.
func (s *Salvage) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	for _, found := range s.lineages {
		for _, w := range found {
			if w.leaves != nil {
				err = errors.Join(err, w.leaves.Close())
			}
			err = errors.Join(err, w.clean.Close())
			if w.lock != nil {
				err = errors.Join(err, w.lock.Close())
			}
		}
	}
	clear(s.lineages)
	return err
}
