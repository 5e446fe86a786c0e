package cache

import (
	"iter"
	"math/bits"
	"sync/atomic"

	"github.com/lazyvol/lazyvol/manifest"
)

// PageState says what a write layer knows of a page.
type PageState uint8

const (
	Absent PageState = iota // never written: look in the layers below
	Data                    // the layer's file has its bytes
	Zero                    // discarded or zeroed: reads as zeros, and nothing below counts
)

func (s PageState) String() string {
	switch s {
	case Absent:
		return "absent"
	case Data:
		return "data"
	case Zero:
		return "zero"
	}
	return "invalid"
}

const (
	regionPages  = 4096                    // pages of a region: 16 MiB of device
	wordPages    = 32                      // pages of a word, two bits each
	regionWords  = regionPages / wordPages // 1 KiB
	chunkRegions = 4096                    // regions of a chunk: 64 GiB of device
)

// A pageMap is the state of every page of a device. Lookups take no lock and
// allocate nothing. Changes and freeze exclude each other by the owner's lock.
//
// It has two levels: chunks of pointers to regions. A missing chunk or region is
// absent throughout, and all that are data throughout, or zero, are one and the same:
// discarding a whole device stores one pointer for each 64 GiB.
type pageMap struct {
	size   int64 // of the device, in bytes
	pages  int64
	chunks []atomic.Pointer[chunk]

	// What is uniformly in a state: shared, never changed, nil for Absent.
	uniformChunk  [Zero + 1]*chunk
	uniformRegion [Zero + 1]*region

	// dirty counts the bytes of the device that are not absent. Changed by the
	// writer only, once for each change, atomic for readers.
	dirty atomic.Int64

	// epoch counts the freezes. A region of an earlier epoch may be in somebody's
	// frozen view: it is replaced by a copy instead of being changed. Only the
	// writer looks at it.
	epoch uint64
}

type chunk [chunkRegions]atomic.Pointer[region]

// A region has the states of regionPages pages, two bits each, lowest first. The
// pages past the end of the device have the state of its last page.
type region struct {
	words [regionWords]atomic.Uint64

	// Only the writer looks at these.
	count [Zero + 1]int // pages in each state but Absent
	epoch uint64
}

func newPageMap(size int64) *pageMap {
	m := &pageMap{size: size, pages: pagesOf(size), epoch: 1}
	m.chunks = make([]atomic.Pointer[chunk], ceilDiv(m.regions(), chunkRegions))
	for _, s := range []PageState{Data, Zero} {
		r := new(region) // of epoch 0, so never changed
		r.set(0, regionPages, s)
		c := new(chunk)
		for i := range min(chunkRegions, m.regions()) {
			c[i].Store(r)
		}
		m.uniformRegion[s], m.uniformChunk[s] = r, c
	}
	return m
}

func (m *pageMap) regions() int64 { return ceilDiv(m.pages, regionPages) }

// regionsIn is the number of regions of a chunk, fewer of the last one.
func (m *pageMap) regionsIn(ci int64) int64 { return min(chunkRegions, m.regions()-ci*chunkRegions) }

// region returns nil for a region that is absent throughout.
func (m *pageMap) region(i int64) *region {
	c := m.chunks[i/chunkRegions].Load()
	if c == nil {
		return nil
	}
	return c[i%chunkRegions].Load()
}

// state returns the state of a page of the device.
func (m *pageMap) state(page int64) PageState {
	r := m.region(page / regionPages)
	if r == nil {
		return Absent
	}
	return r.state(int(page % regionPages))
}

// run returns the state of a page and how many pages from it on, itself included
// and at most limit ≥ 1, have the same. Under concurrent changes each page had
// that state at some moment during the call.
func (m *pageMap) run(page, limit int64) (PageState, int64) {
	limit = min(limit, m.pages-page)
	s := m.state(page)
	n := int64(1)
	for n < limit {
		at := page + n
		i, lo := at/regionPages, int(at%regionPages)
		if lo == 0 && i%chunkRegions == 0 && m.chunks[i/chunkRegions].Load() == m.uniformChunk[s] {
			n += chunkRegions * regionPages
			continue
		}
		k := m.runIn(m.region(i), lo, s)
		n += int64(k)
		if k < regionPages-lo {
			break
		}
	}
	return s, min(n, limit)
}

