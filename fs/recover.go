package fs

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// maxStacked bounds how many dead mounts on one directory Recover removes.
const maxStacked = 16

// Recover makes dir usable again after its daemon was killed: it unmounts what
// is mounted there and dead, lazily, as the dead mount may be in use. Processes
// that use it go on getting errors; a loop device on it must be detached for
// itself.
//
// It does nothing, and returns nil, if dir can be used as it is. It fails if dir
// is not a directory, or is unusable for any other reason than a dead mount of
// this package on it.
func Recover(dir string) error {
	for range maxStacked {
		var st unix.Stat_t
		err := unix.Stat(dir, &st)
		switch {
		case err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR:
			return fmt.Errorf("recover %s: %w", dir, unix.ENOTDIR)
		case err == nil:
			return nil
		case !errors.Is(err, unix.ENOTCONN):
			return fmt.Errorf("recover %s: %w", dir, err)
		}
		mount, path, err := mountAt(dir)
		if err != nil {
			return fmt.Errorf("recover %s: %w", dir, err)
		}
		if mount.path != path || mount.fsType != fsType {
			return fmt.Errorf("recover %s: %w, and it is %s of type %s on %s, not ours to unmount",
				dir, unix.ENOTCONN, mount.source, mount.fsType, mount.path)
		}
		if err := unmount(path, true); err != nil {
			return fmt.Errorf("recover %s: %w", dir, err)
		}
	}
	return fmt.Errorf("recover %s: more than %d dead mounts: %w", dir, maxStacked, unix.ENOTCONN)
}
