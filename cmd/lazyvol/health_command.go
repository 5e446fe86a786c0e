package main

import (
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
)

func (a *app) healthCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "health [VOL|SNAP|DIR]", Short: "Tell whether mounts are healthy", Args: args(cobra.MaximumNArgs(1)),
		Long: `Tells whether a mounted volume or snapshot is healthy; without argument, whether
all of this host are. Exits with 0 if so, and with 1 if one is degraded (it serves,
and somebody should look after it) or has failed, with the reasons on stdout. It
takes 10 seconds at most, also when a daemon or a mount hangs.`,
		Example: `  lazyvol health
  lazyvol health --json vol-0123456789abcdef0`,
		RunE: func(c *cobra.Command, args []string) error {
			all, err := a.fleet()
			if err != nil {
				return err
			}
			if len(args) == 1 {
				if all, err = a.findServed(all, args[0]); err != nil {
					return err
				}
			}
			fleet := a.fleetHealth(c.Context(), all, newProber())
			if len(args) == 1 && len(fleet.Served) == 0 {
				h := healthJSON{ID: all[0].id, Mountpoint: all[0].mountpoint, Status: healthy}
				h.add("daemon", broken, "it is not mounted")
				fleet.Status, fleet.Served = h.Status, append(fleet.Served, h)
			}
			if asJSON {
				err = printJSON(a.stdout, fleet)
			} else {
				err = printHealth(a.stdout, fleet)
			}
			if err == nil && fleet.Status != healthy {
				err = codedError{"not everything is healthy", exitFailed}
			}
			return err
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// findServed is find for a directory that may be relative, or have symbolic links
// above it. What is mounted there is not asked.
func (a *app) findServed(all []served, word string) ([]served, error) {
	if !strings.HasPrefix(word, "vol-") && !strings.HasPrefix(word, "snap-") {
		dir, err := filepath.Abs(word)
		if err != nil {
			return nil, err
		}
		if parent, err := filepath.EvalSymlinks(filepath.Dir(dir)); err == nil {
			dir = filepath.Join(parent, filepath.Base(dir))
		}
		word = dir
	}
	return a.find(all, word)
}

func printHealth(w io.Writer, fleet fleetHealth) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	for _, h := range fleet.Served {
		mountpoint := h.Mountpoint
		if mountpoint == "" {
			mountpoint = "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\n", h.ID, oneLine(mountpoint), h.Status)
		for _, r := range h.Reasons {
			fmt.Fprintf(t, "  %s\t%s\t%s\n", r.Check, r.Status, oneLine(r.Message))
		}
	}
	return t.Flush()
}
