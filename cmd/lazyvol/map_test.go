package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/dustin/go-humanize"
	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/manifest"
)

// mapped returns the grid of a device, at most so many cells, all of whose snapshots
// have a name.
func mapped(h mapHead, cells int64, ranges ...mapRange) *mapGrid {
	g := newMapGrid(h, cells)
	for _, r := range ranges {
		g.add(r)
	}
	g.name(func(named []mapOwner) {
		for i, o := range named {
			serial, _ := strconv.Atoi(o.id[len(o.id)-1:])
			named[i].ownerName = ownerName{start: time.Date(2026, 11, 22, 13, serial, 0, 0, time.Local), text: "of " + o.id}
		}
	})
	return g
}

// called gives all snapshots the same name.
func called(name string) func([]mapOwner) {
	return func(named []mapOwner) {
		for i := range named {
			named[i].text = name
		}
	}
}

// drawRanges draws the ranges of a device of a size.
func drawRanges(t *rapid.T, deviceSize int64) (ranges []mapRange) {
	for off := int64(0); off < deviceSize; {
		most := deviceSize - off
		r := mapRange{Offset: off, Length: rapid.Int64Range(1, most).Draw(t, "length")}
		if len(ranges) == 40 {
			r.Length = most
		}
		if owner := rapid.IntRange(0, 14).Draw(t, "owner"); owner > 0 {
			r.Owner = treeID(1, uint64(owner)).String()
			r.Cached = rapid.Bool().Draw(t, "cached")
		}
		r.Dirty = rapid.SampledFrom([]string{"", "", dirtyData, dirtyZero}).Draw(t, "dirty")
		ranges = append(ranges, r)
		off += r.Length
	}
	return ranges
}

// A picturePath is a path of a picture, or what else has a fill.
type picturePath struct {
	Fill  string `xml:"fill,attr"`
	D     string `xml:"d,attr"`
	Title string `xml:"title"`
}

// A pictureGroup is a group of a picture, or the whole.
type pictureGroup struct {
	Fill      string         `xml:"fill,attr"`
	Transform string         `xml:"transform,attr"`
	Title     string         `xml:"title"`
	Desc      string         `xml:"desc"`
	Texts     []string       `xml:"text"`
	Paths     []picturePath  `xml:"path"`
	Groups    []pictureGroup `xml:"g"`
}

func parsePicture(t interface {
	Helper()
	Fatalf(string, ...any)
}, picture []byte) (whole, cells pictureGroup) {
	t.Helper()
	if !utf8.Valid(picture) {
		t.Fatalf("it is not UTF-8")
	}
	if err := xml.Unmarshal(picture, &whole); err != nil {
		t.Fatalf("it is not XML: %v\n%s", err, picture)
	}
	for _, g := range whole.Groups {
		if strings.Contains(g.Transform, "scale") {
			return whole, g
		}
	}
	t.Fatalf("it has no cells:\n%s", picture)
	return whole, cells
}

var (
	runPath = regexp.MustCompile(`^M(\d+) (\d+)(\.5)?h(\d+)v1?(\.5)?h-(\d+)$`)
	runTip  = regexp.MustCompile(`^(\d+ \w+)\+(\d+ \w+): `)
)

// exactBytes is the inverse of exactSize.
func exactBytes(t *rapid.T, s string) int64 {
	n, unit, _ := strings.Cut(s, " ")
	number, err := strconv.ParseInt(n, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	factor, err := humanize.ParseBytes("1 " + unit)
	if err != nil {
		t.Fatal(err)
	}
	return number * int64(factor)
}

// Each cell lies in one run of the picture, and the runs tell of each byte once.
func TestMapPictureCoversEveryByteOnce(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		deviceSize := manifest.SectorSize * rapid.OneOf(rapid.Int64Range(0, 200), rapid.Int64Range(0, 100_000), rapid.Int64Range(0, manifest.MaxDeviceSize/manifest.SectorSize)).Draw(t, "sectors")
		g := mapped(mapHead{ID: "vol-1", Size: deviceSize}, mapCells, drawRanges(t, deviceSize)...)
		_, cells := parsePicture(t, drawSVG(g))
		var columns int64
		if _, err := fmt.Sscanf(cells.Transform[strings.Index(cells.Transform, "scale"):], "scale(%d", &columns); err != nil {
			t.Fatal(err)
		}
		columns = mapWidth / columns
		covered := make([]bool, len(g.cells))
		var runs [][2]int64
		for _, group := range cells.Groups {
			for _, path := range group.Paths {
				if path.Title == "" {
					continue
				}
				var at [4]int64 // column, row, and twice the width
				m := runPath.FindStringSubmatch(path.D)
				if m == nil || m[4] != m[6] || m[3] != m[5] {
					t.Fatalf("path %q", path.D)
				}
				for i, s := range []string{m[1], m[2], m[4], m[6]} {
					at[i], _ = strconv.ParseInt(s, 10, 64)
				}
				if at[0]+at[2] > columns {
					t.Fatalf("path %q reaches over the right side", path.D)
				}
				first := at[1]*columns + at[0]
				for i := first; i < first+at[2]; i++ {
					if covered[i] {
						t.Fatalf("cell %d is drawn twice", i)
					}
					covered[i] = true
				}
				tip := runTip.FindStringSubmatch(path.Title)
				if tip == nil {
					t.Fatalf("tip %q", path.Title)
				}
				run := [2]int64{exactBytes(t, tip[1]), exactBytes(t, tip[2])}
				if run[0] != first*g.cell {
					t.Fatalf("the run at cell %d says %q", first, path.Title)
				}
				runs = append(runs, run)
			}
		}
		slices.SortFunc(runs, func(a, b [2]int64) int { return int(min(max(a[0]-b[0], -1), 1)) })
		at := int64(0)
		for _, run := range runs {
			if run[0] != at {
				t.Fatalf("a run begins at %d, the one before ends at %d", run[0], at)
			}
			at += run[1]
		}
		if at != deviceSize || slices.Contains(covered, false) {
			t.Fatalf("runs of %d bytes of a device of %d: %v", at, deviceSize, covered)
		}
	})
}

