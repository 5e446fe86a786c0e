package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/BurntSushi/toml"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func (a *app) configCommand() *cobra.Command {
	return group("config", "Look at the configuration", a.configShowCommand(), a.configCheckCommand())
}

func (a *app) configShowCommand() *cobra.Command {
	var all, asJSON bool
	c := &cobra.Command{
		Use: "show", Short: "Show what is configured, and where", Args: args(cobra.NoArgs),
		Long: `Shows the flags that the environment, the configuration file or this command line
set, as a configuration file has them, each with where it comes from. With --all the
others too, with their defaults.`,
		Example: `  lazyvol config show
  lazyvol --config /etc/lazyvol/config.toml config show --all`,
		RunE: func(c *cobra.Command, _ []string) error {
			file, err := a.openConfig(c)
			if err != nil {
				return err
			}
			settings, err := a.effective(c, file, all)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(a.stdout, struct {
					File     string      `json:"file,omitempty"`
					Settings []effective `json:"settings"`
				}{file.name, settings})
			}
			return a.printSettings(settings)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "show those that are not set too")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// An effective setting is what a flag is without a command line of its own.
type effective struct {
	Command string `json:"command,omitempty"`
	Flag    string `json:"flag"`
	Value   any    `json:"value"`
	From    origin `json:"from"`
}

// The origins of what neither the environment nor a file sets.
const (
	fromCommandLine origin = "command line"
	fromDefault     origin = "default"
)

// effective lists the settings, those of all commands first.
func (a *app) effective(running *cobra.Command, file *configFile, all bool) (found []effective, err error) {
	err = eachCommand(running.Root(), func(c *cobra.Command) error {
		var failed error
		settable(c).VisitAll(func(f *pflag.Flag) {
			if f.Hidden || commandLineOnly[f.Name] != "" {
				return
			}
			values, from, err := lookUp(c, f, file)
			if err == nil {
				err = fits(f, values)
			}
			switch {
			case err != nil:
				failed = errors.Join(failed, usageError{fmt.Errorf("%s: %w", from, err)})
				return
			case f.Changed && !c.HasParent() && a.origins[f] == "":
				values, from = []string{f.Value.String()}, fromCommandLine
			case len(values) == 0 && !all:
				return
			case len(values) == 0:
				values, from = []string{f.DefValue}, fromDefault
			}
			found = append(found, effective{commandPath(c), f.Name, tomlValue(f, values), from})
		})
		return failed
	})
	return found, err
}

// fits reports what is wrong with values for a flag, which is left as it is: this
// command does not use it.
func fits(f *pflag.Flag, values []string) error {
	for _, v := range values {
		if isRepeatable(f) || f.Changed {
			continue // checked when it is used, or was
		}
		was := f.Value.String()
		err := f.Value.Set(v)
		if err != nil {
			return err
		}
		if was != "" {
			_ = f.Value.Set(was) // it was its own
		}
	}
	return nil
}

// tomlValue is what a file would have.
func tomlValue(f *pflag.Flag, values []string) any {
	kind := f.Value.Type()
	switch {
	case isRepeatable(f):
		if len(values) == 1 && values[0] == "[]" { // none, as pflag spells it
			return []string{}
		}
		return values
	case kind == "bool":
		return values[0] == "true"
	case strings.HasPrefix(kind, "int"), strings.HasPrefix(kind, "uint"):
		var n int64
		if _, err := fmt.Sscan(values[0], &n); err == nil {
			return n
		}
	}
	return values[0]
}

func (a *app) printSettings(settings []effective) error {
	table := ""
	for _, s := range settings {
		if s.Command != table {
			table = s.Command
			fmt.Fprintf(a.stdout, "\n[%s]\n", strings.ReplaceAll(table, " ", "."))
		}
		line, err := toml.Marshal(map[string]any{s.Flag: s.Value})
		if err != nil {
			return err
		}
		if s.From == fromDefault && s.Value == "" {
			fmt.Fprint(a.stdout, "# ") // it is not set, and perhaps no value that its flag takes
		}
		fmt.Fprintf(a.stdout, "%s  # %s\n", strings.TrimSuffix(string(line), "\n"), s.From)
	}
	return nil
}

func (a *app) configCheckCommand() *cobra.Command {
	return &cobra.Command{
		Use: "check FILE", Short: "Check a configuration file", Args: args(cobra.ExactArgs(1)),
		Long: `Checks a configuration file: that it is TOML, that each key is a flag and each
table a command, that each value is one that the flag takes, and that nobody else may
write it. Exits with 2 and names each line that is wrong.`,
		Example: `  lazyvol config check /etc/lazyvol/config.toml`,
		RunE: func(_ *cobra.Command, args []string) error {
			file, err := readConfig(args[0])
			if err != nil {
				return err
			}
			fmt.Fprintf(a.stderr, "%s: %d settings, all right\n", file.name, len(file.settings))
			return nil
		},
	}
}
