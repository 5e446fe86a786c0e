package main

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/lazyvol/lazyvol/hydrate"
)

// dirtyWarning is what people must know of writes.
const dirtyWarning = "What is dirty exists on this host only until 'lazyvol snapshot create VOL'."

// stateOf returns a row's state for people: long, short of at most 9 letters.
func (r *row) stateOf() (long, short string, p paint) {
	switch {
	case r.silent:
		return "not answering", "no answer", red
	case !r.mounted() && len(r.Errors) > 0:
		return "not mounted", "unmounted", red
	case !r.mounted():
		return "not mounted", "unmounted", faint
	}
	switch r.State {
	case hydrate.Hydrating.String():
		return "hydrating", "hydrating", cyan
	case hydrate.Done.String():
		return "hydrated", "hydrated", green
	case hydrate.Paused.String():
		return "paused", "paused", yellow
	case hydrate.CacheFull.String():
		return "cache full", "full", yellow
	case hydrate.Waiting.String():
		return "waiting for the store", "waiting", red
	}
	return oneLine(r.State), cut(oneLine(r.State), 9), plain
}

// share returns how much of the row is hydrated, from 0 to 1; ok is false if there is
// nothing to hydrate.
func (r *row) share() (share float64, ok bool) {
	if r.TotalBytes <= 0 {
		return 0, false
	}
	return min(float64(r.HydratedBytes)/float64(r.TotalBytes), 1), true
}

func (r *row) percent() string {
	share, ok := r.share()
	if !ok {
		return "-"
	}
	return fmt.Sprintf("%d%%", int(share*100))
}

// hydrating reports whether bytes are coming, or are to.
func (r *row) hydrating() bool {
	share, ok := r.share()
	return ok && share < 1 && r.mounted() && !r.silent && r.State != hydrate.Paused.String()
}

func (r *row) rate() string {
	if !r.hydrating() || r.Rate <= 0 || r.State == hydrate.Waiting.String() {
		return ""
	}
	return size(r.Rate) + "/s"
}

func (r *row) left() string {
	if !r.hydrating() || r.ETASeconds == nil {
		return ""
	}
	return shortTime(time.Duration(*r.ETASeconds) * time.Second)
}

// coming tells how fast the rest comes, and when it will be here.
func (r *row) coming() (facts []patch) {
	if rate := r.rate(); rate != "" {
		facts = append(facts, patch{pad(rate, len("1023 MiB/s")), plain})
	}
	if left := r.left(); left != "" {
		facts = append(facts, patch{left + " left", plain})
	}
	return facts
}

// demand tells of reads that wait for the store: how many, and for how long.
func (r *row) demand() (count, latency string) {
	if r.DemandWaits == 0 && r.waitShare == 0 {
		return "", ""
	}
	latency = fmt.Sprintf("p50 %s, p99 %s", shortMs(r.DemandLatencyMs.P50), shortMs(r.DemandLatencyMs.P99))
	switch {
	case r.waitRate == 0 && r.waitShare < 0.005:
		return fmt.Sprintf("%d reads waited", r.DemandWaits), latency
	case r.waitRate < 0.05: // one that takes long, perhaps
		return fmt.Sprintf("reads wait %.0f%% of the time", r.waitShare*100), latency
	}
	return fmt.Sprintf("%.3g reads/s wait, %.0f%% of the time", r.waitRate, r.waitShare*100), latency
}

// shortMs prints milliseconds.
func shortMs(ms float64) string {
	switch {
	case ms >= 9995:
		return fmt.Sprintf("%.0fs", ms/1000)
	case ms >= 999.5:
		return fmt.Sprintf("%.1fs", ms/1000)
	case ms >= 9.95:
		return fmt.Sprintf("%.0fms", ms)
	}
	return fmt.Sprintf("%.1fms", ms)
}

// dirt tells what was written since the last snapshot, and how fast that grows.
func (r *row) dirt() string {
	if r.DirtyBytes == 0 {
		return ""
	}
	s := "dirty " + size(r.DirtyBytes)
	if r.dirtyRate >= 1 {
		s += fmt.Sprintf(" +%s/s", size(int64(r.dirtyRate)))
	}
	return s
}

// latest returns the latest error, "" if there is none.
func (r *row) latest() string {
	if len(r.Errors) == 0 {
		return ""
	}
	latest := oneLine(r.Errors[len(r.Errors)-1])
	if at, message, ok := strings.Cut(latest, " "); ok {
		if when, err := time.Parse(time.RFC3339, at); err == nil {
			latest = when.Local().Format(time.TimeOnly) + " " + message
		}
	}
	return latest
}