// runIn returns how many pages of r from lo on have the state s.
func (m *pageMap) runIn(r *region, lo int, s PageState) int {
	switch {
	case r == nil:
		if s == Absent {
			return regionPages - lo
		}
		return 0
	case r == m.uniformRegion[s]: // never for Absent: that entry is nil
		return regionPages - lo
	default:
		return r.run(lo, s)
	}
}

// next returns the first page ≥ page that is not absent; false: there is none.
func (m *pageMap) next(page int64) (int64, bool) {
	if page >= m.pages {
		return 0, false
	}
	if m.state(page) != Absent {
		return page, true // without a look at how far that goes on
	}
	_, n := m.run(page, m.pages-page)
	return page + n, page+n < m.pages
}

// set changes the state of the pages [first, first+n) of the device, n > 0, to
// Data or Zero.
func (m *pageMap) set(first, n int64, s PageState) {
	overhang := m.overhang(first + n)
	n += overhang / manifest.PageSize
	if overhang > 0 && m.state(m.pages-1) != Absent {
		overhang = 0 // counted before
	}
	marked := int64(0)
	for n > 0 {
		i, lo := first/regionPages, first%regionPages
		k := min(n, regionPages-lo)
		ci := i / chunkRegions
		if whole := m.regionsIn(ci) * regionPages; first == ci*chunkRegions*regionPages && n >= whole {
			marked += m.setChunk(ci, s)
			k = whole
		} else {
			marked += m.setRegion(i, int(lo), int(k), s)
		}
		first += k
		n -= k
	}
	m.dirty.Add(marked*manifest.PageSize - overhang)
}

// overhang is how many bytes the map has behind the device, if the device's pages end
// at end; otherwise 0. They have the state of its last page.
func (m *pageMap) overhang(end int64) int64 {
	if end != m.pages {
		return 0
	}
	return m.regions()*regionPages*manifest.PageSize - m.size
}

// setChunk changes all pages of a chunk, and returns how many were absent.
func (m *pageMap) setChunk(ci int64, s PageState) (marked int64) {
	marked = m.regionsIn(ci) * regionPages
	if c := m.chunks[ci].Load(); c != nil {
		for i := range m.regionsIn(ci) {
			if r := c[i].Load(); r != nil {
				marked -= int64(r.marked())
			}
		}
	}
	m.chunks[ci].Store(m.uniformChunk[s])
	return marked
}

// setRegion changes n pages of region i from its page lo on, and returns how many
// were absent.
func (m *pageMap) setRegion(i int64, lo, n int, s PageState) (marked int64) {
	slot := m.slot(i)
	old := slot.Load()
	before := 0
	if old != nil {
		before = old.marked()
	}
	r := old
	switch {
	case n == regionPages:
		r = m.uniformRegion[s]
	case old == nil:
		r = &region{epoch: m.epoch}
	case old.epoch != m.epoch:
		r = old.clone(m.epoch)
	}
	if n < regionPages {
		r.set(lo, n, s)
		if r.count[s] == regionPages {
			r = m.uniformRegion[s]
		}
	}
	if r != old {
		slot.Store(r)
	}
	return int64(r.marked() - before)
}

// load puts r, of which only the words are set, in the place of region i, which is
// absent. The error for impossible states wraps manifest.ErrCorrupt.
func (m *pageMap) load(i int64, r *region) error {
	r.epoch = m.epoch
	for w := range r.words {
		word := r.words[w].Load()
		if word&(word>>1)&spread(Data) != 0 {
			return corrupt("region %d has a page in state 3", i)
		}
		r.count[Data] += bits.OnesCount64(word & spread(Data))
		r.count[Zero] += bits.OnesCount64(word & spread(Zero))
	}
	if r.marked() == 0 || r.uniformState() != Absent {
		return corrupt("region %d is not mixed", i)
	}
	dirty := int64(r.marked()) * manifest.PageSize
	if last := int(m.pages - 1 - i*regionPages); last < regionPages {
		s := r.state(last)
		if r.run(last, s) != regionPages-last {
			return corrupt("region %d has pages past the end of the device", i)
		}
		if s != Absent {
			dirty -= m.overhang(m.pages)
		}
	}
	m.slot(i).Store(r)
	m.dirty.Add(dirty)
	return nil
}

