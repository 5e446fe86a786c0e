package main

import (
	"context"

	"github.com/spf13/cobra"
)

// doctorName is the command that works without a configuration file that is wrong, to
// tell what is wrong with it.
const doctorName = "doctor"

// goOnWithout returns what failed when a command was configured; nil if it is the
// doctor, which then goes by the environment alone.
func (a *app) goOnWithout(c *cobra.Command, failed error) error {
	if failed == nil || commandPath(c) != doctorName {
		return failed
	}
	a.misconfigured = failed
	return a.applySettings(c, &configFile{})
}

func (a *app) examineConfig(c *cobra.Command) func(context.Context) finding {
	return func(context.Context) finding {
		name := ""
		if file, err := a.openConfig(c); err == nil {
			name = file.name
		}
		return judgeConfig(name, a.misconfigured)
	}
}

func judgeConfig(name string, wrong error) finding {
	switch {
	case wrong != nil:
		return fail("'lazyvol config check' names each line; all other commands refuse it, and the other checks here go by the environment alone", "%v", wrong)
	case name == "":
		return skip("there is no configuration file")
	}
	return fine("%s is valid", name)
}

// keyURI is the key that new snapshots are encrypted under, and where that is said; ""
// if it is said nowhere.
func (a *app) keyURI(c *cobra.Command) (uri string, from origin) {
	create, _, err := c.Root().Find([]string{"snapshot", "create"})
	if err != nil {
		return "", ""
	}
	file, err := a.openConfig(c)
	if err != nil { // as examineConfig tells
		file = &configFile{}
	}
	values, from, err := lookUp(create, create.Flags().Lookup("key"), file)
	if err != nil || len(values) == 0 {
		return "", ""
	}
	return values[0], from
}
