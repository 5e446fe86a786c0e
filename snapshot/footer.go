package snapshot

import (
	"context"
	"fmt"

	"github.com/lazyvol/lazyvol/manifest"
)

// sectionReads is how many sections of a footer are read ahead, of up to 4 MiB
// each.
const sectionReads = 4

// sectionID names the section of a footer that a pack belongs to.
type sectionID struct {
	owner  uint64
	number uint32
}

func sectionOf(p packID) sectionID { return sectionID{p.owner, p.number / manifest.SectionPacks} }

// inheritSections adds the parent's sections to those written. Those in which
// slots died are written without them.
func (w *indexWriter) inheritSections(ctx context.Context) error {
	p := w.attempt.plan.Parent
	if p == nil {
		return nil
	}
	died := make(map[sectionID][]packID)
	for id := range w.died {
		died[sectionOf(id)] = append(died[sectionOf(id)], id)
	}
	var touched []manifest.SectionRef
	for _, ref := range p.Root.Sections {
		id := sectionID{ref.Owner, ref.Section}
		if died[id] == nil {
			w.sections = append(w.sections, ref)
			continue
		}
		touched = append(touched, ref)
	}
	err := p.eachSection(ctx, touched, func(ctx context.Context, s *manifest.Section) error {
		id := sectionID{s.Owner(), s.Number()}
		for _, pack := range died[id] {
			for slot := range w.died[pack].all {
				if err := s.Remove(pack.number, slot); err != nil {
					return fmt.Errorf("the footer of %s disagrees with its leaves: %w", p.ID(), err)
				}
			}
		}
		delete(died, id)
		return w.writeSection(ctx, s)
	})
	if err != nil {
		return err
	}
	for id := range died {
		return fmt.Errorf("the footer of %s lacks section %d of owner %09x, which its leaves refer to: %w", p.ID(), id.number, id.owner, manifest.ErrCorrupt)
	}
	return nil
}

// eachSection reads sections of the image's footer, several at once, and calls
// fn with each in their order.
func (m *Image) eachSection(ctx context.Context, refs []manifest.SectionRef, fn func(context.Context, *manifest.Section) error) error {
	type read struct {
		ref     manifest.SectionRef
		section *manifest.Section
	}
	reads := func(yield func(*read, error) bool) {
		for _, ref := range refs {
			if !yield(&read{ref: ref}, nil) {
				return
			}
		}
	}
	fetch := func(ctx context.Context, r *read) (err error) {
		r.section, err = m.fetchSection(ctx, r.ref)
		return err
	}
	return inOrder(ctx, min(sectionReads, len(refs)), sectionReads, reads, fetch,
		func(ctx context.Context, r *read) error { return fn(ctx, r.section) })
}

// leavesStream is the logical stream of leaves and sections that a snapshot
// writes, cut into parts.
type leavesStream struct {
	sender *sender
	id     manifest.SnapshotID
	part   []byte // being filled
	parts  uint32 // sent
	sent   int64  // bytes
}

// write appends a leaf or a section and returns its offset in the stream.
func (s *leavesStream) write(ctx context.Context, data []byte) (int64, error) {
	if len(s.part)+len(data) > manifest.LeavesPartSize {
		if err := s.flush(ctx); err != nil {
			return 0, err
		}
	}
	offset := int64(s.parts)*manifest.LeavesPartSize + int64(len(s.part))
	s.part = append(s.part, data...)
	return offset, nil
}

// flush sends the part being filled.
func (s *leavesStream) flush(ctx context.Context) error {
	if len(s.part) == 0 {
		return nil
	}
	key, part := manifest.LeavesKey(s.id, s.parts), s.part
	s.sent += int64(len(part))
	s.parts++
	s.part = nil
	return s.sender.send(ctx, key, part, nil)
}
