package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"unicode"

	"github.com/dustin/go-humanize"
)

// A printer is a command's stdout. It remembers what could not be written first: an id
// that is lost on a full disk is a failure, whatever the command did. It is safe for
// concurrent use.
type printer struct {
	w io.Writer

	mu     sync.Mutex // held while something is written
	failed error
}

// Write implements [io.Writer].
func (p *printer) Write(text []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n, err := p.w.Write(text)
	if err != nil && p.failed == nil {
		p.failed = fmt.Errorf("print %.80q: %w", text, err)
	}
	return n, err
}

// failure is why something could not be written; nil: all was.
func (p *printer) failure() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failed
}

// printJSON prints a value as indented JSON.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// size prints bytes for people.
func size(n int64) string { return humanize.IBytes(uint64(max(n, 0))) }

// byteSize is a flag for a number of bytes, as people write it.
type byteSize int64

// Set implements pflag.Value.
func (b *byteSize) Set(s string) error {
	n, err := humanize.ParseBytes(s)
	if err != nil || n > 1<<62 {
		return fmt.Errorf("%q is not a size like 10GiB, 512MiB or 1073741824", s)
	}
	*b = byteSize(n)
	return nil
}

// String implements pflag.Value.
func (b *byteSize) String() string {
	if *b == 0 {
		return ""
	}
	return humanize.IBytes(uint64(*b))
}

// Type implements pflag.Value.
func (b *byteSize) Type() string { return "size" }

// sortedKeys returns a map's keys in order.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// oneLine returns text with a space for each character that would do more than be shown:
// break the line, command the terminal, or turn the order of what is around it.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}

// printable is oneLine for text of several lines.
func printable(s string) string {
	lines := strings.Split(s, "\n")
	for i, line := range lines {
		lines[i] = oneLine(line)
	}
	return strings.Join(lines, "\n")
}

// note tells a person what may be of use to know.
func (a *app) note(format string, args ...any) {
	fmt.Fprintf(a.stderr, "lazyvol: note: %s\n", printable(fmt.Sprintf(format, args...)))
}

// warning tells a person of something that does not keep the command from going on.
func (a *app) warning(format string, args ...any) {
	fmt.Fprintf(a.stderr, "lazyvol: warning: %s\n", printable(fmt.Sprintf(format, args...)))
}
