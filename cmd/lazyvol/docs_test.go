package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// pages returns the README and the pages of the documentation, by path.
func pages(t *testing.T) map[string]string {
	t.Helper()
	paths, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no pages (%v)", err)
	}
	found := make(map[string]string)
	for _, path := range append(paths, "../../README.md") {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		found[strings.TrimPrefix(path, "../../")] = string(data)
	}
	return found
}

var (
	fenced = regexp.MustCompile("(?ms)^```([^\n]*)\n(.*?)^```$")
	inline = regexp.MustCompile("`(lazyvol [a-z-][^`]*)`") // not such as a format's byte strings

	// separators are what ends a command besides the end of its line.
	separators = regexp.MustCompile(`('[^']*'|"[^"]*")|(&&|\|\||;|[|&](?:\s|$)|(?:^|\s)#.*)`)
	// substitutions are commands whose output is a word of another.
	substitutions = regexp.MustCompile(`\$\(([^()]*)\)`)
)

// commandsOf returns the commands of lazyvol in a script, each as its words. One with an
// ellipsis in it stands for several.
func commandsOf(script string) (commands [][]string) {
	script = strings.ReplaceAll(script, "\\\n", " ")
	for line := range strings.Lines(script) {
		for m := substitutions.FindStringSubmatch(line); m != nil; m = substitutions.FindStringSubmatch(line) {
			commands = append(commands, commandsOf(m[1])...)
			line = strings.Replace(line, m[0], "1", 1) // which a flag may want as a number
		}
		line = separators.ReplaceAllStringFunc(line, func(s string) string {
			if s[0] == '\'' || s[0] == '"' {
				return s
			}
			return "\n"
		})
		for part := range strings.Lines(line) {
			words := shellWords(strings.TrimSpace(part))
			for len(words) > 0 && (strings.Contains(words[0], "=") || words[0] == "sudo" || words[0] == "if" || words[0] == "time") {
				words = words[1:]
			}
			if len(words) > 0 && words[0] == "lazyvol" && !strings.Contains(part, "…") {
				commands = append(commands, words)
			}
		}
	}
	return commands
}

func TestCommandsOfAScriptAreFound(t *testing.T) {
	script := "vol=$(lazyvol volume create --snapshot $(lazyvol a)) # lazyvol no\nsudo lazyvol b 'x; lazyvol no' && A=b lazyvol c \\\n  --flag | tee x\necho lazyvol no\nlazyvol d … e\nlazyvol e > file\nlazyvol f;lazyvol yes\nlazyvol g --to 's3://b?a=1&b=2' &\n"
	var got []string
	for _, words := range commandsOf(script) {
		got = append(got, strings.Join(words, " "))
	}
	want := []string{"lazyvol a", "lazyvol volume create --snapshot 1", "lazyvol b x; lazyvol no", "lazyvol c --flag", "lazyvol e", "lazyvol f", "lazyvol yes", "lazyvol g --to s3://b?a=1&b=2"}
	if !slices.Equal(got, want) {
		t.Errorf("found\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// Every command of lazyvol that a page shows in a block is one, with flags and as many
// arguments as it takes; those within a sentence may leave arguments out.
func TestCommandsOfThePagesParse(t *testing.T) {
	clearEnvironment(t)
	total := 0
	for path, page := range pages(t) {
		for _, block := range fenced.FindAllStringSubmatch(page, -1) {
			if block[1] != "" && block[1] != "sh" {
				continue
			}
			for _, words := range commandsOf(block[2]) {
				total++
				checkCommand(t, path, words, true)
			}
		}
		for _, m := range inline.FindAllStringSubmatch(fenced.ReplaceAllString(page, ""), -1) {
			for _, words := range commandsOf(m[1]) {
				total++
				checkCommand(t, path, words, false)
			}
		}
	}
	if total < 40 {
		t.Errorf("only %d commands were found", total)
	}
}

// checkCommand parses a command against the real ones.
func checkCommand(t *testing.T, path string, words []string, arguments bool) {
	t.Helper()
	shown := strings.Join(words, " ")
	found, rest, err := newTestCommand().Find(words[1:])
	if err != nil {
		t.Errorf("%s: %s: %v", path, shown, err)
		return
	}
	if !arguments && len(rest) > 0 && strings.HasPrefix(rest[len(rest)-1], "--") { // a flag whose value is left out
		if name := strings.TrimPrefix(rest[len(rest)-1], "--"); found.Flags().Lookup(name) == nil && found.InheritedFlags().Lookup(name) == nil && name != "help" && name != "version" {
			t.Errorf("%s: %s: no flag --%s", path, shown, name)
		}
		rest = rest[:len(rest)-1]
	}
	if err := found.ParseFlags(rest); err != nil && !strings.Contains(err.Error(), "help requested") {
		t.Errorf("%s: %s: %v", path, shown, err)
		return
	}
	if found.HasSubCommands() && len(found.Flags().Args()) > 0 {
		t.Errorf("%s: %s: no such command", path, shown)
	}
	if !arguments {
		return
	}
	if found.HasSubCommands() && found.HasParent() {
		t.Errorf("%s: %s: it needs a command", path, shown)
	} else if err := found.ValidateArgs(found.Flags().Args()); err != nil {
		t.Errorf("%s: %s: %v", path, shown, err)
	}
}
