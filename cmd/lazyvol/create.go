package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// createFlags are the flags of 'snapshot create'.
type createFlags struct {
	key         string
	parent      string
	description string
	tags        []string
	freeze      []string
	noWait      bool

	freezeMounted bool     // whatever is mounted from the volumes' loop devices
	mounted       []string // where that is
}

func (a *app) snapshotCreateCommand() *cobra.Command {
	var f createFlags
	c := &cobra.Command{
		Use: "create SOURCE...", Short: "Make a snapshot of an image file, a block device or volumes", Args: args(cobra.MinimumNArgs(1)),
		Long: `Makes a snapshot of a raw image file, a block device, or a volume (vol-…), and
prints its id when it is committed. Of a volume only what changed since its last
snapshot is uploaded, and it may be mounted and in use. With --parent, only blocks
of an image that differ from that snapshot's.

Several volumes of this host, up to 128, are cut at one moment, as if the host had
lost its power then: their writers are held for some milliseconds. All snapshots are
completed, or none. Their ids are printed in the order of the volumes.

An image that changes while it is read fails; a block device that is mounted for
writing is refused without --freeze. Interrupted, nothing is left of it but the
changes themselves.`,
		Example: `  lazyvol snapshot create disk.img
  lazyvol snapshot create --parent snap-1a2b3c4d567890abc --tag env=prod disk.img
  lazyvol snapshot create vol-0123456789abcdef0
  lazyvol snapshot create --freeze /mnt/data --freeze /mnt/log vol-0123456789abcdef0 vol-123456789abcdef01`,
		RunE: func(c *cobra.Command, args []string) error {
			tags, err := parseTags(f.tags)
			if err != nil {
				return err
			}
			if err := manifest.CheckDescription(f.description); err != nil {
				return usageError{err}
			}
			if err := f.checkKey(a.givenHere(c, "key"), args); err != nil {
				return err
			}
			ready, err := newReadiness()
			if err != nil {
				return err
			}
			if f.noWait && !ready.background() {
				return a.createInBackground(c.Context(), args, &f)
			}
			if ready.background() {
				a.progress = progressNone // its stderr is soon a log
			}
			if f.freezeMounted {
				if f.mounted, err = a.mountedOf(c.Context(), args); err != nil {
					return ready.failed(err)
				}
			}
			switch {
			case len(args) > 1:
				err = a.createSet(c.Context(), args, &f, tags, ready)
			case strings.HasPrefix(args[0], "vol-"):
				err = a.createFromVolume(c.Context(), args[0], &f, tags, ready)
			default:
				err = a.createFromImage(c.Context(), args[0], &f, tags, ready)
			}
			return ready.failed(err)
		},
	}
	flags := c.Flags()
	flags.StringVar(&f.parent, "parent", "", "store only what differs from this snapshot (`SNAP`; of a volume: its last one, always)")
	flags.StringVar(&f.description, "description", "", "what it is")
	flags.StringArrayVar(&f.tags, "tag", nil, "tag as `KEY=VALUE` (repeatable)")
	flags.StringArrayVar(&f.freeze, "freeze", nil, "freeze the filesystem mounted on this `DIR` at the moment of the snapshot (repeatable)")
	flags.BoolVar(&f.freezeMounted, "freeze-mounted", false, "freeze whatever filesystems are mounted from the volumes' loop devices at the moment of the snapshot")
	keyFlag(flags, &f.key)
	flags.BoolVar(&f.noWait, "no-wait", false, "print the id once the snapshot is pending, and go on in the background")
	return c
}

// checkKey refuses a key for what begins no lineage; one that is the default is not
// meant for that. With a parent a given one is compared with the lineage's: whoever can
// write the store could else have changed that.
func (f *createFlags) checkKey(given bool, sources []string) error {
	switch {
	case strings.HasPrefix(sources[0], "vol-") && given:
		return usageError{errKeyOfLineage}
	case strings.HasPrefix(sources[0], "vol-"), f.parent != "" && !given:
		f.key = ""
	}
	return checkKey(f.key)
}

// createInBackground runs the same command in the background, and returns when
// it has an id.
func (a *app) createInBackground(ctx context.Context, sources []string, f *createFlags) error {
	args := append(a.globalArgs(), "snapshot", "create", "--no-wait")
	if f.parent != "" {
		args = append(args, "--parent="+f.parent)
	}
	if f.description != "" {
		args = append(args, "--description="+f.description)
	}
	for _, t := range f.tags {
		args = append(args, "--tag="+t)
	}
	if f.freezeMounted {
		args = append(args, "--freeze-mounted")
	}
	for _, dir := range f.freeze {
		abs, err := filepath.Abs(dir)
		if err != nil {
			return err
		}
		args = append(args, "--freeze="+abs)
	}
	// It runs in another folder.
	sources = slices.Clone(sources)
	for i, source := range sources {
		if strings.HasPrefix(source, "vol-") {
			continue
		}
		var err error
		if sources[i], err = filepath.Abs(source); err != nil {
			return err
		}
	}
	if f.key != "" {
		args = append(args, "--key="+f.key)
	}
	ids, err := a.spawn(ctx, append(append(args, "--"), sources...))
	if err == nil {
		fmt.Fprintln(a.stdout, ids)
	}
	return err
}

