package fs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

var (
	// ErrBusy is returned for a mount that somebody uses: a file in it is open,
	// mapped, the backing of a loop device, or somebody's working directory.
	ErrBusy = errors.New("the mount is in use")

	// ErrNotMount is returned for a directory that is not a mountpoint of this
	// package.
	ErrNotMount = errors.New("not a mount of lazyvol")
)

// Unmount removes the mount on dir, dead or alive, whichever process serves it.
// ErrBusy: somebody uses it, and it is left as it is. ErrNotMount: there is
// none. Users other than root may unmount what they mounted.
func Unmount(dir string) error {
	mount, path, err := mountAt(dir)
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	if mount.path != path || mount.fsType != fsType {
		return fmt.Errorf("unmount %s: %w", dir, ErrNotMount)
	}
	if uid := os.Geteuid(); uid != 0 && uid != mount.uid {
		return fmt.Errorf("unmount %s: %w: user %d mounted it", dir, unix.EPERM, mount.uid)
	}
	return unmount(path, false)
}

// unmount removes the topmost mount on path, a path without symbolic links,
// which this user mounted. A lazy one goes out of sight at once, and away when
// nobody uses it any more.
func unmount(path string, lazy bool) error {
	attempt := unmountDirectly
	if os.Geteuid() != 0 {
		attempt = unmountByHelper
	}
	// A file closed a moment ago may still count as open, and things such as
	// udev look into whatever appears.
	var err error
	for pause := 10 * time.Millisecond; pause <= 160*time.Millisecond; pause *= 2 {
		if err = attempt(path, lazy); !errors.Is(err, ErrBusy) {
			break
		}
		time.Sleep(pause)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}

func unmountDirectly(path string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(path, flags)
	if err == unix.EBUSY {
		return ErrBusy
	}
	return err
}

func unmountByHelper(path string, lazy bool) error {
	how := "-u"
	if lazy {
		how = "-uz"
	}
	err := runHelper(nil, how, "--", path)
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && !lazy {
		// The helper knows one exit code only. The mount is there and is this
		// user's, so what remains is that somebody uses it.
		return fmt.Errorf("%w: %w", ErrBusy, err)
	}
	return err
}
