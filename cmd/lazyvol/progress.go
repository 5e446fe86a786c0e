package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"strings"
	"sync"
	"time"
)

// A progressMode is how long commands show how far they are.
type progressMode string

// The modes.
const (
	progressAuto progressMode = "auto" // a bar, if stderr is a terminal
	progressBar  progressMode = "bar"
	progressJSON progressMode = "json"
	progressNone progressMode = "none"
)

// Set implements pflag.Value.
func (m *progressMode) Set(s string) error {
	switch mode := progressMode(s); mode {
	case progressAuto, progressBar, progressJSON, progressNone:
		*m = mode
		return nil
	}
	return fmt.Errorf("%q is none of auto, bar, json and none", s)
}

// String implements pflag.Value.
func (m *progressMode) String() string { return string(*m) }

// Type implements pflag.Value.
func (m *progressMode) Type() string { return "how" }

const (
	barInterval      = 100 * time.Millisecond
	progressInterval = 500 * time.Millisecond // of lines of JSON, at least

	// progressSpan evens out packs of 16 MiB at a rate of 1 MiB/s.
	progressSpan = 30 * time.Second

	// unknownTotal is the total of what nobody knows how long it will be.
	unknownTotal = -1
)

// A progress shows on stderr how far a long command is: as a bar on a terminal, as
// lines of JSON, or not at all. The command tells it, and ends it before it prints
// anything on stdout. Its methods are safe for concurrent use.
type progress struct {
	console   *console
	operation string
	mode      progressMode
	terminal  *os.File // whose width the bar has; nil: a usual one
	began     time.Time

	mu       sync.Mutex // guards the fields below
	id       string
	from     func() (done, total int64) // nil: it is told by set
	done     int64
	total    int64
	finished bool
	speed    trend

	stop   chan struct{}
	ending sync.Once
	shown  sync.WaitGroup
}

// newProgress begins to show how far the command is: with id, which may be "", by so
// many bytes, or unknownTotal. The caller ends it.
func (a *app) newProgress(id string, total int64) *progress {
	c, ok := a.stderr.(*console)
	if !ok {
		c = newConsole(a.stderr)
	}
	p := &progress{
		console: c, operation: a.operation, mode: a.progress, terminal: terminalOf(a.stderr), began: time.Now(),
		id: id, total: total, speed: trend{span: progressSpan}, stop: make(chan struct{}),
	}
	if p.mode == progressAuto || p.mode == "" {
		p.mode = progressNone
		if p.terminal != nil && !isDumb() {
			p.mode = progressBar
		}
	}
	interval, draw := barInterval, p.drawBar
	switch p.mode {
	case progressNone:
		return p
	case progressJSON:
		interval, draw = progressInterval, p.printJSON
	}
	draw(p.measure())
	p.shown.Go(func() { p.show(interval, draw) })
	return p
}

// identify says what the command works on, if it turns out late.
func (p *progress) identify(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.id = id
}

// set says how many bytes are done. The furthest wins.
func (p *progress) set(done int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done = max(p.done, done)
}

// setOf says how many bytes are done, and how many there turned out to be.
func (p *progress) setOf(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done, p.total = max(p.done, done), total
}

// add says that so many bytes more are done.
func (p *progress) add(bytes int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done += bytes
}

// follow has from asked for what is done, and of how much, from now on. What it says
// is taken as it is, so that it may begin anew.
func (p *progress) follow(from func() (done, total int64)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.from = from
}

// finish says that the command is done, and ends what is shown.
func (p *progress) finish() {
	p.mu.Lock()
	p.finished = true
	p.mu.Unlock()
	p.end()
}

// end removes the bar, or prints the last line of JSON; what comes after it does
// nothing.
func (p *progress) end() {
	p.ending.Do(func() {
		close(p.stop)
		p.shown.Wait()
	})
}

// show draws the progress each interval until it ends.
func (p *progress) show(interval time.Duration, draw func(measurement)) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			m := p.measure()
			m.finished = false // what ends says so itself
			draw(m)
			continue
		case <-p.stop:
		}
		if p.mode == progressJSON {
			draw(p.measure())
		} else {
			p.console.draw("")
		}
		return
	}
}

// A measurement is how far an operation is at one moment.
type measurement struct {
	operation string
	id        string
	done      int64         // bytes
	total     int64         // or unknownTotal
	rate      float64       // bytes a second
	elapsed   time.Duration // since it began
	finished  bool
}

func (p *progress) measure() measurement {
	now := time.Now()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.from != nil {
		p.done, p.total = p.from()
	}
	if p.finished && p.total != unknownTotal {
		p.done = p.total
	}
	p.speed.add(now, float64(p.done))
	return measurement{p.operation, p.id, p.done, p.total, p.speed.perSecond(), now.Sub(p.began), p.finished}
}

