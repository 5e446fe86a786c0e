package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strconv"
)

// A group is rows that are measured one after the other with the same set-up.
type group struct {
	name  string
	setUp func(context.Context, *turn) error // nil: none
	rows  []row
}

// A row is one thing that is measured.
type row struct {
	name    string // for -run and as the first part of a figure's key
	title   string
	measure func(context.Context, *turn) error
	bars    []bar
}

// groups are all there is to measure, in order.
func groups() []group {
	return []group{
		{name: "cold", rows: coldRows()},
		{name: "fleet", setUp: setUpFleet, rows: slices.Concat(warmRows(), writeRows())},
		{name: "loop", rows: slices.Concat(coldWriteRows(), loopRows())},
		{name: "trace", rows: traceRows()},
		{name: "vm", rows: vmRows()},
		{name: "sealed", rows: sealedRows()},
		{name: "snapshot", rows: snapshotRows()},
		{name: "huge", rows: hugeRows()},
		{name: "memory", rows: memoryRows()},
	}
}

// A bar is a comparison of one of lazyvol's figures with something.
type bar struct {
	text string // as issue 4 has it
	unit string
	got  key // row may be empty: the bar's own

	// What got is compared with: the best of those references that were
	// measured, or a fixed number if there are none.
	refs  []key
	fixed float64

	// Got is to be at least factor × reference, or, where less is better, at
	// most factor × reference + plus × plusRef.
	less    bool
	factor  float64
	plus    float64
	plusRef key // zero: plus is a number by itself

	// or is another way to meet the bar: this figure reaches that value.
	or      key
	orLeast float64
	orText  string
}

// A verdict is how a bar came out.
type verdict struct {
	Row       string  `json:"row"`
	Bar       string  `json:"bar"`
	Unit      string  `json:"unit"`
	Got       float64 `json:"got"`
	Reference float64 `json:"reference"`
	Whose     string  `json:"whose,omitempty"`
	Limit     float64 `json:"limit"` // what got had to reach, or stay below
	Ratio     float64 `json:"ratio"`
	Met       bool    `json:"met"`
	Because   string  `json:"because,omitempty"`
}

// judge compares; false if something was not measured.
func (b bar) judge(row string, f *figures) (verdict, bool) {
	at := func(k key) key {
		if k.row == "" {
			k.row = row
		}
		return k
	}
	v := verdict{Row: row, Bar: b.text, Unit: b.unit}
	got, ok := f.median(at(b.got))
	if !ok {
		return v, false
	}
	v.Got, v.Reference = got, b.fixed
	if len(b.refs) > 0 {
		best := math.NaN()
		for _, ref := range b.refs {
			value, ok := f.median(at(ref))
			if ok && (math.IsNaN(best) || b.less == (value < best)) {
				best, v.Whose = value, ref.system
			}
		}
		if math.IsNaN(best) {
			return v, false
		}
		v.Reference = best
	}
	v.Limit = b.factor*v.Reference + b.plus
	if b.plusRef != (key{}) {
		value, ok := f.median(at(b.plusRef))
		if !ok {
			return v, false
		}
		v.Limit = b.factor*v.Reference + b.plus*value
	}
	if v.Reference != 0 {
		v.Ratio = v.Got / v.Reference
	}
	v.Met = v.Got >= v.Limit
	if b.less {
		v.Met = v.Got <= v.Limit
	}
	if !v.Met && b.or != (key{}) {
		if value, ok := f.median(at(b.or)); ok && value >= b.orLeast {
			v.Met, v.Because = true, fmt.Sprintf("%s: %.2f", b.orText, value)
		}
	}
	return v, true
}

// A key names a figure.
type key struct{ row, system, metric string }

func (k key) String() string { return k.row + "/" + k.system + "/" + k.metric }

// of is the key of a system's figure in the bar's own row.
func of(system, metric string) key { return key{"", system, metric} }

// figures are the samples of all figures, in the order in which they came.
type figures struct {
	order   []key
	samples map[key][]float64
}

func newFigures() *figures { return &figures{samples: make(map[key][]float64)} }

func (f *figures) add(k key, value float64) {
	if _, ok := f.samples[k]; !ok {
		f.order = append(f.order, k)
	}
	f.samples[k] = append(f.samples[k], value)
}

func (f *figures) median(k key) (float64, bool) {
	s := f.samples[k]
	if len(s) == 0 {
		return 0, false
	}
	return percentile(s, 50), true
}

// percentile returns the p-th percentile, of an even number the mean of the
// middle two for p = 50.
func percentile(samples []float64, p float64) float64 {
	if len(samples) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(samples))
	at := p / 100 * float64(len(sorted)-1)
	low := int(at)
	if low+1 == len(sorted) {
		return sorted[low]
	}
	return sorted[low] + (at-float64(low))*(sorted[low+1]-sorted[low])
}

// number formats a figure with three digits that count.
func number(v float64) string {
	switch abs := math.Abs(v); {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "–"
	case abs >= 100 || v == math.Trunc(v):
		return strconv.FormatFloat(v, 'f', 0, 64)
	case abs >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	case abs >= 0.1:
		return strconv.FormatFloat(v, 'f', 2, 64)
	default:
		return strconv.FormatFloat(v, 'g', 2, 64)
	}
}
