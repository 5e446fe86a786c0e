package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
)

func manPages(t *testing.T) map[string]string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "man1")
	ok(t, "man", dir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	pages := make(map[string]string)
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		pages[e.Name()] = string(data)
	}
	return pages
}

func TestEveryCommandHasAManPage(t *testing.T) {
	clearEnvironment(t)
	pages := manPages(t)
	groff, err := exec.LookPath("groff")
	if err != nil {
		t.Fatalf("%v: run scripts/setup", err)
	}
	_ = eachCommand(newTestCommand(), func(c *cobra.Command) error {
		name := strings.ReplaceAll(c.CommandPath(), " ", "-") + ".1"
		page, there := pages[name]
		delete(pages, name)
		if !there {
			t.Errorf("no %s", name)
			return nil
		}
		checkRoff(t, name, page)
		if c.HasExample() && !strings.Contains(page, "\n.SH EXAMPLES\n") {
			t.Errorf("%s has no examples", name)
		}
		formatter := exec.Command(groff, "-t", "-man", "-Tutf8", "-wall")
		formatter.Stdin = strings.NewReader(page)
		var complaints strings.Builder
		formatter.Stderr = &complaints
		text, err := formatter.Output()
		if err != nil || complaints.Len() > 0 {
			t.Errorf("%s: groff: %v\n%s", name, err, complaints.String())
		}
		shown := regexp.MustCompile(`\x1b\[[0-9;]*m|.\x08`).ReplaceAllString(string(text), "")
		for line := range strings.Lines(c.Example) {
			if line = strings.TrimSpace(line); len(line) < 60 && !strings.Contains(shown, line) {
				t.Errorf("%s does not show %q:\n%s", name, line, shown)
			}
		}
		return nil
	})
	for name := range pages {
		t.Errorf("%s is of no command", name)
	}
}

// checkRoff checks that a page has its parts, in order, and that each .nf and .RS ends.
func checkRoff(t *testing.T, name, page string) {
	t.Helper()
	rest := page
	for _, part := range []string{".TH ", ".SH NAME", ".SH SYNOPSIS", ".SH DESCRIPTION"} {
		_, after, found := strings.Cut(rest, part)
		if !found {
			t.Errorf("%s: no %s, or out of order", name, part)
			return
		}
		rest = after
	}
	count := func(request string) int { return strings.Count(page, "\n"+request+"\n") }
	if count(".nf") != count(".fi") || count(".RS") != count(".RE") || strings.Contains(page, "spf13") {
		t.Errorf("%s is not well-formed:\n%s", name, page)
	}
}

func TestManPagesDoNotDependOnWhoWritesThem(t *testing.T) {
	clearEnvironment(t)
	if page := manPages(t)["lazyvol-mount.1"]; !strings.Contains(page, `.TH "LAZYVOL-MOUNT" "1" "" `) { // tests know no commit
		t.Errorf("it has a date that nothing told:\n%.200s", page)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	want := manPages(t)
	if page := want["lazyvol-mount.1"]; !strings.Contains(page, "Nov 2023") {
		t.Errorf("it is not of the date that SOURCE_DATE_EPOCH has:\n%.200s", page)
	}
	t.Setenv("LAZYVOL_STORE", "file:///secret/store")
	t.Setenv("LAZYVOL_STATE", filepath.Join(t.TempDir(), "secret"))
	t.Setenv("LAZYVOL_OWNER", "123456789012")
	t.Setenv(onEventEnv, "true secret")
	t.Setenv(keyEnv, "file:///secret/key")
	if diff := cmp.Diff(want, manPages(t)); diff != "" {
		t.Errorf("pages changed with the environment:\n%s", diff)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
	dir := filepath.Join(t.TempDir(), "none")
	code, _, stderr := try(t, "man", dir)
	if there, _ := fileExists(dir); code != exitUsage || there {
		t.Errorf("exit %d, made: %v: %s", code, there, stderr)
	}
}

// Each example parses: its command, flags and number of arguments are there.
func TestEveryCommandHasExamplesThatParse(t *testing.T) {
	clearEnvironment(t)
	_ = eachCommand(newTestCommand(), func(c *cobra.Command) error {
		own := false // others may help to show what it does
		for line := range strings.Lines(c.Example) {
			words := shellWords(strings.TrimSpace(line))
			for len(words) > 0 && strings.Contains(words[0], "=") { // a variable that is set
				words = words[1:]
			}
			if len(words) == 0 || words[0] != "lazyvol" { // what is done besides
				continue
			}
			found, rest, err := newTestCommand().Find(words[1:])
			if err == nil {
				err = found.ParseFlags(rest)
			}
			if err == nil {
				err = found.ValidateArgs(found.Flags().Args())
			}
			if err != nil || found.HasSubCommands() || !strings.HasPrefix(line, "  ") {
				t.Errorf("'%s': example %q is of '%s', or not indented: %v", c.CommandPath(), line, found.CommandPath(), err)
			}
			own = own || strings.HasPrefix(found.CommandPath(), c.CommandPath())
		}
		if !own {
			t.Errorf("'%s' has no example of itself: %q", c.CommandPath(), c.Example)
		}
		return nil
	})
}

// shellWords splits a line as a shell does: up to where it redirects, pipes or comments.
func shellWords(line string) (words []string) {
	for _, w := range regexp.MustCompile(`(?:'[^']*'|"[^"]*"|[^\s'"])+`).FindAllString(line, -1) {
		if w == ">" || w == "|" || w == "#" || w == "&&" {
			break
		}
		words = append(words, strings.NewReplacer("'", "", `"`, "").Replace(w))
	}
	return words
}
