package snapshot

import (
	"context"
	"hash/maphash"

	"github.com/lazyvol/lazyvol/manifest"
)

// A slotSum is a digest of a multiset of slots and their lengths: whatever the
// order in which they were added, and in which parts. With two seeds of 64 bits
// that nobody knows, different sets have the same sum with a chance of 2⁻¹²⁸.
type slotSum struct {
	slots int64
	sums  [2]uint64
}

func (s *slotSum) add(t slotSum) {
	s.slots += t.slots
	s.sums[0] += t.sums[0]
	s.sums[1] += t.sums[1]
}

// sum adds a slot to a digest.
func (c *indexCheck) sum(to *slotSum, owner uint64, pack uint32, slot uint16, length uint32) {
	type entry struct {
		owner  uint64
		pack   uint32
		slot   uint16
		length uint32
	}
	to.slots++
	for i, seed := range c.seeds {
		to.sums[i] += maphash.Comparable(seed, entry{owner, pack, slot, length})
	}
}

// compare compares, of each root, the leaves with the footer, and both with the
// root and the outcome. Reclaim believes the footer.
func (c *indexCheck) compare(ctx context.Context) error {
	for _, r := range c.roots {
		if r.unread {
			continue
		}
		harm := []Harm{{Snapshot: r.id}}
		if r.dataBlocks != r.outcome.DataBlocks || r.ownBlocks != r.outcome.UploadedBlocks {
			c.suspect(Finding{Object: manifest.RootKey(r.id), Harm: harm, Err: disagrees(
				"its leaves have %d blocks of data, %d of them uploaded by itself, and the outcome says %d and %d",
				r.dataBlocks, r.ownBlocks, r.outcome.DataBlocks, r.outcome.UploadedBlocks)})
		}
		// As long as it must be whole nobody removes any of what it uploaded.
		if o := r.outcome; r.count.packs != o.Packs || r.count.parts != o.LeavesLength && !r.count.tail {
			c.suspect(Finding{Object: manifest.OutcomeKey(r.id), Harm: harm, Err: disagrees(
				"it tells of %d packs and %d bytes of leaves, and %d and %d are in the store", o.Packs, o.LeavesLength, r.count.packs, r.count.parts)})
		} else if r.count.bytes != o.StoredBytes {
			c.note("%s has %d bytes in the store, and its outcome says %d", r.id, r.count.bytes, o.StoredBytes)
		}
		if r.leaves == r.sections {
			continue
		}
		if err := c.explainFooter(ctx, r); err != nil {
			return err
		}
	}
	return nil
}

// explainFooter tells in what the leaves and the footer of a root differ. It
// takes some 8 bytes a block.
func (c *indexCheck) explainFooter(ctx context.Context, r *rootCheck) error {
	root, err := c.readRoot(ctx, r, false)
	if root == nil || err != nil {
		return err
	}
	suspect := func(format string, args ...any) {
		c.suspect(Finding{Object: manifest.RootKey(r.id), Err: disagrees(format, args...), Harm: []Harm{{Snapshot: r.id}}})
	}
	img := &Image{Root: root, objects: c.store.objects, key: c.key}
	lengths := make(map[packID]map[uint16]uint32) // of the slots that leaves refer to, and no section yet
	for _, ref := range root.Leaves {
		leaf, err := img.FetchLeaf(ctx, ref)
		if err != nil {
			return c.gone(err)
		}
		blocks, refs := leafRead{ref: ref, leaf: leaf}.blocks()
		for i, ref := range refs {
			id := packID{ref.Owner, ref.Pack}
			if lengths[id] == nil {
				lengths[id] = make(map[uint16]uint32)
			}
			if _, twice := lengths[id][ref.Slot]; twice {
				suspect("block %d: another block, too, refers to slot %d of pack %d of owner %09x", blocks[i], ref.Slot, ref.Pack, ref.Owner)
			}
			lengths[id][ref.Slot] = ref.Length
		}
	}
	for _, ref := range root.Sections {
		section, err := img.fetchSection(ctx, ref)
		if err != nil {
			return c.gone(err)
		}
		for p := range section.Packs() {
			id := packID{section.Owner(), p.Pack}
			strays, wrong := 0, 0
			for _, slot := range p.Slots {
				length, ok := lengths[id][slot.Slot]
				switch {
				case !ok:
					strays++
				case length != slot.Length:
					wrong++
				}
				delete(lengths[id], slot.Slot)
			}
			if strays > 0 {
				suspect("the footer lists %d slots of pack %d of owner %09x that no leaf refers to", strays, p.Pack, id.owner)
			}
			if wrong > 0 {
				suspect("the footer lists %d slots of pack %d of owner %09x with other lengths than the leaves", wrong, p.Pack, id.owner)
			}
		}
	}
	for id, slots := range lengths {
		if len(slots) > 0 {
			suspect("the leaves refer to %d slots of pack %d of owner %09x that the footer does not list", len(slots), id.number, id.owner)
		}
	}
	return nil
}

// gone drops an error that says that what was read before is gone by now: the
// snapshot was deleted meanwhile, or else the next check finds it.
func (c *indexCheck) gone(err error) error {
	if isDamage(err) {
		return nil
	}
	return err
}
