package main

import (
	"strings"
	"unicode/utf8"
)

// A paint is what a terminal shows a text in: ECMA-48's attributes, "" for none. The
// colours are those that every terminal theme keeps readable.
type paint string

const (
	plain  paint = ""
	bold   paint = "1"
	faint  paint = "2"
	red    paint = "1;31"
	green  paint = "32"
	yellow paint = "33"
	cyan   paint = "36"
)

// A patch is a piece of a line.
type patch struct {
	text  string
	paint paint
}

// A stripe is a line of a picture.
type stripe []patch

// width returns how many columns the stripe takes, each character one.
func (s stripe) width() (columns int) {
	for _, p := range s {
		columns += utf8.RuneCountInString(p.text)
	}
	return columns
}

// render returns the stripe, cut to so many columns.
func (s stripe) render(width int, coloured bool) string {
	var b strings.Builder
	for _, p := range s {
		text := cut(p.text, width)
		width -= utf8.RuneCountInString(text)
		if coloured && p.paint != plain && text != "" {
			text = "\x1b[" + string(p.paint) + "m" + text + "\x1b[0m"
		}
		b.WriteString(text)
	}
	return strings.TrimRight(b.String(), " ")
}

// cut cuts a text to so many characters; one that loses something ends with "…".
func cut(s string, width int) string {
	if utf8.RuneCountInString(s) <= width {
		return s
	}
	if width <= 0 {
		return ""
	}
	return string([]rune(s)[:width-1]) + "…"
}

// cutFront is cut at the front, for paths: their ends tell more.
func cutFront(s string, width int) string {
	if utf8.RuneCountInString(s) <= width {
		return s
	}
	if width <= 0 {
		return ""
	}
	runes := []rune(s)
	return "…" + string(runes[len(runes)-width+1:])
}

// pad makes a text so many columns wide.
func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(s)))
}

// flow lays patches out, two columns between them, on as many stripes of a width as
// they need: the first one begins in column first, the others are indented.
func flow(width, first, indent int, patches []patch) (stripes []stripe) {
	var line stripe
	for _, p := range patches {
		if p.text == "" {
			continue
		}
		if line != nil && line.width()+2+utf8.RuneCountInString(p.text) > width {
			stripes, line = append(stripes, line), nil
		}
		if line == nil {
			line = stripe{{text: strings.Repeat(" ", first)}}
			first = indent
		} else {
			line = append(line, patch{text: "  "})
		}
		line = append(line, p)
	}
	if line != nil {
		stripes = append(stripes, line)
	}
	return stripes
}

// wrap breaks a text between words into stripes of a width, each indented, at most so
// many: of one that is longer the middle is left out.
func wrap(width, indent, most int, p patch) []stripe {
	room := max(width-indent, 1)
	lines := words(p.text, room)
	for n := most * room; len(lines) > most; n-- {
		lines = words(cutMiddle(p.text, n), room)
	}
	stripes := make([]stripe, len(lines))
	for i, line := range lines {
		stripes[i] = stripe{{text: strings.Repeat(" ", indent)}, {line, p.paint}}
	}
	return stripes
}

// words breaks a text into lines of a width, between words if it can.
func words(text string, width int) (lines []string) {
	for rest := []rune(text); len(rest) > 0; {
		line := rest[:min(len(rest), width)]
		if len(rest) > width && rest[width] != ' ' {
			if at := strings.LastIndexByte(string(line), ' '); at > 0 {
				line = []rune(string(line)[:at])
			}
		}
		rest = []rune(strings.TrimLeft(string(rest[len(line):]), " "))
		lines = append(lines, string(line))
	}
	return lines
}

// cutMiddle is cut in the middle, for errors: what was done comes first in them, and
// why it failed last.
func cutMiddle(s string, width int) string {
	runes := []rune(s)
	if len(runes) <= width {
		return s
	}
	if width <= 0 {
		return ""
	}
	front := (width - 1) / 3
	return string(runes[:front]) + "…" + string(runes[len(runes)-(width-1-front):])
}
