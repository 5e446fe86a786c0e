package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// mountFlags are the flags of a mount.
type mountFlags struct {
	foreground   bool
	noHydrate    bool
	hydrateRate  byteSize
	readDeadline time.Duration
	cacheSize    byteSize
	allowOther   bool
	readAhead    byteSize
	uid, gid     uint32
	trace        traceFlags

	// What 'attach --foreground' does on top of a mount that can be used, before
	// anybody is told of it; it returns what is shown to people. And how it is undone.
	up   func(context.Context) (string, error)
	down func(*slog.Logger) error
}

func (f *mountFlags) register(c *cobra.Command) {
	flags := c.Flags()
	f.registerReading(flags)
	flags.BoolVar(&f.noHydrate, "no-hydrate", false, "fetch only what is read ('lazyvol hydrate --resume' begins later)")
	flags.Var(&f.hydrateRate, "hydrate-rate", "fetch at most so many bytes a second in the background, as 100MiB")
	f.trace.register(flags)
}

// registerReading adds the flags of whatever shows images, volumes or not.
func (f *mountFlags) registerReading(flags *pflag.FlagSet) {
	flags.DurationVar(&f.readDeadline, "read-deadline", defaultReadDeadline, "how long a read waits for the store before it fails")
	flags.Var(&f.cacheSize, "cache-size", "keep at most so many `bytes` on this host that the store has too, of all volumes and mounts together: what was used least recently goes first (default: leave a tenth of the filesystem free)")
	f.readAhead = defaultReadAhead
	flags.Var(&f.readAhead, "read-ahead", "fetch at most so many `bytes` ahead of a sequential reader at a time; 0: none")
	flags.BoolVar(&f.allowOther, "allow-other", false, "let other users in")
	flags.Uint32Var(&f.uid, "uid", 0, "owner of the file")
	flags.Uint32Var(&f.gid, "gid", 0, "group of the file")
}

// args returns the flags as a command line has them.
func (f *mountFlags) args() []string {
	args := f.readingArgs()
	if f.noHydrate {
		args = append(args, "--no-hydrate")
	}
	if f.hydrateRate > 0 {
		args = append(args, fmt.Sprintf("--hydrate-rate=%d", f.hydrateRate))
	}
	return append(args, f.trace.args()...)
}

// readingArgs is args for the flags of registerReading.
func (f *mountFlags) readingArgs() []string {
	args := []string{
		fmt.Sprintf("--read-deadline=%s", f.readDeadline), fmt.Sprintf("--read-ahead=%d", f.readAhead),
		fmt.Sprintf("--uid=%d", f.uid), fmt.Sprintf("--gid=%d", f.gid),
	}
	if f.cacheSize > 0 {
		args = append(args, fmt.Sprintf("--cache-size=%d", f.cacheSize))
	}
	if f.allowOther {
		args = append(args, "--allow-other")
	}
	return args
}

func (f *mountFlags) check() error {
	if f.readDeadline <= 0 {
		return usageError{errors.New("--read-deadline must be positive")}
	}
	return f.trace.check()
}

func (a *app) mountCommand() *cobra.Command {
	var f mountFlags
	c := &cobra.Command{
		Use:   "mount SNAP|VOL DIR",
		Short: "Mount a snapshot read-only, or a volume",
		Long: `Mounts a snapshot read-only, or a volume for reading and writing, as
DIR/volume.img, with DIR/status.json beside it. Returns when the mount is ready;
a daemon serves it until 'lazyvol unmount', SIGTERM or umount. A mountpoint that
a killed daemon left dead is recovered.

What is written to a volume is only on this host until 'lazyvol snapshot create'.`,
		Example: `  lazyvol mount snap-1a2b3c4d567890abc /mnt/old
  lazyvol mount --hydrate-rate 50MiB vol-0123456789abcdef0 /mnt/disk`,
		Args: args(cobra.ExactArgs(2)),
		RunE: func(c *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			dir, err := filepath.Abs(args[1])
			if err != nil {
				return err
			}
			if f.foreground {
				a.flushOwn()
				return a.mountHere(c.Context(), args[0], dir, &f)
			}
			_, err = a.spawnMount(c.Context(), args[0], dir, &f)
			return err
		},
	}
	f.register(c)
	c.Flags().BoolVar(&f.foreground, "foreground", false, "stay, and log to stderr, for supervisors")
	return c
}

// spawnMount starts a daemon that mounts target on dir, and returns when the
// mount is ready.
func (a *app) spawnMount(ctx context.Context, target, dir string, f *mountFlags) (string, error) {
	args := append(a.globalArgs(), "mount", "--foreground")
	args = append(args, f.args()...)
	return a.spawn(ctx, append(args, "--", target, dir))
}