// trouble tells of errors.
func (r *row) trouble() string {
	switch len(r.Errors) {
	case 0:
		return ""
	case 1:
		return "error: " + r.latest()
	}
	return fmt.Sprintf("%d errors, the latest: %s", len(r.Errors), r.latest())
}

// interest orders rows by how much they matter to who looks: lower ones first.
func (r *row) interest() int {
	switch {
	case r.silent, len(r.Errors) > 0:
		return 0
	case r.hydrating():
		return 1
	case r.DirtyBytes > 0:
		return 2
	case r.mounted():
		return 3
	}
	return 4
}

// renderWatch draws a sample in so many columns and lines: with all that there is to tell
// of each row if there is room, else one line a row, the most interesting first. note
// stands at the right of the first line.
func renderWatch(s sample, note string, width, height int, coloured bool) string {
	head := heading(s, note, width)
	tail := footing(s, width)
	picture := slices.Concat(head, panels(s.rows, width, true), tail)
	if len(picture) > height {
		picture = slices.Concat(head, panels(s.rows, width, false), tail)
	}
	if len(picture) > height {
		picture = compact(s, head[:min(len(head), max(height-1, 0))], tail, width, height)
	}
	lines := make([]string, min(len(picture), height))
	for i := range lines {
		lines[i] = picture[i].render(width, coloured)
	}
	return strings.Join(lines, "\n")
}

// heading sums a sample up.
func heading(s sample, note string, width int) []stripe {
	var mounted, troubled int
	var sum row
	for i := range s.rows {
		r := &s.rows[i]
		if r.mounted() {
			mounted++
		}
		if r.interest() == 0 {
			troubled++
		}
		sum.HydratedBytes += r.HydratedBytes
		sum.TotalBytes += r.TotalBytes
		sum.DirtyBytes += r.DirtyBytes
		sum.dirtyRate += r.dirtyRate
		if r.rate() != "" {
			sum.Rate += r.Rate
		}
	}
	first := stripe{{"lazyvol", bold}, {"  " + s.at.Local().Format(time.TimeOnly), plain}}
	if len(s.rows) > 1 {
		first = append(first, patch{fmt.Sprintf("  %d of %d mounted", mounted, len(s.rows)), plain})
	}
	if room := width - first.width() - len(note); room >= 2 {
		first = append(first, patch{strings.Repeat(" ", room), plain}, patch{note, faint})
	}
	if len(s.rows) == 0 {
		return []stripe{first, {{text: "There is no volume, and nothing is mounted."}}}
	}
	if len(s.rows) == 1 {
		return []stripe{first}
	}
	facts := []patch{{text: fmt.Sprintf("hydrated %s of %s", size(sum.HydratedBytes), size(sum.TotalBytes))}}
	if sum.Rate > 0 {
		facts = append(facts, patch{text: size(sum.Rate) + "/s"})
	}
	if dirt := sum.dirt(); dirt != "" {
		facts = append(facts, patch{dirt, yellow})
	}
	if troubled > 0 {
		facts = append(facts, patch{fmt.Sprintf("%d in trouble", troubled), red})
	}
	return append([]stripe{first}, flow(width, 0, 0, facts)...)
}

// footing warns of what is dirty, and names what cannot be looked at.
func footing(s sample, width int) (lines []stripe) {
	for _, err := range s.failed {
		lines = append(lines, stripe{{"warning: " + oneLine(err.Error()), red}})
	}
	if slices.ContainsFunc(s.rows, func(r row) bool { return r.DirtyBytes > 0 }) {
		lines = append(lines, wrap(width, 0, 2, patch{dirtyWarning, yellow})...)
	}
	return lines
}

// panels draws each row with all that there is to tell of it; spaced: an empty line is
// between them.
func panels(rows []row, width int, spaced bool) (lines []stripe) {
	for i := range rows {
		if spaced {
			lines = append(lines, nil)
		}
		lines = append(lines, panel(&rows[i], width)...)
	}
	if spaced && len(rows) > 0 {
		lines = append(lines, nil)
	}
	return lines
}

