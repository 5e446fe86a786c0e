package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A report is everything that a run found.
type report struct {
	Machine  machine      `json:"machine"`
	Image    imageReport  `json:"image"`
	Rounds   int          `json:"rounds"`
	Quick    bool         `json:"quick"`
	Latency  float64      `json:"latencyMs"`
	Begin    time.Time    `json:"begin"`
	Seconds  float64      `json:"seconds"`
	Verdicts []verdict    `json:"bars"`
	Figures  []figureJSON `json:"figures"`
	Absent   []string     `json:"notMeasured"`
	Failed   []string     `json:"failed"`
	Notes    []note       `json:"notes"`

	figures *figures
	systems []string
}

type machine struct {
	Cores    int               `json:"cores"`
	Memory   uint64            `json:"memoryBytes"`
	Kernel   string            `json:"kernel"`
	Go       string            `json:"go"`
	Commit   string            `json:"commit"`
	Load     float64           `json:"load1AtTheEnd"` // our own work in it
	Versions map[string]string `json:"versions"`
}

type imageReport struct {
	Size   int64 `json:"size"`
	Data   int64 `json:"data"`   // in blocks that are not holes
	Stored int64 `json:"stored"` // of those
}

type figureJSON struct {
	Row     string    `json:"row"`
	System  string    `json:"system"`
	Metric  string    `json:"metric"`
	Median  float64   `json:"median"`
	Samples []float64 `json:"samples"`
}

func (b *bench) report() *report {
	r := &report{
		Machine: b.describeMachine(), Rounds: b.rounds, Quick: b.quick, Latency: milliseconds(b.latency),
		Image: imageReport{b.image.size, b.stored.dataBytes(), b.stored.bytes},
		Begin: b.begin, Seconds: time.Since(b.begin).Seconds(), Absent: b.absent, Failed: b.failed, Notes: b.notes, figures: b.figures,
	}
	for _, s := range b.systems {
		r.systems = append(r.systems, s.name())
	}
	for _, g := range groups() {
		for _, row := range g.rows {
			for _, bar := range row.bars {
				if v, ok := bar.judge(row.name, b.figures); ok {
					r.Verdicts = append(r.Verdicts, v)
				}
			}
		}
	}
	for _, k := range b.figures.order {
		median, _ := b.figures.median(k)
		r.Figures = append(r.Figures, figureJSON{k.row, k.system, k.metric, median, b.figures.samples[k]})
	}
	return r
}

func (b *bench) describeMachine() machine {
	m := machine{Cores: runtime.NumCPU(), Go: runtime.Version(), Versions: make(map[string]string)}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		m.Memory = uint64(info.Totalram) * uint64(info.Unit)
		m.Load = float64(info.Loads[0]) / (1 << 16)
	}
	says := func(name string, args ...string) string {
		path, err := b.tool(name)
		if err != nil {
			return ""
		}
		out, _ := exec.Command(path, args...).CombinedOutput() // some say it and fail
		line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		return line
	}
	if out, err := exec.Command("git", "describe", "--always", "--dirty", "--abbrev=12").Output(); err == nil {
		m.Commit = strings.TrimSpace(string(out)) // else it does not run in the work tree
	}
	for name, flag := range map[string]string{
		"fio": "--version", "rclone": "--version", "qemu-storage-daemon": "--version", "s3backer": "--version", "nbdkit": "--version", "versitygw": "--version",
	} {
		if said := says(name, flag); said != "" {
			m.Versions[name] = said
		}
	}
	return m
}

// writeJSON writes everything, samples included.
func (r *report) writeJSON(path string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}

// markdown writes the tables of docs/performance.md.
func (r *report) markdown(w io.Writer) {
	fmt.Fprintf(w, "%s; %d cores, Linux %s, %s, commit %s; an image of %d MiB with %d MiB in data blocks, %d MiB stored; +%s ms a response; medians of %d.\n\n",
		r.Begin.Format("2006-01-02 15:04"), r.Machine.Cores, r.Machine.Kernel, r.Machine.Go, cmp.Or(r.Machine.Commit, "unknown"),
		r.Image.Size/mib, r.Image.Data/mib, r.Image.Stored/mib, number(r.Latency), r.Rounds)
	r.barTable(w)
	r.systemTable(w)
	for _, absent := range r.Absent {
		fmt.Fprintf(w, "\nNot measured: %s.", absent)
	}
	for _, failed := range r.Failed {
		fmt.Fprintf(w, "\nFailed: %s.", failed)
	}
	if len(r.Absent)+len(r.Failed) > 0 {
		fmt.Fprintln(w)
	}
}

func (r *report) barTable(w io.Writer) {
	fmt.Fprintln(w, "| what | bar | lazyvol | reference | ratio | met |\n|---|---|---|---|---|---|")
	titles := make(map[string]string)
	for _, g := range groups() {
		for _, row := range g.rows {
			titles[row.name] = row.title
		}
	}
	last := ""
	for _, v := range r.Verdicts {
		title := ""
		if v.Row != last {
			title, last = titles[v.Row], v.Row
		}
		met := "**no**"
		if v.Met {
			met = "yes"
		}
		if v.Because != "" {
			met += " (" + v.Because + ")"
		}
		reference, ratio := number(v.Limit), "–"
		if v.Whose != "" {
			reference, ratio = fmt.Sprintf("%s (%s)", number(v.Reference), v.Whose), number(v.Ratio)
		}
		fmt.Fprintf(w, "| %s | %s | %s %s | %s | %s | %s |\n", title, v.Bar, number(v.Got), v.Unit, reference, ratio, met)
	}
}

// columns are the figures of the table of systems.
var columns = []struct {
	title string
	keys  []key // system is filled in
}{
	{"first byte ms", []key{{row: "first-byte", metric: ms}}},
	{"cold 4K p50 / p99 ms", []key{{row: "cold-random", metric: p50}, {row: "cold-random", metric: p99}}},
	{"cold seq MB/s", []key{{row: "cold-sequential", metric: rate}}},
	{"warm 4K qd1 / qd16 IOPS", []key{{row: "warm-random", metric: iops}, {row: "warm-random-16", metric: iops}}},
	{"page-cached 4K IOPS", []key{{row: "warm-page-cached", metric: iops}}},
	{"warm seq buffered / direct MB/s", []key{{row: "warm-sequential", metric: rate}, {row: "warm-sequential-direct", metric: rate}}},
	{"write 4K qd1 / qd16 IOPS", []key{{row: "write-random", metric: iops}, {row: "write-random-16", metric: iops}}},
	{"write 4K+fsync IOPS", []key{{row: "write-fsync", metric: iops}}},
	{"write seq MB/s", []key{{row: "write-sequential", metric: rate}}},
}

func (r *report) systemTable(w io.Writer) {
	var lines strings.Builder
	for _, system := range r.systems {
		measured := false
		line := "| " + system + " |"
		for _, c := range columns {
			var values []string
			for _, k := range c.keys {
				k.system = system
				if value, ok := r.figures.median(k); ok {
					values = append(values, number(value))
				}
			}
			cell := "–"
			if len(values) == len(c.keys) {
				cell, measured = strings.Join(values, " / "), true
			}
			line += " " + cell + " |"
		}
		if measured {
			lines.WriteString(line + "\n")
		}
	}
	if lines.Len() == 0 {
		return
	}
	fmt.Fprint(w, "\n| system |")
	for _, c := range columns {
		fmt.Fprintf(w, " %s |", c.title)
	}
	fmt.Fprintf(w, "\n|---|%s\n%s", strings.Repeat("---|", len(columns)), lines.String())
}
