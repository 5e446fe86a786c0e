package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

func (a *app) volumeCommand() *cobra.Command {
	return group("volume", "Make, list and delete volumes of this host",
		a.volumeCreateCommand(), a.volumeListCommand(), a.volumeShowCommand(), a.volumeResizeCommand(), a.volumeDeleteCommand(), a.volumeForgetCommand(),
	)
}

func (a *app) volumeCreateCommand() *cobra.Command {
	var from, key string
	var bytes byteSize
	c := &cobra.Command{
		Use: "create", Short: "Make a volume, instantly", Args: args(cobra.NoArgs),
		Long: `Makes a volume, from a snapshot or blank, and prints its id. No data is read.

What is written to a volume is only on this host until 'lazyvol snapshot create'
puts it into the store.

A volume of a snapshot is encrypted if that is, under the same key. To encrypt what
is not, or to change the key, copy the snapshot first ('lazyvol snapshot copy --key').`,
		Example: `  lazyvol volume create --snapshot snap-1a2b3c4d567890abc
  lazyvol volume create --size 10GiB`,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx := c.Context()
			if from == "" && !c.Flags().Changed("size") {
				return usageError{errors.New("give --snapshot SNAP, --size SIZE, or both")}
			}
			var id *manifest.SnapshotID
			if from != "" {
				parsed, err := parseSnapshot(from)
				if err != nil {
					return err
				}
				id = &parsed
			} else if bytes == 0 {
				return usageError{errors.New("--size must be more than 0")}
			}
			if err := checkKey(key); err != nil {
				return err
			}
			store, err := a.openRemote(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			host, err := a.host(store, commandPatience, a.log())
			if err != nil {
				return err
			}
			a.removeAbandoned(host)
			if id != nil {
				if err := keyOfSnapshot(ctx, store.Store, *id, key); err != nil {
					return err
				}
			}
			vol, err := createVolume(ctx, host, id, int64(bytes), key)
			if err == nil || failedJob(err) {
				a.event(store.Store, store.VolumeCreated(vol, err))
			}
			if err != nil {
				return err
			}
			fmt.Fprintln(a.stdout, vol)
			fmt.Fprintf(a.stderr, "what is written to %s stays on this host until 'lazyvol snapshot create %s'\n", vol, vol)
			return nil
		},
	}
	c.Flags().StringVar(&from, "snapshot", "", "restore this snapshot (`SNAP`)")
	c.Flags().Var(&bytes, "size", "size of the volume, as 10GiB (default: the snapshot's)")
	keyFlag(c.Flags(), &key)
	return c
}

// keyOfSnapshot refuses a key other than that of the snapshot's lineage: all that is
// restored from a snapshot shares that.
func keyOfSnapshot(ctx context.Context, store *snapshot.Store, id manifest.SnapshotID, key string) error {
	if key == "" {
		return nil
	}
	lineage, err := store.Lineage(ctx, id.Lineage)
	switch {
	case err != nil:
		return err
	case lineage.Encryption == nil:
		return refusal{fmt.Errorf("%s is not encrypted: copy it ('lazyvol snapshot copy --key %s'), and restore the copy; --key '' leaves it as it is", id, key)}
	case lineage.Encryption.KeyURI != key:
		return refusal{fmt.Errorf("%s is encrypted under %s: to change the key copy it ('lazyvol snapshot copy --key %s'), and restore the copy", id, lineage.Encryption.KeyURI, key)}
	}
	return nil
}

// removeAbandoned removes what is left of volumes whose creation or deletion was
// killed. What cannot be removed now is left to the next time.
func (a *app) removeAbandoned(host *volume.Host) {
	if err := host.RemoveAbandoned(); err != nil {
		a.log().Warn("could not remove what is left of a volume", "error", err)
	}
}

// createVolume makes a volume, again if another command took its folder for an
// abandoned one's before it had a record.
func createVolume(ctx context.Context, host *volume.Host, from *manifest.SnapshotID, size int64, key string) (manifest.VolumeID, error) {
	const tries = 4
	for try := 1; ; try++ {
		vol, err := host.Create(ctx, from, size, manifest.DefaultBlockSize, key)
		if try == tries || !isAny(err, volume.ErrInUse, volume.ErrNotFound) {
			return vol, err
		}
	}
}

