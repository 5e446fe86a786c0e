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

// ownerChecks is how many snapshots' objects are listed at once, each with one
// section of up to 4 MiB in memory.
const ownerChecks = 4

// An ownerCheck compares the objects of one snapshot with what roots refer to
// of them.
type ownerCheck struct {
	*indexCheck
	id       manifest.SnapshotID
	root     *rootCheck // nil: it need not be whole
	pending  bool
	known    bool                // it was begun
	sections [][]*sectionVersion // by their numbers, those that are still to be compared

	number uint32               // of the section below
	packs  map[uint32]*livePack // live, and not seen yet; of one section
	unread bool                 // a version of it, so that packs may lack

	count counts
}

// counts are objects of a snapshot that are in the store.
type counts struct {
	packs        int64
	parts, bytes int64 // bytes of leaves, and of all
	tail         bool  // a part of the leaves is too long
}

// checkOwners checks the footers of all roots, and lists the objects of every
// snapshot to which they refer, and of all others that have any.
func (c *indexCheck) checkOwners(ctx context.Context) error {
	owners := make(map[manifest.SnapshotID]*ownerCheck)
	owner := func(id manifest.SnapshotID) *ownerCheck {
		o := owners[id]
		if o == nil {
			_, begun := c.intents[id]
			_, ended := c.outcomes[id]
			_, pending := c.pending[id]
			o = &ownerCheck{indexCheck: c, id: id, pending: pending, known: begun || ended || c.damaged[id] != nil}
			owners[id] = o
		}
		return o
	}
	for _, id := range c.stored {
		owner(id)
	}
	for _, r := range c.roots {
		owner(r.id).root = r
	}
	for part := range c.parts {
		owner(c.owner(part.Owner))
	}
	for _, v := range c.sections {
		o := owner(c.owner(v.ref.Owner))
		o.sections = append(o.sections, []*sectionVersion{v})
	}
	g, gctx := newGroup(ctx)
	g.SetLimit(ownerChecks)
	for _, id := range sorted(owners) {
		g.Go(func() error { return owners[id].run(gctx) })
	}
	return g.Wait()
}

func (o *ownerCheck) run(ctx context.Context) error {
	o.sortSections()
	err := o.store.objects.List(ctx, manifest.DataPrefix(o.id), func(info blockstore.Info) error { return o.object(ctx, info) })
	if err != nil {
		return err
	}
	for o.packs != nil || len(o.sections) > 0 {
		if err := o.nextSection(ctx); err != nil {
			return err
		}
	}
	if o.root != nil {
		o.root.count = o.count
	}
	if o.root == nil && !o.known && !o.pending && o.Snapshot.IsZero() {
		o.checkBegun()
	}
	return nil
}

// sortSections puts the versions of each section together, ascending.
func (o *ownerCheck) sortSections() {
	slices.SortFunc(o.sections, func(a, b []*sectionVersion) int {
		x, y := a[0].ref, b[0].ref
		return cmp.Or(cmp.Compare(x.Section, y.Section), cmp.Compare(x.Home, y.Home), cmp.Compare(x.Offset, y.Offset))
	})
	var grouped [][]*sectionVersion
	for _, s := range o.sections {
		if last := len(grouped) - 1; last >= 0 && grouped[last][0].ref.Section == s[0].ref.Section {
			grouped[last] = append(grouped[last], s...)
			continue
		}
		grouped = append(grouped, s)
	}
	o.sections = grouped
}

// object looks at one object of the listing.
func (o *ownerCheck) object(ctx context.Context, info blockstore.Info) error {
	if part, err := manifest.ParseLeavesKey(info.Key); err == nil {
		o.count.parts += info.Size
		o.count.bytes += info.Size
		if !o.parts[manifest.LeavesPart{Owner: o.id.Serial, Part: part}] {
			return o.unused(ctx, info)
		}
		// One that is too short lacks a leaf or a section: reading that will tell.
		if o.root != nil && info.Size > o.root.ends[part] {
			o.count.tail = true
			o.suspect(Finding{
				Object: info.Key, Harm: []Harm{{Snapshot: o.id}}, repair: damage{part: &manifest.LeavesPart{Owner: o.id.Serial, Part: part}},
				Err: disagrees("it has %d bytes, and what it holds ends at %d", info.Size, o.root.ends[part]),
			})
		}
		return nil
	}
	if info.Key == manifest.RootKey(o.id) {
		o.count.bytes += info.Size
		if o.root == nil {
			return o.unused(ctx, info)
		}
		return nil
	}
	number, err := manifest.ParsePackKey(info.Key)
	if err != nil {
		o.ofNoKind(info)
		return nil
	}
	o.count.packs++
	o.count.bytes += info.Size
	return o.pack(ctx, number, info)
}

// ofNoKind tells of an object below a snapshot's prefix that is none of its.
func (o *ownerCheck) ofNoKind(info blockstore.Info) {
	if o.Snapshot.IsZero() {
		o.strange(info)
	}
}

