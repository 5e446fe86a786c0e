package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// sampleValues are two values that a flag takes, as TOML has them.
func sampleValues(t *testing.T, f *pflag.Flag) (a, b string) {
	t.Helper()
	switch kind := f.Value.Type(); {
	case kind == "bool":
		return "true", "false"
	case strings.HasPrefix(kind, "int"), strings.HasPrefix(kind, "uint"):
		return "3", "4"
	case kind == "size":
		return `"200MiB"`, `"300MiB"`
	case kind == "duration":
		return `"71s"`, `"72s"`
	case kind == "level":
		return `"debug"`, `"error"`
	case kind == "format":
		return `"json"`, `"text"`
	}
	for _, pair := range [][2]string{{`"one"`, `"two"`}, {`"json"`, `"none"`}, {`"5%"`, `"6%"`}, {`"7d"`, `"8d"`}, {`"3"`, `"4"`}, {`"2"`, `"1"`}} {
		fresh := newTestFlag(t, f)
		first, second := strings.Trim(pair[0], `"`), strings.Trim(pair[1], `"`)
		if fresh.Value.Set(first) == nil && fresh.Value.Set(second) == nil {
			return pair[0], pair[1]
		}
	}
	t.Fatalf("no value is known that --%s of type %q takes", f.Name, f.Value.Type())
	return "", ""
}

// newTestFlag returns the same flag of another tree.
func newTestFlag(t *testing.T, f *pflag.Flag) (found *pflag.Flag) {
	t.Helper()
	_ = eachCommand(newTestCommand(), func(c *cobra.Command) error {
		if other := settable(c).Lookup(f.Name); other != nil && other.Usage == f.Usage {
			found = other
		}
		return nil
	})
	return found
}

// configured is what a flag of a command is when a variable, a file and a command line
// say something, each "" if it says nothing.
func configured(t *testing.T, path, flag, variable, config string, line ...string) (string, error) {
	t.Helper()
	if variable != "" {
		name, value, _ := strings.Cut(variable, "=")
		t.Setenv(name, value)
		defer os.Unsetenv(name)
	}
	a := &app{memory: defaultMemory, keys: newSecretKeys()}
	root := a.command()
	c, rest, err := root.Find(append(strings.Fields(path), line...))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.ParseFlags(rest); err != nil {
		t.Fatal(err)
	}
	file := &configFile{}
	if config != "" {
		if file, err = parseConfig("test.toml", []byte(config)); err != nil {
			return "", err
		}
	}
	if err := a.applySettings(c, file); err != nil {
		return "", err
	}
	f := c.Flags().Lookup(flag)
	if slice, ok := f.Value.(pflag.SliceValue); ok {
		return strings.Join(slice.GetSlice(), "\n"), nil
	}
	return f.Value.String(), nil
}

// tableOf is a configuration in which a flag of a command has a value.
func tableOf(path, flag, value string) string {
	if path == "" {
		return fmt.Sprintf("%s = %s\n", flag, value)
	}
	return fmt.Sprintf("[%s]\n%s = %s\n", strings.ReplaceAll(path, " ", "."), flag, value)
}