// volumeJSON describes a volume.
type volumeJSON struct {
	VolumeId        string
	SnapshotId      string `json:",omitempty"` // the one it was created from
	RootSnapshotId  string `json:",omitempty"` // the one its cold blocks come from
	SizeBytes       int64
	CreateTime      time.Time
	Store           string
	PendingSnapshot string `json:",omitempty"`
	Incomplete      bool   `json:",omitempty"` // its creation was interrupted
}

func describeVolume(r volume.Record) volumeJSON {
	j := volumeJSON{VolumeId: string(r.ID), SizeBytes: r.Size, CreateTime: r.Created, Store: r.StoreURL, Incomplete: r.Creating}
	if r.Base != nil {
		j.SnapshotId = r.Base.String()
	}
	if r.Root != nil {
		j.RootSnapshotId = r.Root.String()
	}
	if r.Pending != nil {
		j.PendingSnapshot = r.Pending.Snapshot.String()
	}
	return j
}

func (a *app) volumeListCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "list", Short: "List the volumes of this host, oldest first", Args: args(cobra.NoArgs),
		Example: "  lazyvol volume list",
		RunE: func(*cobra.Command, []string) error {
			records, failed, err := volume.List(vfs.OS(), a.state)
			if err != nil {
				return err
			}
			list := struct{ Volumes []volumeJSON }{[]volumeJSON{}}
			for _, r := range records {
				list.Volumes = append(list.Volumes, describeVolume(r))
			}
			if asJSON {
				return errors.Join(append(failed, printJSON(a.stdout, list))...)
			}
			if len(records)+len(failed) == 0 {
				a.note("no volume in %s", a.state)
			}
			w := tabwriter.NewWriter(a.stdout, 0, 4, 2, ' ', 0)
			if len(records) > 0 {
				fmt.Fprintln(w, "VOLUME\tSIZE\tCREATED\tROOT\tSTORE")
			}
			for _, j := range list.Volumes {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", j.VolumeId, size(j.SizeBytes), j.CreateTime.Local().Format(time.DateTime), orDash(j.RootSnapshotId), j.Store)
			}
			return errors.Join(append(failed, w.Flush())...)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func (a *app) volumeShowCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use: "show VOL", Short: "Show a volume", Args: args(cobra.ExactArgs(1)),
		Example: "  lazyvol volume show vol-0123456789abcdef0",
		RunE: func(c *cobra.Command, args []string) error {
			id, dir, err := a.volumeFolder(args[0])
			if err != nil {
				return err
			}
			r, err := volume.ReadRecord(vfs.OS(), a.state, id)
			if err != nil {
				return err
			}
			j := describeVolume(r)
			if asJSON {
				return printJSON(a.stdout, j)
			}
			w := tabwriter.NewWriter(a.stdout, 0, 4, 2, ' ', 0)
			for _, row := range [][2]string{
				{"volume", j.VolumeId}, {"size", fmt.Sprintf("%s (%d bytes)", size(j.SizeBytes), j.SizeBytes)},
				{"created", j.CreateTime.Local().Format(time.DateTime)}, {"from", orDash(j.SnapshotId)},
				{"root", orDash(j.RootSnapshotId)}, {"pending snapshot", orDash(j.PendingSnapshot)}, {"store", j.Store}, {"folder", dir},
			} {
				fmt.Fprintf(w, "%s:\t%s\n", row[0], row[1])
			}
			return w.Flush()
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return c
}

func (a *app) volumeDeleteCommand() *cobra.Command {
	var yes bool
	c := &cobra.Command{
		Use: "delete VOL", Short: "Delete a volume with what was written since its last snapshot", Args: args(cobra.ExactArgs(1)),
		Long: `Deletes a volume with what was written since its last snapshot, which is nowhere
else. At a terminal it asks before that is lost, unless --yes is given.`,
		Example: "  lazyvol volume delete vol-0123456789abcdef0",
		RunE: func(c *cobra.Command, args []string) error {
			ctx := c.Context()
			id, _, err := a.volumeFolder(args[0])
			if err != nil {
				return err
			}
			record, err := volume.ReadRecord(vfs.OS(), a.state, id)
			if err != nil {
				return err
			}
			store, err := a.openRemote(ctx, record.StoreURL, commandPatience)
			if err != nil {
				return err
			}
			host, err := a.host(store, commandPatience, a.log())
			if err != nil {
				return err
			}
			a.removeAbandoned(host)
			if err := a.refuseAttached(id); err != nil {
				return err
			}
			if !yes && a.canAsk() {
				if err := a.confirmDelete(ctx, id); err != nil {
					return err
				}
			}
			return host.Delete(ctx, id)
		},
	}
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}

// refuseAttached refuses a volume whose loop device, and what is mounted from it, a killed
// daemon left behind: detach does not find those of a volume that there is not. One that
// is served is refused anyway.
func (a *app) refuseAttached(id manifest.VolumeID) error {
	p := &place{id: string(id), dir: a.attachDir(string(id)), served: true}
	if err := a.findDevices(p); err != nil {
		return err
	}
	if len(p.broken) > 0 {
		return refusal{fmt.Errorf("the daemon of %s was killed, and %s is still attached: clean up with 'lazyvol detach %[1]s' first", id, strings.Join(p.broken, ", "))}
	}
	return nil
}

// confirmDelete asks a person before a volume is deleted with what was never
// snapshotted, or may not have been.
func (a *app) confirmDelete(ctx context.Context, id manifest.VolumeID) error {
	loss := ""
	switch s, err := a.statusOf(ctx, string(id)); {
	case errors.Is(err, volume.ErrInUse):
		return err
	case err != nil: // one that is damaged is to be deleted, too
		loss = fmt.Sprintf("Whether anything was written to %s since its last snapshot is not known (%v).", id, err)
	case s.DirtyBytes == 0 || s.PID != 0: // in use, it is refused
		return nil
	default:
		loss = fmt.Sprintf("%s were written to %s since its last snapshot, and are lost with it.", size(s.DirtyBytes), id)
	}
	return a.confirm(ctx, printable(loss), string(id))
}

func (a *app) volumeForgetCommand() *cobra.Command {
	return &cobra.Command{
		Use: "forget VOL", Short: "Remove the pins of a volume whose host is lost", Args: args(cobra.ExactArgs(1)),
		Long: `Removes the pins of a volume whose host is lost for good, so that the space of
deleted snapshots it held can be freed. Should the host come back, the volume's
cold blocks may be gone. A volume of this host is deleted instead.

What the host had mounted or was exporting when it was lost has a pin, too: give
its holder (mount-…), as 'lazyvol gc' shows it.`,
		Example: "  lazyvol volume forget vol-0123456789abcdef0",
		RunE: func(c *cobra.Command, args []string) error {
			ctx := c.Context()
			if err := a.refuseToForget(args[0]); err != nil {
				return err
			}
			store, err := a.openStore(ctx, "", commandPatience)
			if err != nil {
				return err
			}
			forgotten, err := store.Forget(ctx, args[0])
			for _, snap := range forgotten {
				fmt.Fprintln(a.stdout, snap)
			}
			if err == nil && len(forgotten) == 0 {
				return codedError{fmt.Sprintf("%s has no pins in %s", args[0], store), exitNotFound}
			}
			return err
		},
	}
}

// refuseToForget refuses the holder of a pin that this host has, and what is
// no holder's id.
func (a *app) refuseToForget(holder string) error {
	if isSessionID(holder) {
		here, err := fileExists(filepath.Join(volume.SessionsDir(a.state), holder))
		if here {
			return refusal{fmt.Errorf("%s is a mount or an export of this host; end it, and any command that reads the store removes its pin", holder)}
		}
		return err
	}
	id, _, err := a.volumeFolder(holder)
	if err != nil {
		return err
	}
	_, err = volume.ReadRecord(vfs.OS(), a.state, id)
	if err == nil {
		return refusal{fmt.Errorf("%s is a volume of this host; use 'lazyvol volume delete'", id)}
	}
	if errors.Is(err, volume.ErrNotFound) {
		return nil
	}
	return err
}