// The sums of the cells are those of the ranges, however these lie.
func TestMapGridSumsUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		deviceSize := manifest.SectorSize * rapid.Int64Range(0, 100_000).Draw(t, "sectors")
		ranges := drawRanges(t, deviceSize)
		g := mapped(mapHead{Size: deviceSize}, rapid.Int64Range(1, 50).Draw(t, "cells"), ranges...)
		for i, c := range g.cells {
			lo := int64(i) * g.cell
			hi := lo + g.length(int64(i), 1)
			var want mapSums
			mix := make(map[string]int64)
			for _, r := range ranges {
				n := min(hi, r.Offset+r.Length) - max(lo, r.Offset)
				if n <= 0 {
					continue
				}
				if r.Owner != "" {
					want.owned += n
					mix[r.Owner] += n
				}
				if r.Cached {
					want.cached += n
				}
				if r.Dirty == dirtyData {
					want.data += n
				}
				if r.Dirty == dirtyZero {
					want.zero += n
				}
			}
			if c.mapSums != want {
				t.Fatalf("cell %d: %+v, want %+v", i, c.mapSums, want)
			}
			for id, n := range mix {
				if n > mix[c.owner] {
					t.Fatalf("cell %d is %q's, which has %d bytes; %q has %d", i, c.owner, mix[c.owner], id, n)
				}
			}
			if c.owner == "" && len(mix) > 0 || c.owner != "" && mix[c.owner] == 0 {
				t.Fatalf("cell %d is %q's of %v", i, c.owner, mix)
			}
		}
		sum, n := g.others()
		for i, o := range g.owners[:len(g.owners)-n] {
			sum.bytes, sum.cached = sum.bytes+o.bytes, sum.cached+o.cached
			if i > 0 && o.start.Before(g.owners[i-1].start) {
				t.Fatalf("%q comes after a younger one", o.id)
			}
			for _, other := range g.owners[len(g.owners)-n:] {
				if other.bytes > o.bytes {
					t.Fatalf("%q is named, though %q has more", o.id, other.id)
				}
			}
		}
		if sum.bytes != g.total.owned || sum.cached != g.total.cached {
			t.Fatalf("the snapshots have %+v of %+v", sum, g.total)
		}
	})
}

// Not even a device on which no cell is like its neighbour makes a large picture.
func TestMapPictureIsSmall(t *testing.T) {
	for _, deviceSize := range []int64{mapCells * manifest.PageSize, 1<<62 - manifest.SectorSize, manifest.MaxDeviceSize} {
		g := newMapGrid(mapHead{ID: "vol-0123456789abcdef0", Root: treeID(1, 1).String(), Size: deviceSize}, mapCells)
		for i := range int64(len(g.cells)) {
			owner := treeID(1, uint64(i%11+1)).String()
			third := g.length(i, 1) / 3
			off := i * g.cell
			dirty := []string{dirtyZero, dirtyData}
			g.add(mapRange{Offset: off, Length: third, Owner: owner, Dirty: dirty[i%2]})
			off += third
			g.add(mapRange{Offset: off, Length: third / 2, Owner: owner, Cached: true, Dirty: dirty[(i+1)%2]})
			off += third / 2
			if rest := i*g.cell + g.length(i, 1) - off; i%3 == 0 {
				g.add(mapRange{Offset: off, Length: rest})
			} else {
				g.add(mapRange{Offset: off, Length: rest, Owner: owner})
			}
		}
		g.name(called(strings.Repeat("<", 300)))
		picture := drawSVG(g)
		_, cells := parsePicture(t, picture)
		runs := 0
		for _, group := range cells.Groups {
			for _, path := range group.Paths {
				if path.Title != "" {
					runs++
				}
			}
		}
		if runs != len(g.cells) || len(g.cells) < mapCells/2 {
			t.Errorf("%d bytes: %d runs of %d cells", deviceSize, runs, len(g.cells))
		}
		if len(picture) >= 1_000_000 {
			t.Errorf("%d bytes: a picture of %d bytes", deviceSize, len(picture))
		}
	}
}