// globalArgs are the global flags as the command line of a background process has them;
// backgroundEnv has the rest.
func (a *app) globalArgs() []string {
	args := []string{"--state=" + a.state}
	if a.memoryGiven {
		args = append(args, fmt.Sprintf("--memory=%d", a.memory))
	}
	if a.storeURL != "" {
		args = append(args, "--store="+a.storeURL)
	}
	if a.owner != "" {
		args = append(args, "--owner-id="+a.owner)
	}
	if a.verbose {
		args = append(args, "--verbose")
	}
	if a.logging.level != "" {
		args = append(args, "--log-level="+string(a.logging.level))
	}
	if a.logging.format != logText {
		args = append(args, "--log-format="+string(a.logging.format))
	}
	return args
}

// mountHere mounts target and serves it in this process.
func (a *app) mountHere(ctx context.Context, target, dir string, f *mountFlags) error {
	log, ready, err := a.becomeDaemon(dir)
	if err != nil {
		return err
	}
	switch {
	case strings.HasPrefix(target, "snap-"):
		err = a.mountSnapshot(ctx, target, dir, f, log, ready)
	case strings.HasPrefix(target, "vol-"):
		err = a.mountVolume(ctx, target, dir, f, log, ready)
	default:
		err = usageError{fmt.Errorf("%q is neither a snapshot (snap-…) nor a volume (vol-…)", target)}
	}
	return ready.failed(err)
}

// flushOwn makes this process an I/O flusher, by which it begins anew: it comes before all
// else.
func (a *app) flushOwn() {
	if err := becomeFlusher(prctl, unix.Exec); err != nil {
		a.log().Debug("the kernel may make the daemon wait for what only it can write", "error", err)
	}
}

// becomeDaemon makes this process, after flushOwn, one that will serve a mount on dir.
func (a *app) becomeDaemon(dir string) (*slog.Logger, *readiness, error) {
	addSpareProcs()
	ready, err := newReadiness()
	if err != nil {
		return nil, nil, err
	}
	if err := errors.Join(checkMountpoint(dir), a.refuseHiding(dir)); err != nil {
		return nil, nil, ready.failed(err)
	}
	a.logFile = newLogFile()
	return a.logger(a.logFile, a.minimum(slog.LevelInfo)), ready, nil
}

// checkMountpoint makes sure that a directory can be mounted on, and recovers
// it if a killed daemon left it dead.
func checkMountpoint(dir string) error {
	if err := recoverMountpoint(dir); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("mountpoint %s does not exist; make it first", dir)
		}
		return fmt.Errorf("recover mountpoint %s: %w", dir, err)
	}
	var st, parent unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return fmt.Errorf("mountpoint %s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return fmt.Errorf("mountpoint %s is not a directory", dir)
	}
	if err := unix.Stat(filepath.Dir(dir), &parent); err != nil {
		return fmt.Errorf("mountpoint %s: %w", dir, err)
	}
	if st.Dev != parent.Dev {
		return refusal{fmt.Errorf("something is mounted on %s already", dir)}
	}
	return nil
}

// refuseHiding refuses to mount on the state directory, or above it, or on one of its
// folders: no command would find what it has there.
func (a *app) refuseHiding(dir string) error {
	state, err := filepath.EvalSymlinks(a.state)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at the state directory: %w", err)
	}
	_, path, err := fs.MountedOn(dir)
	if errors.Is(err, os.ErrNotExist) { // which others tell
		return nil
	}
	if err != nil {
		return fmt.Errorf("mountpoint %s: %w", dir, err)
	}
	if rel, err := filepath.Rel(path, state); err == nil && filepath.IsLocal(rel) || filepath.Dir(path) == state {
		return refusal{fmt.Errorf("mountpoint %s: the state directory %s would be out of sight", dir, a.state)}
	}
	return nil
}

func (a *app) mountSnapshot(ctx context.Context, target, dir string, f *mountFlags, log *slog.Logger, ready *readiness) (err error) {
	id, err := parseSnapshot(target)
	if err != nil {
		return err
	}
	store, err := a.openRemote(ctx, "", min(f.readDeadline, commandPatience))
	if err != nil {
		return err
	}
	s, img, err := a.beginSession(ctx, store.Store, id, dir)
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandPatience)
		defer cancel()
		err = errors.Join(err, s.end(ctx, img.Pinned))
	}()
	host, err := a.mountHost(store, f, log)
	if err != nil {
		return err
	}
	device, err := host.OpenSnapshot(ctx, img)
	if err != nil {
		return err
	}
	device.LoadFirstLeaf()
	d := &daemon{app: a, store: store.Store, id: id.String(), dir: s.dir, device: device, log: log, mountpoint: dir, resumed: make(chan struct{}, 1)}
	d.trace = tracing{f.trace, store.Store, device, []manifest.SnapshotID{id}, log}
	err = a.serveMount(ctx, d, f, ready)
	return errors.Join(err, device.Close())
}

