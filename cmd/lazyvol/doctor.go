package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// How long a check may take. What it asks may be a mount or a network filesystem that
// does not answer; those of the store make up to a few dozen requests.
const (
	hostCheckTime  = 10 * time.Second
	storeCheckTime = 40 * time.Second
)

// defaultDirtyAge is for how long what was written may be on this host only before the
// doctor says so.
const defaultDirtyAge = 7 * 24 * time.Hour

// A verdictLevel is how a check ended.
type verdictLevel string

const (
	levelOK      verdictLevel = "ok"
	levelWarning verdictLevel = "warning"
	levelFailed  verdictLevel = "failed"
	levelSkipped verdictLevel = "skipped"
)

// A finding is what a check found.
type finding struct {
	Check   string
	Result  verdictLevel
	Message string
	Mend    string `json:",omitempty"` // what to do; "" only if it is ok or skipped
}

func fine(format string, args ...any) finding {
	return finding{Result: levelOK, Message: fmt.Sprintf(format, args...)}
}

func skip(format string, args ...any) finding {
	return finding{Result: levelSkipped, Message: fmt.Sprintf(format, args...)}
}

func warn(mend, format string, args ...any) finding {
	return finding{Result: levelWarning, Message: fmt.Sprintf(format, args...), Mend: mend}
}

func fail(mend, format string, args ...any) finding {
	return finding{Result: levelFailed, Message: fmt.Sprintf(format, args...), Mend: mend}
}

// A check looks at one thing. It changes nothing that it does not put back.
type check struct {
	name    string
	within  time.Duration
	examine func(context.Context) []finding
}

// one makes a check of a function that finds one thing.
func one(examine func(context.Context) finding) func(context.Context) []finding {
	return func(ctx context.Context) []finding { return []finding{examine(ctx)} }
}

func (a *app) doctorCommand() *cobra.Command {
	var asJSON bool
	var dirtyAge time.Duration
	c := &cobra.Command{
		Use: doctorName, Short: "Check this host and the store, and tell how to mend what is wrong", Args: args(cobra.NoArgs),
		Long: `Checks what lazyvol needs of this host (FUSE, loop devices, limits, memory), the state
directory (rights, filesystem, space, what killed commands left), the configuration, the
key of LAZYVOL_KEY, and the store: whether it answers, to whom, how fast, whether it
honours conditional puts, and whether its bucket deletes or keeps what it should not.

Each line is ok, a warning or failed, and with -v those that were skipped; "mend" below it says what to do. Nothing is
changed: probes are a file in the state directory and a few small objects under "probe/" in
the store, and are removed again. No check takes longer than 40 seconds, and none keeps
another from being made. Exits with 1 if one failed.

Give it the flags and the environment of the commands that do not work, and run it as the
same user.`,
		Example: `  lazyvol doctor
  lazyvol --store s3://my-bucket/disks doctor --json`,
		RunE: func(c *cobra.Command, _ []string) error {
			findings := runChecks(c.Context(), a.checks(c, dirtyAge))
			if ctx := c.Context(); ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if asJSON {
				if err := printJSON(a.stdout, struct{ Checks []finding }{findings}); err != nil {
					return err
				}
			} else if err := printFindings(a.stdout, findings, a.verbose); err != nil {
				return err
			}
			if failed := countFailed(findings); failed > 0 {
				return codedError{fmt.Sprintf("%d of %d checks failed", failed, len(findings)), exitFailed}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.Flags().DurationVar(&dirtyAge, "dirty-age", defaultDirtyAge, "warn of what was written and is in no snapshot for longer than this")
	return c
}

// checks are all checks, in the order in which they are shown.
func (a *app) checks(c *cobra.Command, dirtyAge time.Duration) []check {
	host := func(name string, examine func(context.Context) finding) check {
		return check{name, hostCheckTime, one(examine)}
	}
	s := newStoreExam(a)
	store := func(name string, examine func(context.Context) finding) check {
		return check{name, storeCheckTime, one(examine)}
	}
	return []check{
		host("kernel", examineKernel),
		host("fuse", examineFuse),
		host("fusermount3", examineHelper),
		host("allow-other", examineAllowOther),
		host("fuse-limits", examineFuseLimits),
		host("loop", examineLoop),
		host("files", examineFiles),
		host("memory", a.examineMemory),
		host("state", a.examineState),
		host("filesystem", a.examineFilesystem),
		host("space", a.examineSpace),
		{"mounts", hostCheckTime, examineMounts},
		{"loops", hostCheckTime, a.examineLoops},
		{"volumes", hostCheckTime, func(ctx context.Context) []finding { return a.examineVolumes(ctx, dirtyAge) }},
		{"sessions", hostCheckTime, a.examineSessions},
		{"copies", hostCheckTime, a.examineCopies},
		host("config", a.examineConfig(c)),
		store("key", a.examineKey(c)),
		store("store", s.store),
		store("credentials", s.credentials),
		store("clock", s.clock),
		store("region", s.region),
		store("format", s.format),
		store("writes", s.writes),
		store("versions", s.versions),
		store("lifecycle", s.lifecycle),
	}
}

// runChecks makes all checks at once, and returns what they found in the order of the
// checks. One that does not end in its time is left behind, perhaps in a system call
// that never returns: the process ends soon.
func runChecks(ctx context.Context, checks []check) []finding {
	results := make([]chan []finding, len(checks))
	for i, c := range checks {
		results[i] = make(chan []finding, 1)
		go func() {
			ctx, cancel := context.WithTimeout(ctx, c.within)
			defer cancel()
			done := make(chan []finding, 1)
			go func() { done <- c.examine(ctx) }()
			select {
			case found := <-done:
				results[i] <- found
			case <-ctx.Done():
				results[i] <- []finding{overdue(c, done)}
			}
		}()
	}
	var all []finding
	for i, c := range checks {
		for _, f := range <-results[i] {
			f.Check = c.name
			all = append(all, f)
		}
	}
	return all
}

// overduePatience is what a check has to end once its context has.
const overduePatience = time.Second

// overdue returns what a check found that was told to end, should it do so.
func overdue(c check, done <-chan []finding) finding {
	select {
	case found := <-done:
		if len(found) > 0 {
			return found[0]
		}
	case <-time.After(overduePatience):
	}
	return fail("find out what does not answer: a mount, a network filesystem or the store", "no answer within %s", c.within)
}

func countFailed(findings []finding) int {
	n := 0
	for _, f := range findings {
		if f.Result == levelFailed {
			n++
		}
	}
	return n
}

// printFindings prints a line for each finding, and below it what to do; those that
// were skipped only if all are asked for.
func printFindings(w io.Writer, findings []finding, all bool) error {
	widest, warnings, skipped := 0, 0, 0
	for _, f := range findings {
		widest = max(widest, len(f.Check))
	}
	var out strings.Builder
	for _, f := range findings {
		switch f.Result {
		case levelWarning:
			warnings++
		case levelSkipped:
			skipped++
			if !all {
				continue
			}
		}
		fmt.Fprintf(&out, "%-7s  %-*s  %s\n", f.Result, widest, f.Check, oneLine(f.Message))
		if f.Mend != "" {
			fmt.Fprintf(&out, "%-7s  mend: %s\n", "", oneLine(f.Mend))
		}
	}
	fmt.Fprintf(&out, "%d failed, %d warnings", countFailed(findings), warnings)
	if skipped > 0 && !all {
		fmt.Fprintf(&out, "; %d checks were skipped: -v tells why", skipped)
	}
	out.WriteByte('\n')
	_, err := io.WriteString(w, out.String())
	return err
}