// Each flag of each command can be set on the command line, by its variable and in a
// file, and they go in this order.
func TestEveryFlagIsSetByLineVariableAndFile(t *testing.T) {
	clearEnvironment(t)
	flags, names := 0, make(map[string]string)
	_ = eachCommand(newTestCommand(), func(c *cobra.Command) error {
		path := commandPath(c)
		settable(c).VisitAll(func(f *pflag.Flag) {
			if f.Hidden || commandLineOnly[f.Name] != "" {
				return
			}
			flags++
			variable := variableName(path, f.Name)
			if other := names[variable]; other != "" {
				t.Errorf("%s is of --%s of '%s' and of %s", variable, f.Name, path, other)
			}
			names[variable] = "--" + f.Name + " of '" + path + "'"
			x, y := sampleValues(t, f)
			plainX, plainY := strings.Trim(x, `"`), strings.Trim(y, `"`)
			spelled := make(map[string]string) // as the flag itself spells it
			for _, value := range []string{plainX, plainY} {
				fresh := newTestFlag(t, f)
				if err := fresh.Value.Set(value); err != nil {
					t.Fatalf("--%s: %v", f.Name, err)
				}
				spelled[value] = fresh.Value.String()
				if slice, ok := fresh.Value.(pflag.SliceValue); ok {
					spelled[value] = strings.Join(slice.GetSlice(), "\n")
				}
			}
			running := path
			if running == "" {
				running = "gc" // any that has no flags of its own
			}
			for _, try := range []struct {
				what, variable, config, line, want string
			}{
				{what: "file", config: tableOf(path, f.Name, x), want: plainX},
				{what: "variable", variable: variable + "=" + plainX, want: plainX},
				{what: "variable before file", variable: variable + "=" + plainX, config: tableOf(path, f.Name, y), want: plainX},
				{what: "line before both", variable: variable + "=" + plainY, config: tableOf(path, f.Name, y), line: "--" + f.Name + "=" + plainX, want: plainX},
			} {
				var line []string
				if try.line != "" {
					line = append(line, try.line)
				}
				got, err := configured(t, running, f.Name, try.variable, try.config, line...)
				if err != nil || got != spelled[try.want] {
					t.Errorf("'%s' --%s by %s: got %q (%v), want %q", path, f.Name, try.what, got, err, spelled[try.want])
				}
			}
		})
		return nil
	})
	if flags < 60 {
		t.Errorf("only %d flags were tried", flags)
	}
	for _, reserved := range []string{configEnv, readyEnv, flusherEnv, inEventEnv} {
		if names[reserved] != "" {
			t.Errorf("%s means something else, and sets %s", reserved, names[reserved])
		}
	}
}

// The table of what only a command line sets has no flag that is gone.
func TestWhatOnlyALineSetsIsThere(t *testing.T) {
	there := make(map[string]bool)
	_ = eachCommand(newTestCommand(), func(c *cobra.Command) error {
		c.InitDefaultHelpFlag()
		c.Flags().VisitAll(func(f *pflag.Flag) { there[f.Name] = true })
		c.PersistentFlags().VisitAll(func(f *pflag.Flag) { there[f.Name] = true })
		return nil
	})
	for name := range commandLineOnly {
		if !there[name] {
			t.Errorf("no command has --%s", name)
		}
	}
}

func TestDangerousFlagsAreNotConfigured(t *testing.T) {
	clearEnvironment(t)
	if _, err := configured(t, "snapshot export", "force", "", "[snapshot.export]\nforce = true\n"); err == nil || !strings.Contains(err.Error(), "test.toml:2: force can be given on the command line only") {
		t.Errorf("got %v", err)
	}
	if got, err := configured(t, "snapshot export", "force", "LAZYVOL_SNAPSHOT_EXPORT_FORCE=true", ""); got != "false" || err != nil {
		t.Errorf("the variable made it %q, %v", got, err)
	}
}

func TestFlagsThatAreRepeatedTakeArraysAndLines(t *testing.T) {
	clearEnvironment(t)
	const want = "a=1\nb=2"
	for _, try := range [][2]string{
		{"", "[snapshot.create]\ntag = [\"a=1\", \"b=2\"]\n"},
		{"LAZYVOL_SNAPSHOT_CREATE_TAG=a=1\nb=2", ""},
	} {
		if got, err := configured(t, "snapshot create", "tag", try[0], try[1]); got != want || err != nil {
			t.Errorf("%q: got %q, %v", try, got, err)
		}
	}
	got, err := configured(t, "snapshot create", "tag", "", "[snapshot.create]\ntag = [\"a=1\"]\n", "--tag=c=3")
	if got != "c=3" || err != nil {
		t.Errorf("a line does not replace what a file has: %q, %v", got, err)
	}
}

