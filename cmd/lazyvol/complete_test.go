package main

import (
	"bytes"
	"context"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/manifest"
)

// try runs a command line, as a shell would.
func try(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(context.Background(), args, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

// ok is try for what must succeed.
func ok(t *testing.T, args ...string) string {
	t.Helper()
	code, stdout, stderr := try(t, args...)
	if code != exitDone {
		t.Fatalf("lazyvol %q: exit %d: %s", args, code, stderr)
	}
	return strings.TrimSpace(stdout)
}

// completions returns the words that the shell is offered for the last of args, and
// what else it is to do.
func completions(t *testing.T, args ...string) (words []string, directive string) {
	t.Helper()
	lines := strings.Split(ok(t, append([]string{"__complete"}, args...)...), "\n")
	for _, line := range lines[:len(lines)-1] {
		word, _, _ := strings.Cut(line, "\t")
		words = append(words, word)
	}
	return words, lines[len(lines)-1]
}

const (
	noFiles   = ":4"
	files     = ":0"
	noneOther = ":16" // directories
)

func TestWordsCompleteToWhatTheyMayBe(t *testing.T) {
	clearEnvironment(t)
	state := t.TempDir()
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	lazyvol := func(args ...string) string { return ok(t, append([]string{"--state", state}, args...)...) }
	first := lazyvol("snapshot", "create", "--description", "a\tb\x1b[2J", image)
	second := lazyvol("snapshot", "create", image)
	binned := lazyvol("snapshot", "create", image)
	lazyvol("snapshot", "delete", "--retain", "1d", binned)
	vol := lazyvol("volume", "create", "--size", "1MiB")
	for line, want := range map[string]struct {
		words     []string
		directive string
	}{
		"snapshot show ":                 {[]string{first, second}, noFiles},
		"snapshot show " + second:        {[]string{second}, noFiles},
		"snapshot show vol":              {nil, noFiles},
		"snapshot show " + first + " ":   {nil, noFiles},
		"snapshot delete " + first + " ": {[]string{second}, noFiles},
		"snapshot diff " + first + " ":   {[]string{second}, noFiles},
		"snapshot restore-deleted ":      {[]string{binned}, noFiles},
		"snapshot export " + first + " ": {nil, files},
		"snapshot create ":               {[]string{vol}, files},
		"snapshot create --parent ":      {[]string{first, second}, noFiles},
		"snapshot create --tag ":         {nil, noFiles},
		"snapshot create --freeze ":      {nil, noneOther},
		"snapshot lock --mode g":         {[]string{"governance"}, noFiles},
		"snapshot list ":                 {nil, noFiles},
		"volume create --snapshot ":      {[]string{first, second}, noFiles},
		"volume show ":                   {[]string{vol}, noFiles},
		"volume forget ":                 {nil, noFiles},
		"mount ":                         {[]string{first, second, vol}, noFiles},
		"mount " + vol + " ":             {nil, noneOther},
		"unmount vol":                    {[]string{vol}, noFiles},
		"volume sh":                      {[]string{"show"}, noFiles},
		"config check ":                  {nil, files},
		"--config ":                      {nil, files},
		"snapshot map --output ":         {nil, files},
		"--log-level d":                  {[]string{"debug"}, noFiles},
		"--log-format ":                  {[]string{"json", "text"}, noFiles},
		"completion ":                    {[]string{"bash", "fish", "zsh"}, noFiles},
	} {
		words, directive := completions(t, append([]string{"--state", state}, strings.Split(line, " ")...)...)
		slices.Sort(words)
		slices.Sort(want.words)
		if !slices.Equal(words, want.words) || directive != want.directive {
			t.Errorf("%q completes to %q %s, want %q %s", line, words, directive, want.words, want.directive)
		}
	}
	if out := lazyvol("__complete", "snapshot", "show", first); strings.Contains(out, "\x1b") || !strings.Contains(out, "a b [2J") {
		t.Errorf("the description is shown as %q", out)
	}
}

func TestCompletionMakesNoStore(t *testing.T) {
	clearEnvironment(t)
	state := filepath.Join(t.TempDir(), "state")
	if words, _ := completions(t, "--state", state, "mount", ""); len(words) > 0 {
		t.Errorf("completes to %q", words)
	}
	if there, err := fileExists(state); there || err != nil {
		t.Errorf("the state directory was made, or: %v", err)
	}
}

func TestCompletionGivesUpOnASilentStore(t *testing.T) {
	clearEnvironment(t)
	t.Setenv("AWS_ACCESS_KEY_ID", "a")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "b")
	released := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-released }))
	defer server.Close()
	defer close(released)
	begun := time.Now()
	code, stdout, stderr := try(t, "--state", t.TempDir(), "--store", "s3://bucket/x?region=us-east-1&endpoint="+server.URL, "__complete", "snapshot", "show", "")
	if code != exitDone || strings.TrimSpace(stdout) != noFiles || strings.Contains(stderr, "rror") {
		t.Errorf("exit %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	if took := time.Since(begun); took > 10*completionPatience {
		t.Errorf("it took %s", took)
	}
}

func TestCompletionTablesNameCommandsThatAreThere(t *testing.T) {
	root := newTestCommand()
	for path := range completedArguments {
		c, rest, err := root.Find(strings.Fields(path))
		if err != nil || len(rest) > 0 || c.ValidArgsFunction == nil {
			t.Errorf("%q: command %q, rest %q, %v", path, c.CommandPath(), rest, err)
		}
	}
	unused := make(map[string]bool)
	for name := range completedFlags {
		unused[name] = true
	}
	_ = eachCommand(root, func(c *cobra.Command) error {
		for name := range unused {
			if c.Flag(name) != nil {
				delete(unused, name)
			}
		}
		return nil
	})
	if len(unused) > 0 {
		t.Errorf("no command has the flags %v", unused)
	}
}

func TestCompletionScripts(t *testing.T) {
	for shell, sign := range map[string]string{"bash": "__start_lazyvol", "zsh": "#compdef lazyvol", "fish": "complete -c lazyvol"} {
		if script := ok(t, "completion", shell); !strings.Contains(script, sign) {
			t.Errorf("the script for %s lacks %q", shell, sign)
		}
	}
	if code, _, stderr := try(t, "completion", "tcsh"); code != exitUsage {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if help := ok(t, "--help"); !strings.Contains(help, "completion ") {
		t.Errorf("help does not list it:\n%s", help)
	}
}

func newTestCommand() *cobra.Command {
	return (&app{memory: defaultMemory, keys: newSecretKeys()}).command()
}

// clearEnvironment undoes what the person who runs the tests has set.
func clearEnvironment(t *testing.T) {
	for _, v := range []string{"LAZYVOL_STORE", "LAZYVOL_STATE", "LAZYVOL_OWNER", onEventEnv, keyEnv, "SOURCE_DATE_EPOCH"} {
		t.Setenv(v, "") // to be put back at the end
		if err := os.Unsetenv(v); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSnapshotIDsLookAsTheirCompletionExpects(t *testing.T) {
	if id := manifest.NewSnapshotID(1).String(); !mayBecome(id, "snap-") || !mayBecome("", "snap-") || mayBecome("vol-", "snap-") {
		t.Errorf("%s", id)
	}
}
