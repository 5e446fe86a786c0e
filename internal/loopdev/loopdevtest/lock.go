// Package loopdevtest keeps the tests of several packages, which run at the same time,
// from taking each other's loop devices: the number of one that was detached is the
// next one's.
package loopdevtest

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Lock makes the tests of this process the only ones that use loop devices, or mkfs,
// which looks at all of them, until it ends. It is for TestMain.
func Lock() {
	// Kept open by the process; what it starts does not inherit it.
	fd, err := unix.Open("/dev/loop-control", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Flock(fd, unix.LOCK_EX)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "loop devices cannot be used: /dev/loop-control: %v\n", err)
		os.Exit(1)
	}
}
