package main

import (
	"bytes"
	"cmp"
	"encoding/xml"
	"fmt"
	"maps"
	"math/bits"
	"slices"
	"strings"
)

// mapCells is how many cells a picture has at most: as many as keep that of the worst
// device below a megabyte.
const mapCells = 8192

// A colour is red, green and blue.
type colour [3]uint8

func (c colour) String() string { return fmt.Sprintf("#%02x%02x%02x", c[0], c[1], c[2]) }

// over returns the colour at an opacity, in percent, over another.
func (c colour) over(ground colour, percent int) (mixed colour) {
	for i := range c {
		mixed[i] = uint8((int(c[i])*percent + int(ground[i])*(100-percent)) / 100)
	}
	return mixed
}

// ownerColours are Paul Tol's muted scheme, which the colour-blind can tell apart, with a
// lighter blue for indigo, that hides marks, in an order in which neighbours differ most.
var ownerColours = [...]colour{
	{0x33, 0x66, 0xaa}, {0xcc, 0x66, 0x77}, {0x44, 0xaa, 0x99}, {0xdd, 0xcc, 0x77}, {0x88, 0x22, 0x55},
	{0x88, 0xcc, 0xee}, {0x99, 0x99, 0x33}, {0xaa, 0x44, 0x99}, {0x11, 0x77, 0x33},
}

var (
	otherColour = colour{0x77, 0x77, 0x77}
	holeColour  = colour{0xf1, 0xf1, 0xf1}
	paper       = colour{0xff, 0xff, 0xff}
)

func colourOf(owner int) colour {
	if owner >= len(ownerColours) {
		return otherColour
	}
	return ownerColours[owner]
}

// A mapLook is how a cell looks.
type mapLook struct {
	owner  int  // of the grid; -1: a hole
	cached int  // 0 to len(cachedOpacity)-1
	sparse bool // less than half of it is data
}

// cachedOpacity is how strong a colour is, in percent: where nothing is cached, less
// than half, more, and all.
var cachedOpacity = [...]int{36, 56, 76, 100}

// An overlay is what is drawn over a cell: what was done since the last snapshot.
type overlay string

// The overlays, by the ends of their patterns' ids: of some of a cell, and of half or more.
const (
	noOverlay   overlay = ""
	someWritten overlay = "w"
	mostWritten overlay = "W"
	someZeroed  overlay = "z"
	mostZeroed  overlay = "Z"
)

// look returns how a cell of so many bytes looks.
func (c *mapCell) look(owner map[string]int, bytes int64) mapLook {
	if c.owner == "" {
		return mapLook{owner: -1}
	}
	l := mapLook{owner: owner[c.owner], sparse: c.owned < (bytes+1)/2}
	switch {
	case c.cached == c.owned:
		l.cached = 3
	case c.cached >= c.owned-c.cached:
		l.cached = 2
	case c.cached > 0:
		l.cached = 1
	}
	return l
}

func (c *mapCell) overlay(bytes int64) overlay {
	most := c.data+c.zero >= (bytes+1)/2
	switch {
	case c.data+c.zero == 0:
		return noOverlay
	case c.data >= c.zero && most:
		return mostWritten
	case c.data >= c.zero:
		return someWritten
	case most:
		return mostZeroed
	}
	return someZeroed
}

// The picture, in pixels.
const (
	mapWidth   = 1024 // of the cells
	mapHeight  = 512  // of the cells, at most
	mapMargin  = 20
	mapLeft    = mapMargin + 84 // offsets stand before it
	mapTop     = 76             // titles stand above it
	mostCell   = 24             // height of a row, at most
	legendLine = 20
	mapFull    = mapLeft + mapWidth + mapMargin
)

// An svgMap is a picture being drawn.
type svgMap struct {
	*mapGrid
	bytes.Buffer

	columns, rows int64
	height        int // of a row, in pixels
	owner         map[string]int
}