// A file that says something wrong is refused, with each place, and with what was
// perhaps meant.
func TestWrongConfigurationsNameFileAndLine(t *testing.T) {
	clearEnvironment(t)
	for config, wants := range map[string][]string{
		"memry = \"1GiB\"\n":                                {`test.toml:1: unknown key "memry"; did you mean memory?`},
		"# c\n\n[mount]\ncache-sze = \"1GiB\"\n":            {`test.toml:4: unknown key "mount.cache-sze"; did you mean cache-size?`},
		"[mont]\nno-hydrate = true\n":                       {`test.toml:1: unknown key "mont"`, "did you mean", "mount"},
		"[snapshot.crate]\n":                                {`test.toml:1: unknown key "snapshot.crate"; did you mean create?`},
		"mount = 1\n":                                       {"test.toml:1: mount is a command: its flags go into a table, [mount]"},
		"[mount]\nno-hydrate = \"yes\"\n":                   {`test.toml:2: mount.no-hydrate: true or false is wanted, and "yes" is none`},
		"[mount]\nuid = \"root\"\n":                         {`test.toml:2: mount.uid: a number is wanted, and "root" is none`},
		"[mount]\nuid = -1\n":                               {"test.toml:2: mount.uid:"},
		"[mount]\nread-deadline = 60\n":                     {`test.toml:2: mount.read-deadline: a time like "60s" is wanted, and 60 is none`},
		"memory = true\n":                                   {`test.toml:1: memory: a size like "512MiB" is wanted, and true is none`},
		"memory = \"much\"\n":                               {`test.toml:1: memory: "much" is not a size`},
		"store = [\"a\"]\n":                                 {"test.toml:1: store: a string is wanted, and an array is none"},
		"[store]\nurl = \"x\"\n":                            {"test.toml:1: store: a string is wanted, and a table is none"},
		"[snapshot.create]\ntag = [\n  \"a=1\",\n  7,\n]\n": {"test.toml:2: snapshot.create.tag: an array of strings is wanted, and 7 is none"},
		"[snapshot.create]\ntag = [\n  \"a=1\",\n]\n[mount]\nxyz = 1\n": {`test.toml:6: unknown key "mount.xyz"`},
		"log-level = \"loud\"\n":                                  {`test.toml:1: log-level: "loud" is not debug, info, warn or error`},
		"settled = true\n":                                        {`test.toml:1: unknown key "settled"`},
		"[mount]\nhelp = true\n":                                  {`test.toml:2: unknown key "mount.help"`},
		"state = \"a\"\nstate = \"b\"\n":                          {"test.toml:2:"},
		"state = \n":                                              {"test.toml:1:"},
		"memry = 1\nstore = \"s\"\n[mount]\nnot = 1\n":            {"test.toml:1:", "test.toml:4:"}, // all of it
		"[[mount]]\nuid = 1\n":                                    {"test.toml:1: mount is a command: its flags go into a table"},
		"[version]\njson = \"x\"\n":                               {"test.toml:2: version.json: true or false"},
		strings.Repeat("# a comment\n", 300) + "[mount]\nxyz = 1": {`test.toml:302: unknown key "mount.xyz"`},
	} {
		_, err := parseConfig("test.toml", []byte(config))
		if err == nil || exitCode(err) != exitUsage {
			t.Errorf("%q: %v, want a usage error", config, err)
			continue
		}
		for _, want := range wants {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q: got %q, want %q", config, err, want)
			}
		}
	}
}

// A file of another program that is named by mistake is refused at once, however large,
// and with no more lines than a terminal shows. What takes many lines costs no more.
func TestLargeConfigurationsAreCheckedInBoundedTime(t *testing.T) {
	clearEnvironment(t)
	var wrong strings.Builder
	for i := range 50_000 {
		fmt.Fprintf(&wrong, "key%d = 1\n", i)
	}
	_, err := parseConfig("test.toml", []byte(wrong.String()))
	if err == nil || exitCode(err) != exitUsage || strings.Count(err.Error(), "\n") != maxFaults || !strings.HasSuffix(err.Error(), fmt.Sprintf("test.toml: and %d more", 50_000-maxFaults)) {
		t.Errorf("%.3000v", err)
	}
	array := "[snapshot.create]\ntag = [\n" + strings.Repeat("\"a=b\",\n", 50_000) + "]\n"
	if _, err := parseConfig("test.toml", []byte(array)); err != nil {
		t.Error(err)
	}
	_, err = parseConfig("test.toml", []byte(array+"mount.x.y = 1\n"))
	if err == nil || !strings.Contains(err.Error(), "test.toml:50004: unknown key \"snapshot.create.mount\"") {
		t.Errorf("%.3000v", err)
	}
}

