package main

import (
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func (a *app) snapshotPruneCommand() *cobra.Command {
	var r snapshot.Retention
	var tagged []string
	var dryRun bool
	var retain retention
	c := &cobra.Command{
		Use: "prune --keep-RULE N...", Short: "Delete snapshots by their age", Args: args(cobra.NoArgs),
		Long: `Deletes all snapshots that no rule keeps, and frees what only they used. --keep-last
keeps the last N; --keep-daily, --keep-weekly and --keep-monthly keep the newest of
each of the last N days, weeks (from Monday on) and months that have any, in the
host's time zone. N may be -1: all. The rules are applied to each volume by itself,
and what one keeps is kept. Snapshots of images count as one volume for each lineage,
and pending ones are left alone.

With --tag only snapshots that have all these tags are looked at: the others stay, and
do not count. Prints the ids that are deleted; with --dry-run what would become of
each, and why.`,
		Example: `  lazyvol snapshot prune --keep-last 3 --keep-daily 7 --keep-monthly 12 --dry-run
  lazyvol snapshot prune --tag made-by=timer --keep-daily 14`,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx := c.Context()
			if err := checkRetention(r); err != nil {
				return err
			}
			want, err := parseTags(tagged)
			if err != nil {
				return err
			}
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			if _, err := store.ID(ctx); err != nil {
				return err
			}
			found, err := store.List(ctx, false)
			if err != nil {
				return err
			}
			verdicts := r.Apply(withTags(found, want))
			if dryRun {
				return a.printVerdicts(verdicts)
			}
			var ids []manifest.SnapshotID
			for _, v := range verdicts {
				if !v.Keep {
					ids = append(ids, v.ID)
				}
			}
			if len(ids) == 0 {
				fmt.Fprintln(a.stderr, "nothing to delete")
				return nil
			}
			return a.deleteSnapshots(ctx, store, ids, time.Duration(retain))
		},
	}
	flags := c.Flags()
	flags.IntVar(&r.Last, "keep-last", 0, "keep the last `N`")
	flags.IntVar(&r.Daily, "keep-daily", 0, "keep the newest of each of the last `N` days")
	flags.IntVar(&r.Weekly, "keep-weekly", 0, "keep the newest of each of the last `N` weeks")
	flags.IntVar(&r.Monthly, "keep-monthly", 0, "keep the newest of each of the last `N` months")
	flags.StringArrayVar(&tagged, "tag", nil, "look only at snapshots with this tag, `KEY=VALUE` (repeatable)")
	flags.Var(&retain, "retain", "keep what is deleted in the recycle bin for at least so long: 7d, 12h; 365 days at most")
	flags.BoolVar(&dryRun, "dry-run", false, "delete nothing, and print what would be")
	return c
}

// checkRetention refuses rules that keep nothing: they are sooner a mistake than meant.
func checkRetention(r snapshot.Retention) error {
	for _, n := range []int{r.Last, r.Daily, r.Weekly, r.Monthly} {
		if n < snapshot.Unlimited {
			return usageError{fmt.Errorf("%d snapshots cannot be kept; -1 keeps all", n)}
		}
	}
	if r.Empty() {
		return usageError{errors.New("say what to keep: --keep-last, --keep-daily, --keep-weekly or --keep-monthly")}
	}
	return nil
}

// withTags returns the snapshots that have all these tags.
func withTags(all []snapshot.Description, want map[string]string) (with []snapshot.Description) {
	for _, d := range all {
		has := true
		for k, v := range want {
			value, ok := d.Tags[k]
			has = has && ok && value == v
		}
		if has {
			with = append(with, d)
		}
	}
	return with
}

func (a *app) printVerdicts(verdicts []snapshot.Judgement) error {
	w := tabwriter.NewWriter(a.stdout, 0, 4, 2, ' ', 0)
	if len(verdicts) > 0 {
		fmt.Fprintln(w, "SNAPSHOT\tVOLUME\tSTARTED\tWHAT\tWHY\tDESCRIPTION")
	}
	for _, v := range verdicts {
		what, why := "delete", "-"
		if v.Keep {
			what, why = "keep", strings.Join(v.Why, ",")
		}
		volume := string(v.Volume)
		if volume == "" {
			volume = imageVolume
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", v.ID, volume, v.Start.Local().Format(time.DateTime), what, why, oneLine(v.Description.Description))
	}
	return w.Flush()
}