// drawSVG returns the picture of a map as SVG. It is the same for the same map, needs
// nothing else, and can be read on any background.
func drawSVG(g *mapGrid) []byte {
	d := &svgMap{mapGrid: g, owner: g.indexes(), columns: 32}
	for n := int64(len(g.cells)); d.columns < 128 && n > d.columns*d.columns/2; {
		d.columns *= 2
	}
	d.rows = max(1, (int64(len(g.cells))+d.columns-1)/d.columns)
	d.height = int(min(mapHeight/d.rows, mostCell))
	legend := d.legend()
	bottom := mapTop + d.height*int(d.rows) + mapMargin
	full := bottom + legendLine*len(legend) + mapMargin
	fmt.Fprintf(d, `<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 %d %d" width="%[1]d" height="%[2]d" font-family="sans-serif" font-size="13" fill="#222">`+"\n", mapFull, full)
	fmt.Fprintf(d, "<title>Map of %s</title>\n<desc>%s</desc>\n", escaped(g.ID), escaped(d.summary()))
	d.patterns()
	fmt.Fprintf(d, `<rect width="%d" height="%d" rx="8" fill="%s"/>`+"\n", mapFull, full, paper)
	d.text(mapMargin, 32, ` font-size="18" font-weight="bold"`, g.ID)
	d.text(mapMargin, 54, ` fill="#555"`, d.summary())
	d.offsets()
	d.cellsSVG()
	for i, line := range legend {
		line(bottom + legendLine*i)
	}
	d.WriteString("</svg>\n")
	return d.Bytes()
}

// summary says in one line what the device is and how it is drawn.
func (d *svgMap) summary() string { return d.mapGrid.summary(d.columns) }

func (g *mapGrid) summary(columns int64) string {
	s := size(g.Size)
	switch g.Root {
	case "":
		s += ", no snapshot yet"
	case g.ID:
	default:
		s += ", on " + g.Root
	}
	return s + fmt.Sprintf("; a cell is %s, a row %s", exactSize(g.cell), exactSize(g.cell*columns))
}

func (d *svgMap) text(x, y int, attributes, s string) {
	fmt.Fprintf(d, `<text x="%d" y="%d"%s>%s</text>`+"\n", x, y, attributes, escaped(s))
}

// patterns defines the overlays, each of one cell. All have dark marks on white, that
// can be seen on every colour.
func (d *svgMap) patterns() {
	d.WriteString("<defs>\n")
	for _, p := range []struct {
		id    overlay
		marks string
	}{
		{someWritten, `<ellipse cx=".5" cy=".5" rx=".34" ry=".34" fill="#fff"/><ellipse cx=".5" cy=".5" rx=".22" ry=".22"/>`},
		{mostWritten, `<path d="M0 0h1v1h-1z" fill="#fff" fill-opacity=".45"/><path d="M0 .75L.75 0H1V.25L.25 1H0zM0 0H.25L0 .25zM1 .75V1H.75z"/>`},
		{someZeroed, `<path d="M.15 .3h.7v.4h-.7z" fill="#fff"/><path d="M.22 .42h.56v.16h-.56z"/>`},
		{mostZeroed, `<path d="M0 0h1v1h-1z" fill="#fff" fill-opacity=".75"/><path d="M0 .4h1v.2h-1z"/>`},
	} {
		fmt.Fprintf(d, `<pattern id="lv-%s" width="1" height="1" patternUnits="userSpaceOnUse">%s</pattern>`+"\n", p.id, p.marks)
	}
	d.WriteString("</defs>\n")
}

// offsets draws the offset of rows at the left, as many as there is room for.
func (d *svgMap) offsets() {
	step := int64(1)
	for int(step)*d.height < 16 {
		step *= 2
	}
	d.WriteString(`<g font-size="11" text-anchor="end" fill="#555">` + "\n")
	for row := int64(0); row < d.rows; row += step {
		d.text(mapLeft-6, mapTop+int(row)*d.height+min(d.height, 16)/2+4, "", exactSize(row*d.columns*d.cell))
	}
	d.WriteString("</g>\n")
}