// Whether a pipe has a writer is not waited for.
func TestAConfigurationIsARegularFile(t *testing.T) {
	clearEnvironment(t)
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := try(t, "--config", pipe, "config", "show"); code != exitUsage || !strings.Contains(stderr, "no regular file") {
		t.Errorf("exit %d: %s", code, stderr)
	}
}

func TestAFileThatOthersMayWriteIsRefused(t *testing.T) {
	name := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	check := func(mode os.FileMode, user int) error {
		t.Helper()
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		return checkCustody(f, user)
	}
	me := os.Geteuid()
	for _, mode := range []os.FileMode{0o600, 0o644, 0o400} {
		if err := check(mode, me); err != nil {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
	if err := check(0o646, me); err == nil || !strings.Contains(err.Error(), "chmod o-w") {
		t.Errorf("everybody may write it: %v", err)
	}
	if me != 0 {
		t.Fatal("this test needs root, as CI has")
	}
	if err := os.Chown(name, 1234, 1234); err != nil {
		t.Fatal(err)
	}
	if err := check(0o600, 0); err == nil || !strings.Contains(err.Error(), "belongs to user 1234") {
		t.Errorf("root is to use another's: %v", err)
	}
	if err := check(0o660, 1234); err != nil {
		t.Errorf("its owner's group may write it, as distributions have it: %v", err)
	}
	if err := os.Chown(name, 0, 1234); err != nil {
		t.Fatal(err)
	}
	if err := check(0o660, 0); err == nil || !strings.Contains(err.Error(), "chmod g-w") {
		t.Errorf("a group may write root's: %v", err)
	}
	if err := check(0o644, 1234); err != nil {
		t.Errorf("a user uses root's: %v", err)
	}
	code, _, stderr := try(t, "--config", t.TempDir(), "version")
	if code != exitDone {
		t.Errorf("the version needs a configuration: exit %d: %s", code, stderr)
	}
	if code, _, stderr = try(t, "--config", t.TempDir(), "status"); code != exitUsage || !strings.Contains(stderr, "is a directory") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	if code, _, stderr = try(t, "--config", filepath.Join(t.TempDir(), "none"), "status"); code != exitUsage || !strings.Contains(stderr, "no such file") {
		t.Errorf("a file that was named and is not there: exit %d: %s", code, stderr)
	}
}

// What 'config show' prints is a configuration that says the same.
func TestShownConfigurationsMeanTheSame(t *testing.T) {
	clearEnvironment(t)
	state := t.TempDir()
	name := filepath.Join(t.TempDir(), "config.toml")
	config := "state = '" + state + "'\nmemory = \"256MiB\"\n[mount]\nno-hydrate = true\nuid = 7\ncache-size = \"1GiB\"\n[snapshot.create]\ntag = [\"a=1\", \"b=2\"]\n"
	if err := os.WriteFile(name, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("LAZYVOL_MOUNT_UID", "8")
	t.Setenv("LAZYVOL_OWNER", "123456789012")
	shown := ok(t, "--config", name, "--on-event", "true", "config", "show")
	for _, want := range []string{
		"# " + name + ":1\n", "uid = 8  # LAZYVOL_MOUNT_UID\n", "# " + name + ":4\n", `tag = ["a=1", "b=2"]  # ` + name + ":8", `owner-id = "123456789012"  # LAZYVOL_OWNER`,
		`on-event = "true"  # command line`, "[snapshot.create]\n",
	} {
		if !strings.Contains(shown+"\n", want) {
			t.Errorf("no %q in\n%s", want, shown)
		}
	}
	again := filepath.Join(t.TempDir(), "again.toml")
	if err := os.WriteFile(again, []byte(shown), 0o600); err != nil {
		t.Fatal(err)
	}
	ok(t, "config", "check", again)
	for _, v := range []string{"LAZYVOL_MOUNT_UID", "LAZYVOL_OWNER"} {
		if err := os.Unsetenv(v); err != nil {
			t.Fatal(err)
		}
	}
	values := func(out string) map[string]any {
		var all struct{ Settings []effective }
		if err := json.Unmarshal([]byte(out), &all); err != nil {
			t.Fatal(err)
		}
		found := make(map[string]any)
		for _, s := range all.Settings {
			found[s.Command+" "+s.Flag] = fmt.Sprint(s.Value)
		}
		return found
	}
	got := values(ok(t, "--config", again, "config", "show", "--json"))
	if len(got) != 8 || got["mount uid"] != "8" || got["snapshot create tag"] != "[a=1 b=2]" || got[" state"] != state {
		t.Errorf("it became %v", got)
	}
	all := ok(t, "--config", again, "config", "show", "--all")
	if err := os.WriteFile(again, []byte(all), 0o600); err != nil {
		t.Fatal(err)
	}
	ok(t, "config", "check", again)
	if !strings.Contains(all, "# default") || !strings.Contains(all, "[volume.create]") {
		t.Errorf("not all are shown:\n%s", all)
	}
}

// A wrong value is told with where it comes from; it is not taken for none.
func TestWrongVariablesAreNamed(t *testing.T) {
	clearEnvironment(t)
	t.Setenv("LAZYVOL_STATE", t.TempDir())
	t.Setenv("LAZYVOL_MEMORY", "much")
	code, _, stderr := try(t, "status")
	if code != exitUsage || !strings.Contains(stderr, "LAZYVOL_MEMORY:") {
		t.Errorf("exit %d: %s", code, stderr)
	}
	t.Setenv("LAZYVOL_MEMORY", "") // empty is none
	ok(t, "status")
	t.Setenv("LAZYVOL_JSON", "true")
	if out := ok(t, "status"); !strings.HasPrefix(out, "{") {
		t.Errorf("status has its own --json, which LAZYVOL_JSON sets too: %s", out)
	}
}

// LAZYVOL_KEY is a default: it is for what begins a lineage, and no reason to refuse
// what does not.
func TestAKeyOfTheEnvironmentIsNotGiven(t *testing.T) {
	clearEnvironment(t)
	t.Setenv(keyEnv, "file:///none")
	a := &app{memory: defaultMemory, keys: newSecretKeys()}
	root := a.command()
	c, _, err := root.Find([]string{"snapshot", "create"})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.applySettings(c, &configFile{}); err != nil {
		t.Fatal(err)
	}
	if a.givenHere(c, "key") || c.Flags().Lookup("key").Value.String() != "file:///none" {
		t.Errorf("given: %v, value %q", a.givenHere(c, "key"), c.Flags().Lookup("key").Value)
	}
	if err := c.ParseFlags([]string{"--key=file:///other"}); err != nil {
		t.Fatal(err)
	}
	b := &app{memory: defaultMemory, keys: newSecretKeys()}
	if c, _, err = b.command().Find([]string{"snapshot", "create"}); err != nil {
		t.Fatal(err)
	}
	if err := c.ParseFlags([]string{"--key=file:///other"}); err != nil {
		t.Fatal(err)
	}
	if err := b.applySettings(c, &configFile{}); err != nil || !b.givenHere(c, "key") {
		t.Errorf("given on the line: %v, %v", b.givenHere(c, "key"), err)
	}
}

// A background process has all global flags on its command line, as they were resolved,
// and asks neither the environment nor a file again.
func TestBackgroundProcessesInheritWhatWasResolved(t *testing.T) {
	clearEnvironment(t)
	parent := &app{memory: defaultMemory, keys: newSecretKeys(), stderr: &strings.Builder{}}
	root := parent.command()
	skipped := map[string]bool{"json": true, "progress": true, "config": true, "on-event": true} // of the person at the terminal; the last is told by the environment
	var line []string
	root.PersistentFlags().VisitAll(func(f *pflag.Flag) {
		if f.Hidden || skipped[f.Name] || commandLineOnly[f.Name] != "" {
			return
		}
		value, _ := sampleValues(t, f)
		line = append(line, "--"+f.Name+"="+strings.Trim(value, `"`))
	})
	if err := root.PersistentFlags().Parse(line); err != nil {
		t.Fatal(err)
	}
	if err := parent.resolve(); err != nil {
		t.Fatal(err)
	}
	parent.memoryGiven, parent.onEvent = true, "curl -H 'Authorization: secret' https://example.org"
	child := &app{memory: defaultMemory, keys: newSecretKeys()}
	childRoot := child.command()
	args := append([]string{"--" + settledFlag}, parent.globalArgs()...)
	if err := childRoot.PersistentFlags().Parse(args); err != nil {
		t.Fatal(err)
	}
	root.PersistentFlags().VisitAll(func(f *pflag.Flag) {
		if got := childRoot.PersistentFlags().Lookup(f.Name).Value.String(); !skipped[f.Name] && f.Name != settledFlag && got != f.Value.String() {
			t.Errorf("--%s is %q in the background, and was %q", f.Name, got, f.Value)
		}
	})
	if strings.Contains(strings.Join(args, " "), "secret") {
		t.Errorf("each user of the host can read %q", args)
	}
	for _, v := range parent.backgroundEnv() {
		if name, value, _ := strings.Cut(v, "="); name == onEventEnv {
			t.Setenv(name, value)
		}
	}
	t.Setenv(configEnv, filepath.Join(t.TempDir(), "none"))
	c, _, err := childRoot.Find([]string{"mount"})
	if err != nil {
		t.Fatal(err)
	}
	c.SetContext(context.Background())
	if err := child.configure(c); err != nil || child.onEvent != parent.onEvent {
		t.Errorf("it asked again: %q, %v", child.onEvent, err)
	}
}

// The command that is handed events is no source of events, whatever a file says.
func TestAHookHasNoHook(t *testing.T) {
	clearEnvironment(t)
	t.Setenv(inEventEnv, "1")
	if got, err := configured(t, "gc", "on-event", "", "on-event = \"true\"\n"); got != "" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}

// What a setting says of an option that needs another, or excludes it, is no reason to
// refuse what the command line says.
func TestSettingsYieldToWhatTheLineExcludes(t *testing.T) {
	clearEnvironment(t)
	t.Setenv("LAZYVOL_STATE", t.TempDir())
	const a, b = "snap-1a2b3c4d567890abc", "snap-1a2b3c4d567890abd"
	for _, c := range []struct {
		line            []string
		contrary        string // an option that it does not go with
		setting, sample string // the same as a variable
		done            int    // the exit code without it
	}{
		{[]string{"status"}, "--interval=5s", "LAZYVOL_STATUS_INTERVAL", "5s", exitDone},
		{[]string{"snapshot", "map", a, "--output=x.svg"}, "--json", "LAZYVOL_JSON", "true", exitNotFound},
		{[]string{"snapshot", "map", a, "--text"}, "--json", "LAZYVOL_JSON", "true", exitNotFound},
		{[]string{"snapshot", "map", a, "--json"}, "--text", "LAZYVOL_SNAPSHOT_MAP_TEXT", "true", exitNotFound},
		{[]string{"snapshot", "diff", a, b, "--human"}, "--json", "LAZYVOL_JSON", "true", exitNotFound},
	} {
		if code, _, stderr := try(t, append(c.line, c.contrary)...); code != exitUsage {
			t.Errorf("%q with %s: exit %d: %s", c.line, c.contrary, code, stderr)
		}
		t.Setenv(c.setting, c.sample)
		if code, _, stderr := try(t, c.line...); code != c.done {
			t.Errorf("%q with %s: exit %d: %s", c.line, c.setting, code, stderr)
		}
		t.Setenv(c.setting, "")
	}
}
