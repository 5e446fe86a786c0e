package fs

import (
	"errors"
	"fmt"
)

// ErrNotMount is returned for a directory that is not a mountpoint of this
// package.
var ErrNotMount = errors.New("not a mount of lazyvol")

// Unmount removes the mount on dir, whichever process serves it; a dead one as
// Recover does. ErrBusy: somebody uses it, and it is left as it is.
func Unmount(dir string) error {
	mount, path, err := mountAt(dir)
	if err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	if mount.path != path || mount.fsType != fsType {
		return fmt.Errorf("unmount %s: %w", dir, ErrNotMount)
	}
	return unmount(path, false)
}
