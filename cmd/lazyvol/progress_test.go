package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// A tape is what was written, write by write.
type tape struct {
	mu     sync.Mutex
	writes []string
}

func (t *tape) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.writes = append(t.writes, string(p))
	return len(p), nil
}

func (t *tape) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Join(t.writes, "")
}

// shown returns what is left to see of something written to a terminal: lines that
// were erased are gone.
func shown(s string) string {
	var lines []string
	for line := range strings.SplitSeq(s, "\n") {
		if at := strings.LastIndex(line, eraseLine); at >= 0 {
			line = line[at+len(eraseLine):]
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

func newTestProgress(mode progressMode, total int64) (*progress, *tape) {
	t := &tape{}
	a := &app{stderr: newConsole(t), progress: mode, operation: "snapshot create"}
	return a.newProgress("snap-1", total), t
}

func TestBarLines(t *testing.T) {
	m := measurement{operation: "snapshot create", done: 3 << 29, total: 4 << 30, rate: 100 << 20}
	unknown := measurement{operation: "gc", done: 5 << 20, total: unknownTotal, rate: 1 << 20, elapsed: 83 * time.Second}
	stalled, over, empty := m, m, m
	stalled.rate = 0
	over.done = 5 << 30
	empty.done, empty.total, empty.rate = 0, 0, 0
	for _, c := range []struct {
		m     measurement
		width int
		want  string
	}{
		{m, 119, "snapshot create   37%  ███████████████░░░░░░░░░░░░░░░░░░░░░░░░░  1.5 GiB of 4.0 GiB   100 MiB/s   26s left"},
		{m, 79, "snapshot create   37%  ███░░░░░░░  1.5 GiB of 4.0 GiB   100 MiB/s   26s left"},
		{m, 78, "snapshot create   37%  ███████░░░░░░░░░░░░░░  1.5 GiB of 4.0 GiB   26s left"},
		{m, 39, " 37%  ███████░░░░░░░░░░░░░  26s left"},
		{m, 12, " 37%"},
		{m, 3, " 37"},
		{stalled, 79, "snapshot create   37%  ███░░░░░░░  1.5 GiB of 4.0 GiB   0 B/s       - left"},
		{over, 79, "snapshot create  100%  ██████████  5.0 GiB of 4.0 GiB   100 MiB/s   0s left"},
		{empty, 39, "100%  ████████████████████  0s left"},
		{unknown, 79, "gc  -  5.0 MiB   1.0 MiB/s   1m23s"},
		{unknown, 12, "-  5.0 MiB"},
	} {
		if got := barLine(c.m, c.width); got != c.want {
			t.Errorf("in %d columns:\n got %q\nwant %q", c.width, got, c.want)
		}
	}
}

func TestBarFitsWhateverTheWidth(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := measurement{
			operation: rapid.SampledFrom([]string{"gc", "hydrate", "snapshot create"}).Draw(t, "operation"),
			done:      rapid.Int64Range(0, 1<<50).Draw(t, "done"),
			total:     rapid.OneOf(rapid.Just(int64(unknownTotal)), rapid.Int64Range(0, 1<<50)).Draw(t, "total"),
			rate:      rapid.Float64Range(0, 1e12).Draw(t, "rate"),
			elapsed:   time.Duration(rapid.Int64Range(0, 1<<62).Draw(t, "elapsed")),
		}
		width := rapid.IntRange(0, 200).Draw(t, "width")
		if line := barLine(m, width); utf8.RuneCountInString(line) > width || !utf8.ValidString(line) {
			t.Fatalf("%q has more than %d columns", line, width)
		}
	})
}

// Whatever is written while a bar is drawn appears whole, in order, and nothing of the
// bar stays.
func TestBarTearsNothingAndLeavesNothing(t *testing.T) {
	p, tape := newTestProgress(progressBar, 1000)
	var want strings.Builder
	for i := range 50 {
		p.set(int64(i * 20))
		fmt.Fprintf(p.console, "warning %d\n", i)
		fmt.Fprintf(&want, "warning %d\n", i)
		p.drawBar(p.measure())
	}
	p.finish()
	fmt.Fprint(p.console, "lazyvol: an error\n")
	want.WriteString("lazyvol: an error\n")
	if !strings.Contains(tape.String(), "█") {
		t.Error("no bar was drawn")
	}
	if diff := cmp.Diff(want.String(), shown(tape.String())); diff != "" {
		t.Errorf("what is left to see (-want +got):\n%s", diff)
	}
	before := tape.String()
	p.set(5)
	p.end()
	p.finish()
	if tape.String() != before {
		t.Error("something was drawn after the end")
	}
}

func TestProgressIsDrawnOnlyWhereItIsWanted(t *testing.T) {
	t.Setenv("TERM", "xterm")
	for _, mode := range []progressMode{progressNone, progressAuto, ""} { // no terminal
		p, tape := newTestProgress(mode, 10)
		p.set(5)
		p.finish()
		if got := tape.String(); got != "" {
			t.Errorf("%q: %q", mode, got)
		}
	}
	if err := new(progressMode).Set("barr"); err == nil {
		t.Error("barr is no mode")
	}
}

// progressLines parses lines of JSON.
func progressLines(t *testing.T, out string) (lines []progressLine) {
	t.Helper()
	for line := range strings.Lines(out) {
		d := json.NewDecoder(strings.NewReader(line))
		d.DisallowUnknownFields()
		var l progressLine
		if err := d.Decode(&l); err != nil {
			t.Fatalf("%v in %q", err, line)
		}
		lines = append(lines, l)
	}
	return lines
}

func TestJSONProgressEndsWithWhetherItIsDone(t *testing.T) {
	for _, finished := range []bool{true, false} {
		p, tape := newTestProgress(progressJSON, unknownTotal)
		p.setOf(30, 100)
		p.identify("snap-2")
		if finished {
			p.finish()
		}
		p.end()
		lines := progressLines(t, tape.String())
		last := lines[len(lines)-1].Progress
		done, eta := int64(30), (*int64)(nil)
		if finished {
			done, eta = 100, new(int64)
		}
		if last.Operation != "snapshot create" || last.Id != "snap-2" || last.Done != finished || last.DoneBytes != done || last.TotalBytes == nil ||
			*last.TotalBytes != 100 || finished && !cmp.Equal(last.EtaSeconds, eta) {
			t.Errorf("finished %t: the last line is %+v", finished, last)
		}
		for _, l := range lines[:len(lines)-1] {
			if l.Progress.Done {
				t.Errorf("finished %t: a line before says so", finished)
			}
		}
	}
	p, tape := newTestProgress(progressJSON, unknownTotal)
	p.add(4)
	p.add(5)
	p.finish()
	lines := progressLines(t, tape.String())
	if last := lines[len(lines)-1].Progress; last.TotalBytes != nil || last.EtaSeconds != nil || last.DoneBytes != 9 || !last.Done {
		t.Errorf("of a total that nobody knows: %+v", last)
	}
}

func TestChecksInARowGoOnWhereTheLastOneEnded(t *testing.T) {
	p, _ := newTestProgress(progressNone, unknownTotal)
	tell := eachPass(p)
	for _, c := range []struct{ done, total, wantDone, wantTotal int64 }{
		{10, 50, 10, 50}, {50, 100, 50, 100}, {100, 100, 100, 100}, {20, 100, 120, 200}, {100, 100, 200, 200}, {1, 100, 201, 300},
	} {
		tell(c.done, c.total)
		if m := p.measure(); m.done != c.wantDone || m.total != c.wantTotal {
			t.Errorf("%d of %d is shown as %d of %d, want %d of %d", c.done, c.total, m.done, m.total, c.wantDone, c.wantTotal)
		}
	}
}

func TestHeldConsoleKeepsWhatIsWrittenInBounds(t *testing.T) {
	var out bytes.Buffer
	c := newConsole(&out)
	c.hold()
	fmt.Fprint(c, "a warning\n")
	c.draw("a bar")
	for range 100 {
		if n, err := c.Write(make([]byte, mostKept/10)); n != mostKept/10 || err != nil {
			t.Fatal(n, err)
		}
	}
	if out.Len() > 0 {
		t.Errorf("%q was written while held", out.String()[:10])
	}
	c.release()
	if !strings.HasPrefix(out.String(), "a warning\n") || out.Len() > mostKept {
		t.Errorf("%d bytes came, which begin with %.20q", out.Len(), out.String())
	}
	out.Reset()
	fmt.Fprint(c, "after\n")
	if out.String() != "after\n" {
		t.Errorf("after it: %q", out.String())
	}
}

func TestConsoleDrawsItsLineAgainAfterEachLine(t *testing.T) {
	var out bytes.Buffer
	c := newConsole(&out)
	c.draw("bar")
	fmt.Fprint(c, "half ")
	c.draw("bar") // not there
	fmt.Fprint(c, "a line\n")
	c.draw("")
	if want := eraseLine + "bar" + eraseLine + "half " + "a line\n"; !strings.HasPrefix(shown(out.String()), "half a line\n") || out.String() != want+"bar"+eraseLine {
		t.Errorf("wrote %q", out.String())
	}
}

func TestConsoleReportsWhatCannotBeWritten(t *testing.T) {
	r, w := io.Pipe()
	broken := errors.New("broken")
	_ = r.CloseWithError(broken) // never fails
	c := newConsole(w)
	for _, line := range []string{"", "bar"} {
		c.draw(line)
		if _, err := c.Write([]byte("x")); !errors.Is(err, broken) {
			t.Errorf("with the line %q: %v", line, err)
		}
	}
}

func TestShortTimes(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 59 * time.Second: "59s", 80 * time.Second: "1m20s", 2*time.Hour + 5*time.Minute: "2h05m", 49 * time.Hour: "2d01h", 1 << 62: "years",
	} {
		if got := shortTime(d); got != want {
			t.Errorf("%v is %q, want %q", d, got, want)
		}
	}
}
