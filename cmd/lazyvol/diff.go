package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func (a *app) snapshotDiffCommand() *cobra.Command {
	c := &cobra.Command{
		Use: "diff A B", Short: "List the ranges in which B differs from A", Args: args(cobra.ExactArgs(2)),
		Long: `Lists the ranges in which B differs from A, one per line: offset and length in
bytes; on a terminal, or with --human, as people read them, with what happened to
each (changed, added where there were zeros, or zeroed), and the total and its
share of the device last. Ranges are whole blocks. --json prints them block by block, as EBS's ListChangedBlocks does, but
without pages. The snapshots must be of one lineage. Of the index only what
differs is read.`,
		Example: "  lazyvol snapshot diff snap-1a2b3c4d567890abc snap-1a2b3c4d567890abd",
		RunE: func(c *cobra.Command, args []string) error {
			asJSON, human := a.chosen(c, "json", "human"), a.chosen(c, "human", "json")
			if asJSON && human {
				return combinationError{errors.New("--json and --human exclude each other")}
			}
			if !c.Flags().Changed("human") {
				human = a.showsTerminal()
			}
			ctx := c.Context()
			var ids [2]manifest.SnapshotID
			for i, arg := range args {
				id, err := parseSnapshot(arg)
				if err != nil {
					return err
				}
				ids[i] = id
			}
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			if ids[0].Lineage != ids[1].Lineage {
				return unrelated(ctx, store, ids)
			}
			var images [2]*snapshot.Image
			for i, id := range ids {
				s, img, err := a.beginSession(ctx, store, id, "")
				if err != nil {
					return err
				}
				defer a.endSession(ctx, s, img)
				images[i] = img
			}
			out := bufio.NewWriter(a.stdout)
			switch {
			case asJSON:
				err = diffJSON(ctx, out, images[0], images[1])
			case human:
				err = diffHuman(ctx, out, images[0], images[1])
			default:
				err = snapshot.Diff(ctx, images[0], images[1], func(change snapshot.Change) error {
					_, err := fmt.Fprintf(out, "%d %d\n", change.Offset, change.Length)
					return err
				})
			}
			if err != nil {
				return err
			}
			return out.Flush()
		},
	}
	c.Flags().Bool("json", false, "print JSON, block by block")
	c.Flags().Bool("human", false, "print sizes for people, and the total (default on a terminal)")
	return c
}

// showsTerminal reports whether a person reads the results as they are printed.
func (a *app) showsTerminal() bool {
	return terminalOf(a.stdout) != nil
}

// diffHuman prints the ranges and sums them up.
func diffHuman(ctx context.Context, out io.Writer, first, second *snapshot.Image) error {
	sum := diffSum{out: out, device: max(first.Geometry().Size, second.Geometry().Size)}
	if err := snapshot.Diff(ctx, first, second, sum.add); err != nil {
		return err
	}
	return sum.end()
}

// A diffSum prints changes for people and adds them up.
type diffSum struct {
	out    io.Writer
	device int64 // bytes, of the larger snapshot
	ranges int
	total  int64 // bytes
}

// add prints a change: where it is, to the byte, as dd and debugfs want it, and about.
func (s *diffSum) add(c snapshot.Change) error {
	if s.ranges == 0 {
		if _, err := fmt.Fprintf(s.out, "%16s  %10s  %10s  %s\n", "OFFSET", "AT", "SIZE", "CHANGE"); err != nil {
			return err
		}
	}
	s.ranges++
	s.total += c.Length
	what := "changed"
	switch {
	case !c.First:
		what = "added"
	case !c.Second:
		what = "zeroed"
	}
	_, err := fmt.Fprintf(s.out, "%16d  %10s  %10s  %s\n", c.Offset, size(c.Offset), size(c.Length), what)
	return err
}

// end prints the total.
func (s *diffSum) end() error {
	ranges := "ranges"
	if s.ranges == 1 {
		ranges = "range"
	}
	share := fmt.Sprintf("%.2f%%", 100*float64(s.total)/float64(max(s.device, 1)))
	if s.total > 0 && share == "0.00%" {
		share = "less than 0.01%"
	}
	_, err := fmt.Fprintf(s.out, "%d %s, %s of %s: %s of the device\n", s.ranges, ranges, size(s.total), size(s.device), share)
	return err
}

// unrelated says what is wrong with snapshots of two lineages, before any is
// pinned: that they are, if both are there.
func unrelated(ctx context.Context, store *snapshot.Store, ids [2]manifest.SnapshotID) error {
	for _, id := range ids {
		if _, err := store.Describe(ctx, id); err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: %s and %s", snapshot.ErrUnrelated, ids[0], ids[1])
}

// changedBlock is a block in EBS's ListChangedBlocks. A token is missing where
// the snapshot has no data in the block.
type changedBlock struct {
	BlockIndex       int64
	FirstBlockToken  string `json:",omitempty"`
	SecondBlockToken string `json:",omitempty"`
}

// diffJSON prints one object, a changed block on each line, as they are found. If
// it fails the object is not finished.
func diffJSON(ctx context.Context, out io.Writer, first, second *snapshot.Image) error {
	g := second.Geometry()
	_, err := fmt.Fprintf(out, "{\"VolumeSize\": %d, \"BlockSize\": %d, \"ChangedBlocks\": [", gibibytes(g.Size), g.BlockSize)
	if err != nil {
		return err
	}
	before := "\n"
	err = snapshot.Diff(ctx, first, second, func(change snapshot.Change) error {
		blockSize := int64(g.BlockSize)
		for off := change.Offset; off < change.Offset+change.Length; off += blockSize {
			b := changedBlock{BlockIndex: off / blockSize}
			if change.First {
				b.FirstBlockToken = blockToken(first.ID(), b.BlockIndex)
			}
			if change.Second {
				b.SecondBlockToken = blockToken(second.ID(), b.BlockIndex)
			}
			line, err := json.Marshal(b)
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintf(out, "%s%s", before, line); err != nil {
				return err
			}
			before = ",\n"
		}
		return nil
	})
	if err != nil {
		return err
	}
	_, err = fmt.Fprint(out, "\n]}\n")
	return err
}

// blockToken names a block of a snapshot, in EBS's alphabet for tokens.
func blockToken(id manifest.SnapshotID, block int64) string {
	return base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "%s/%d", id, block))
}

// gibibytes are EBS's unit of volume sizes, rounded up.
func gibibytes(size int64) int64 { return (size + 1<<30 - 1) >> 30 }
