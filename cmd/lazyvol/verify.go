package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/snapshot"
)

func (a *app) snapshotVerifyCommand() *cobra.Command {
	var all, repair, asJSON bool
	sample := percentage(100)
	var seed uint64
	c := &cobra.Command{
		Use: "verify SNAP|--all", Short: "Read snapshots back and check every byte", Args: args(cobra.MaximumNArgs(1)),
		Long: `Checks that a snapshot, or with --all everything in the store, is whole: records,
indexes, packs, and each block by its SHA-256, read once however many snapshots
share it. Prints each snapshot with "ok" or the number of its problems, and a line
for each problem: the object, what is the matter, and which bytes of which
snapshots are lost. Exits with 1 if there is any.

With --all it also tells what is in the store besides: objects that the next gc
removes, objects that no rule explains, pins, pending snapshots. These are no
problems. --sample reads a random share of the blocks, and all of the index.

--repair writes again what is damaged or missing, from what this host has: its
bases, its volumes' clean layers and copies of indexes, and other objects of the
store. Nothing is taken without its SHA-256 being right. What could not be
repaired is listed, and why. A missing object of a deleted snapshot is not made
again.

Other hosts may go on meanwhile. Without --repair nothing is written.`,
		Example: `  lazyvol snapshot verify snap-1a2b3c4d567890abc
  lazyvol snapshot verify --all --sample 5%`,
		RunE: func(c *cobra.Command, args []string) error {
			ctx := c.Context()
			if all == (len(args) == 1) {
				return usageError{errors.New("give a snapshot, or --all")}
			}
			if repair && sample < 100 {
				return usageError{errors.New("--repair reads everything: it takes no --sample")}
			}
			how := snapshot.Check{Share: float64(sample) / 100, Seed: seed}
			if !c.Flags().Changed("seed") {
				how.Seed = rand.Uint64()
			}
			if !all {
				id, err := parseSnapshot(args[0])
				if err != nil {
					return err
				}
				how.Snapshot = id
			}
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			bar := a.newProgress(strings.Join(args, ""), unknownTotal)
			defer bar.end()
			how.Progress = eachPass(bar)
			var report *snapshot.Report
			if repair {
				report, err = a.repair(ctx, store, how)
			} else {
				report, err = store.Check(ctx, how)
			}
			if err != nil {
				return err
			}
			bar.finish()
			if asJSON {
				err = printJSON(a.stdout, describeReport(report, how))
			} else {
				err = a.printReport(report, how)
			}
			if err == nil && report.Problems > 0 {
				err = fmt.Errorf("%d problems were found", report.Problems)
			}
			return err
		},
	}
	c.Flags().BoolVar(&all, "all", false, "everything in the store")
	c.Flags().BoolVar(&repair, "repair", false, "write again what is damaged, from what this host has")
	c.Flags().Var(&sample, "sample", "read this share of the blocks only, as 5%")
	c.Flags().Uint64Var(&seed, "seed", 0, "draw the sample by this `number`, to draw the same one again")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

// percentage is a flag from 0 to 100, with or without a percent sign.
type percentage float64

// Set implements pflag.Value.
func (p *percentage) Set(s string) error {
	n, err := strconv.ParseFloat(strings.TrimSuffix(s, "%"), 64)
	if err != nil || !(n >= 0 && n <= 100) {
		return fmt.Errorf("%q is not a share from 0%% to 100%%", s)
	}
	*p = percentage(n)
	return nil
}

// String implements pflag.Value.
func (p *percentage) String() string { return strconv.FormatFloat(float64(*p), 'g', -1, 64) + "%" }

// Type implements pflag.Value.
func (p *percentage) Type() string { return "share" }

// eachPass returns what tells a progress of checks one after the other: how long the
// later ones are is not known before they begin.
func eachPass(p *progress) func(done, total int64) {
	var before, last, all int64 // of the passes that have ended, and of this one
	return func(done, total int64) {
		if done < last {
			before += all
		}
		last, all = done, total
		p.setOf(before+done, before+total)
	}
}

// printReport prints verdicts to stdout, and all else for people.
func (a *app) printReport(r *snapshot.Report, how snapshot.Check) error {
	for _, v := range r.Snapshots {
		verdict := "ok"
		if v.Problems > 0 {
			verdict = fmt.Sprintf("%d problems", v.Problems)
		}
		if v.Deleted {
			verdict += " (deleted, and pinned)"
		}
		fmt.Fprintf(a.stdout, "%s %s\n", v.Snapshot, verdict)
	}
	for _, f := range r.Findings {
		fmt.Fprintln(a.stderr, printable(fmt.Sprint(f)))
	}
	w := tabwriter.NewWriter(a.stderr, 0, 4, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s:\t%s\n", name, fmt.Sprintf(format, args...))
	}
	read := "every block"
	if how.Share < 1 {
		read = fmt.Sprintf("a sample of %g%% (--seed %d)", how.Share*100, how.Seed)
	}
	row("read", "%s: %d blocks, %s stored, are good", read, r.Blocks, size(r.Bytes))
	if r.Garbage.Objects > 0 {
		row("garbage", "%d objects of deleted and aborted snapshots, %s, which the next gc removes", r.Garbage.Objects, size(r.Garbage.Bytes))
	}
	if r.DeadBytes > 0 {
		row("dead", "%s inside packs of which a part is needed", size(r.DeadBytes))
	}
	if r.Strange.Objects > 0 {
		row("strange", "%d objects, %s, that no rule explains", r.Strange.Objects, size(r.Strange.Bytes))
	}
	for _, key := range r.StrangeKeys {
		row("", "%s", key)
	}
	for _, id := range r.Pending {
		row("pending", "%s", id)
	}
	for _, pin := range r.Pins {
		deleted := ""
		if pin.Deleted {
			deleted = ", keeps it though it is deleted"
		}
		row("pin", "%s on %s by %s, for %s%s", pin.Holder, pin.Snapshot, orDash(pin.Host), pin.Age.Round(time.Second), deleted)
	}
	for _, note := range r.Notes {
		row("note", "%s", note)
	}
	return w.Flush()
}

// reportJSON is a report.
type reportJSON struct {
	Sampled  *sampleJSON `json:",omitempty"`
	Blocks   int64
	Bytes    int64
	Problems []problemJSON

	Snapshots []verdictJSON
	Pending   []string
	Pins      []pinJSON

	GarbageObjects int64
	GarbageBytes   int64
	DeadBytes      int64
	StrangeObjects int64
	StrangeBytes   int64
	StrangeKeys    []string
	Notes          []string
}

type sampleJSON struct {
	Percent float64
	Seed    uint64
}

type problemJSON struct {
	Object    string
	Problem   string
	Snapshots []harmJSON
}

type harmJSON struct {
	SnapshotId string
	Ranges     []snapshot.Range
}

type verdictJSON struct {
	SnapshotId string
	Deleted    bool `json:",omitempty"`
	Problems   int
}

type pinJSON struct {
	SnapshotId string
	Holder     string
	Host       string
	AgeSeconds int64
	Deleted    bool
}

func describeReport(r *snapshot.Report, how snapshot.Check) reportJSON {
	j := reportJSON{
		Blocks: r.Blocks, Bytes: r.Bytes, Problems: []problemJSON{}, Snapshots: []verdictJSON{}, Pending: []string{}, Pins: []pinJSON{},
		GarbageObjects: r.Garbage.Objects, GarbageBytes: r.Garbage.Bytes, DeadBytes: r.DeadBytes,
		StrangeObjects: r.Strange.Objects, StrangeBytes: r.Strange.Bytes, StrangeKeys: []string{}, Notes: []string{},
	}
	if how.Share < 1 {
		j.Sampled = &sampleJSON{how.Share * 100, how.Seed}
	}
	for _, f := range r.Findings {
		p := problemJSON{Object: f.Object, Problem: f.Err.Error(), Snapshots: []harmJSON{}}
		for _, h := range f.Harm {
			p.Snapshots = append(p.Snapshots, harmJSON{h.Snapshot.String(), append([]snapshot.Range{}, h.Ranges...)})
		}
		j.Problems = append(j.Problems, p)
	}
	for _, v := range r.Snapshots {
		j.Snapshots = append(j.Snapshots, verdictJSON{v.Snapshot.String(), v.Deleted, v.Problems})
	}
	for _, id := range r.Pending {
		j.Pending = append(j.Pending, id.String())
	}
	for _, p := range r.Pins {
		j.Pins = append(j.Pins, pinJSON{p.Snapshot.String(), p.Holder, p.Host, int64(p.Age / time.Second), p.Deleted})
	}
	j.StrangeKeys = append(j.StrangeKeys, r.StrangeKeys...)
	j.Notes = append(j.Notes, r.Notes...)
	return j
}
