package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

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

func (a *app) attachCommand() *cobra.Command {
	var f mountFlags
	c := &cobra.Command{
		Use: "attach SNAP|VOL", Short: "Mount and attach as a loop device; prints /dev/loopN", Args: args(cobra.ExactArgs(1)),
		Long: `Mounts a snapshot or volume, unless it is mounted, and attaches a loop device
with direct I/O to it. Prints the device. Attaching again prints the same device.
Once all of a snapshot is on this host its device reads the local file, as fast as
any, and does not need the daemon.`,
		Example: `  lazyvol attach vol-0123456789abcdef0
  lazyvol attach --no-hydrate snap-1a2b3c4d567890abc`,
		RunE: func(c *cobra.Command, args []string) error {
			if os.Geteuid() != 0 {
				return errors.New("attach needs root: loop devices are the kernel's")
			}
			if err := f.check(); err != nil {
				return err
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
	return c
}

func (a *app) attach(ctx context.Context, target string, f *mountFlags) (string, error) {
	readOnly := strings.HasPrefix(target, "snap-")
	if !readOnly && !strings.HasPrefix(target, "vol-") {
		return "", usageError{fmt.Errorf("%q is neither a snapshot (snap-…) nor a volume (vol-…)", target)}
	}
	dir, mounted, err := a.mountForAttach(ctx, target, f)
	if err != nil {
		return "", err
	}
	devs, err := a.loopsOf(dir)
	if err == nil && len(devs) > 0 {
		return devs[0], nil
	}
	var dev string
	if err == nil && readOnly {
		dev, err = a.attachNative(ctx, dir)
	}
	if err == nil && dev == "" {
		dev, err = loopdev.Attach(filepath.Join(dir, fs.ImageName), loopOptions(readOnly))
	}
	if err != nil && mounted {
		err = errors.Join(err, a.unmountAttached(context.WithoutCancel(ctx), dir))
	}
	return dev, err
}

// mountForAttach returns where target is mounted, mounting it if it is not.
func (a *app) mountForAttach(ctx context.Context, target string, f *mountFlags) (dir string, mounted bool, err error) {
	dir = a.attachDir(target)
	if strings.HasPrefix(target, "vol-") {
		s, err := a.statusOf(ctx, target)
		if err != nil {
			return "", false, err
		}
		if s.Mountpoint != "" {
			return s.Mountpoint, false, inSight(s)
		}
	} else {
		if _, err := parseSnapshot(target); err != nil {
			return "", false, err
		}
		if _, err := statusOfMount(dir); err == nil {
			return dir, false, nil
		}
	}
	if err := a.detachDead(dir); err != nil {
		return "", false, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", false, fmt.Errorf("attach: %w", err)
	}
	if _, err := a.spawnMount(ctx, target, dir, f); err != nil {
		return "", false, errors.Join(err, os.Remove(dir))
	}
	return dir, true, nil
}

// detachDead cleans up where an attached mount's daemon was killed: the loop
// device first, then the mount under it.
func (a *app) detachDead(dir string) error {
	if !deadMount(dir) {
		return nil
	}
	devs, err := loopdev.FindByBacking(filepath.Join(dir, fs.ImageName))
	if err != nil {
		return err
	}
	for _, dev := range devs {
		// What was on its way to the daemon died with it: nobody was told that
		// it is safe.
		if err := loopdev.Detach(dev); err != nil && !errors.Is(err, loopdev.ErrFlush) {
			return fmt.Errorf("detach the loop device of a killed daemon: %w", err)
		}
	}
	return fs.Recover(dir)
}

func (a *app) unmountAttached(ctx context.Context, dir string) error {
	mounted, err := fileExists(filepath.Join(dir, fs.StatusName))
	if mounted || err != nil { // else somebody has taken the mount away
		err = a.unmount(ctx, dir)
	}
	if err != nil {
		return err
	}
	return os.Remove(dir)
}

func (a *app) detachCommand() *cobra.Command {
	return &cobra.Command{
		Use: "detach /dev/loopN|SNAP|VOL", Short: "Undo attach", Args: args(cobra.ExactArgs(1)),
		Long: `Detaches a loop device and unmounts what attach mounted for it. A device that is
in use is refused.`,
		Example: `  lazyvol detach /dev/loop0
  lazyvol detach vol-0123456789abcdef0`,
		RunE: func(c *cobra.Command, args []string) error {
			return a.detach(c.Context(), args[0])
		},
	}
}

func (a *app) detach(ctx context.Context, target string) error {
	var dir string
	var devs []string
	switch {
	case strings.HasPrefix(target, "/dev/"):
		image, err := loopdev.Backing(target)
		if err != nil {
			return err
		}
		if dir, err = a.mountOfImage(image); err != nil {
			return codedError{fmt.Sprintf("%s is not attached to a volume of lazyvol, but to %s", target, image), exitNotFound}
		}
		devs = []string{target}
	default:
		dir = a.attachDir(target)
		if strings.HasPrefix(target, "vol-") {
			s, err := a.statusOf(ctx, target)
			if err != nil {
				return err
			}
			if s.Mountpoint != "" {
				dir = s.Mountpoint
				if err := inSight(s); err != nil {
					return err
				}
			}
		} else if _, err := parseSnapshot(target); err != nil {
			return err
		}
		found, err := a.loopsOf(dir)
		if err != nil {
			return err
		}
		if len(found) == 0 && !strings.HasPrefix(dir, a.attachDir("")) {
			return codedError{fmt.Sprintf("%s is not attached", target), exitNotFound}
		}
		devs = found
	}
	var lost error // writes that did not get through; what is attached goes all the same
	for _, dev := range devs {
		err := loopdev.Detach(dev)
		if err != nil && !errors.Is(err, loopdev.ErrFlush) {
			return err
		}
		lost = errors.Join(lost, err)
	}
	if filepath.Dir(dir) != filepath.Clean(a.attachDir("")) {
		return lost // mounted by somebody else, who unmounts it
	}
	if there, err := fileExists(dir); !there && err == nil {
		return codedError{fmt.Sprintf("%s is not attached", target), exitNotFound}
	}
	return errors.Join(lost, a.unmountAttached(ctx, dir))
}
