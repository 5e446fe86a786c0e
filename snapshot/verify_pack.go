package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// packReads is how many packs are read at once, of up to 32 MiB each.
const packReads = 4

// damage is what a Finding tells a repair: one of these is set.
type damage struct {
	root *manifest.Outcome
	part *manifest.LeavesPart
	pack *packID
	lost []manifest.Hash // blocks of the pack that cannot be read
}

func (d damage) known() bool { return d.root != nil || d.part != nil || d.pack != nil }

// checkPacks looks at the blocks gathered, pack by pack, and forgets them.
func (c *indexCheck) checkPacks(ctx context.Context) error {
	wants := c.wants
	c.wants = nil
	slices.SortFunc(wants, func(a, b want) int {
		return cmp.Or(cmp.Compare(a.ref.Owner, b.ref.Owner), cmp.Compare(a.ref.Pack, b.ref.Pack), cmp.Compare(a.ref.Slot, b.ref.Slot))
	})
	readers := newCrew(ctx, c.reads)
	return readers.lead(func(ctx context.Context) error {
		for len(wants) > 0 {
			id := packID{wants[0].ref.Owner, wants[0].ref.Pack}
			n := slices.IndexFunc(wants, func(w want) bool { return w.ref.Owner != id.owner || w.ref.Pack != id.number })
			if n < 0 {
				n = len(wants)
			}
			p := &packCheck{indexCheck: c, owner: c.owner(id.owner), number: id.number, wants: wants[:n]}
			if err := readers.run(ctx, p.run); err != nil {
				return err
			}
			wants = wants[n:]
		}
		return nil
	})
}

// A packCheck is the check of one pack, as far as blocks in it are wanted.
type packCheck struct {
	*indexCheck
	owner  manifest.SnapshotID
	number uint32
	wants  []want // ascending by slot

	tableErr    error // what is the matter with the slot table
	bad         []want
	why         error // what is the matter with the first of them
	good, bytes int64
}

func (p *packCheck) run(ctx context.Context) error {
	var wanted, reach int64
	blockSize := 0
	for _, w := range p.wants {
		wanted += int64(w.ref.Length)
		reach = max(reach, int64(w.ref.Offset)+int64(w.ref.Length))
		blockSize = w.in[0].roots[0].geometry.BlockSize
	}
	rest := p.wants
	var err error
	if 2*wanted >= reach { // most of it: one request
		rest, err = p.whole(ctx, blockSize)
	} else {
		var table *blockstore.SlotTable
		table, p.tableErr = blockstore.ReadSlotTable(ctx, p.store.objects, p.owner, p.number, p.key)
		rest = p.compare(table, rest)
	}
	if err == nil && !isDamage(p.tableErr) {
		err = p.tableErr
	}
	if err == nil {
		err = p.read(ctx, blockSize, rest)
	}
	if err != nil {
		return err
	}
	p.tell()
	p.advance(wanted, p.good, p.bytes)
	return nil
}

// whole reads the pack as a whole, and returns the blocks that it did not find
// good, which are to be read once more.
func (p *packCheck) whole(ctx context.Context, blockSize int) (rest []want, err error) {
	object, _, err := p.store.objects.Get(ctx, manifest.PackKey(p.owner, p.number), blockstore.MaxPackSize)
	if err != nil {
		if isDamage(err) {
			p.tableErr = err
			return p.wants, nil
		}
		return nil, err
	}
	table, tableErr := blockstore.DecodePack(object, p.owner, p.number, p.key)
	p.tableErr = tableErr
	block := make([]byte, blockSize)
	for _, w := range p.compare(table, p.wants) {
		off, n, raw := w.ref.Offset, w.ref.Length+uint32(p.key.Overhead()), w.ref.Raw
		if table != nil {
			slot := table.Slots[w.ref.Slot]
			off, n, raw = slot.Offset, table.StoredLen(int(w.ref.Slot)), slot.Raw
		}
		if int64(off)+int64(n) > int64(len(object)) ||
			blockstore.DecodeSlot(block, object[off:][:n], raw, p.key, p.owner, p.number, w.ref.Slot) != nil || manifest.Sum(block) != w.ref.Hash {
			rest = append(rest, w)
			continue
		}
		if table != nil && table.Slots[w.ref.Slot].Checksum != manifest.Checksum(object[off:][:n]) {
			// As it is now it can be read; no rewrite would take it.
			p.spoilt(w, fmt.Errorf("%w: slot %d has another checksum than the slot table says", manifest.ErrCorrupt, w.ref.Slot))
			continue
		}
		p.count(w)
	}
	return rest, nil
}

