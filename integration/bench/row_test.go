package main

import (
	"fmt"
	"math"
	"regexp"
	"testing"
)

func TestPercentile(t *testing.T) {
	for _, test := range []struct {
		samples []float64
		p, want float64
	}{
		{[]float64{3}, 99, 3},
		{[]float64{3, 1, 2}, 50, 2},
		{[]float64{4, 1, 2, 3}, 50, 2.5},
		{[]float64{0, 10}, 99, 9.9},
	} {
		if got := percentile(test.samples, test.p); math.Abs(got-test.want) > 1e-9 {
			t.Errorf("percentile %v of %v is %v, want %v", test.p, test.samples, got, test.want)
		}
	}
}

func TestBarsCompareWithTheBestReferenceMeasured(t *testing.T) {
	f := newFigures()
	for system, value := range map[string]float64{lazyvolName: 90, rcloneName: 50, nbdkitName: 100} {
		f.add(key{"row", system, rate}, value)
	}
	f.add(key{"row", lazyvolName, cores}, 1.9)
	rivals := []key{of(rcloneName, rate), of(nbdkitName, rate), of(s3backerName, rate)}
	tests := []struct {
		bar  bar
		met  bool
		text string
	}{
		{bar{got: of(lazyvolName, rate), refs: rivals, factor: 0.9}, true, nbdkitName},
		{bar{got: of(lazyvolName, rate), refs: rivals, factor: 1}, false, nbdkitName},
		{bar{got: of(lazyvolName, rate), refs: rivals, factor: 1, less: true}, false, rcloneName},
		{bar{got: of(lazyvolName, rate), refs: rivals, factor: 1, less: true, plus: 40}, true, rcloneName},
		{bar{got: of(lazyvolName, rate), refs: rivals, factor: 1, less: true, plus: 0.4, plusRef: of(nbdkitName, rate)}, true, rcloneName},
		{bar{got: of(lazyvolName, rate), refs: rivals, factor: 1, or: of(lazyvolName, cores), orLeast: 1.8}, true, nbdkitName},
		{bar{got: of(lazyvolName, rate), refs: rivals, factor: 1, or: of(lazyvolName, cores), orLeast: 2}, false, nbdkitName},
		{bar{got: of(lazyvolName, rate), fixed: 90, factor: 1, less: true}, true, ""},
	}
	for i, test := range tests {
		v, ok := test.bar.judge("row", f)
		if !ok || v.Met != test.met || v.Whose != test.text {
			t.Errorf("bar %d: %+v, %t; want met %t by %q", i, v, ok, test.met, test.text)
		}
	}
	for _, missing := range []bar{
		{got: of(lazyvolName, iops), fixed: 1},
		{got: of(lazyvolName, rate), refs: []key{of(s3backerName, rate)}, factor: 1},
	} {
		if v, ok := missing.judge("row", f); ok {
			t.Errorf("judged without figures: %+v", v)
		}
	}
}

func TestRowsHaveNamesOfTheirOwn(t *testing.T) {
	seen := make(map[string]bool)
	for _, g := range groups() {
		for _, row := range g.rows {
			if seen[row.name] || !regexp.MustCompile(`^[a-z0-9-]+$`).MatchString(row.name) {
				t.Errorf("the name %q is taken, or none", row.name)
			}
			seen[row.name] = true
		}
	}
	for _, g := range groups() {
		for _, row := range g.rows {
			for _, bar := range row.bars {
				for _, k := range append(bar.refs, bar.got, bar.or, bar.plusRef) {
					if k.row != "" && !seen[k.row] {
						t.Errorf("%s refers to row %q, which is not there", row.name, k.row)
					}
				}
			}
		}
	}
}

func TestFioIsUnderstood(t *testing.T) {
	const out = `fio: a warning
{"jobs": [{"error": %d,
  "read": {"iops": 1, "bw_bytes": 4096, "total_ios": 1},
  "write": {"iops": 2500.5, "bw_bytes": 10242048, "total_ios": 12502, "clat_ns": {"max": 5e6, "percentile": {"50.000000": 400000, "99.000000": 900000}}}}]}`
	got, err := parseFio(fmt.Sprintf(out, 0), true)
	if want := (result{iops: 2500.5, mbs: 10.242048, p50: 400_000, p99: 900_000, most: 5_000_000, requests: 12502}); err != nil || got != want {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	for _, bad := range []string{"", "{}", fmt.Sprintf(out, 5), "{"} {
		if got, err := parseFio(bad, true); err == nil {
			t.Errorf("%q: %+v", bad, got)
		}
	}
}