// eta returns how many seconds it takes at the present rate to do the rest; ok is
// false if nobody knows.
func (m measurement) eta() (seconds int64, ok bool) {
	rest := m.total - m.done
	if m.total == unknownTotal || rest > 0 && m.rate < 1 {
		return 0, false
	}
	if rest <= 0 {
		return 0, true
	}
	return int64(math.Ceil(float64(rest) / m.rate)), true
}

// progressLine is a line of '--progress json'.
type progressLine struct {
	Progress struct {
		Operation      string // the command, as "snapshot create"
		Id             string // of the snapshot, set or volume; "": of several, or not known yet
		DoneBytes      int64
		TotalBytes     *int64 // null: not known
		BytesPerSecond int64  // over the last half minute
		EtaSeconds     *int64 // null: not known
		Done           bool   // it has succeeded; this is the last line
	}
}

func (p *progress) printJSON(m measurement) {
	var l progressLine
	o := &l.Progress
	o.Operation, o.Id, o.DoneBytes, o.BytesPerSecond, o.Done = m.operation, m.id, m.done, int64(m.rate), m.finished
	if m.total != unknownTotal {
		o.TotalBytes = &m.total
	}
	if seconds, ok := m.eta(); ok {
		o.EtaSeconds = &seconds
	}
	line, err := json.Marshal(l)
	if err != nil {
		return // of strings and numbers: it cannot be
	}
	_, _ = p.console.Write(append(line, '\n')) // nobody is left to be told
}

func (p *progress) drawBar(m measurement) {
	width, _ := sizeOf(p.terminal)
	p.console.draw(barLine(m, width-1)) // in the last column some terminals wrap
}

// Widths of a bar, in columns.
const (
	leastBar = 10
	mostBar  = 40
)

// barLine returns one line about an operation, of at most width columns: of a bar,
// bytes, rate and time left what there is room for.
func barLine(m measurement, width int) string {
	// Padded, for the bar not to tremble.
	bytes, rate := pad(size(m.done), len("1023 MiB")), pad(size(int64(m.rate))+"/s", len("1023 MiB/s"))
	if m.total == unknownTotal {
		turning := `|/-\`[int(m.elapsed/barInterval)%4 : int(m.elapsed/barInterval)%4+1]
		return strings.TrimRight(fitting(width, []string{m.operation, turning, bytes, rate, shortTime(m.elapsed)}, 4, 3, 0), " ")
	}
	share := 1.0
	if m.total > 0 {
		share = min(float64(m.done)/float64(m.total), 1)
	}
	left := "- left"
	if seconds, ok := m.eta(); ok {
		left = shortTime(time.Duration(seconds)*time.Second) + " left"
	}
	left = pad(left, len("23h59m left"))
	bytes = pad(size(m.done)+" of "+size(m.total), len("1023 MiB of ")+len(size(m.total)))
	percent := fmt.Sprintf("%3d%%", int(share*100))
	room := strings.Repeat("_", leastBar) // for the bar
	fields := []string{m.operation, percent, room, bytes, rate, left}
	line := fitting(width, fields, 4, 0, 3, 2, 5)
	wide := min(leastBar+width-len(line), mostBar)
	return strings.TrimRight(strings.Replace(line, room, bar(share, wide), 1), " ")
}

// fitting joins fields by two spaces, without those that there is no room for: dropped
// are their numbers, the first ones first. What is left is cut.
func fitting(width int, fields []string, dropped ...int) string {
	for {
		var kept []string
		for _, f := range fields {
			if f != "" {
				kept = append(kept, f)
			}
		}
		line := strings.Join(kept, "  ")
		if len(line) <= width {
			return line
		}
		if len(dropped) == 0 {
			return line[:max(width, 0)]
		}
		fields[dropped[0]] = ""
		dropped = dropped[1:]
	}
}

// bar draws a share, from 0 to 1, in so many columns.
func bar(share float64, width int) string {
	full := int(min(max(share, 0), 1) * float64(width))
	return strings.Repeat("█", full) + strings.Repeat("░", width-full)
}

// shortTime prints a duration in its two largest units.
func shortTime(d time.Duration) string {
	s := int64(d.Seconds())
	switch {
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return fmt.Sprintf("%dm%02ds", s/60, s%60)
	case s < 24*3600:
		return fmt.Sprintf("%dh%02dm", s/3600, s%3600/60)
	case s < 1000*24*3600:
		return fmt.Sprintf("%dd%02dh", s/(24*3600), s%(24*3600)/3600)
	}
	return "years"
}