// begun tells whoever waits that the snapshot has an id. What a process in the
// background has to say from then on goes to the log in dir.
func begun(ready *readiness, id manifest.SnapshotID, dir string) error {
	if ready.background() {
		if err := logToFile(dir); err != nil {
			return err
		}
	}
	return ready.ready(id.String())
}

func (a *app) createFromImage(ctx context.Context, path string, f *createFlags, tags map[string]string, ready *readiness) (err error) {
	src, err := snapshot.OpenSource(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	if err := refuseMounted(path, len(f.freeze) > 0); err != nil {
		return err
	}
	store, err := a.openStore(ctx, "", commandPatience)
	if err != nil {
		return err
	}
	start := time.Now()
	id, err := a.storeImage(ctx, store, src, f, tags, ready)
	a.snapshotEnded(store, id, "", start, err)
	return err
}

// storeImage makes the snapshot of an image, and returns its id, as soon as it
// has one, also with an error.
func (a *app) storeImage(ctx context.Context, store *snapshot.Store, src *snapshot.FileSource, f *createFlags, tags map[string]string, ready *readiness) (id manifest.SnapshotID, err error) {
	if _, err := store.ID(ctx); err != nil {
		return id, err
	}
	a.sweepSessions(ctx, store)
	plan, err := a.planImage(ctx, store, src.Size(), f, tags)
	if err != nil {
		return id, err
	}
	thaw, err := a.freezeAll(f)
	if err != nil {
		return id, err
	}
	defer func() { err = errors.Join(err, thaw()) }()
	id = plan.ID
	attempt, err := store.Begin(ctx, plan)
	if err != nil {
		return id, errors.Join(err, resolveFailed(ctx, store, plan))
	}
	if err := begun(ready, id, a.state); err != nil {
		return id, errors.Join(err, abort(ctx, attempt, err))
	}
	outcome, err := a.uploadImage(ctx, attempt, src, plan.Geometry)
	if err != nil {
		return id, errors.Join(err, abort(ctx, attempt, err))
	}
	fmt.Fprintf(a.stderr, "stored %s for %s of data in %s\n", size(outcome.StoredBytes),
		size(outcome.DataBlocks*int64(outcome.BlockSize)), outcome.End.Sub(outcome.Start).Round(time.Millisecond))
	if !f.noWait {
		fmt.Fprintln(a.stdout, outcome.Snapshot)
	}
	return id, nil
}

// planImage plans the snapshot of an image: in its parent's lineage, or in a
// new one.
func (a *app) planImage(ctx context.Context, store *snapshot.Store, size int64, f *createFlags, tags map[string]string) (snapshot.Plan, error) {
	g := manifest.Geometry{Size: size, BlockSize: manifest.DefaultBlockSize}
	if f.parent == "" {
		lineage, err := store.CreateLineage(ctx, g.BlockSize, f.key)
		if err != nil {
			return snapshot.Plan{}, err
		}
		plan := snapshot.NewPlan(lineage.ID)
		plan.Geometry, plan.Description, plan.Tags, plan.Log, plan.Memory = g, f.description, tags, a.log(), a.heap()
		return plan, nil
	}
	id, err := parseSnapshot(f.parent)
	if err != nil {
		return snapshot.Plan{}, err
	}
	// No pin: from its intent on, the attempt itself keeps the parent.
	img, err := store.Open(ctx, id, snapshot.Holder{})
	if err != nil {
		return snapshot.Plan{}, fmt.Errorf("parent: %w", err)
	}
	if err := keyOfSnapshot(ctx, store, id, f.key); err != nil {
		return snapshot.Plan{}, err
	}
	plan := snapshot.NewPlan(id.Lineage)
	g.BlockSize = img.Geometry().BlockSize
	plan.Parent, plan.Geometry, plan.Description, plan.Tags, plan.Log, plan.Memory = img, g, f.description, tags, a.log(), a.heap()
	return plan, nil
}

func (a *app) uploadImage(ctx context.Context, attempt *snapshot.Attempt, src *snapshot.FileSource, g manifest.Geometry) (manifest.Outcome, error) {
	bar := a.newProgress(attempt.ID().String(), unknownTotal)
	defer bar.end()
	bar.follow(attempt.Progress)
	if err := attempt.Upload(ctx, src.Source(g.BlockSize)); err != nil {
		return manifest.Outcome{}, err
	}
	if err := src.Changed(); err != nil {
		return manifest.Outcome{}, err
	}
	outcome, err := attempt.Commit(ctx)
	if err == nil {
		bar.finish()
	}
	return outcome, err
}

// abort gives an attempt up for a reason.
func abort(ctx context.Context, attempt *snapshot.Attempt, why error) error {
	if errors.Is(why, snapshot.ErrAborted) {
		return nil // somebody did already
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandPatience)
	defer cancel()
	return attempt.Abort(ctx, firstLine(why))
}

// resolveFailed makes sure that an attempt whose intent may be in the store
// never becomes a snapshot.
func resolveFailed(ctx context.Context, store *snapshot.Store, plan snapshot.Plan) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandPatience)
	defer cancel()
	_, _, err := store.Resolve(ctx, plan.ID, plan.Nonce, "it could not begin")
	return err
}

func firstLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// refuseMounted refuses a block device that is mounted for writing, unless its
// filesystem is to be frozen.
func refuseMounted(path string, frozen bool) error {
	mountpoint, err := snapshot.MountedReadWrite(path)
	if err != nil || mountpoint == "" || frozen {
		return err
	}
	return refusal{fmt.Errorf("%s is mounted for writing on %s: unmount it, or freeze it with --freeze %s", path, mountpoint, mountpoint)}
}

// createFromVolume snapshots a volume: through its daemon if it is mounted.
func (a *app) createFromVolume(ctx context.Context, target string, f *createFlags, tags map[string]string, ready *readiness) (err error) {
	id, dir, err := a.volumeFolder(target)
	if err != nil {
		return err
	}
	if f.parent != "" {
		return usageError{errors.New("--parent is for images: a volume's snapshot always follows its last one")}
	}
	if _, err := volume.ReadRecord(vfs.OS(), a.state, id); err != nil {
		return err
	}
	ctx, sealed, thaw, err := a.freezeForCut(ctx, f)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(frozenLong(ctx, err), thaw()) }()
	err = a.askSnapshot(ctx, dir, f, tags, sealed, ready)
	if !errors.Is(err, errNoDaemon) {
		return err
	}
	v, store, err := a.openSettled(ctx, target)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	bar := a.newProgress("", unknownTotal)
	defer bar.end()
	var sealedErr, begunErr error
	var made manifest.SnapshotID
	start := time.Now()
	outcome, err := v.Snapshot(ctx, volume.SnapshotOptions{
		Description: f.description, Tags: tags,
		Sealed: func() { sealedErr = sealed() },
		Cut: func(attempt *snapshot.Attempt) {
			made = attempt.ID()
			bar.identify(made.String())
			bar.follow(attempt.Progress)
			begunErr = begun(ready, made, dir)
		},
	})
	a.snapshotEnded(store, made, id, start, err)
	if err := errors.Join(err, sealedErr, begunErr); err != nil {
		return err
	}
	bar.finish()
	if !f.noWait {
		fmt.Fprintln(a.stdout, outcome.Snapshot)
	}
	return nil
}

// askSnapshot lets a volume's daemon make the snapshot. sealed is called when its moment
// has passed.
func (a *app) askSnapshot(ctx context.Context, dir string, f *createFlags, tags map[string]string, sealed func() error, ready *readiness) error {
	request, err := json.Marshal(snapshotRequest{Description: f.description, Tags: tags})
	if err != nil {
		return err
	}
	// What follows may take as long as it likes. One that hangs is found out here: it
	// would not notice that we hang up.
	if _, err := askStatus(ctx, dir); err != nil {
		return err
	}
	// Interrupted, we hang up and listen on: when the daemon ends its answer,
	// what it was making is gone and the changes are back in the volume.
	body, err := dialControl(dir).hangUp(ctx).call(context.WithoutCancel(ctx), "POST", "/snapshot", bytes.NewReader(request))
	if err != nil {
		return err
	}
	defer body.Close()
	bar := a.newProgress("", unknownTotal)
	defer bar.end()
	for decoder := json.NewDecoder(body); ; {
		var e snapshotEvent
		if err := decoder.Decode(&e); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return fmt.Errorf("the daemon broke off; the changes are kept: %w", err)
		}
		if e.TotalBytes > 0 {
			bar.setOf(e.DoneBytes, e.TotalBytes)
		}
		switch {
		case e.Error != "":
			return remoteError{e.report}
		case e.Sealed:
			if err := sealed(); err != nil {
				return err
			}
		case e.Cut:
			bar.identify(e.Snapshot)
			id, err := manifest.ParseSnapshotID(e.Snapshot)
			if err := errors.Join(err, sealed()); err != nil {
				return err
			}
			if err := begun(ready, id, dir); err != nil {
				return err
			}
		case e.Done:
			bar.finish()
			if !f.noWait {
				fmt.Fprintln(a.stdout, e.Snapshot)
			}
			return nil
		}
	}
}
