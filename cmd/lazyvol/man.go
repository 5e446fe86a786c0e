package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

func (a *app) manCommand() *cobra.Command {
	return &cobra.Command{
		Use: "man DIR", Short: "Write the man pages into a directory", Args: args(cobra.ExactArgs(1)),
		Long: `Writes a man page for each command into a directory, which is made unless it is
there: lazyvol.1, lazyvol-mount.1 and so on. Pages that are there are replaced.

The same build writes the same pages: they bear the month of its commit, or that
which SOURCE_DATE_EPOCH has, in seconds since 1970, or none.`,
		Example: `  lazyvol man /usr/local/share/man/man1`,
		RunE: func(c *cobra.Command, args []string) error {
			built, err := buildTime()
			if err != nil {
				return err
			}
			return writeManPages(c.Root(), args[0], built)
		},
	}
}

// buildTime is what the pages of this build are dated: zero when nothing tells.
func buildTime() (time.Time, error) {
	if s := os.Getenv("SOURCE_DATE_EPOCH"); s != "" {
		seconds, err := strconv.ParseInt(s, 10, 64)
		if err != nil || seconds < 0 {
			return time.Time{}, usageError{fmt.Errorf("SOURCE_DATE_EPOCH=%q: it must be seconds since 1970", s)}
		}
		return time.Unix(seconds, 0).UTC(), nil
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.time" {
				return time.Parse(time.RFC3339, s.Value)
			}
		}
	}
	return time.Time{}, nil
}

// writeManPages writes the pages of root and of all that its help lists.
func writeManPages(root *cobra.Command, dir string, date time.Time) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write man pages: %w", err)
	}
	root.DisableAutoGenTag = true
	return eachCommand(root, func(c *cobra.Command) error {
		var page bytes.Buffer
		header := &doc.GenManHeader{Section: "1", Date: &date, Source: "lazyvol", Manual: "lazyvol"}
		if err := doc.GenMan(c, header, &page); err != nil {
			return fmt.Errorf("write the man page of '%s': %w", c.CommandPath(), err)
		}
		name := strings.ReplaceAll(c.CommandPath(), " ", "-") + ".1"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(finished(page.String())), 0o644); err != nil {
			return fmt.Errorf("write man pages: %w", err)
		}
		return nil
	})
}

// finished takes away a date that nobody knows, heads examples as other pages do, and
// spells characters beyond ASCII so that each troff shows them, whatever it takes the
// encoding to be.
func finished(page string) string {
	page = strings.Replace(page, time.Time{}.Format(`"Jan 2006"`), `""`, 1)
	page = strings.Replace(page, "\n.SH EXAMPLE\n", "\n.SH EXAMPLES\n", 1)
	var b strings.Builder
	for _, r := range page {
		if r > unicode.MaxASCII {
			fmt.Fprintf(&b, `\[u%04X]`, r)
		} else {
			b.WriteRune(r)
		}
	}
	return b.String()
}
