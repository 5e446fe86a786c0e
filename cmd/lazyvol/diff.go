package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func (a *app) snapshotDiffCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "diff A B", Short: "List the ranges in which B differs from A", Args: args(cobra.ExactArgs(2)),
		Long: `Lists the ranges in which B differs from A, one per line: offset and length in
bytes. --json prints them block by block, as EBS's ListChangedBlocks does, but
without pages. The snapshots must be of one lineage. Of the index only what
differs is read.`,
		RunE: func(c *cobra.Command, args []string) error {
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
			if asJSON {
				err = diffJSON(ctx, out, images[0], images[1])
			} else {
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
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON, block by block")
	return c
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
