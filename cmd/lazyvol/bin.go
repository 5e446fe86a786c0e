package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// binnedJSON is a snapshot in the recycle bin with EBS's names.
type binnedJSON struct {
	SnapshotId          string
	VolumeId            string
	Description         string
	RecycleBinEnterTime time.Time
	RecycleBinExitTime  time.Time
	Tags                []tag // those of EBS, which tags such snapshots, included
}

// binTag is the tag that EBS gives to what is in the recycle bin.
const binTag = "aws:recycle-bin:resource-in-bin"

func (a *app) snapshotListBinCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "list-bin", Short: "List the snapshots in the recycle bin", Args: args(cobra.NoArgs),
		Long: `Lists the snapshots that were deleted and can be brought back, those first that
leave the bin first. They keep their space until then. They can be tagged and restored,
and nothing else; volumes and mounts that were opened from one before go on.

Nothing is deleted out of the bin by hand, as in EBS. To free space sooner, restore the
snapshot, take the rule out of the store's policy, and delete it again.`,
		Example: "  lazyvol snapshot list-bin",
		RunE:    func(c *cobra.Command, _ []string) error { return a.listBin(c.Context(), asJSON) },
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func (a *app) listBin(ctx context.Context, asJSON bool) error {
	store, err := a.openStore(ctx, "", commandPatience)
	if err != nil {
		return err
	}
	if _, err := store.ID(ctx); err != nil {
		return err
	}
	found, err := store.ListBin(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		list := struct{ Snapshots []binnedJSON }{[]binnedJSON{}}
		for _, d := range found {
			j := describe(d)
			list.Snapshots = append(list.Snapshots, binnedJSON{
				j.SnapshotId, j.VolumeId, j.Description, d.Bin.Entered, d.Bin.Until, append(j.Tags, tag{binTag, "true"}),
			})
		}
		return printJSON(a.stdout, list)
	}
	if len(found) == 0 {
		a.note("the recycle bin of %s is empty", store)
	}
	w := tabwriter.NewWriter(a.stdout, 0, 4, 2, ' ', 0)
	if len(found) > 0 {
		fmt.Fprintln(w, "SNAPSHOT\tDELETED\tUNTIL\tSIZE\tDESCRIPTION")
	}
	for _, d := range found {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", d.ID, d.Bin.Entered.Local().Format(time.DateTime),
			d.Bin.Until.Local().Format(time.DateTime), size(d.Geometry.Size), oneLine(d.Description))
	}
	return w.Flush()
}

func (a *app) snapshotRestoreDeletedCommand() *cobra.Command {
	return &cobra.Command{
		Use: "restore-deleted SNAP...", Short: "Bring snapshots back from the recycle bin", Args: args(cobra.MinimumNArgs(1)),
		Long: `Brings snapshots back from the recycle bin, as they were: with their tags, and
shared with the same accounts. Once a 'gc' or a delete has found the time of one over,
nothing brings it back.`,
		Example: "  lazyvol snapshot restore-deleted snap-1a2b3c4d567890abc",
		RunE: func(c *cobra.Command, args []string) error {
			ids, err := parseSnapshots(args)
			if err != nil {
				return err
			}
			store, err := a.openStore(c.Context(), "", commandPatience)
			if err != nil {
				return err
			}
			return a.restoreDeleted(c.Context(), store, ids)
		},
	}
}

func (a *app) restoreDeleted(ctx context.Context, store *snapshot.Store, ids []manifest.SnapshotID) error {
	for _, id := range ids {
		if err := store.RestoreDeleted(ctx, id); err != nil {
			return err
		}
		fmt.Fprintln(a.stdout, id)
	}
	return nil
}

// retention is a flag for how long deleted snapshots are kept.
type retention time.Duration

// Set implements pflag.Value.
func (r *retention) Set(s string) error {
	d, err := parseRetention(s)
	*r = retention(d)
	return err
}

// String implements pflag.Value.
func (r *retention) String() string {
	if *r == 0 {
		return ""
	}
	return formatRetention(time.Duration(*r))
}

// Type implements pflag.Value.
func (r *retention) Type() string { return "duration" }

// parseRetention parses a number of days, or what [time.ParseDuration] takes, of
// whole seconds.
func parseRetention(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if days, ok := strings.CutSuffix(s, "d"); ok {
		var n int64
		n, err = strconv.ParseInt(days, 10, 16) // 89 years
		d = time.Duration(n) * 24 * time.Hour
	}
	if err != nil || d < 0 || d > manifest.MaxRetention || d%time.Second != 0 {
		return 0, fmt.Errorf("%q is not a time like 7d or 12h, of %d days at most", s, manifest.MaxRetention/(24*time.Hour))
	}
	return d, nil
}

func formatRetention(d time.Duration) string {
	const day = 24 * time.Hour
	if d%day == 0 {
		return fmt.Sprintf("%dd", d/day)
	}
	return d.String()
}
