package snapshot

import (
	"context"
	"fmt"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// An indexCheck checks what a root refers to.
type indexCheck struct {
	*check
	image    *Image
	referred slotSet // by the leaves, and not yet found in the footer
	unread   bool    // a leaf could not be read, so that referred is incomplete
}

// blocks checks every leaf, and every block not known to be good.
func (c *indexCheck) blocks(ctx context.Context) error {
	reader := &blockstore.BlockReader{Store: c.store.objects, Lineage: c.id.Lineage, BlockSize: c.outcome.BlockSize}
	buffers := make(freelist[[]byte], readRuns)
	dataBlocks := int64(0)
	pick := func(ctx context.Context, l leafRead) (blocks []int64, refs []manifest.Ref, err error) {
		if l.err != nil {
			c.unread = true
			return nil, nil, c.problem(ctx, l.err)
		}
		all, found := l.blocks()
		dataBlocks += int64(len(all))
		for i, ref := range found {
			if !c.referred.add(packID{ref.Owner, ref.Pack}, ref.Slot) {
				err := c.damaged(ctx, "block %d: another block, too, refers to slot %d of pack %d of owner %09x", all[i], ref.Slot, ref.Pack, ref.Owner)
				if err != nil {
					return nil, nil, err
				}
			}
			if c.verifier.isGood(c.id.Lineage, ref) {
				c.count(ref, false)
				continue
			}
			blocks, refs = append(blocks, all[i]), append(refs, ref)
		}
		return blocks, refs, nil
	}
	err := c.image.eachRun(ctx, pick, func(ctx context.Context, run manifest.Run) error {
		if err := c.slotTable(ctx, run); err != nil {
			return err
		}
		buffer := buffers.get(func() []byte { return make([]byte, reader.BlockSize) })
		defer buffers.put(buffer)
		var stop error
		_ = reader.ReadRun(ctx, run.Refs, func(int) []byte { return buffer }, func(i int, err error) {
			if err == nil {
				c.verifier.setGood(c.id.Lineage, run.Refs[i])
				c.count(run.Refs[i], true)
			} else if stop == nil {
				stop = c.problem(ctx, fmt.Errorf("block %d: %w", run.Blocks[i], err))
			}
		}) // done was told each error
		return stop
	})
	if err != nil {
		return err
	}
	if root := c.image.Root; dataBlocks != root.DataBlocks && !c.unread {
		return c.damaged(ctx, "the leaves have %d blocks of data, and the root says %d", dataBlocks, root.DataBlocks)
	}
	return nil
}

// count counts a good block.
func (c *indexCheck) count(ref manifest.Ref, read bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Blocks++
	if read {
		c.report.Bytes += int64(ref.Length)
	}
}

// slotTable checks that the slots of a pack are what the leaves say: where
// blocks are is learnt from it once the pack was rewritten.
func (c *indexCheck) slotTable(ctx context.Context, run manifest.Run) error {
	owner := manifest.SnapshotID{Lineage: c.id.Lineage, Serial: run.Refs[0].Owner}
	table, err := blockstore.ReadSlotTable(ctx, c.store.objects, owner, run.Refs[0].Pack)
	if err != nil {
		return c.problem(ctx, err)
	}
	for i, ref := range run.Refs {
		if int(ref.Slot) < len(table.Slots) {
			slot := table.Slots[ref.Slot]
			if !slot.Dead && slot.Block == run.Blocks[i] && slot.Length == ref.Length && slot.Raw == ref.Raw {
				continue
			}
		}
		err := c.damaged(ctx, "block %d: slot %d of pack %d of %s is not as the leaf says", run.Blocks[i], ref.Slot, ref.Pack, owner)
		if err != nil {
			return err
		}
	}
	return nil
}

// footer checks that the footer lists exactly the slots that the leaves refer
// to: reclaim believes it.
func (c *indexCheck) footer(ctx context.Context) error {
	for _, ref := range c.image.Root.Sections {
		section, err := c.image.fetchSection(ctx, ref)
		if err == nil {
			err = c.section(ctx, section)
		} else {
			c.forget(sectionID{ref.Owner, ref.Section})
			err = c.problem(ctx, err)
		}
		if err != nil {
			return err
		}
	}
	for pack, slots := range c.referred {
		err := c.damaged(ctx, "the leaves refer to %d slots of pack %d of owner %09x that the footer does not list", slots.len(), pack.number, pack.owner)
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *indexCheck) section(ctx context.Context, s *manifest.Section) error {
	for p := range s.Packs() {
		id := packID{s.Owner(), p.Pack}
		strays := 0
		for _, slot := range p.Slots {
			if !c.referred.remove(id, slot.Slot) {
				strays++
			}
		}
		if strays == 0 || c.unread {
			continue
		}
		err := c.damaged(ctx, "the footer lists %d slots of pack %d of owner %09x that no leaf refers to", strays, p.Pack, s.Owner())
		if err != nil {
			return err
		}
	}
	return nil
}

// forget takes the slots of a section that cannot be read for listed.
func (c *indexCheck) forget(id sectionID) {
	for pack := range c.referred {
		if sectionOf(pack) == id {
			delete(c.referred, pack)
		}
	}
}
