package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

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

// progress shows how far a long command is: a bar on a terminal, nothing
// elsewhere.
type progress struct {
	bar  *progressbar.ProgressBar // nil if nobody watches
	last atomic.Int64
}

// newProgress begins a bar over total bytes.
func (a *app) newProgress(what string, total int64) *progress {
	f, ok := a.stderr.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return &progress{}
	}
	return &progress{bar: progressbar.NewOptions64(total,
		progressbar.OptionSetWriter(f),
		progressbar.OptionSetDescription(what),
		progressbar.OptionShowBytes(true),
		progressbar.OptionUseIECUnits(true),
		progressbar.OptionSetPredictTime(true),
		progressbar.OptionFullWidth(),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionClearOnFinish(),
	)}
}

// set moves the bar. It may be called concurrently; the furthest wins.
func (p *progress) set(done int64) {
	if p.bar == nil {
		return
	}
	if last := p.last.Load(); done > last && p.last.CompareAndSwap(last, done) {
		_ = p.bar.Set64(done) // a bar that cannot be drawn is no reason to fail
	}
}

// end removes the bar.
func (p *progress) end() {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
}

// sortedKeys returns a map's keys in order.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
