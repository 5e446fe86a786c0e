package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/internal/loopdev"
)

func (a *app) detachCommand() *cobra.Command {
	return &cobra.Command{
		Use: "detach /dev/loopN|SNAP|VOL|DIR", Short: "Undo attach", Args: args(cobra.ExactArgs(1)),
		Long: `Unmounts the filesystems that 'lazyvol attach --mount' mounted, detaches the loop
device, and unmounts what attach mounted for it. DIR is where such a filesystem is
mounted. If a filesystem or the device is in use, or others mounted it, or something over
or in it, that is refused and all stays as it was. What a killed daemon left dead is cleaned up.`,
		Example: `  lazyvol detach /dev/loop0
  lazyvol detach vol-0123456789abcdef0
  lazyvol detach /mnt/data`,
		RunE: func(c *cobra.Command, args []string) error {
			return a.detachTarget(c.Context(), args[0])
		},
	}
}

// detachTarget detaches what an argument of detach means, in its turn.
func (a *app) detachTarget(ctx context.Context, target string) (err error) {
	p, err := a.placeFor(ctx, target)
	if err != nil {
		return err
	}
	if p.id != "" { // else nobody knows what it is of
		id := p.id
		turn, taken := a.takeTurn(ctx, id)
		if taken != nil {
			return taken
		}
		defer func() { err = errors.Join(err, turn.end()) }()
		if p, err = a.placeFor(ctx, target); err != nil {
			return err
		}
		if p.id != id {
			return errNotAttached(target)
		}
	}
	return a.detach(context.WithoutCancel(ctx), p, target) // half undone is worse than late
}

// placeFor finds out what is meant by an argument of detach.
func (a *app) placeFor(ctx context.Context, target string) (*place, error) {
	switch {
	case strings.HasPrefix(target, "/dev/"):
		return a.placeOfDevice(ctx, target)
	case isVolume(target), isSnapshot(target):
		return a.place(ctx, target)
	}
	return a.placeOfMount(ctx, target)
}

func (a *app) detach(ctx context.Context, p *place, target string) error {
	devices := slices.Concat(p.devices, p.strays)
	if p.hidden != nil && len(devices) == 0 {
		return p.hidden
	}
	own := a.isAttachDir(p.dir)
	if !own && len(devices)+len(p.broken) == 0 {
		return errNotAttached(target)
	}
	ours, err := a.refuseOthers(p.id, devices)
	if err != nil {
		return err
	}
	lost, err := a.lostMounts(p.id)
	if err != nil {
		return err
	}
	left := len(p.dead)+len(lost) > 0 // by a killed daemon
	if err := a.buryDead(p, nil); err != nil {
		return err
	}
	if err := a.unmountAll(p.id, ours); err != nil {
		return err
	}
	var unwritten error // writes that did not get through; what is attached goes all the same
	for _, dev := range devices {
		err := loopdev.Detach(dev)
		if err != nil && !errors.Is(err, loopdev.ErrFlush) {
			return errors.Join(err, a.mountAllAgain(ctx, p.id, ours))
		}
		unwritten = errors.Join(unwritten, err)
	}
	if own { // else mounted by somebody else, who unmounts it
		there, err := fileExists(p.dir)
		if there || err != nil {
			err = a.unmountAttached(ctx, p.dir)
		} else if !left {
			err = errNotAttached(target)
		}
		if err != nil {
			return errors.Join(unwritten, err)
		}
	}
	if p.hidden != nil {
		unwritten = errors.Join(unwritten, waitUnlocked(ctx, p.lock, p.pid))
	}
	return errors.Join(unwritten, a.forgetAll(p.id))
}

func errNotAttached(target string) error {
	return codedError{fmt.Sprintf("%s is not attached", target), exitNotFound}
}

// refuseOthers refuses to take devices away on which others mounted a filesystem, or
// over or in one of ours, and returns those that attach mounted.
func (a *app) refuseOthers(target string, devs []string) ([]attachedMount, error) {
	ours, others, err := a.mountsOf(target, devs)
	if err != nil {
		return nil, err
	}
	if len(others) > 0 {
		m := others[0]
		return nil, refusal{fmt.Errorf("%s is in use: %s is mounted on %s, and not by 'lazyvol attach --mount': unmount it first", strings.Join(devs, ", "), m.Source, m.Dir)}
	}
	for _, m := range ours {
		if err := m.refuseCovered(); err != nil {
			return nil, err
		}
	}
	return ours, refuseInside(ours)
}

// refuseInside refuses filesystems in which others mounted something: to unmount them
// lazily would take that away as well.
func refuseInside(ours []attachedMount) error {
	mounts, err := fs.Mountpoints()
	if err != nil {
		return err
	}
	r := attachment{Mounts: ours}
	for _, outer := range mounts {
		if !r.has(outer) {
			continue
		}
		for _, m := range mounts {
			if m.In(outer) && !r.has(m) {
				return refusal{fmt.Errorf("%s (%s) is mounted on %s, in the filesystem on %s: unmount it first", m.Source, m.Type, m.Dir, outer.Dir)}
			}
		}
	}
	return nil
}

