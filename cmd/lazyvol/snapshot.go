package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func (a *app) snapshotCommand() *cobra.Command {
	return group("snapshot", "Make, look into and delete snapshots",
		a.snapshotCreateCommand(), a.snapshotListCommand(), a.snapshotShowCommand(), a.snapshotDiffCommand(),
		a.snapshotTagCommand(), a.snapshotExportCommand(), a.snapshotVerifyCommand(), a.snapshotDeleteCommand(), a.snapshotPruneCommand(),
	)
}

// tag is a tag in EBS's JSON.
type tag struct{ Key, Value string }

// snapshotJSON describes a snapshot with EBS's names, and three of our own.
type snapshotJSON struct {
	SnapshotId              string
	VolumeId                string
	State                   string
	StateMessage            string `json:",omitempty"`
	Progress                string
	StartTime               time.Time
	CompletionTime          *time.Time `json:",omitempty"`
	Description             string
	VolumeSize              int64 // GiB, rounded up
	Encrypted               bool
	KmsKeyId                string `json:",omitempty"`
	Tags                    []tag
	ParentSnapshotId        string `json:",omitempty"`
	FullSnapshotSizeInBytes int64
	VolumeSizeBytes         int64
	StoredBytes             int64
	UniqueBytes             *int64 `json:",omitempty"`
}

// imageVolume is the volume id that EBS, too, shows for snapshots that no
// volume was the source of.
const imageVolume = "vol-ffffffff"

func describe(d snapshot.Description) snapshotJSON {
	j := snapshotJSON{
		SnapshotId: d.ID.String(), VolumeId: string(d.Volume), State: string(d.State), StateMessage: d.Why,
		Progress: fmt.Sprintf("%d%%", d.Percent), StartTime: d.Start, Description: d.Description,
		VolumeSize: (d.Geometry.Size + 1<<30 - 1) >> 30, VolumeSizeBytes: d.Geometry.Size, Tags: []tag{},
		FullSnapshotSizeInBytes: d.Outcome.DataBlocks * int64(d.Geometry.BlockSize), StoredBytes: d.Outcome.StoredBytes,
	}
	if j.VolumeId == "" {
		j.VolumeId = imageVolume
	}
	if !d.End.IsZero() {
		j.CompletionTime = &d.End
	}
	if !d.Parent.IsZero() {
		j.ParentSnapshotId = d.Parent.String()
	}
	for _, k := range sortedKeys(d.Tags) {
		j.Tags = append(j.Tags, tag{k, d.Tags[k]})
	}
	return j
}

func (a *app) snapshotListCommand() *cobra.Command {
	var all, asJSON bool
	var pairs []string
	c := &cobra.Command{
		Use: "list", Short: "List snapshots, oldest first", Args: args(cobra.NoArgs),
		Long: `Lists snapshots, oldest first. --filter NAME=VALUE shows only those that match, by
EBS's names: description, encrypted, progress, snapshot-id, start-time, status,
storage-tier, tag:KEY, tag-key, volume-id and volume-size (GiB). In a value * is any
characters and ? one or none; a \ before one takes it as it is. Of several filters of
one name one must match, and of each name one.`,
		Example: `  lazyvol snapshot list --filter tag:made-by=timer --filter 'start-time=2026-11-*'`,
		RunE: func(c *cobra.Command, _ []string) error {
			filter, err := parseFilters(pairs)
			if err != nil {
				return err
			}
			store, err := a.openStore(c.Context(), "", commandPatience)
			if err != nil {
				return err
			}
			if _, err := store.ID(c.Context()); err != nil {
				return err
			}
			found, err := store.List(c.Context(), all)
			if err != nil {
				return err
			}
			found = slices.DeleteFunc(found, func(d snapshot.Description) bool { return !filter.pass(describe(d)) })
			if asJSON {
				list := struct{ Snapshots []snapshotJSON }{[]snapshotJSON{}}
				for _, d := range found {
					list.Snapshots = append(list.Snapshots, describe(d))
				}
				return printJSON(a.stdout, list)
			}
			w := tabwriter.NewWriter(a.stdout, 0, 4, 2, ' ', 0)
			if len(found) > 0 {
				fmt.Fprintln(w, "SNAPSHOT\tSTATE\tSTARTED\tSIZE\tSTORED\tPARENT\tDESCRIPTION")
			}
			for _, d := range found {
				state := string(d.State)
				if d.State == snapshot.Pending {
					state = fmt.Sprintf("%s %d%%", state, d.Percent)
				}
				parent := "-"
				if !d.Parent.IsZero() {
					parent = d.Parent.String()
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", d.ID, state, d.Start.Local().Format(time.DateTime),
					size(d.Geometry.Size), size(d.Outcome.StoredBytes), parent, d.Description)
			}
			return w.Flush()
		},
	}
	c.Flags().BoolVar(&all, "all", false, "show aborted ones too")
	c.Flags().StringArrayVar(&pairs, "filter", nil, "show only what matches `NAME=VALUE` (repeatable)")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func (a *app) snapshotShowCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "show SNAP", Short: "Show all about a snapshot", Args: args(cobra.ExactArgs(1)),
		Long: `Shows all about a snapshot. StoredBytes is what it uploaded, UniqueBytes what
deleting it would free.`,
		RunE: func(c *cobra.Command, args []string) error {
			id, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			store, err := a.openStore(c.Context(), "", commandPatience)
			if err != nil {
				return err
			}
			d, err := store.Describe(c.Context(), id)
			if err != nil {
				return err
			}
			j := describe(d)
			if d.State == snapshot.Completed {
				unique, err := store.UniqueBytes(c.Context(), id)
				if err != nil {
					return err
				}
				j.UniqueBytes = &unique
			}
			if asJSON {
				return printJSON(a.stdout, j)
			}
			return a.showText(j)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func (a *app) showText(j snapshotJSON) error {
	w := tabwriter.NewWriter(a.stdout, 0, 4, 2, ' ', 0)
	row := func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "%s:\t%s\n", name, value)
		}
	}
	row("snapshot", j.SnapshotId)
	row("state", j.State+" "+j.Progress)
	row("why", j.StateMessage)
	row("description", j.Description)
	row("volume", j.VolumeId)
	row("parent", j.ParentSnapshotId)
	row("started", j.StartTime.Local().Format(time.DateTime))
	if j.CompletionTime != nil {
		row("completed", j.CompletionTime.Local().Format(time.DateTime))
	}
	row("size", fmt.Sprintf("%s (%d bytes)", size(j.VolumeSizeBytes), j.VolumeSizeBytes))
	row("data", size(j.FullSnapshotSizeInBytes))
	row("stored", size(j.StoredBytes))
	if j.UniqueBytes != nil {
		row("freed if deleted", size(*j.UniqueBytes))
	}
	for _, t := range j.Tags {
		row("tag "+t.Key, t.Value)
	}
	return w.Flush()
}

