package main

import (
	"cmp"
	"math/bits"
	"slices"
	"strings"
	"time"

	"github.com/lazyvol/lazyvol/manifest"
)

// A mapGrid is a map in cells of equal size, in bytes a power of two: each sums up a
// range of the device. It takes as much memory for 16 TiB as for one.
type mapGrid struct {
	mapHead
	cell   int64 // bytes of a cell; the last may lie partly outside the device
	cells  []mapCell
	total  mapSums
	owners []mapOwner // the named ones, oldest first, and then the others

	byID map[string]*mapOwner
	last int64            // the cell that was added to last
	mix  map[string]int64 // bytes by snapshot in it
}

// mapSums are bytes of a range.
type mapSums struct {
	owned  int64 // that the root has data in
	cached int64 // of these, that this host has
	data   int64 // written since the last snapshot
	zero   int64 // discarded since
}

// A mapCell is a range of the device.
type mapCell struct {
	mapSums
	owner string // the snapshot that has most of it; "": all holes
}

// A mapOwner is a snapshot that uploaded some of a device.
type mapOwner struct {
	id            string
	bytes, cached int64
	ownerName
}

// ownerName is what the store tells of a snapshot.
type ownerName struct {
	start   time.Time // zero: not known
	text    string    // its Name tag or description, for people
	deleted bool
}

// newMapGrid returns the grid of a device, of at most so many cells, none smaller than
// a page.
func newMapGrid(h mapHead, cells int64) *mapGrid {
	cell := int64(manifest.PageSize)
	if h.Size > cell*cells {
		cell = 1 << bits.Len64(uint64((h.Size-1)/cells))
	}
	n := h.Size / cell
	if h.Size%cell > 0 {
		n++
	}
	return &mapGrid{
		mapHead: h, cell: cell, cells: make([]mapCell, n),
		byID: make(map[string]*mapOwner), mix: make(map[string]int64),
	}
}

// add adds a range to the cells that it lies in. The ranges of a device are added
// once each, ascending.
func (g *mapGrid) add(r mapRange) {
	g.total.add(r, r.Length)
	if r.Owner != "" {
		o := g.byID[r.Owner]
		if o == nil {
			o = &mapOwner{id: r.Owner}
			g.byID[r.Owner] = o
		}
		o.bytes += r.Length
		if r.Cached {
			o.cached += r.Length
		}
	}
	for off, rest := r.Offset, r.Length; rest > 0; {
		i := off / g.cell
		if i != g.last {
			clear(g.mix)
			g.last = i
		}
		n := min(rest, g.cell-off%g.cell)
		c := &g.cells[i]
		c.add(r, n)
		if r.Owner != "" {
			g.mix[r.Owner] += n
			if most := g.mix[c.owner]; g.mix[r.Owner] > most {
				c.owner = r.Owner
			}
		}
		off, rest = off+n, rest-n
	}
}

// add adds n bytes that are as the range is.
func (s *mapSums) add(r mapRange, n int64) {
	if r.Owner != "" {
		s.owned += n
	}
	if r.Cached {
		s.cached += n
	}
	switch r.Dirty {
	case dirtyData:
		s.data += n
	case dirtyZero:
		s.zero += n
	}
}

// plus adds what another range has.
func (s *mapSums) plus(t mapSums) {
	s.owned += t.owned
	s.cached += t.cached
	s.data += t.data
	s.zero += t.zero
}

// namedOwners is how many snapshots a map names: those that have most of it. There are
// no more colours that everybody can tell from each other.
const namedOwners = len(ownerColours)

// name orders the snapshots, when all ranges were added, and has the names filled in of
// those that a legend has room for. A snapshot made later takes no colour away from
// those before.
func (g *mapGrid) name(fillIn func(named []mapOwner)) {
	g.owners = g.owners[:0]
	for _, o := range g.byID {
		g.owners = append(g.owners, *o)
	}
	slices.SortFunc(g.owners, func(a, b mapOwner) int {
		return cmp.Or(cmp.Compare(b.bytes, a.bytes), strings.Compare(a.id, b.id))
	})
	named := g.owners[:min(len(g.owners), namedOwners)]
	fillIn(named)
	slices.SortFunc(named, func(a, b mapOwner) int { return cmp.Or(a.start.Compare(b.start), strings.Compare(a.id, b.id)) })
}

// letterOf returns the letter of a snapshot, by its place among the owners.
func letterOf(owner int) byte {
	if owner >= namedOwners {
		return otherLetter
	}
	return 'A' + byte(owner)
}

// otherLetter is that of all snapshots that are not named.
const otherLetter = 'X'

// indexes returns the place of each snapshot among the owners; those that are not named
// share the one after.
func (g *mapGrid) indexes() map[string]int {
	at := make(map[string]int, len(g.owners))
	for i, o := range g.owners {
		at[o.id] = min(i, namedOwners)
	}
	return at
}

// others sums up the snapshots that are not named, and counts them.
func (g *mapGrid) others() (sum mapOwner, n int) {
	for _, o := range g.owners[min(len(g.owners), namedOwners):] {
		sum.bytes += o.bytes
		sum.cached += o.cached
		n++
	}
	return sum, n
}

// length is how many bytes of so many cells from one on lie inside the device.
func (g *mapGrid) length(cell, n int64) int64 { return min(n*g.cell, g.Size-cell*g.cell) }

// share is how many percent one number of bytes is of another: 0 and 100 only if it is
// none and all of it.
func share(part, whole int64) int {
	switch {
	case part <= 0:
		return 0
	case part >= whole:
		return 100
	}
	return min(max(int(100*float64(part)/float64(whole)+0.5), 1), 99)
}