// compare compares slots with what the leaves say of them, and returns those
// that may be good. Once a pack is rewritten its table is what tells where a
// block is.
func (p *packCheck) compare(table *blockstore.SlotTable, wants []want) (rest []want) {
	if table == nil {
		return wants
	}
	for _, w := range wants {
		if n := int(w.ref.Slot); n >= len(table.Slots) || table.Slots[n].Dead || table.Slots[n].Block != w.block {
			p.spoilt(w, fmt.Errorf("%w: slot %d is not as the leaf says", manifest.ErrCorrupt, n))
			continue
		}
		rest = append(rest, w)
	}
	return rest
}

// read reads blocks as everybody does, by what the leaves say.
func (p *packCheck) read(ctx context.Context, blockSize int, wants []want) error {
	reader := &blockstore.BlockReader{Store: p.store.objects, Lineage: p.lineage, BlockSize: blockSize, Key: p.key}
	buffer := make([]byte, blockSize)
	var blocks []int64
	var refs []manifest.Ref
	at := make(map[manifest.Ref]want)
	for _, w := range wants {
		blocks, refs = append(blocks, w.block), append(refs, w.ref)
		at[w.ref] = w
	}
	for _, run := range manifest.GroupRuns(blocks, refs, maxRunGap, maxRunSpan) {
		var stop error
		_ = reader.ReadRun(ctx, run.Refs, func(int) []byte { return buffer }, func(i int, err error) {
			switch {
			case err == nil:
				p.count(at[run.Refs[i]])
			case isDamage(err) && ctx.Err() == nil:
				p.spoilt(at[run.Refs[i]], err)
			case stop == nil:
				stop = err
			}
		}) // done was told each error
		if stop != nil {
			return stop
		}
	}
	return nil
}

func (p *packCheck) count(w want) {
	p.good++
	p.bytes += int64(w.ref.Length)
}

func (p *packCheck) spoilt(w want, err error) {
	if p.why == nil {
		p.why = fmt.Errorf("block %d: %w", w.block, err)
	}
	p.bad = append(p.bad, w)
}

// tell tells what is the matter with the pack.
func (p *packCheck) tell() {
	var err error
	switch {
	case errors.Is(p.tableErr, blockstore.ErrNotExist):
		err = p.tableErr
	case p.tableErr != nil && p.why != nil:
		err = fmt.Errorf("%w; %w", p.tableErr, p.why)
	case p.tableErr != nil:
		err = p.tableErr
	case len(p.bad) > 1:
		err = fmt.Errorf("%d blocks; %w", len(p.bad), p.why)
	case p.why != nil:
		err = p.why
	default:
		return
	}
	repair := damage{pack: &packID{p.owner.Serial, p.number}}
	for _, w := range p.bad {
		repair.lost = append(repair.lost, w.ref.Hash)
	}
	p.suspect(Finding{Object: manifest.PackKey(p.owner, p.number), Err: err, Harm: p.harm(), repair: repair})
}

// harm returns what each snapshot loses. One that needs other blocks of a pack
// whose table is damaged is harmed, too.
func (p *packCheck) harm() []Harm {
	ranges := make(map[manifest.SnapshotID][]Range)
	each := func(wants []want, do func(*rootCheck, want)) {
		for _, w := range wants {
			for _, v := range w.in {
				i := int(w.block % manifest.LeafBlocks)
				if i >= v.blocks || v.leaf.Ref(i) != w.ref {
					continue
				}
				for _, r := range v.roots {
					do(r, w)
				}
			}
		}
	}
	if p.tableErr != nil {
		each(p.wants, func(r *rootCheck, _ want) { ranges[r.id] = nil })
	}
	slices.SortFunc(p.bad, func(a, b want) int { return cmp.Compare(a.block, b.block) })
	each(p.bad, func(r *rootCheck, w want) {
		next := blockRange(r.geometry, w.block, 1)
		if last := len(ranges[r.id]) - 1; last >= 0 && ranges[r.id][last].Offset+ranges[r.id][last].Length == next.Offset {
			ranges[r.id][last].Length += next.Length
			return
		}
		ranges[r.id] = append(ranges[r.id], next)
	})
	var harm []Harm
	for _, id := range sorted(ranges) {
		harm = append(harm, Harm{id, ranges[id]})
	}
	return harm
}