// slot is where the pointer to region i lies, for changing it.
func (m *pageMap) slot(i int64) *atomic.Pointer[region] {
	at := &m.chunks[i/chunkRegions]
	c := at.Load()
	if c == nil || c == m.uniformChunk[Data] || c == m.uniformChunk[Zero] {
		own := new(chunk)
		if c != nil {
			for j := range c {
				own[j].Store(c[j].Load())
			}
		}
		at.Store(own)
		c = own
	}
	return &c[i%chunkRegions]
}

// An extent is count regions from the region first on that share one content.
type extent struct {
	first, count uint32
	state        PageState // Absent: the regions are mixed, and count is 1
	region       *region   // never changes
}

// freeze returns the regions that are not absent, ascending, as they are now.
func (m *pageMap) freeze() []extent {
	m.epoch++
	var extents []extent
	for i, r := range m.present() {
		s := r.uniformState()
		if n := len(extents); n > 0 && s != Absent {
			if last := &extents[n-1]; last.state == s && int64(last.first)+int64(last.count) == i {
				last.count++
				continue
			}
		}
		extents = append(extents, extent{first: uint32(i), count: 1, state: s, region: r})
	}
	return extents
}

// present yields the regions that are not absent throughout, ascending.
func (m *pageMap) present() iter.Seq2[int64, *region] {
	return func(yield func(int64, *region) bool) {
		for ci := range m.chunks {
			c := m.chunks[ci].Load()
			if c == nil {
				continue
			}
			for ri := range m.regionsIn(int64(ci)) {
				if r := c[ri].Load(); r != nil && !yield(int64(ci)*chunkRegions+ri, r) {
					return
				}
			}
		}
	}
}

// spread is the word in which all pages have the state s.
func spread(s PageState) uint64 { return uint64(s) * 0x5555_5555_5555_5555 }

func (r *region) state(page int) PageState {
	return PageState(r.words[page/wordPages].Load() >> (page % wordPages * 2) & 3)
}

func (r *region) run(lo int, s PageState) int {
	for at := lo; at < regionPages; {
		inWord := at % wordPages
		if diff := (r.words[at/wordPages].Load() ^ spread(s)) >> (inWord * 2); diff != 0 {
			return at + bits.TrailingZeros64(diff)/2 - lo
		}
		at += wordPages - inWord
	}
	return regionPages - lo
}

func (r *region) set(lo, n int, s PageState) {
	for n > 0 {
		inWord := lo % wordPages
		k := min(n, wordPages-inWord)
		mask := ^uint64(0) >> (64 - 2*k) << (2 * inWord)
		word := &r.words[lo/wordPages]
		old := word.Load()
		word.Store(old&^mask | spread(s)&mask)
		r.count[Data] -= bits.OnesCount64(old & mask & spread(Data))
		r.count[Zero] -= bits.OnesCount64(old & mask & spread(Zero))
		r.count[s] += k
		lo += k
		n -= k
	}
}

func (r *region) clone(epoch uint64) *region {
	c := &region{count: r.count, epoch: epoch}
	for i := range r.words {
		c.words[i].Store(r.words[i].Load())
	}
	return c
}

// marked is the number of pages that are not absent.
func (r *region) marked() int { return r.count[Data] + r.count[Zero] }

// uniformState is the state of all pages, Absent if they differ.
func (r *region) uniformState() PageState {
	for _, s := range []PageState{Data, Zero} {
		if r.count[s] == regionPages {
			return s
		}
	}
	return Absent
}

// ceilDiv is a/b rounded up, for a ≥ 0 and b > 0 far from overflow.
func ceilDiv(a, b int64) int64 { return (a + b - 1) / b }

// pagesOf is the number of pages of size bytes, the last perhaps short.
func pagesOf(size int64) int64 { return ceilDiv(size, manifest.PageSize) }
