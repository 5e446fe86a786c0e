package snapshot

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sort"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// Numbers are those from which a run of a resumed attempt numbers its packs and
// the parts of its leaves. No other run of the attempt has used them: so a request
// of a run that was killed, carried out late, finds nothing to spoil.
type Numbers struct {
	Packs uint32 `json:"packs"`
	Parts uint32 `json:"parts"`
}

// after returns the numbers of a run after one that began at n, when the store has
// packs and parts up to those given. Packs begin a section of their own.
func (n Numbers) after(packs, parts uint32) Numbers {
	// Of those that were not seen, a run has at most so many under way.
	const underWay = uploads
	packs = max(n.Packs, packs) + underWay
	return Numbers{
		Packs: (packs + manifest.SectionPacks - 1) / manifest.SectionPacks * manifest.SectionPacks,
		Parts: max(n.Parts, parts) + underWay,
	}
}

// An earlierPack is one that an earlier run of an attempt has uploaded whole.
type earlierPack struct {
	number      uint32
	size        int64 // of the object, in bytes; 0: it is damaged
	first, last int64 // its blocks
}

// earlierPacks is what a resumed attempt takes of the packs of earlier runs.
type earlierPacks struct {
	sections map[uint32]*manifest.Section // by number
	packs    map[uint32]bool
}

// A lookup finds the blocks of earlier packs, asked for in ascending order.
type lookup struct {
	attempt manifest.SnapshotID
	read    func(ctx context.Context, pack uint32) (*blockstore.SlotTable, error)
	packs   []earlierPack // not yet open; by their first blocks
	open    []openPack
}

type openPack struct {
	last  int64
	table *blockstore.SlotTable
}

