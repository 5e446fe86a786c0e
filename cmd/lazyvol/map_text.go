package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
)

const (
	// textColumns leaves room for offsets in 80 columns.
	textColumns = 64

	// textCells fill the lines of a usual terminal, with the legend.
	textCells = 16 * textColumns
)

// showsColours reports whether results may be coloured: a terminal that can, and nobody
// who asked for none (no-color.org).
func (a *app) showsColours() bool {
	return a.showsTerminal() && !isDumb() && os.Getenv("NO_COLOR") == ""
}

// What a map in letters has besides those of snapshots.
const (
	holeMark    = '.'
	writtenMark = '#'
	partlyMark  = '+' // written in part
	zeroedMark  = '-'
)

// mark returns how a cell is shown: a letter, a capital if most of what is there is
// cached, and whose it is, -1 for nobody's.
func (c *mapCell) mark(owner map[string]int, bytes int64) (mark byte, of int) {
	switch c.overlay(bytes) {
	case mostWritten:
		return writtenMark, -1
	case someWritten:
		return partlyMark, -1
	case mostZeroed:
		return zeroedMark, -1
	}
	l := c.look(owner, bytes)
	if l.owner < 0 {
		return holeMark, -1
	}
	mark = letterOf(l.owner)
	if l.cached < 2 {
		mark += 'a' - 'A'
	}
	return mark, l.owner
}

// drawTextMap draws a map in letters.
func drawTextMap(w io.Writer, g *mapGrid, colours bool) error {
	out := bufio.NewWriter(w)
	paint := func(text string, owner int) {
		if c := colourOf(max(owner, 0)); colours && owner >= 0 {
			text = fmt.Sprintf("\x1b[1;38;5;%dm%s\x1b[0m", c.ansi(), text)
		}
		out.WriteString(text)
	}
	fmt.Fprintf(out, "%s: %s\n", g.ID, g.summary(textColumns))
	owner := g.indexes()
	for i := 0; i < len(g.cells); i += textColumns {
		fmt.Fprintf(out, "%10s  ", exactSize(int64(i)*g.cell))
		for j := i; j < min(i+textColumns, len(g.cells)); {
			mark, of := g.cells[j].mark(owner, g.length(int64(j), 1))
			run := []byte{mark}
			for j++; j < min(i+textColumns, len(g.cells)); j++ {
				if next, _ := g.cells[j].mark(owner, g.length(int64(j), 1)); next != mark {
					break
				}
				run = append(run, mark)
			}
			paint(string(run), of)
		}
		out.WriteByte('\n')
	}
	for i, o := range g.owners[:min(len(g.owners), namedOwners)] {
		paint("  "+string(letterOf(i)), i)
		line := fmt.Sprintf("  %s  %-16s  %s  %s", o.id, o.when(), o.sizes(), shortened(o.text, mostName))
		fmt.Fprintln(out, strings.TrimRight(line, " "))
	}
	if sum, n := g.others(); n > 0 {
		paint("  "+string(otherLetter), namedOwners)
		fmt.Fprintf(out, "  %d others  %s\n", n, sum.sizes())
	}
	fmt.Fprintf(out, "  %c  hole: %s; a capital is cached here, a small letter is to be fetched\n", holeMark, size(g.Size-g.total.owned))
	if g.total.data > 0 {
		fmt.Fprintf(out, "  %c  written since the last snapshot, on this host only: %s; %c in part\n", writtenMark, size(g.total.data), partlyMark)
	}
	if g.total.zero > 0 {
		fmt.Fprintf(out, "  %c  discarded or zeroed since: %s\n", zeroedMark, size(g.total.zero))
	}
	return out.Flush()
}

// ansi returns the nearest colour of the cube of 256-colour terminals.
func (c colour) ansi() int {
	nearest := func(v uint8) int {
		if v < 48 {
			return 0
		}
		if v < 115 {
			return 1
		}
		return (int(v) - 35) / 40
	}
	return 16 + 36*nearest(c[0]) + 6*nearest(c[1]) + nearest(c[2])
}
