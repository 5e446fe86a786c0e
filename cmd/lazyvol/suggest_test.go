package main

import (
	"strings"
	"testing"
)

func TestTyposAreMetWithWhatWasMeant(t *testing.T) {
	clearEnvironment(t)
	for line, want := range map[string]string{
		"snpshot":                             `unknown command "snpshot"; did you mean snapshot?`,
		"snpshot create --tag a=b x":          `unknown command "snpshot"; did you mean snapshot?`,
		"st":                                  `unknown command "st"; did you mean status?`,
		"umount":                              `unknown command "umount"; did you mean mount or unmount?`,
		"m":                                   `unknown command "m"; did you mean man or metrics or mount?`,
		"ls":                                  `unknown command "ls"; see 'lazyvol --help'`,
		"snapshot lsit":                       `unknown command "lsit" for "lazyvol snapshot"; did you mean list?`,
		"snapshot craete --tag a=b x":         `unknown command "craete" for "lazyvol snapshot"; did you mean create?`,
		"snapshot frobnicate":                 `unknown command "frobnicate" for "lazyvol snapshot"; see 'lazyvol snapshot --help'`,
		"snapshot create --prent snap-1 x":    `unknown flag: --prent; did you mean --parent?`,
		"snapshot create --descr=y x":         `unknown flag: --descr; did you mean --description?`,
		"snapshot list --sotre file:///x":     `unknown flag: --sotre; did you mean --store?`,
		"snapshot create --frobnicate=yes x":  `unknown flag: --frobnicate; see 'lazyvol snapshot create --help'`,
		"snapshot create -x y":                `unknown shorthand flag: 'x' in -x; see 'lazyvol snapshot create --help'`,
		"snapshot list " + "--" + long("a"):   `unknown flag: --` + long("a") + `; see`,
		"help stauts":                         `unknown command "stauts"; did you mean status?`,
		"help snapshot lsit":                  `unknown command "lsit" for "lazyvol snapshot"; did you mean list?`,
		"--jsn version":                       `unknown flag: --jsn; did you mean --json?`,
		"snapshot lock snap-1 --days tuesday": `invalid argument "tuesday" for "--days" flag`,
	} {
		code, stdout, stderr := try(t, strings.Fields(line)...)
		if code != exitUsage || !strings.Contains(stderr, want) || stdout != "" {
			t.Errorf("%q: exit %d, stdout %q, stderr %q; want %q", line, code, stdout, stderr, want)
		}
	}
}

func long(s string) string { return strings.Repeat(s, 100_000) }

func TestSlipsAreCounted(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"", "abc", 3}, {"list", "list", 0}, {"lsit", "list", 1}, {"ist", "list", 1}, {"lizt", "list", 1},
		{"kitten", "sitting", 3}, {"ca", "abc", 3}, {"größe", "grösse", 2},
	} {
		if got, back := slips(c.a, c.b), slips(c.b, c.a); got != c.want || back != c.want {
			t.Errorf("slips %q, %q: %d and %d, want %d", c.a, c.b, got, back, c.want)
		}
	}
}
