package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// unknownCommand refuses a word that is none of c's commands.
func unknownCommand(c *cobra.Command, word string) error {
	var names []string
	for _, sub := range c.Commands() {
		if sub.IsAvailableCommand() {
			names = append(names, sub.Name())
		}
	}
	what := fmt.Sprintf("unknown command %q", word)
	if c.HasParent() {
		what += fmt.Sprintf(" for %q", c.CommandPath())
	}
	return usageError{fmt.Errorf("%s%s; see '%s --help'", what, didYouMean(nearest(word, names)), c.CommandPath())}
}

// helpTopic refuses words that name no command.
func helpTopic(c *cobra.Command, words []string) error {
	topic, rest, err := c.Root().Find(words)
	if err != nil || len(rest) == 0 {
		return err
	}
	return unknownCommand(topic, rest[0])
}

// badFlag refuses flags that cannot be parsed. On a command that only has subcommands
// it is the word before them that was wrong.
func badFlag(c *cobra.Command, err error) error {
	if words := c.Flags().Args(); c.HasSubCommands() && len(words) > 0 {
		return unknownCommand(c, words[0])
	}
	hint := ""
	if unknown := (*pflag.NotExistError)(nil); errors.As(err, &unknown) && unknown.GetSpecifiedShortnames() == "" {
		var names []string
		add := func(f *pflag.Flag) {
			if !f.Hidden {
				names = append(names, "--"+f.Name)
			}
		}
		c.Flags().VisitAll(add)
		hint = didYouMean(nearest("--"+unknown.GetSpecifiedName(), names))
	}
	return usageError{fmt.Errorf("%w%s; see '%s --help'", err, hint, c.CommandPath())}
}

func didYouMean(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return "; did you mean " + strings.Join(names, " or ") + "?"
}

// nearest returns the names that a word may have been meant to be, sorted: those that
// begin with it, else those that are the fewest slips away, one for each three letters
// at most. Dashes before them are no letters.
func nearest(word string, names []string) (found []string) {
	bare := strings.TrimLeft(word, "-")
	if bare == "" {
		return nil
	}
	for _, name := range names {
		if strings.HasPrefix(name, word) {
			found = append(found, name)
		}
	}
	best := max(1, len(bare)/3)
	if len(found) == 0 && len(word) <= 64 { // no name is longer
		for _, name := range names {
			d := slips(word, name)
			if d < best {
				best, found = d, nil
			}
			if d == best && d < len(strings.TrimLeft(name, "-")) {
				found = append(found, name)
			}
		}
	}
	slices.Sort(found)
	return found
}

// slips is how many letters to leave out, put in, change or swap with their neighbour
// make b of a (optimal string alignment distance).
func slips(a, b string) int {
	from, to := []rune(a), []rune(b)
	d := make([][]int, len(from)+1)
	for i := range d {
		d[i] = make([]int, len(to)+1)
		d[i][0] = i
	}
	for j := range to {
		d[0][j+1] = j + 1
	}
	for i := 1; i <= len(from); i++ {
		for j := 1; j <= len(to); j++ {
			change := d[i-1][j-1]
			if from[i-1] != to[j-1] {
				change++
			}
			d[i][j] = min(change, d[i-1][j]+1, d[i][j-1]+1)
			if i > 1 && j > 1 && from[i-1] == to[j-2] && from[i-2] == to[j-1] {
				d[i][j] = min(d[i][j], d[i-2][j-2]+1)
			}
		}
	}
	return d[len(from)][len(to)]
}
