package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/internal/loopdev"
)

// loopReadAheadKB is how far the kernel reads ahead on an attached loop device:
// with 128, its default, a sequential reader waits for the store seven times as
// long.
const loopReadAheadKB = 4096

func loopOptions(readOnly bool) loopdev.Options {
	return loopdev.Options{ReadOnly: readOnly, ReadAheadKB: loopReadAheadKB, PartScan: true}
}

// attachDir is where attach mounts a snapshot or volume that is not mounted.
func (a *app) attachDir(target string) string { return filepath.Join(a.state, "attached", target) }

// attachFlags are the flags of attach.
type attachFlags struct {
	mountFlags
	mount filesystemFlags
}

func (a *app) attachCommand() *cobra.Command {
	var f attachFlags
	c := &cobra.Command{
		Use: "attach SNAP|VOL", Short: "Mount and attach as a loop device; prints /dev/loopN", Args: args(cobra.ExactArgs(1)),
		Long: `Mounts a snapshot or volume, unless it is mounted, and attaches a loop device
with direct I/O to it. Prints the device. Attaching again prints the same device.
Once all of a snapshot is on this host its device reads the local file, as fast as
any, and does not need the daemon.

With --mount DIR the filesystem inside is mounted on DIR as well, and 'lazyvol
detach' unmounts it again. That of a snapshot is mounted read-only, with nosuid and
nodev ('--mount-options suid,dev' allows both), and its journal left alone (ext4:
noload, xfs: norecovery, btrfs: rescue=nologreplay): what was only in the journal
does not show; in a volume made from the snapshot it does. Of a
partitioned device the one partition with a filesystem is mounted, or that which
--partition names.

If the daemon was killed, attaching again detaches what is dead, and mounts again
what was mounted with --mount.`,
		Example: `  lazyvol attach vol-0123456789abcdef0
  lazyvol attach --mount /mnt/data vol-0123456789abcdef0
  lazyvol attach --mount /mnt/old --partition 1 --no-hydrate snap-1a2b3c4d567890abc`,
		RunE: func(c *cobra.Command, args []string) error {
			if os.Geteuid() != 0 {
				return errors.New("attach needs root: loop devices are the kernel's")
			}
			if err := errors.Join(f.check(), f.mount.check(c, args[0])); err != nil {
				return err
			}
			if f.foreground {
				return a.attachHere(c.Context(), args[0], &f)
			}
			dev, err := a.attach(c.Context(), args[0], &f)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.stdout, dev)
			return nil
		},
	}
	f.register(c)
	f.mount.register(c)
	c.Flags().BoolVar(&f.foreground, "foreground", false, "stay, and log to stderr, for supervisors; SIGTERM detaches")
	return c
}

func (a *app) attach(ctx context.Context, target string, f *attachFlags) (dev string, err error) {
	p, turn, err := a.placeInTurn(ctx, target)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, turn.end()) }()
	if err := a.prepare(p, f); err != nil {
		return "", err
	}
	mounted := false
	if !p.served {
		if err := os.MkdirAll(p.dir, 0o700); err != nil {
			return "", fmt.Errorf("attach: %w", err)
		}
		if _, err := a.spawnMount(ctx, target, p.dir, &f.mountFlags); err != nil {
			return "", errors.Join(err, os.Remove(p.dir))
		}
		mounted = true
	}
	dev, err = a.attachDevice(ctx, p, &f.mount)
	if err != nil && mounted {
		err = errors.Join(err, a.unmountAttached(context.WithoutCancel(ctx), p.dir))
	}
	return dev, err
}

// placeInTurn finds out where target is attached, in the caller's turn.
func (a *app) placeInTurn(ctx context.Context, target string) (p *place, t *turn, err error) {
	if _, err := a.place(ctx, target); err != nil { // what is refused leaves no trace
		return nil, nil, err
	}
	if t, err = a.takeTurn(ctx, target); err != nil {
		return nil, nil, err
	}
	if p, err = a.place(ctx, target); err != nil {
		return nil, nil, errors.Join(err, t.end())
	}
	return p, t, nil
}

// prepare refuses what cannot be done, and cleans up what killed daemons left.
func (a *app) prepare(p *place, f *attachFlags) error {
	if p.hidden != nil {
		return p.hidden
	}
	if err := f.mount.refuseTaken(p); err != nil {
		return err
	}
	if f.mount.dir != "" {
		if err := a.refuseHiding(f.mount.dir); err != nil {
			return err
		}
	}
	return a.buryDead(p, a.recordLost)
}

// attachDevice attaches a loop device to a place that is served, unless it has one,
// and mounts what is to be mounted, and what was before its daemon was killed. After an
// error it leaves no device that it attached.
func (a *app) attachDevice(ctx context.Context, p *place, f *filesystemFlags) (dev string, err error) {
	attached := false
	lost, err := a.lostMounts(p.id)
	if err != nil {
		return "", err
	}
	if err := a.findDevices(p); err != nil {
		return "", err
	}
	if len(p.devices) > 0 {
		dev = p.devices[0]
	} else if dev, err = a.attachLoop(ctx, p); err != nil {
		return "", err
	} else {
		attached = true
	}
	a.warnOfDifferences(dev, p.readOnly())
	if _, err := findPartitions(ctx, dev); err != nil { // which have nodes then, also in containers
		a.warning("%v", err)
	}
	for _, m := range lost {
		if err == nil {
			err = a.mountAgain(ctx, p.id, dev, m)
		}
	}
	if err == nil && f.dir != "" {
		err = a.mountFilesystem(ctx, p.id, dev, f)
	}
	if err != nil && attached {
		ours, _, look := a.mountsOf(p.id, []string{dev}) // of what was lost, some may be mounted
		err = errors.Join(err, look, a.unmountAll(p.id, ours), a.recordLost(p.id, lost), loopdev.Detach(dev))
	}
	return dev, err
}

// attachLoop attaches a loop device to the mount of a place, or to the local file.
func (a *app) attachLoop(ctx context.Context, p *place) (dev string, err error) {
	if p.readOnly() {
		dev, err = a.attachNative(ctx, p.dir)
	}
	if err == nil && dev == "" {
		dev, err = loopdev.Attach(filepath.Join(p.dir, fs.ImageName), loopOptions(p.readOnly()))
	}
	return dev, err
}

// warnOfDifferences tells of what makes a device slower than it should be.
func (a *app) warnOfDifferences(dev string, readOnly bool) {
	differences, err := loopdev.Check(dev, loopOptions(readOnly))
	if err != nil {
		differences = append(differences, err.Error())
	}
	for _, d := range differences {
		a.warning("%s: %s", dev, d)
	}
}
