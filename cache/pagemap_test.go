package cache

import (
	"math"
	"os"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/internal/vfs"
)

// checkPageMap compares a map with what it should be. pages that lie at the device's
// start are want; all others are absent.
func checkPageMap(t interface {
	Helper()
	Fatalf(string, ...any)
}, m *pageMap, want []PageState) {
	t.Helper()
	marked := int64(0)
	for first := 0; first < len(want); {
		run := 1
		for first+run < len(want) && want[first+run] == want[first] {
			run++
		}
		for _, at := range []int{first, first + run/2, first + run - 1} {
			if s := m.state(int64(at)); s != want[at] {
				t.Fatalf("page %d is %v, want %v", at, s, want[at])
			}
		}
		if s, n := m.run(int64(first), math.MaxInt32); s != want[first] || n != int64(run) {
			t.Fatalf("run from %d: %v × %d, want %v × %d", first, s, n, want[first], run)
		}
		next, ok := m.next(int64(first))
		wantNext := first
		if want[first] == Absent {
			wantNext += run
		} else {
			marked += int64(run)
		}
		if ok != (wantNext < len(want)) || ok && next != int64(wantNext) {
			t.Fatalf("next from %d: %d, %v; want %d", first, next, ok, wantNext)
		}
		first += run
	}
	dirty := marked * page
	if m.pages > 0 && want[m.pages-1] != Absent {
		dirty -= m.pages*page - m.size
	}
	if got := m.dirty.Load(); got != dirty {
		t.Fatalf("%d dirty bytes, want %d", got, dirty)
	}
}

func drawRange(t *rapid.T, pages int) (first, n int) {
	// Whole regions often: they are what is special.
	edge := rapid.OneOf(rapid.IntRange(0, pages), rapid.Map(rapid.IntRange(0, pages/regionPages), func(i int) int { return i * regionPages }), rapid.Just(pages))
	a, b := edge.Draw(t, "a"), edge.Draw(t, "b")
	if a == b {
		a, b = min(a, pages-1), min(a, pages-1)+1
	}
	return min(a, b), max(a, b) - min(a, b)
}

func TestPageMapIsAnArrayOfStates(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		pages := rapid.IntRange(1, 3*regionPages).Draw(t, "pages")
		size := int64(pages)*page - rapid.Int64Range(0, page-1).Draw(t, "short")
		m := newPageMap(size)
		want := make([]PageState, pages)
		var frozen []extent
		var wantFrozen []PageState
		for range rapid.IntRange(1, 12).Draw(t, "ops") {
			if rapid.IntRange(0, 4).Draw(t, "freeze") == 0 {
				frozen, wantFrozen = m.freeze(), slices.Clone(want)
				continue
			}
			first, n := drawRange(t, pages)
			s := rapid.SampledFrom([]PageState{Data, Zero}).Draw(t, "state")
			m.set(int64(first), int64(n), s)
			for i := first; i < first+n; i++ {
				want[i] = s
			}
		}
		checkPageMap(t, m, want)
		if wantFrozen != nil {
			checkPageMap(t, roundTrip(t, frozen, size), wantFrozen)
		}
	})
}

// The same in units of regions, for devices of several chunks.
func TestPageMapOfManyChunksIsAnArrayOfStates(t *testing.T) {
	const regions = 2*chunkRegions + 100
	pages := int64(regions*regionPages - 7)
	rapid.Check(t, func(t *rapid.T) {
		m := newPageMap(pages * page)
		want := make([]PageState, regions)
		edge := rapid.OneOf(rapid.IntRange(0, regions), rapid.SampledFrom([]int{0, chunkRegions, 2 * chunkRegions, regions}))
		for range rapid.IntRange(1, 8).Draw(t, "ops") {
			a, b := edge.Draw(t, "a"), edge.Draw(t, "b")
			first, end := min(a, b), max(a, b)
			if first == end {
				m.freeze()
				continue
			}
			s := rapid.SampledFrom([]PageState{Data, Zero}).Draw(t, "state")
			m.set(int64(first)*regionPages, min(int64(end)*regionPages, pages)-int64(first)*regionPages, s)
			for i := first; i < end; i++ {
				want[i] = s
			}
		}
		for _, m := range []*pageMap{m, roundTrip(t, m.freeze(), pages*page)} {
			marked := int64(0)
			for i := 0; i < regions; {
				first := int64(i) * regionPages
				s, n := m.run(first, pages)
				for i < regions && int64(i)*regionPages < first+n {
					if want[i] != s {
						t.Fatalf("region %d is %v, want %v", i, s, want[i])
					}
					i++
				}
				if i < regions && want[i] == s {
					t.Fatalf("run of %v ends before region %d", s, i)
				}
				if s != Absent {
					marked += n
				}
			}
			if got := m.dirty.Load(); got != marked*page {
				t.Fatalf("%d dirty bytes, want %d", got, marked*page)
			}
		}
	})
}

// roundTrip writes a checkpoint and reads it back.
func roundTrip(t interface{ Fatalf(string, ...any) }, extents []extent, size int64) *pageMap {
	f, err := vfs.NewCrash(0).OpenFile("map", os.O_RDWR|os.O_CREATE, 0)
	if err != nil {
		t.Fatalf("%v", err)
	}
	h := mapHeader{size: size, generation: 3, nonce: 4, bootID: "boot"}
	if err := writeCheckpoint(f, &h, extents); err != nil {
		t.Fatalf("%v", err)
	}
	got, m, err := readCheckpoint(f, h.size)
	if err != nil {
		t.Fatalf("%v", err)
	}
	if !reflect.DeepEqual(got, h) {
		t.Fatalf("header %+v became %+v", h, got)
	}
	return m
}

func TestPageMapOfALargeDeviceIsSmallAndQuick(t *testing.T) {
	const pages = 16 << 40 / page
	m := newPageMap(pages * page)
	m.set(0, pages, Zero)
	m.set(pages/2+1, 1, Data)
	for _, c := range []struct {
		page, n int64
		state   PageState
	}{{0, pages/2 + 1, Zero}, {pages/2 + 1, 1, Data}, {pages/2 + 2, pages/2 - 2, Zero}} {
		if s, n := m.run(c.page, pages); s != c.state || n != c.n {
			t.Errorf("run from %d: %v × %d", c.page, s, n)
		}
	}
	if extents := m.freeze(); len(extents) != 3 {
		t.Errorf("%d extents", len(extents))
	}
	empty := newPageMap(pages * page)
	empty.set(pages-1, 1, Data)
	if page, ok := empty.next(5); !ok || page != pages-1 {
		t.Errorf("next = %d, %v", page, ok)
	}
	if s, n := empty.run(3*regionPages+5, pages); s != Absent || n != pages-1-3*regionPages-5 {
		t.Errorf("run = %v × %d", s, n)
	}
}