// cellsSVG draws the cells, equal neighbours in a row as one, those that look alike in
// one group. Their unit is a cell.
func (d *svgMap) cellsSVG() {
	groups := make(map[mapLook]*bytes.Buffer)
	overlays := make(map[overlay]*bytes.Buffer)
	d.runs(func(row, column, n int64, l mapLook, o overlay, sums mapSums) {
		cell := row*d.columns + column
		to := buffer(groups, l)
		y, height := fmt.Sprint(row), "1"
		if l.sparse {
			y, height = fmt.Sprint(row)+".5", ".5"
		}
		fmt.Fprintf(to, `<path d="M%d %sh%dv%sh-%[3]d"><title>%[5]s</title></path>`, column, y, n, height, escaped(d.tip(cell, n, l, sums)))
		if o != noOverlay {
			fmt.Fprintf(buffer(overlays, o), "M%d %dh%dv1h-%[3]d", column, row, n)
		}
	})
	fmt.Fprintf(d, `<g transform="translate(%d %d) scale(%d %d)">`+"\n", mapLeft, mapTop, mapWidth/d.columns, d.height)
	fmt.Fprintf(d, `<path fill="%s" d="%s"/>`+"\n", holeColour, d.outline(0, 0, 1, 1))
	for _, l := range slices.SortedFunc(maps.Keys(groups), compareLooks) {
		fmt.Fprintf(d, "<g fill=\"%s\">%s</g>\n", l.fill(), groups[l])
	}
	d.WriteString(`<g pointer-events="none">` + "\n")
	for _, o := range slices.Sorted(maps.Keys(overlays)) {
		fmt.Fprintf(d, `<path fill="url(#lv-%s)" d="%s"/>`+"\n", o, overlays[o])
	}
	d.WriteString("</g>\n</g>\n")
	fmt.Fprintf(d, `<path fill="none" stroke="#999" d="%s"/>`+"\n", d.outline(mapLeft, mapTop, mapWidth/d.columns, int64(d.height)))
}

func buffer[K comparable](in map[K]*bytes.Buffer, key K) *bytes.Buffer {
	b := in[key]
	if b == nil {
		b = new(bytes.Buffer)
		in[key] = b
	}
	return b
}

// runs calls draw for the runs of equal cells in each row.
func (d *svgMap) runs(draw func(row, column, n int64, l mapLook, o overlay, sums mapSums)) {
	at := func(i int64) (mapLook, overlay) {
		c, bytes := &d.cells[i], d.length(i, 1)
		return c.look(d.owner, bytes), c.overlay(bytes)
	}
	for i := int64(0); i < int64(len(d.cells)); {
		row, first := i/d.columns, i
		l, o := at(i)
		var sums mapSums
		for ; i < min((row+1)*d.columns, int64(len(d.cells))); i++ {
			if otherLook, otherOverlay := at(i); otherLook != l || otherOverlay != o {
				break
			}
			sums.plus(d.cells[i].mapSums)
		}
		draw(row, first-row*d.columns, i-first, l, o, sums)
	}
}

// tip is what the mouse is told of a run: terse, as there may be thousands.
func (d *svgMap) tip(cell, n int64, l mapLook, sums mapSums) string {
	length := d.length(cell, n)
	s := fmt.Sprintf("%s+%s: ", exactSize(cell*d.cell), exactSize(length))
	if l.owner < 0 {
		s += "hole"
	} else {
		s += string(letterOf(l.owner))
		if l.sparse {
			s += fmt.Sprintf(" %d%%", share(sums.owned, length))
		}
		s += fmt.Sprintf(", %d%% cached", share(sums.cached, sums.owned))
	}
	if sums.data > 0 {
		s += fmt.Sprintf(", %d%% written", share(sums.data, length))
	}
	if sums.zero > 0 {
		s += fmt.Sprintf(", %d%% zeroed", share(sums.zero, length))
	}
	return s
}

// outline is the path around all cells, which begin at a point and have a size.
func (d *svgMap) outline(x, y, width, height int64) string {
	n := int64(len(d.cells))
	if n == 0 {
		return ""
	}
	whole, rest := n/d.columns, n%d.columns
	path := fmt.Sprintf("M%d %d", x, y)
	if whole > 0 {
		path += fmt.Sprintf("H%dV%d", x+d.columns*width, y+whole*height)
	}
	if rest > 0 {
		path += fmt.Sprintf("H%dV%d", x+rest*width, y+(whole+1)*height)
	}
	return path + fmt.Sprintf("H%dz", x)
}

func (l mapLook) fill() colour {
	if l.owner < 0 {
		return holeColour
	}
	return colourOf(l.owner).over(paper, cachedOpacity[l.cached])
}

func compareLooks(a, b mapLook) int {
	number := func(l mapLook) int {
		n := (l.owner+1)*len(cachedOpacity) + l.cached
		if l.sparse {
			return 2*n + 1
		}
		return 2 * n
	}
	return cmp.Compare(number(a), number(b))
}

// swatch draws a sample of the size of a cell, or wider, at the top of a line of the
// legend.
func (d *svgMap) swatch(x, y, width int, fill string) {
	fmt.Fprintf(d, `<path transform="translate(%d %d) scale(8 14)" fill="%s" d="M0 0h%dv1h-%[4]dz"/>`+"\n", x, y, fill, width/8)
}