// earlier finds out which packs earlier runs of an attempt have put into the store,
// and the numbers for the next one. It leaves out those that are damaged.
func (s *Store) earlier(ctx context.Context, id manifest.SnapshotID, began Numbers) ([]earlierPack, Numbers, error) {
	var packs []earlierPack
	var nextPack, nextPart uint32
	err := s.objects.List(ctx, manifest.DataPrefix(id), func(o blockstore.Info) error {
		if n, err := manifest.ParsePackKey(o.Key); err == nil {
			packs = append(packs, earlierPack{number: n, size: o.Size})
			nextPack = max(nextPack, n+1)
		}
		if n, err := manifest.ParseLeavesKey(o.Key); err == nil {
			nextPart = max(nextPart, n+1)
		}
		return nil
	})
	if err != nil {
		return nil, Numbers{}, fmt.Errorf("list what %s has uploaded: %w", id, err)
	}
	g, gctx := newGroup(ctx)
	g.SetLimit(parallel)
	for i := range packs {
		g.Go(func() error {
			table, err := s.slotTable(gctx, id, packs[i].number)
			if isDamage(err) || err == nil && table.PackLen() != packs[i].size {
				packs[i].size = 0
				return nil
			}
			if err == nil {
				packs[i].first, packs[i].last = table.Slots[0].Block, table.Slots[len(table.Slots)-1].Block
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, Numbers{}, err
	}
	packs = slices.DeleteFunc(packs, func(p earlierPack) bool { return p.size == 0 })
	return packs, began.after(nextPack, nextPart), nil
}

// slotTable reads the slot table of a pack of an attempt.
func (s *Store) slotTable(ctx context.Context, id manifest.SnapshotID, pack uint32) (*blockstore.SlotTable, error) {
	key, err := s.Key(ctx, id.Lineage)
	if err != nil {
		return nil, err
	}
	return blockstore.ReadSlotTable(ctx, s.objects, id, pack, key)
}

func (s *Store) newLookup(id manifest.SnapshotID, packs []earlierPack) *lookup {
	packs = slices.Clone(packs)
	slices.SortFunc(packs, func(a, b earlierPack) int {
		return cmp.Or(cmp.Compare(a.first, b.first), cmp.Compare(a.number, b.number))
	})
	return &lookup{
		attempt: id, packs: packs,
		read: func(ctx context.Context, pack uint32) (*blockstore.SlotTable, error) {
			return s.slotTable(ctx, id, pack)
		},
	}
}

// find returns where a block lies, without its hash, or a hole's ref. Of each pack
// the table is read when the first block that it may have is asked for.
func (l *lookup) find(ctx context.Context, block int64) (manifest.Ref, error) {
	l.open = slices.DeleteFunc(l.open, func(p openPack) bool { return p.last < block })
	for len(l.packs) > 0 && l.packs[0].first <= block {
		p := l.packs[0]
		l.packs = l.packs[1:]
		if p.last < block {
			continue
		}
		table, err := l.read(ctx, p.number)
		if err != nil {
			return manifest.Ref{}, err
		}
		l.open = append(l.open, openPack{p.last, table})
	}
	for _, p := range l.open {
		slots := p.table.Slots
		i := sort.Search(len(slots), func(i int) bool { return slots[i].Block >= block })
		if i < len(slots) && slots[i].Block == block && !slots[i].Dead {
			return manifest.Ref{
				Owner: l.attempt.Serial, Pack: p.table.Pack, Slot: uint16(i), Raw: slots[i].Raw,
				Offset: slots[i].Offset, Length: slots[i].Length,
			}, nil
		}
	}
	return manifest.Ref{}, nil
}

// numberFrom makes a run of a resumed attempt number what it uploads.
func (w *indexWriter) numberFrom(n Numbers) {
	w.packs, w.stream.parts = n.Packs, n.Parts
	w.earlier = earlierPacks{make(map[uint32]*manifest.Section), make(map[uint32]bool)}
}

// addThere takes a block that an earlier run has uploaded.
func (w *indexWriter) addThere(j *job, at place) error {
	number := j.there.Pack / manifest.SectionPacks
	if w.earlier.sections[number] == nil {
		w.earlier.sections[number] = manifest.NewSection(w.attempt.ID().Serial, number)
	}
	if err := w.earlier.sections[number].Add(j.there.Pack, j.there.Slot, j.there.Length); err != nil {
		return err
	}
	at.leaf.Set(at.i, j.there)
	w.earlier.packs[j.there.Pack] = true
	w.result.dataBlocks++
	w.result.blocks++
	return nil
}

// finishEarlier writes the sections of the packs of earlier runs.
func (w *indexWriter) finishEarlier(ctx context.Context) error {
	for _, number := range slices.Sorted(maps.Keys(w.earlier.sections)) {
		if err := w.writeSection(ctx, w.earlier.sections[number]); err != nil {
			return err
		}
	}
	return nil
}

// finishResumed removes what earlier runs have uploaded and nothing refers to, and
// puts the root in the place of theirs.
func (a *Attempt) finishResumed(ctx context.Context, w *indexWriter, root []byte) error {
	var strays []string
	err := a.store.objects.List(ctx, manifest.DataPrefix(a.ID()), func(o blockstore.Info) error {
		if n, err := manifest.ParsePackKey(o.Key); err == nil && n < a.plan.Resumed.Packs {
			if !w.earlier.packs[n] {
				strays = append(strays, o.Key)
				return nil
			}
			w.result.packs++
			w.result.storedBytes += o.Size
		}
		if n, err := manifest.ParseLeavesKey(o.Key); err == nil && n < a.plan.Resumed.Parts {
			strays = append(strays, o.Key)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list what earlier runs have uploaded: %w", err)
	}
	if len(strays) > 0 {
		if err := a.store.objects.Delete(ctx, strays...); err != nil {
			return fmt.Errorf("remove what earlier runs have uploaded in vain: %w", err)
		}
	}
	return putInstead(ctx, a.store.objects, manifest.RootKey(a.ID()), root)
}

// putInstead puts an object that earlier runs may have put, with other content,
// so that none of their requests that is still under way can do so again: each
// finds the key taken, or the object changed.
func putInstead(ctx context.Context, objects blockstore.Store, key string, data []byte) error {
	const tries = 8 // each one that fails lost against a request of a run that ended
	for range tries {
		_, err := objects.Put(ctx, key, data, blockstore.IfAbsent)
		if !errors.Is(err, blockstore.ErrExists) {
			return wrapPut(key, err)
		}
		there, etag, err := objects.Get(ctx, key, manifest.MaxRootLength+crypt.ObjectOverhead)
		switch {
		case errors.Is(err, blockstore.ErrNotExist):
			continue
		case err == nil && bytes.Equal(there, data):
			return nil
		case err != nil:
			return fmt.Errorf("replace %s: %w", key, err)
		}
		if _, err = objects.Put(ctx, key, data, blockstore.IfMatch(etag)); !errors.Is(err, blockstore.ErrChanged) {
			return wrapPut(key, err)
		}
	}
	return fmt.Errorf("put %s: it changed %d times meanwhile", key, tries)
}

func wrapPut(key string, err error) error {
	if err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	return nil
}