func (a *app) snapshotDiffCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "diff A B", Short: "List the ranges in which B differs from A", Args: args(cobra.ExactArgs(2)),
		Long: `Lists the ranges in which B differs from A, one per line: offset and length in
bytes. --json prints them block by block, as EBS's ListChangedBlocks does. The
snapshots must be of one lineage.`,
		RunE: func(c *cobra.Command, args []string) error {
			ctx := c.Context()
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			var images [2]*snapshot.Image
			for i, arg := range args {
				id, err := parseSnapshot(arg)
				if err != nil {
					return err
				}
				s, img, err := a.beginSession(ctx, store, id, "")
				if err != nil {
					return err
				}
				defer a.endSession(ctx, s, img)
				images[i] = img
			}
			if asJSON {
				return a.diffJSON(ctx, images[0], images[1])
			}
			return snapshot.Diff(ctx, images[0], images[1], func(change snapshot.Change) error {
				_, err := fmt.Fprintf(a.stdout, "%d %d\n", change.Offset, change.Length)
				return err
			})
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON, block by block")
	return c
}

// changedBlock is a block in EBS's ListChangedBlocks. A token is missing where
// the snapshot has no data in the block.
type changedBlock struct {
	BlockIndex       int64
	FirstBlockToken  string `json:",omitempty"`
	SecondBlockToken string `json:",omitempty"`
}

func (a *app) diffJSON(ctx context.Context, first, second *snapshot.Image) error {
	g := second.Geometry()
	list := struct {
		ChangedBlocks []changedBlock
		VolumeSize    int64
		BlockSize     int
	}{[]changedBlock{}, (g.Size + 1<<30 - 1) >> 30, g.BlockSize}
	token := func(img *snapshot.Image, has bool, block int64) string {
		if !has {
			return ""
		}
		return base64.StdEncoding.EncodeToString(fmt.Appendf(nil, "%s/%d", img.ID(), block))
	}
	err := snapshot.Diff(ctx, first, second, func(change snapshot.Change) error {
		blockSize := int64(g.BlockSize)
		for off := change.Offset; off < change.Offset+change.Length; off += blockSize {
			block := off / blockSize
			list.ChangedBlocks = append(list.ChangedBlocks, changedBlock{block, token(first, change.First, block), token(second, change.Second, block)})
		}
		return nil
	})
	if err != nil {
		return err
	}
	return printJSON(a.stdout, list)
}

// endSession ends a session at the end of a command. That the pin stays a
// while longer is no reason to fail it.
func (a *app) endSession(ctx context.Context, s *session, img *snapshot.Image) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandPatience)
	defer cancel()
	if err := s.end(ctx, img.Pinned); err != nil {
		a.log().Warn("could not remove the session's pin yet", "snapshot", s.Snapshot, "error", err)
	}
}

func (a *app) snapshotTagCommand() *cobra.Command {
	var remove []string
	c := &cobra.Command{
		Use: "tag SNAP [KEY=VALUE]...", Short: "Add, change and remove tags", Args: args(cobra.MinimumNArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := parseSnapshot(args[0])
			if err != nil {
				return err
			}
			set, err := parseTags(args[1:])
			if err != nil {
				return err
			}
			if len(set)+len(remove) == 0 {
				return usageError{errors.New("nothing to do: give KEY=VALUE or --remove KEY")}
			}
			store, err := a.openStore(c.Context(), "", commandPatience)
			if err != nil {
				return err
			}
			return store.SetTags(c.Context(), id, set, remove)
		},
	}
	c.Flags().StringArrayVar(&remove, "remove", nil, "remove the tag with this `KEY` (repeatable)")
	return c
}

// parseTags parses KEY=VALUE pairs.
func parseTags(pairs []string) (map[string]string, error) {
	tags := make(map[string]string, len(pairs))
	for _, pair := range pairs {
		k, v, ok := strings.Cut(pair, "=")
		if !ok || k == "" {
			return nil, usageError{fmt.Errorf("%q is not KEY=VALUE", pair)}
		}
		tags[k] = v
	}
	if err := manifest.CheckTags(tags); err != nil {
		return nil, usageError{err}
	}
	return tags, nil
}