// refuseCovered refuses a mount that is not the topmost on its folder: to unmount the
// folder would take away what others mounted there.
func (m attachedMount) refuseCovered() error {
	on, _, err := fs.MountedOn(m.Dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if on.Source == m.Device {
		return nil
	}
	return refusal{fmt.Errorf("something is mounted over the filesystem on %s: unmount that first", m.Dir)}
}

// around reports whether inner is mounted below the folder of m.
func (m attachedMount) around(inner attachedMount) bool {
	return strings.HasPrefix(inner.Dir, strings.TrimSuffix(m.Dir, "/")+"/")
}

// unmountAttached unmounts what attach mounted under its loop device.
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

// buryDead cleans up where killed daemons were: the filesystems that attach mounted
// and that are dead now, then the loop devices, then the mounts under them. Of those
// filesystems record is told before, unless it is nil. What is still used goes out of
// sight, and fails whoever uses it.
func (a *app) buryDead(p *place, record func(id string, lost []attachedMount) error) error {
	lost, err := a.refuseOthers(p.id, p.broken)
	if err != nil {
		return fmt.Errorf("the daemon of %s was killed: %w", p.id, err)
	}
	if record != nil {
		if err := record(p.id, lost); err != nil {
			return err
		}
	}
	for _, m := range slices.Backward(lost) {
		err := unix.Unmount(m.Dir, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			a.warning("the filesystem on %s is dead, and in use: who uses it gets errors, and has to open its files anew", m.Dir)
			err = unix.Unmount(m.Dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		if err != nil {
			return fmt.Errorf("unmount %s, whose daemon was killed: %w", m.Dir, err)
		}
	}
	for _, dev := range p.broken {
		// What was on its way to the daemon died with it: nobody was told that
		// it is safe.
		err := loopdev.Detach(dev)
		if errors.Is(err, loopdev.ErrBusy) && len(lost) > 0 {
			err = loopdev.Release(dev)
		}
		if err != nil && !errors.Is(err, loopdev.ErrFlush) {
			return fmt.Errorf("detach the loop device of a killed daemon: %w", err)
		}
	}
	for _, dir := range p.dead {
		if err := fs.Recover(dir); err != nil {
			return err
		}
	}
	p.broken, p.dead = nil, nil
	return nil
}

// forgetAll removes the record of what is attached.
func (a *app) forgetAll(target string) error {
	if there, err := fileExists(a.attachmentFile(target)); !there || err != nil {
		return err
	}
	return a.changeAttachment(target, func([]attachedMount) []attachedMount { return nil })
}

// unmountAll unmounts filesystems that attach mounted, the last one first; or none, if
// one of them is in use, or others mounted something over it.
func (a *app) unmountAll(target string, mounts []attachedMount) error {
	for i, m := range mounts {
		if err := m.refuseCovered(); err != nil {
			return err
		}
		if slices.ContainsFunc(mounts[i+1:], m.around) {
			continue // it is in use as long as that is mounted
		}
		if err := unused(m.Dir); err != nil {
			return err
		}
	}
	for i, m := range slices.Backward(mounts) {
		if err := unmountFilesystem(m.Dir); err != nil {
			return errors.Join(err, a.mountAllAgain(context.Background(), target, mounts[i+1:]))
		}
	}
	return nil
}

// mountAllAgain mounts filesystems that unmountAll unmounted.
func (a *app) mountAllAgain(ctx context.Context, target string, mounts []attachedMount) (err error) {
	for _, m := range mounts {
		if again := a.mountRecorded(ctx, target, &m); again != nil {
			err = errors.Join(err, fmt.Errorf("mount it again: %w", again))
		}
	}
	return err
}

// unused refuses a filesystem that is in use, without unmounting it.
func unused(dir string) error {
	err := whileBusy(func() error {
		// The first call marks a mount that is not in use, and a second one unmounts it if
		// nobody used it in between. To open it takes a former mark off.
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := unix.Close(fd); err != nil {
			return err
		}
		return unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_EXPIRE)
	})
	if errors.Is(err, unix.EAGAIN) {
		return nil
	}
	return inUse(dir, err)
}

// unmountFilesystem unmounts a filesystem; what was written to it is on the device
// when it returns.
func unmountFilesystem(dir string) error {
	return inUse(dir, whileBusy(func() error { return unix.Unmount(dir, unix.UMOUNT_NOFOLLOW) }))
}

// whileBusy tries again for a moment what fails because of something that looked into a
// mount just now.
func whileBusy(try func() error) (err error) {
	for pause := 10 * time.Millisecond; pause <= 160*time.Millisecond; pause *= 2 {
		if err = try(); !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(pause)
	}
	return err
}

func inUse(dir string, err error) error {
	if errors.Is(err, unix.EBUSY) {
		return refusal{fmt.Errorf("the filesystem on %s is in use: end what uses it ('fuser -vm %s' shows that), then try again", dir, dir)}
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}