// What people call a snapshot cannot break the picture, nor does it differ from one
// time to the next.
func TestMapPictureShowsAnyName(t *testing.T) {
	for _, name := range []string{"a <b> & \"c\" 'd'", "]]>", "two\nlines\x1b[2J\x00", "\xff\xfe", "</svg>", "&#0;", strings.Repeat("ä", 300)} {
		draw := func() []byte {
			const pages = 1000
			g := newMapGrid(mapHead{ID: "vol-<&>", Root: "snap-\"", Size: pages * manifest.PageSize}, pages/4)
			for i := range int64(pages) {
				r := mapRange{Offset: i * manifest.PageSize, Length: manifest.PageSize, Dirty: []string{"", dirtyData}[i/7%2]}
				if i/4%2 == 0 || i%4 == 0 { // every other cell is sparse
					r.Owner, r.Cached = treeID(1, uint64(i/8%12+1)).String(), i%5 == 0
				}
				g.add(r)
			}
			g.name(called(name))
			return drawSVG(g)
		}
		picture := draw()
		whole, _ := parsePicture(t, picture)
		if whole.Title != "Map of vol-<&>" || !slices.Contains(whole.Texts, "vol-<&>") {
			t.Errorf("the titles are %q and %q", whole.Title, whole.Texts)
		}
		want := shortened(name, mostName)
		if !slices.Contains(whole.Texts, want) || utf8.RuneCountInString(want) > mostName {
			t.Errorf("%q is not among %q", want, whole.Texts)
		}
		for range 5 {
			if !bytes.Equal(draw(), picture) {
				t.Errorf("%q is drawn in two ways", name)
			}
		}
	}
}

func TestMapInLettersIsForPeople(t *testing.T) {
	const mib = 1 << 20
	first, second := treeID(1, 1).String(), treeID(1, 2).String()
	g := newMapGrid(mapHead{ID: "vol-1", Root: second, Size: 65*mib + 512}, textCells)
	for _, r := range []mapRange{
		{Offset: 0, Length: 4 * mib, Owner: first, Cached: true},
		{Offset: 4 * mib, Length: 4 * mib, Owner: first},
		{Offset: 8 * mib, Length: 2*mib - 128<<10, Owner: second},
		{Offset: 10*mib - 128<<10, Length: 96 << 10, Owner: second, Cached: true},
		{Offset: 10*mib - 32<<10, Length: 32 << 10, Owner: second},
		{Offset: 10 * mib, Length: 2 * mib, Owner: second, Cached: true, Dirty: dirtyData},
		{Offset: 12 * mib, Length: 4096, Dirty: dirtyData},
		{Offset: 12*mib + 4096, Length: 2*mib - 4096},
		{Offset: 14 * mib, Length: 2 * mib, Owner: first, Dirty: dirtyZero},
		{Offset: 16 * mib, Length: 49 * mib},
		{Offset: 65 * mib, Length: 512, Owner: first},
	} {
		g.add(r)
	}
	g.name(func(named []mapOwner) {
		for i, o := range named {
			if o.id == first {
				named[i].deleted = true
				continue
			}
			named[i].ownerName = ownerName{start: time.Date(2026, 11, 22, 13, 14, 0, 0, time.Local), text: "nightly\x1b[2J"}
		}
	})
	var out strings.Builder
	if err := drawTextMap(&out, g, false); err != nil {
		t.Fatal(err)
	}
	want := strings.TrimPrefix(`
vol-1: 65 MiB, on snap-00000001000000002; a cell is 128 KiB, a row 8 MiB
       0 B  AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
     8 MiB  bbbbbbbbbbbbbbbB################+...............----------------
    16 MiB  ................................................................
    24 MiB  ................................................................
    32 MiB  ................................................................
    40 MiB  ................................................................
    48 MiB  ................................................................
    56 MiB  ................................................................
    64 MiB  ........a
  A  snap-00000001000000001  deleted           10 MiB, 40% cached
  B  snap-00000001000000002  2026-11-22 13:14  4.0 MiB, 52% cached  nightly [2J
  .  hole: 51 MiB; a capital is cached here, a small letter is to be fetched
  #  written since the last snapshot, on this host only: 2.0 MiB; + in part
  -  discarded or zeroed since: 2.0 MiB
`, "\n")
	if diff := cmp.Diff(strings.Split(want, "\n"), strings.Split(out.String(), "\n")); diff != "" {
		t.Errorf("the map (-want +got):\n%s", diff)
	}
	var coloured strings.Builder
	if err := drawTextMap(&coloured, g, true); err != nil {
		t.Fatal(err)
	}
	if plain := regexp.MustCompile("\x1b\\[[0-9;]*m").ReplaceAllString(coloured.String(), ""); plain != out.String() || plain == coloured.String() {
		t.Errorf("in colours it is another map:\n%s", coloured.String())
	}
}