func (a *app) mountVolume(ctx context.Context, target, dir string, f *mountFlags, log *slog.Logger, ready *readiness) error {
	v, store, err := a.openVolume(ctx, target, f, log)
	if err != nil {
		return err
	}
	v.LoadFirstLeaf()
	settled, err := a.settleFirst(ctx, v)
	if err != nil {
		return err
	}
	d := &daemon{app: a, store: store, id: target, dir: volume.Dir(a.state, manifest.VolumeID(target)), device: v.Device, volume: v, log: log, mountpoint: dir, resumed: make(chan struct{}, 1), unsettled: make(chan struct{}, 1)}
	if !settled {
		d.unsettled <- struct{}{}
	}
	d.trace = tracing{f.trace, store, v.Device, tracesOf(v.Record()), log}
	err = a.serveMount(ctx, d, f, ready)
	return errors.Join(err, v.Close())
}

// mountHost is host with what the flags of a mount say.
func (a *app) mountHost(store remote, f *mountFlags, log *slog.Logger) (*volume.Host, error) {
	host, err := a.host(store, f.readDeadline, log)
	if err != nil {
		return nil, err
	}
	host.Budget = volume.NewBudget(host.FS, host.State, int64(f.cacheSize), log)
	host.ReadAhead = a.readAhead(int64(f.readAhead))
	return host, nil
}

// openVolume opens a volume and its own store, which it asks nothing.
func (a *app) openVolume(ctx context.Context, target string, f *mountFlags, log *slog.Logger) (*volume.Volume, *snapshot.Store, error) {
	id, err := manifest.ParseVolumeID(target)
	if err != nil {
		return nil, nil, usageError{err}
	}
	record, err := volume.ReadRecord(vfs.OS(), a.state, id)
	if err != nil {
		return nil, nil, err
	}
	store, err := a.openRemote(ctx, record.StoreURL, f.readDeadline)
	if err != nil {
		return nil, nil, err
	}
	host, err := a.mountHost(store, f, log)
	if err != nil {
		return nil, nil, err
	}
	v, err := a.openFree(ctx, host, id)
	return v, store.Store, err
}

// settleFirst lets the store have a say before a volume is used: wrong
// credentials are better told now than by reads that fail. A store that does not
// answer is no obstacle, but then the volume is not settled. After an error it
// is closed.
func (a *app) settleFirst(ctx context.Context, v *volume.Volume) (settled bool, err error) {
	const patience = 10 * time.Second
	asking, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err = v.Settle(asking)
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, snapshot.ErrNotFound):
		a.warning("%v", err)
		return true, nil // as far as it can be
	case isAny(err, blockstore.ErrUnavailable, context.DeadlineExceeded) && ctx.Err() == nil:
		a.warning("the store does not answer; reads of what is not cached will wait for it: %v", err)
		return false, nil
	}
	return false, errors.Join(err, v.Close())
}

// openSettled is openVolume and settleFirst.
func (a *app) openSettled(ctx context.Context, target string) (*volume.Volume, *snapshot.Store, error) {
	v, store, err := a.openVolume(ctx, target, &mountFlags{readDeadline: defaultReadDeadline}, a.log())
	if err == nil {
		_, err = a.settleFirst(ctx, v)
	}
	return v, store, err
}

// openFree opens a volume. One that a short command, such as status, is looking
// into becomes free in a moment; one that a daemon serves does not.
func (a *app) openFree(ctx context.Context, host *volume.Host, id manifest.VolumeID) (*volume.Volume, error) {
	const patience = 3 * time.Second
	for end := time.Now().Add(patience); ; {
		v, err := host.OpenVolume(id)
		if !errors.Is(err, volume.ErrInUse) || time.Now().After(end) {
			return v, err
		}
		if s, statusErr := askStatus(ctx, volume.Dir(a.state, id)); statusErr == nil {
			return nil, fmt.Errorf("%w: %s is mounted on %s", volume.ErrInUse, id, s.Mountpoint)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// serveMount serves a device until its mount ends.
func (a *app) serveMount(ctx context.Context, d *daemon, f *mountFlags, ready *readiness) error {
	d.hydrator = hydrate.New(source{d.device}, hydrate.Options{Rate: int64(f.hydrateRate), Busy: d.device.DemandInFlight, Log: d.log})
	if f.noHydrate {
		d.pause(true)
	}
	var err error
	if d.replay, err = d.trace.begin(ctx); err != nil {
		return err
	}
	d.shownAs, d.letGo, d.notify = d.mountpoint, f.down, newNotifier(ready.background(), d.log)
	o := fs.Options{AllowOther: f.allowOther, UID: f.uid, GID: f.gid, ReadDeadline: f.readDeadline}
	err = d.serve(ctx, o, func() error {
		if ready.background() {
			if err := a.logFile.open(d.dir); err != nil {
				return err
			}
		}
		if f.up != nil {
			shownAs, err := f.up(ctx)
			if err != nil {
				return err
			}
			d.shownAs = shownAs
		}
		d.notify.ready(d.statusLine())
		return ready.ready(d.mountpoint)
	})
	return errors.Join(err, d.trace.end(ctx))
}
