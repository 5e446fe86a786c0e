package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/internal/loopdev"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/volume"
)

// unmountPatience bounds how long a daemon may take to end after its mount is
// gone: it makes what was written durable, and tells the store.
const unmountPatience = time.Minute

// exitPatience bounds how long a daemon that has let go of everything may take
// to be gone as a process.
const exitPatience = 2 * time.Second

func (a *app) unmountCommand() *cobra.Command {
	return &cobra.Command{
		Use: "unmount DIR|VOL", Short: "Take a mount away", Args: args(cobra.ExactArgs(1)),
		Long: `Takes a mount away and returns when its daemon has ended: everything written is
durable on this host. A mount that is in use is refused, and left as it is. A
mountpoint that a killed daemon left dead is cleaned up.`,
		Example: `  lazyvol unmount /mnt/old
  lazyvol unmount vol-0123456789abcdef0`,
		RunE: func(c *cobra.Command, args []string) error {
			dir, err := a.findMount(c.Context(), args[0])
			if err != nil {
				return err
			}
			return a.unmount(c.Context(), dir)
		},
	}
}

// findMount returns the mountpoint of a volume, or of a mountpoint itself.
func (a *app) findMount(ctx context.Context, target string) (string, error) {
	if !strings.HasPrefix(target, "vol-") {
		return filepath.Abs(target)
	}
	s, err := a.statusOf(ctx, target)
	if err != nil {
		return "", err
	}
	if s.Mountpoint == "" {
		dir, err := leftMount(target)
		if dir != "" || err != nil {
			return dir, err
		}
		return "", codedError{fmt.Sprintf("%s is not mounted", target), exitNotFound}
	}
	return s.Mountpoint, inSight(s)
}

// leftMount returns a mountpoint of a volume that a killed daemon left dead, "" if there
// is none.
func leftMount(target string) (string, error) {
	mounts, err := fs.Mountpoints()
	if err != nil {
		return "", err
	}
	for _, m := range mounts {
		if m.ID() == target && deadMount(m.Dir) {
			return m.Dir, nil
		}
	}
	return "", nil
}

// inSight refuses a mount that is out of sight: its daemon was told to end, and
// serves those to their end who have the volume open.
func inSight(s statusJSON) error {
	if there, err := fileExists(filepath.Join(s.Mountpoint, fs.StatusName)); there || err != nil {
		return nil // what else may be wrong shows when it is used
	}
	return refusal{fmt.Errorf("%s is being unmounted from %s and is in use: it is free when whoever has it open, perhaps a loop device, lets go", s.ID, s.Mountpoint)}
}

func (a *app) unmount(ctx context.Context, dir string) error {
	s, err := statusOfMount(ctx, dir)
	if errors.Is(err, unix.ENOTCONN) { // a killed daemon left it
		return recoverMountpoint(dir)
	}
	if err != nil {
		return err
	}
	if err := a.refuseAttachedMount(dir, s.PID); err != nil {
		return err
	}
	lock, err := a.lockOf(s)
	if err != nil {
		return err
	}
	if err := fs.Unmount(dir); err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return waitUnlocked(ctx, lock, s.PID)
}

// recoverMountpoint makes a directory usable again that a killed daemon left dead. One that has a
// loop device is refused: detach would not find the device any more, nor what is mounted
// from it.
func recoverMountpoint(dir string) error {
	if deadMount(dir) {
		devs, err := loopdev.FindByBacking(filepath.Join(dir, fs.ImageName))
		if err != nil {
			return err
		}
		if len(devs) > 0 {
			return refusal{fmt.Errorf("its daemon was killed, and %s is attached to it: clean up with 'lazyvol detach %s' first", strings.Join(devs, ", "), devs[0])}
		}
	}
	return fs.Recover(dir)
}

// lockOf returns the lock file that a mount's daemon holds while it lives.
func (a *app) lockOf(s statusJSON) (string, error) {
	if strings.HasPrefix(s.ID, "vol-") {
		return filepath.Join(volume.Dir(a.state, manifest.VolumeID(s.ID)), "lock"), nil
	}
	sessions, err := a.sessions()
	if err != nil {
		return "", err
	}
	for _, session := range sessions {
		if session.PID == s.PID && session.shows() == s.ID {
			return filepath.Join(session.dir, "lock"), nil
		}
	}
	return "", nil // of another state directory
}

// waitUnlocked waits until a daemon has let go of its lock, or is gone.
func waitUnlocked(ctx context.Context, lock string, pid int) error {
	ctx, cancel := context.WithTimeout(ctx, unmountPatience)
	defer cancel()
	for {
		free, err := unlocked(lock, pid)
		if err != nil {
			return err
		}
		if free {
			break
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the mount is gone, but its daemon (pid %d) has not ended: %w", pid, context.Cause(ctx))
		case <-time.After(10 * time.Millisecond):
		}
	}
	// All is done; what is left is the process, which keeps its log open. Its id
	// may be another's by now, or be none of this namespace: not worth a failure.
	for deadline := time.Now().Add(exitPatience); !ended(pid) && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	return nil
}

// ended reports whether a process is gone, but for its parent's notice.
func ended(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return true
	}
	_, state, _ := bytes.Cut(stat, []byte(") "))
	return bytes.HasPrefix(state, []byte("Z")) || bytes.HasPrefix(state, []byte("X"))
}

func unlocked(lock string, pid int) (bool, error) {
	if lock == "" {
		return errors.Is(unix.Kill(pid, 0), unix.ESRCH), nil
	}
	if there, err := fileExists(lock); !there || err != nil {
		return !there, err
	}
	held, err := vfs.OS().Lock(lock, true)
	switch {
	case errors.Is(err, vfs.ErrLocked):
		return false, nil
	case errors.Is(err, os.ErrNotExist):
		return true, nil
	case err != nil:
		return false, err
	}
	return true, held.Close()
}
