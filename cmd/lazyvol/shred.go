package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/manifest"
)

func (a *app) keyShredCommand() *cobra.Command {
	var yes, inUse bool
	c := &cobra.Command{
		Use: "shred LINEAGE|SNAP", Short: "Destroy the key of an encrypted lineage, and so all of its snapshots", Args: args(cobra.ExactArgs(1)),
		Long: `Destroys the wrapped data key of an encrypted lineage in the store. After that
nobody can read any of its snapshots again, and 'lazyvol gc' frees their space. It
cannot be undone. The lineage is the first 8 digits of its snapshots' ids.

Refused while a snapshot of it is locked, or pinned by a volume or a mount: a volume
keeps a copy of the wrapped key on its host until it is deleted. A bucket that keeps
former versions of objects keeps that of the wrapped key, too.`,
		Example: "  lazyvol key shred 1a2b3c4d",
		RunE: func(c *cobra.Command, args []string) error {
			id, err := parseLineage(args[0])
			if err != nil {
				return err
			}
			store, err := a.openStore(c.Context(), "", commandPatience)
			if err != nil {
				return err
			}
			if !yes {
				if !a.canAsk() {
					return usageError{errors.New("there is nobody to ask: give --yes")}
				}
				if err := a.confirm(c.Context(), fmt.Sprintf("This destroys all snapshots of lineage %s for ever.", id), id.String()); err != nil {
					return err
				}
			}
			if err := store.Shred(c.Context(), id, inUse); err != nil {
				return err
			}
			fmt.Fprintf(a.stderr, "the key of lineage %s is destroyed; 'lazyvol gc' frees what it took\n", id)
			return nil
		},
	}
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	c.Flags().BoolVar(&inUse, "in-use", false, "also while volumes or mounts have a snapshot of it in use")
	return c
}

func parseLineage(s string) (manifest.LineageID, error) {
	if strings.HasPrefix(s, "snap-") {
		id, err := parseSnapshot(s)
		return id.Lineage, err
	}
	id, err := manifest.ParseLineageID(s)
	if err != nil {
		return id, usageError{err}
	}
	return id, nil
}