// pack looks at a pack. Packs come in the order of their numbers.
func (o *ownerCheck) pack(ctx context.Context, number uint32, info blockstore.Info) error {
	section := number / manifest.SectionPacks
	for o.packs != nil && o.number < section || o.packs == nil && len(o.sections) > 0 && o.sections[0][0].ref.Section <= section {
		if err := o.nextSection(ctx); err != nil {
			return err
		}
	}
	live := o.packs[number]
	if live == nil {
		if o.unread && o.number == section {
			return nil // nobody knows
		}
		return o.unused(ctx, info)
	}
	delete(o.packs, number)
	least := live.size(o.key)
	if info.Size < least {
		o.suspectPack(number)
	} else if o.root == nil && !o.pending {
		o.mu.Lock()
		o.report.DeadBytes += info.Size - least
		o.mu.Unlock()
	}
	return nil
}

// nextSection ends the section whose packs were seen, if there is one, and
// reads the next.
func (o *ownerCheck) nextSection(ctx context.Context) error {
	for number := range o.packs {
		o.suspectPack(number) // missing: reading it will tell
		if o.root != nil && int64(number) < o.root.outcome.Packs {
			o.count.packs++
		}
	}
	o.packs, o.unread = nil, false
	if len(o.sections) == 0 {
		return nil
	}
	versions := o.sections[0]
	o.sections = o.sections[1:]
	o.number = versions[0].ref.Section
	o.packs = make(map[uint32]*livePack)
	live := &liveness{packs: make(map[packID]*livePack)}
	for _, v := range versions {
		section, err := o.image(v.roots[0]).fetchSection(ctx, v.ref)
		if isDamage(err) && ctx.Err() == nil {
			o.lostSection(v, err)
			continue
		}
		if err != nil {
			return err
		}
		o.addSection(v, section)
		live.add(section)
	}
	bytes := int64(0)
	for id, pack := range live.packs {
		o.packs[id.number] = pack
		bytes += pack.bytes
	}
	o.expect(int64(float64(bytes) * min(1, o.Share)))
	return nil
}

func (o *ownerCheck) lostSection(v *sectionVersion, err error) {
	o.unread = true
	part, _ := manifest.SplitOffset(v.ref.Offset)
	o.mu.Lock()
	for _, r := range v.roots {
		r.unread = true
	}
	o.mu.Unlock()
	o.suspect(Finding{Object: manifest.LeavesKey(o.owner(v.ref.Home), part), Err: err, Harm: harmAll(v.roots),
		repair: damage{part: &manifest.LeavesPart{Owner: v.ref.Home, Part: part}}})
}

// addSection adds a section to the sums of its roots.
func (o *ownerCheck) addSection(v *sectionVersion, s *manifest.Section) {
	var sum slotSum
	for p := range s.Packs() {
		for _, slot := range p.Slots {
			o.sum(&sum, s.Owner(), p.Pack, slot.Slot, slot.Length)
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, r := range v.roots {
		r.sections.add(sum)
	}
}

func (o *ownerCheck) isUnread(r *rootCheck) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return r.unread
}

func (o *ownerCheck) suspectPack(number uint32) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.suspects[packID{o.id.Serial, number}] = true
}

// unused tells of an object to which no root refers.
func (o *ownerCheck) unused(ctx context.Context, info blockstore.Info) error {
	switch {
	case !o.Snapshot.IsZero() || o.pending:
		return nil // not asked for, or not yet referred to
	case o.root != nil && o.isUnread(o.root):
		return nil // nobody knows
	case o.root != nil:
		o.strange(info) // it refers to all that it uploaded
		return nil
	case o.known:
		o.garbage(info)
		return nil
	}
	// Begun after the intents were listed?
	for _, key := range []string{manifest.IntentKey(o.id), manifest.OutcomeKey(o.id)} {
		_, _, err := o.store.objects.Get(ctx, key, recordLimit)
		if err == nil || isDamage(err) && !errors.Is(err, blockstore.ErrNotExist) {
			o.pending = true
			return nil
		}
		if !isDamage(err) {
			return err
		}
	}
	o.strange(info)
	return nil
}

// checkBegun tells of a snapshot to whose objects roots refer, and of which there
// is no record: it must have been committed.
func (o *ownerCheck) checkBegun() {
	var harm []Harm
	for _, v := range o.sectionsOf() {
		harm = append(harm, harmAll(v.roots)...)
	}
	if len(harm) > 0 {
		o.suspect(Finding{Object: manifest.OutcomeKey(o.id), Harm: harm, Err: fmt.Errorf("others refer to what it uploaded: %w", blockstore.ErrNotExist)})
	}
}

// sectionsOf returns the sections of the owner's packs.
func (o *ownerCheck) sectionsOf() []*sectionVersion {
	var found []*sectionVersion
	for ref, v := range o.indexCheck.sections {
		if ref.Owner == o.id.Serial {
			found = append(found, v)
		}
	}
	return found
}
