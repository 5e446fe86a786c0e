package manifest

// A Run is blocks whose bytes lie close to each other in one pack, by the hints in their refs: what
// one ranged GET fetches. Blocks and Refs are parallel, not empty, and ascending by block and by
// offset.
type Run struct {
	Blocks []int64
	Refs   []Ref
}

// Span is the range of the pack that holds all of the run's bytes: offset and length in bytes.
func (r Run) Span() (off, n int64) {
	first, last := r.Refs[0], r.Refs[len(r.Refs)-1]
	off = int64(first.Offset)
	return off, last.end() - off
}

// end is the offset in the pack that follows the block's last byte.
func (r Ref) end() int64 { return int64(r.Offset) + int64(r.Length) }

// GroupRuns groups blocks, ascending, with their refs into runs, in the order of their first blocks.
// Holes are left out. Blocks of other packs in between do not end a run; a gap of more than maxGap
// unwanted bytes does, as do a span that would exceed maxSpan bytes and bytes that do not follow
// those of the block before. A block longer than maxSpan is a run by itself.
func GroupRuns(blocks []int64, refs []Ref, maxGap, maxSpan int64) []Run {
	type packID struct {
		owner uint64
		pack  uint32
	}
	var runs []Run
	open := make(map[packID]int) // index in runs of each pack's last run
	for i, ref := range refs {
		if ref.IsHole() {
			continue
		}
		id := packID{ref.Owner, ref.Pack}
		if at, ok := open[id]; ok {
			run := &runs[at]
			off, n := run.Span()
			gap := int64(ref.Offset) - (off + n)
			if gap >= 0 && gap <= maxGap && ref.end()-off <= maxSpan {
				run.Blocks = append(run.Blocks, blocks[i])
				run.Refs = append(run.Refs, ref)
				continue
			}
		}
		open[id] = len(runs)
		runs = append(runs, Run{Blocks: []int64{blocks[i]}, Refs: []Ref{ref}})
	}
	return runs
}