func panel(r *row, width int) []stripe {
	const indent = 2
	state, _, p := r.stateOf()
	title := []patch{{oneLine(r.ID), bold}, {state, p}}
	if r.Size > 0 {
		title = append(title, patch{size(r.Size), plain})
	}
	if r.place() != "" {
		title = append(title, patch{"on " + cutFront(oneLine(r.place()), max(width-indent-3, 1)), plain})
	}
	titles := flow(width, 0, indent, title)
	lines := titles[:1:1]
	if share, ok := r.share(); ok {
		// Each has its width, for nothing to tremble.
		facts := []patch{{fmt.Sprintf("%4s", r.percent()), plain}, {pad(size(r.HydratedBytes)+" of "+size(r.TotalBytes), len("1023 MiB of 1023 GiB")), plain}}
		wide := width - indent - len("  100%  1023 MiB of 1023 GiB  1023 MiB/s  23h59m left")
		if wide < leastBar {
			wide = max(width-indent-len("  100%"), 1) // and the rest on the lines below
		}
		lines = append(lines, flow(width, indent, indent, append([]patch{{bar(share, min(wide, mostBar)), p}}, append(facts, r.coming()...)...))...)
	}
	lines = append(append(lines, wrap(width, indent, 2, patch{r.trouble(), red})...), titles[1:]...)
	count, latency := r.demand()
	return append(lines, flow(width, indent, indent, []patch{{r.dirt(), yellow}, {count, plain}, {latency, plain}})...)
}

// compact draws a line for each row that there is room for, and more of the first ones
// if there still is.
func compact(s sample, head, tail []stripe, width, height int) []stripe {
	rows := slices.Clone(s.rows)
	slices.SortStableFunc(rows, func(a, b row) int { return cmp.Compare(a.interest(), b.interest()) })
	if len(rows) > 0 && len(rows[0].Errors) > 0 {
		tail = append([]stripe{{{cutMiddle("! "+rows[0].latest(), width), red}}}, tail...) // of the first row
	}
	tail = tail[:max(0, min(len(tail), (height-len(head))/3))] // most of the screen is the rows'
	room := max(height-len(head)-len(tail), 0)
	var more []stripe
	if len(rows) > room {
		room = max(room-1, 0)
		more = []stripe{{{fmt.Sprintf("… and %d more", len(rows)-room), faint}}}
		rows = rows[:room]
	}
	room -= len(rows)
	lines := slices.Clone(head)
	for i := range rows {
		// What room is left is for all there is to tell of the first ones.
		const least = 2
		if all := panel(&rows[i], width); room+1 >= least {
			all = all[:min(len(all), room+1)]
			room -= len(all) - 1
			lines = append(lines, all...)
			continue
		}
		lines = append(lines, rowLine(&rows[i], width))
	}
	return slices.Concat(lines, more, tail)
}

// rowLine draws a row in one line. What it has no room for it leaves out, from the
// right.
func rowLine(r *row, width int) stripe {
	const id = 22 // the columns of a snapshot's
	_, state, p := r.stateOf()
	mark := patch{"  ", plain}
	switch r.interest() {
	case 0:
		mark = patch{"! ", red}
	case 2:
		mark = patch{"* ", yellow}
	}
	line := stripe{mark, {pad(cut(oneLine(r.ID), id), id), bold}, {fmt.Sprintf(" %4s ", r.percent()), plain}, {pad(state, 9), p}}
	column := func(text string, wide int, p paint) {
		if line.width()+2+wide <= width {
			line = append(line, patch{text: "  "}, patch{pad(text, wide), p})
		}
	}
	share, ok := r.share()
	column(strings.TrimPrefix(r.dirt(), "dirty "), len("1023 MiB +1023 KiB/s"), yellow)
	column(r.rate(), len("1023 MiB/s"), plain)
	column(r.left(), len("23h59m"), plain)
	if ok {
		column(bar(share, leastBar), leastBar, p)
	} else {
		column("", leastBar, plain)
	}
	if room := width - line.width() - 2; room >= 8 && r.place() != "" {
		line = append(line, patch{text: "  "}, patch{cutFront(oneLine(r.place()), room), plain})
	}
	return line
}

// renderLines draws a sample as lines of text that follow each other: for logs, and
// terminals that cannot do more.
func renderLines(s sample) string {
	var b strings.Builder
	at := s.at.Local().Format(time.TimeOnly)
	for i := range s.rows {
		r := &s.rows[i]
		state, _, _ := r.stateOf()
		facts := []string{at, oneLine(r.ID), state}
		if _, ok := r.share(); ok {
			facts = append(facts, r.percent(), size(r.HydratedBytes)+" of "+size(r.TotalBytes))
		}
		for _, fact := range r.coming() {
			facts = append(facts, strings.TrimRight(fact.text, " "))
		}
		count, latency := r.demand()
		facts = append(facts, r.dirt(), count, latency)
		if r.place() != "" {
			facts = append(facts, "on "+oneLine(r.place()))
		}
		facts = append(facts, r.trouble())
		b.WriteString(strings.Join(slices.DeleteFunc(facts, func(f string) bool { return f == "" }), "  ") + "\n")
	}
	if len(s.rows) == 0 {
		b.WriteString(at + "  no volume, and nothing is mounted\n")
	}
	for _, err := range s.failed {
		b.WriteString(at + "  warning: " + oneLine(err.Error()) + "\n")
	}
	return b.String()
}