// legend returns what draws each line of it, given its top.
func (d *svgMap) legend() (lines []func(y int)) {
	for i, o := range d.owners[:min(len(d.owners), namedOwners)] {
		lines = append(lines, func(y int) {
			d.owned(y, i, ` font-family="monospace" font-size="12"`, o.id, o)
			d.text(mapLeft+228, y+12, ` fill="#555"`, o.when())
			d.text(mapLeft+520, y+12, "", shortened(o.text, mostName))
		})
	}
	if sum, n := d.others(); n > 0 {
		lines = append(lines, func(y int) { d.owned(y, namedOwners, "", fmt.Sprintf("%d others", n), sum) })
	}
	lines = append(lines, d.keys)
	if d.total.data+d.total.zero > 0 {
		lines = append(lines, d.dirtyKeys)
	}
	return lines
}

// mostName is how many characters of a snapshot's name a legend shows.
const mostName = 64

// owned draws the line of a snapshot.
func (d *svgMap) owned(y, owner int, attributes, id string, o mapOwner) {
	d.swatch(mapLeft, y, 16, mapLook{owner: owner}.fill().String())
	d.swatch(mapLeft+16, y, 16, colourOf(owner).String())
	d.text(mapLeft+38, y+12, ` font-weight="bold"`, string(letterOf(owner)))
	d.text(mapLeft+56, y+12, attributes, id)
	d.text(mapLeft+356, y+12, "", o.sizes())
}

// sizes says how much of the device a snapshot has uploaded.
func (o *mapOwner) sizes() string {
	return fmt.Sprintf("%s, %d%% cached", size(o.bytes), share(o.cached, o.bytes))
}

// when says when a snapshot was begun.
func (o *mapOwner) when() string {
	switch {
	case o.deleted:
		return "deleted"
	case o.start.IsZero():
		return ""
	}
	return o.start.Local().Format("2006-01-02 15:04")
}

// keys draws what the rest of a cell's look means.
func (d *svgMap) keys(y int) {
	y += legendLine / 4
	x := mapLeft
	fmt.Fprintf(d, `<path fill="%s" stroke="#999" d="M%d %dh32v14h-32z"/>`+"\n", holeColour, x, y)
	d.text(x+40, y+12, "", "hole: "+size(d.Size-d.total.owned))
	x += 200
	for i, percent := range cachedOpacity {
		d.swatch(x+8*i, y, 8, colourOf(0).over(paper, percent).String())
	}
	d.text(x+40, y+12, "", "strong: cached here; pale: to be fetched")
	x += 320
	fmt.Fprintf(d, `<path fill="%s" d="M%d %dh32v14h-32z"/><path fill="%s" d="M%[2]d %[5]dh32v7h-32z"/>`+"\n", holeColour, x, y, colourOf(0), y+7)
	d.text(x+40, y+12, "", "low: less than half of it is data")
}

// dirtyKeys draws what the overlays mean.
func (d *svgMap) dirtyKeys(y int) {
	y += legendLine / 4
	x := mapLeft
	for _, key := range []struct {
		overlays [2]overlay
		text     string
		bytes    int64
	}{
		{[2]overlay{someWritten, mostWritten}, "written since the last snapshot, on this host only: ", d.total.data},
		{[2]overlay{someZeroed, mostZeroed}, "discarded or zeroed since: ", d.total.zero},
	} {
		if key.bytes == 0 {
			continue
		}
		for j, o := range key.overlays {
			d.swatch(x+16*j, y, 16, colourOf(0).over(paper, cachedOpacity[0]).String())
			d.swatch(x+16*j, y, 16, "url(#lv-"+string(o)+")")
		}
		d.text(x+40, y+12, "", key.text+size(key.bytes))
		x += 520
	}
}

// exactSize prints bytes for people, and all of them.
func exactSize(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	i := 0
	if n > 0 {
		i = min(bits.TrailingZeros64(uint64(n))/10, len(units)-1)
	}
	return fmt.Sprintf("%d %s", n>>(10*i), units[i])
}

// shortened returns a line of text of at most so many characters.
func shortened(s string, most int) string {
	r := []rune(oneLine(s))
	if len(r) > most {
		r = append(r[:most-1], '…')
	}
	return string(r)
}

// escaped makes text fit to stand in XML.
func escaped(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder never fails
	return b.String()
}