// A map of which something is missing is an error, as is what a daemon has to say.
func TestDaemonsMapIsWhole(t *testing.T) {
	const head = `{"head":{"id":"vol-1","size":100,"blockSize":65536}}` + "\n"
	for answer, want := range map[string]string{
		"":   "ended before the map was done",
		head: "ended before the map was done",
		head + `{"ranges":[{"offset":0,"length":100}]}`:                                       "ended before the map was done",
		head + `{"ranges":[{"offset":0,"length":100}]}{"do`:                                   "unexpected EOF",
		head + `{"ranges":[{"offset":0,"length":60}]}{"done":true}`:                           "it ends after 60 bytes",
		head + `{"ranges":[{"offset":0,"length":101}]}{"done":true}`:                          "after 0 bytes",
		head + `{"ranges":[{"offset":0,"length":60},{"offset":70,"length":30}]}{"done":true}`: "after 60 bytes",
		head + `{"ranges":[{"offset":0,"length":0},{"offset":0,"length":100}]}{"done":true}`:  "after 0 bytes",
		`{"ranges":[{"offset":0,"length":100}]}{"done":true}`:                                 "after 0 bytes",
		`{"done":true}`:                       "it ends after 0 bytes",
		head + `{"error":"not now","code":4}`: "not now",
		head + `{"ranges":[{"offset":0,"length":60},{"offset":60,"length":40}]}{"done":true}`: "",
		`{"head":{"id":"vol-1","size":0,"blockSize":65536}}{"done":true}`:                     "",
	} {
		err := readMap(strings.NewReader(answer), mapSink{
			begin: func(mapHead) error { return nil },
			add:   func(mapRange) error { return nil },
		})
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", answer, err, want)
		}
		if remote := (remoteError{}); strings.Contains(answer, "error") && (!errors.As(err, &remote) || exitCode(err) != exitRefused) {
			t.Errorf("%s: %v with exit code %d", answer, err, exitCode(err))
		}
	}
	failing := errors.New("failing")
	whole := head + `{"ranges":[{"offset":0,"length":100}]}{"done":true}`
	if err := readMap(strings.NewReader(whole), mapSink{begin: func(mapHead) error { return failing }}); err != failing {
		t.Errorf("who cannot begin: %v", err)
	}
	if err := readMap(strings.NewReader(whole), mapSink{begin: func(mapHead) error { return nil }, add: func(mapRange) error { return failing }}); err != failing {
		t.Errorf("who cannot go on: %v", err)
	}
}

// What is printed as JSON is JSON, also of nothing.
func TestMapJSONIsJSON(t *testing.T) {
	for _, ranges := range [][]mapRange{nil, {{Length: 5, Owner: "snap-1", Cached: true}}, {{Length: 5}, {Offset: 5, Length: 7, Dirty: dirtyZero}}} {
		d := mapDrawing{run: func(_ context.Context, to mapSink) error {
			err := to.begin(mapHead{ID: "vol-1", Size: 12, BlockSize: 65536})
			for _, r := range ranges {
				err = errors.Join(err, to.add(r))
			}
			return err
		}}
		var out bytes.Buffer
		if err := d.printJSON(t.Context(), &out); err != nil {
			t.Fatal(err)
		}
		var got struct {
			mapHead
			Ranges []mapRange
		}
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatalf("%v\n%s", err, out.Bytes())
		}
		if diff := cmp.Diff(ranges, got.Ranges, cmp.Comparer(func(a, b []mapRange) bool { return slices.Equal(a, b) })); diff != "" || got.ID != "vol-1" || got.Size != 12 {
			t.Errorf("%s\n%s", out.Bytes(), diff)
		}
	}
	d := mapDrawing{run: func(context.Context, mapSink) error { return io.ErrClosedPipe }}
	if err := d.printJSON(t.Context(), io.Discard); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("of one that failed: %v", err)
	}
}
