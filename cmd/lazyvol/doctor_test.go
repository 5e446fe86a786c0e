package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

// judged is a finding and what it is to be.
type judged struct {
	found finding
	want  verdictLevel
	says  string // of its message and what to do
}

// judge checks findings, and that what is not in order can be mended.
func checkJudged(t *testing.T, cases map[string]judged) {
	t.Helper()
	for name, c := range cases {
		f := c.found
		if f.Result != c.want || !strings.Contains(f.Message+"\n"+f.Mend, c.says) {
			t.Errorf("%s: %+v, want %s with %q", name, f, c.want, c.says)
		}
		if wrong := f.Result == levelWarning || f.Result == levelFailed; wrong != (f.Mend != "") || f.Message == "" {
			t.Errorf("%s: %+v: what is wrong, and only that, comes with what to do", name, f)
		}
	}
}

func TestEachCheckIsMadeWhateverBecomesOfTheOthers(t *testing.T) {
	forever := make(chan struct{}) // as a system call that never returns
	t.Cleanup(func() { close(forever) })
	quick := func(f finding) func(context.Context) []finding {
		return func(context.Context) []finding { return []finding{f} }
	}
	found := runChecks(t.Context(), []check{
		{"stuck", time.Millisecond, func(context.Context) []finding { <-forever; return nil }},
		{"obedient", time.Millisecond, func(ctx context.Context) []finding {
			<-ctx.Done()
			return []finding{fail("mend", "it was told to end")}
		}},
		{"bad", time.Hour, quick(fail("mend", "bad"))},
		{"two", time.Hour, func(context.Context) []finding { return []finding{fine("one"), warn("mend", "two")} }},
		{"last", time.Hour, quick(fine("good"))},
	})
	var got []string
	for _, f := range found {
		got = append(got, f.Check+" "+string(f.Result)+" "+f.Message)
	}
	want := "stuck failed no answer within 1ms, obedient failed it was told to end, bad failed bad, two ok one, two warning two, last ok good"
	if s := strings.Join(got, ", "); s != want {
		t.Errorf("found %s\nwant  %s", s, want)
	}
	if n := countFailed(found); n != 3 {
		t.Errorf("%d failed", n)
	}
}

func TestFindingsAreALineEach(t *testing.T) {
	var out strings.Builder
	f, g := fine("all is well"), fail("mend it", "%v", errors.Join(errors.New("one"), errors.New("two\x1b[2J")))
	f.Check, g.Check = "fuse", "state"
	s := skip("nothing to see")
	s.Check = "key"
	begin := "ok       fuse   all is well\nfailed   state  one two [2J\n         mend: mend it\n"
	for all, end := range map[bool]string{
		false: "1 failed, 0 warnings; 1 checks were skipped: -v tells why\n",
		true:  "skipped  key    nothing to see\n1 failed, 0 warnings\n",
	} {
		out.Reset()
		if err := printFindings(&out, []finding{f, g, s}, all); err != nil {
			t.Fatal(err)
		}
		if want := begin + end; out.String() != want {
			t.Errorf("printed\n%swant\n%s", out.String(), want)
		}
	}
}
