package main

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// configEnv names the configuration file, as --config does; empty, that there is none.
const configEnv = "LAZYVOL_CONFIG"

// variablePrefix begins the name of each flag's variable.
const variablePrefix = "LAZYVOL_"

// variableAliases are older, or shorter, names of variables. That of a flag is asked
// first.
var variableAliases = map[string]string{
	"owner-id": "LAZYVOL_OWNER",
	"key":      keyEnv, // of whichever command
}

// commandLineOnly are the flags that neither variables nor files may set, on whichever
// command, and why.
var commandLineOnly = map[string]string{
	"help":    "it is a question",
	"config":  "it says where settings are",
	"force":   "it overwrites what is there: whoever wants that says so each time",
	"yes":     "it answers a question that is to be asked each time",
	"in-use":  "it takes away what is in use",
	"repair":  "it writes to the store, and the command else does not",
	"mode":    "a lock in compliance mode cannot be taken away",
	"add":     "it is what the command does",
	"remove":  "it is what the command does",
	"account": "it is what the command does",
	"pause":   "it is what the command does",
	"resume":  "it is what the command does",
}

// configless are the commands that work whatever a configuration says.
var configless = []string{
	"completion", "man", "version", "help", "config check", probeCommand,
	cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd, // candidates are configured by the line that is completed
}

// An origin says where the value of a flag comes from: the command line (""), a
// variable, or a line of a file.
type origin string

// commandPath is a command's path below the root: "snapshot create"; "" is the root.
func commandPath(c *cobra.Command) string {
	_, path, _ := strings.Cut(c.CommandPath(), " ")
	return path
}

// configure gives the flags of c that are not on its command line what the
// environment or else the configuration file says.
func (a *app) configure(c *cobra.Command) error {
	if a.settled {
		a.onEvent = os.Getenv(onEventEnv) // see backgroundEnv
		return nil
	}
	if slices.Contains(configless, commandPath(c)) {
		return nil
	}
	file, err := a.openConfig(c)
	if err != nil {
		return err
	}
	return a.applySettings(c, file)
}

// openConfig reads the configuration file of an invocation; it is empty if there is
// none.
func (a *app) openConfig(c *cobra.Command) (*configFile, error) {
	name, named := os.LookupEnv(configEnv)
	if flag := c.Flags().Lookup("config"); flag != nil && flag.Changed {
		name, named = flag.Value.String(), true
	}
	if !named {
		var err error
		if name, err = defaultConfig(); err != nil {
			return nil, err
		}
	}
	if name == "" {
		return &configFile{}, nil
	}
	return readConfig(name)
}

func (a *app) applySettings(c *cobra.Command, file *configFile) error {
	var failed error
	c.Flags().VisitAll(func(f *pflag.Flag) {
		if f.Changed || failed != nil {
			return
		}
		values, from, err := lookUp(c, f, file)
		for _, v := range values {
			if err == nil {
				err = c.Flags().Set(f.Name, v)
			}
		}
		switch {
		case err != nil:
			failed = usageError{fmt.Errorf("%s: %w", from, err)}
		case len(values) > 0:
			if a.origins == nil {
				a.origins = make(map[*pflag.Flag]origin)
			}
			a.origins[f] = from
		}
	})
	return failed
}

// givenHere reports whether a flag of c is on the command line.
func (a *app) givenHere(c *cobra.Command, name string) bool {
	f := c.Flags().Lookup(name)
	return f != nil && f.Changed && a.origins[f] == ""
}

// chosen reports whether a switch of c is on: if a variable or a file says so, only while
// the command line has none of those that exclude it.
func (a *app) chosen(c *cobra.Command, name string, excluding ...string) bool {
	given := func(name string) bool { return a.givenHere(c, name) }
	return c.Flags().Lookup(name).Value.String() == "true" && (given(name) || !slices.ContainsFunc(excluding, given))
}

// lookUp returns what the environment, or else the file, says of a flag of c. No
// values: nothing.
func lookUp(c *cobra.Command, f *pflag.Flag, file *configFile) (values []string, from origin, err error) {
	if commandLineOnly[f.Name] != "" || f.Hidden || f.Name == "on-event" && os.Getenv(inEventEnv) != "" {
		return nil, "", nil
	}
	for _, name := range variables(c, f) {
		if v := os.Getenv(name); v != "" {
			return split(f, v), origin(name), nil
		}
	}
	for _, path := range settingPaths(c, f) {
		if s, ok := file.find(path, f.Name); ok {
			values, err = s.values(f)
			return values, s.origin(), err
		}
	}
	return nil, "", nil
}

// split returns the values of a variable: of a flag that may be repeated, one a line.
func split(f *pflag.Flag, v string) []string {
	if isRepeatable(f) {
		return slices.DeleteFunc(strings.Split(v, "\n"), func(s string) bool { return s == "" })
	}
	return []string{v}
}

func isRepeatable(f *pflag.Flag) bool {
	_, slice := f.Value.(pflag.SliceValue)
	return slice
}

// settingPaths are the commands under which a flag of c is set, the first that has it:
// its own and, for one that all commands have, "".
func settingPaths(c *cobra.Command, f *pflag.Flag) (paths []string) {
	if c.HasParent() && c.LocalFlags().Lookup(f.Name) == f {
		paths = append(paths, commandPath(c))
	}
	if c.Root().PersistentFlags().Lookup(f.Name) != nil {
		paths = append(paths, "")
	}
	return paths
}

// variables are the variables that set a flag of c, the first that is set.
func variables(c *cobra.Command, f *pflag.Flag) (names []string) {
	for _, path := range settingPaths(c, f) {
		names = append(names, variableName(path, f.Name))
	}
	if alias := variableAliases[f.Name]; alias != "" {
		names = append(names, alias)
	}
	return names
}

// variableName is the rule by which variables are named: LAZYVOL_, the words of the
// command, and the flag, in capitals, with underscores between words.
func variableName(path, flag string) string {
	words := strings.TrimSpace(path + " " + flag)
	return variablePrefix + strings.ToUpper(strings.NewReplacer(" ", "_", "-", "_").Replace(words))
}
