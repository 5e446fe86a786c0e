package main

import (
	"bytes"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// A console is a command's stderr. It has at most one line at its end that is drawn
// over and over, a bar; what else is written goes before that, so that neither tears
// the other. Its methods are safe for concurrent use.
type console struct {
	w io.Writer

	mu   sync.Mutex // guards the fields below, and writes to w
	line string     // drawn at the end; "": none
	half bool       // the last write ended in the middle of a line, so that none is drawn
	held bool
	kept bytes.Buffer // of what was written while held, the first mostKept bytes
}

// mostKept bounds what a held console keeps.
const mostKept = 64 << 10

// eraseLine goes to the first column and empties the line.
const eraseLine = "\r\x1b[K"

func newConsole(w io.Writer) *console { return &console{w: w} }

// Write writes before the line that is drawn.
func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held {
		if c.kept.Len()+len(p) <= mostKept {
			c.kept.Write(p)
		}
		return len(p), nil
	}
	drawn := c.line != "" && !c.half
	if len(p) > 0 {
		c.half = !bytes.HasSuffix(p, []byte("\n"))
	}
	if c.line == "" {
		return c.w.Write(p)
	}
	whole := make([]byte, 0, len(eraseLine)+len(p)+len(c.line))
	if drawn {
		whole = append(whole, eraseLine...)
	}
	whole = append(whole, p...)
	if !c.half {
		whole = append(whole, c.line...)
	}
	if _, err := c.w.Write(whole); err != nil {
		return 0, err
	}
	return len(p), nil
}

// draw puts a line in place of the one that is drawn; "" removes it. That it cannot be
// drawn is no reason to fail.
func (c *console) draw(line string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held || line == "" && c.line == "" {
		return
	}
	c.line = line
	if c.half {
		return
	}
	_, _ = io.WriteString(c.w, eraseLine+line)
}

// hold keeps back what is written until release, while something else has the whole
// terminal.
func (c *console) hold() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = true
}

// release writes what was kept back.
func (c *console) release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = false
	_, _ = c.kept.WriteTo(c.w)
}

// fileOf returns the file that a writer writes to, nil if it is none.
func fileOf(w io.Writer) *os.File {
	if c, ok := w.(*console); ok {
		w = c.w
	}
	if p, ok := w.(*printer); ok {
		w = p.w
	}
	f, _ := w.(*os.File)
	return f
}

// terminalOf returns the terminal that a writer writes to, nil if it is none.
func terminalOf(w io.Writer) *os.File {
	if f := fileOf(w); f != nil && term.IsTerminal(int(f.Fd())) {
		return f
	}
	return nil
}

// isDumb reports whether terminals understand no more than lines of text, by the
// environment.
func isDumb() bool {
	name := os.Getenv("TERM")
	return name == "" || name == "dumb"
}

// sizeOf returns the columns and lines of a terminal; of one that does not know, and of
// nil, 80 and 24.
func sizeOf(f *os.File) (width, height int) {
	width, height = 80, 24
	if f == nil {
		return width, height
	}
	if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 0 && size.Row > 0 {
		width, height = int(size.Col), int(size.Row)
	}
	return width, height
}
