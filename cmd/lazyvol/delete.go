package main

import (
	"context"
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func (a *app) snapshotDeleteCommand() *cobra.Command {
	var retain retention
	c := &cobra.Command{
		Use: "delete SNAP...", Short: "Delete snapshots and free what only they used", Args: args(cobra.MinimumNArgs(1)),
		Long: `Deletes snapshots and frees what only they used. Other snapshots stay whole,
also those made from them. A pending one is aborted. Volumes and mounts that
were opened from one before go on reading it; its space is freed after them. One
that is locked is not deleted.

If --retain or the store's policy ('lazyvol policy') says so, whichever is longer, a
snapshot goes into the recycle bin first, from where 'lazyvol snapshot restore-deleted'
brings it back; its space is freed after that, by the next 'lazyvol gc' or delete.`,
		Example: `  lazyvol snapshot delete snap-1a2b3c4d567890abc snap-1a2b3c4d567890abd
  lazyvol snapshot delete --retain 7d snap-1a2b3c4d567890abc`,
		RunE: func(c *cobra.Command, args []string) error {
			ctx := c.Context()
			ids, err := parseSnapshots(args)
			if err != nil {
				return err
			}
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			return a.deleteSnapshots(ctx, store, ids, time.Duration(retain))
		},
	}
	c.Flags().Var(&retain, "retain", "keep it in the recycle bin for at least so long: 7d, 12h; 365 days at most")
	return c
}

// deleteSnapshots deletes snapshots, into the recycle bin for at least as long as
// retain or for as long as the store's policy says, prints those that are, and
// frees what only they used. It goes on with the others when one cannot be deleted.
func (a *app) deleteSnapshots(ctx context.Context, store *snapshot.Store, ids []manifest.SnapshotID, retain time.Duration) (failed error) {
	a.sweepSessions(ctx, store)
	lineages := make(map[manifest.LineageID]bool)
	for _, id := range ids {
		start := time.Now()
		until, err := store.Retire(ctx, id, retain)
		if err == nil || failedJob(err) {
			a.event(store, store.SnapshotDeleted(id, start, err))
		}
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		lineages[id.Lineage] = true
		fmt.Fprintln(a.stdout, id)
		if !until.IsZero() {
			fmt.Fprintf(a.stderr, "%s is in the recycle bin until %s\n", id, until.Local().Format(time.DateTime))
		}
	}
	bar := a.newProgress("", unknownTotal)
	defer bar.end()
	store.TellFreed(bar.add)
	for lineage := range lineages {
		r, err := store.Reclaim(ctx, lineage)
		if err != nil {
			// The snapshots are deleted; only the space waits.
			failed = errors.Join(failed, fmt.Errorf("deleted, but their space is not freed yet ('lazyvol gc' will): %w", err))
			continue
		}
		fmt.Fprintf(a.stderr, "freed %s\n", size(r.Bytes))
	}
	if failed == nil {
		bar.finish()
	}
	return failed
}

func (a *app) gcCommand() *cobra.Command {
	return &cobra.Command{
		Use: "gc", Short: "Free what no snapshot uses any more, and show pins", Args: args(cobra.NoArgs),
		Long: `Frees what no snapshot uses any more, in every lineage: what deletes that were
interrupted left, and what attempts left whose host was lost; and events of more than
90 days. Shows the pins that stand, one per line: snapshot, holder, host, age. The pins of a host that is lost
for good are removed by 'lazyvol volume forget'.`,
		Example: "  lazyvol gc",
		RunE: func(c *cobra.Command, _ []string) error {
			ctx := c.Context()
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			if _, err := store.ID(ctx); err != nil {
				return err
			}
			bar := a.newProgress("", unknownTotal)
			defer bar.end()
			store.TellFreed(bar.add)
			a.sweepSessions(ctx, store)
			lineages, err := store.Lineages(ctx)
			if err != nil {
				return err
			}
			var failed error
			var objects, rewritten int
			var freed int64
			w := tabwriter.NewWriter(a.stdout, 0, 4, 2, ' ', 0)
			for _, lineage := range lineages {
				r, err := store.Reclaim(ctx, lineage)
				if err != nil {
					failed = errors.Join(failed, err)
				}
				objects, rewritten, freed = objects+r.Objects, rewritten+r.Rewritten, freed+r.Bytes
				for _, pin := range r.Pins {
					note := ""
					if pin.Deleted {
						note = "deleted"
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", pin.Snapshot, oneLine(pin.Holder), oneLine(pin.Host), pin.Age.Round(time.Second), note)
				}
			}
			expired, bytes, err := store.ExpireEvents(ctx)
			failed, objects, freed = errors.Join(failed, err), objects+expired, freed+bytes
			if failed == nil {
				bar.finish()
			}
			bar.end()
			fmt.Fprintf(a.stderr, "freed %s: %d objects removed, %d packs rewritten\n", size(freed), objects, rewritten)
			return errors.Join(w.Flush(), failed)
		},
	}
}
