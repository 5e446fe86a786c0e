package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

func (a *app) snapshotCommand() *cobra.Command {
	return group("snapshot", "Make, look into and delete snapshots",
		a.snapshotCreateCommand(), a.snapshotListCommand(), a.snapshotTreeCommand(), a.snapshotShowCommand(), a.snapshotDiffCommand(), a.snapshotMapCommand(),
		a.snapshotTagCommand(), a.snapshotExportCommand(), a.snapshotVerifyCommand(), a.snapshotCopyCommand(), a.snapshotDeleteCommand(), a.snapshotPruneCommand(),
		a.snapshotLockCommand(), a.snapshotUnlockCommand(), a.snapshotListBinCommand(), a.snapshotRestoreDeletedCommand(), a.snapshotShareCommand(),
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
	OwnerId                 string
	VolumeSize              int64 // GiB, rounded up
	StorageTier             string
	TransferType            string `json:",omitempty"` // of a copy
	Encrypted               bool
	KmsKeyId                string `json:",omitempty"` // its URI
	DataEncryptionKeyId     string `json:",omitempty"` // the same in all snapshots of a lineage
	Tags                    []tag
	ParentSnapshotId        string `json:",omitempty"`
	SetId                   string `json:",omitempty"` // of which it is one
	FullSnapshotSizeInBytes int64
	VolumeSizeBytes         int64
	StoredBytes             int64
	UniqueBytes             *int64 `json:",omitempty"`
	protectionJSON
}

// imageVolume is the volume id that EBS, too, shows for snapshots that no
// volume was the source of.
const imageVolume = "vol-ffffffff"

func describe(d snapshot.Description) snapshotJSON {
	j := snapshotJSON{
		SnapshotId: d.ID.String(), VolumeId: string(d.Volume), State: string(d.State), StateMessage: d.Why,
		Progress: fmt.Sprintf("%d%%", d.Percent), StartTime: d.Start, Description: d.Description,
		OwnerId: d.Owner, VolumeSize: gibibytes(d.Geometry.Size), StorageTier: "standard", VolumeSizeBytes: d.Geometry.Size, Tags: []tag{},
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
	j.SetId = string(d.Set)
	if e := d.Encryption; e != nil {
		j.Encrypted, j.KmsKeyId, j.DataEncryptionKeyId = true, e.KeyURI, dataKeyID(e)
		if e.Shredded {
			j.State, j.StateMessage = "error", cmp.Or(j.StateMessage, "the data key of its lineage was destroyed")
		}
	}
	if d.CopiedFrom != nil {
		j.TransferType = "standard"
	}
	for _, k := range sortedKeys(d.Tags) {
		j.Tags = append(j.Tags, tag{k, d.Tags[k]})
	}
	return j
}

// dataKeyID names the data key of a lineage by its wrapped form: of 128 bits, as
// EBS's. One that was destroyed has no name.
func dataKeyID(e *manifest.Encryption) string {
	if e.Shredded {
		return ""
	}
	sum := sha256.Sum256(e.WrappedKey)
	return hex.EncodeToString(sum[:16])
}

// owned gives snapshots that no owner was recorded with the store's: whoever has
// it has them.
func owned(ctx context.Context, store *snapshot.Store, found []snapshot.Description) error {
	id, err := store.ID(ctx)
	for i := range found {
		found[i].Owner = cmp.Or(found[i].Owner, id)
	}
	return err
}

// ownerFilter returns whose snapshots to list, of which none is everybody's. What
// this host makes is its own: by --owner-id, or the store's.
func (a *app) ownerFilter(ctx context.Context, store *snapshot.Store, owners []string) ([]string, error) {
	var ids []string
	for _, owner := range owners {
		if owner == "self" {
			id, err := store.ID(ctx)
			if err != nil {
				return nil, err
			}
			ids = append(ids, cmp.Or(a.owner, id))
			continue
		}
		if err := manifest.CheckOwner(owner); err != nil {
			return nil, usageError{fmt.Errorf("--owner: %w", err)}
		}
		ids = append(ids, owner)
	}
	return ids, nil
}

func (a *app) snapshotListCommand() *cobra.Command {
	var all, bin, asJSON bool
	var pairs, owners []string
	c := &cobra.Command{
		Use: "list", Short: "List snapshots, oldest first", Args: args(cobra.NoArgs),
		Long: `Lists snapshots, oldest first. --filter NAME=VALUE shows only those that match, by
EBS's names: description, encrypted, owner-id, progress, snapshot-id, start-time,
status, storage-tier, tag:KEY, tag-key, transfer-type (standard: it is a copy),
volume-id and volume-size (GiB). In a value * is any characters and ? one or none;
a \ before one takes it as it is. Of several filters of one name one must match, and
of each name one.

Snapshots whose records are damaged are left out and named, and the exit code is 1.

The owner of a snapshot is the --owner-id with which it was made, else the store. It
is what its maker said, and proves nothing.`,
		Example: `  lazyvol snapshot list --filter tag:made-by=timer --filter 'start-time=2026-11-*'`,
		RunE: func(c *cobra.Command, _ []string) error {
			if bin && (all || len(pairs)+len(owners) > 0) {
				return combinationError{errors.New("--bin goes alone")}
			}
			if bin {
				return a.listBin(c.Context(), asJSON)
			}
			filter, err := parseFilters(pairs)
			if err != nil {
				return err
			}
			ctx := c.Context()
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			of, err := a.ownerFilter(ctx, store, owners)
			if err != nil {
				return err
			}
			found, damaged := store.List(ctx, all)
			if found == nil {
				return damaged
			}
			if err := owned(ctx, store, found); err != nil {
				return err
			}
			found = slices.DeleteFunc(found, func(d snapshot.Description) bool {
				return len(of) > 0 && !slices.Contains(of, d.Owner) || !filter.pass(describe(d))
			})
			if asJSON {
				return errors.Join(a.listJSON(found), damaged)
			}
			if len(found) == 0 && damaged == nil {
				a.note("no snapshot %sin %s", map[bool]string{true: "that matches "}[len(pairs)+len(owners) > 0], store)
			}
			return errors.Join(a.listText(found), damaged)
		},
	}
	c.Flags().BoolVar(&all, "all", false, "show aborted ones too")
	c.Flags().BoolVar(&bin, "bin", false, "show those in the recycle bin instead, as 'lazyvol snapshot list-bin' does")
	c.Flags().StringArrayVar(&owners, "owner", nil, "show only what `ID` owns, or self (repeatable)")
	c.Flags().StringArrayVar(&pairs, "filter", nil, "show only what matches `NAME=VALUE` (repeatable)")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func (a *app) listJSON(found []snapshot.Description) error {
	list := struct{ Snapshots []snapshotJSON }{[]snapshotJSON{}}
	for _, d := range found {
		list.Snapshots = append(list.Snapshots, describe(d))
	}
	return printJSON(a.stdout, list)
}

func (a *app) listText(found []snapshot.Description) error {
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
			size(d.Geometry.Size), size(d.Outcome.StoredBytes), parent, oneLine(d.Description))
	}
	return w.Flush()
}

func (a *app) snapshotShowCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "show SNAP", Short: "Show all about a snapshot", Args: args(cobra.ExactArgs(1)),
		Long: `Shows all about a snapshot. StoredBytes is what it uploaded, UniqueBytes what
deleting it would free.`,
		Example: "  lazyvol snapshot show snap-1a2b3c4d567890abc",
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
			one := []snapshot.Description{d}
			if err := owned(c.Context(), store, one); err != nil {
				return err
			}
			j := describe(one[0])
			if d.State == snapshot.Completed {
				switch unique, err := store.UniqueBytes(c.Context(), id); {
				case errors.Is(err, snapshot.ErrNoKey), errors.Is(err, blockstore.ErrDenied): // the latter of a snapshot that others share
					a.log().Warn("what deleting it would free is not known", "error", err)
				case err != nil:
					return err
				default:
					j.UniqueBytes = &unique
				}
			}
			if j.protectionJSON, err = a.protection(c.Context(), store, d); err != nil {
				return err
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
			fmt.Fprintf(w, "%s:\t%s\n", oneLine(name), oneLine(value)) // some of it is the store's
		}
	}
	row("snapshot", j.SnapshotId)
	row("state", j.State+" "+j.Progress)
	row("why", j.StateMessage)
	row("description", j.Description)
	row("volume", j.VolumeId)
	row("parent", j.ParentSnapshotId)
	row("set", j.SetId)
	row("owner", j.OwnerId)
	row("key", j.KmsKeyId)
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
	j.rows(row)
	for _, t := range j.Tags {
		row("tag "+t.Key, t.Value)
	}
	return w.Flush()
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
		Long: `Adds, changes and removes tags. A snapshot has at most 50, with keys of 1 to 128
characters and values of at most 256; keys that begin with aws: or lazyvol: are
reserved. A tag that is not there is removed without complaint.`,
		Example: `  lazyvol snapshot tag snap-1a2b3c4d567890abc env=prod made-by=hand
  lazyvol snapshot tag snap-1a2b3c4d567890abc --remove env`,
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
			if err := checkRemoved(set, remove); err != nil {
				return err
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
		if _, twice := tags[k]; twice {
			return nil, usageError{fmt.Errorf("%w: key %q is given twice", manifest.ErrTags, k)}
		}
		if err := checkReserved(k); err != nil {
			return nil, err
		}
		tags[k] = v
	}
	if err := manifest.CheckTags(tags); err != nil {
		return nil, usageError{err}
	}
	return tags, nil
}

// checkRemoved checks the keys of tags to be removed, beside others that are set.
func checkRemoved(set map[string]string, remove []string) error {
	for _, k := range remove {
		if _, both := set[k]; both {
			return combinationError{fmt.Errorf("tag %q is both set and removed", k)}
		}
		if err := cmp.Or(checkReserved(k), manifest.CheckTags(map[string]string{k: ""})); err != nil {
			return usageError{fmt.Errorf("--remove: %w", err)}
		}
	}
	return nil
}

// checkReserved refuses keys of tags that people cannot set, as EBS does in
// whatever case.
func checkReserved(key string) error {
	for _, prefix := range []string{"aws:", "lazyvol:"} {
		if len(key) >= len(prefix) && strings.EqualFold(key[:len(prefix)], prefix) {
			return usageError{fmt.Errorf("%w: key %q begins with %q, which is reserved", manifest.ErrTags, key, prefix)}
		}
	}
	return nil
}
