package loopdev

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Resize makes a device as large as its backing file is now, at once, and tells those
// who watch devices. Whoever has it open or mounted goes on. Partitions stay as they
// are.
func Resize(dev string) error {
	f, err := os.OpenFile(dev, os.O_RDONLY, 0)
	if err != nil {
		return fmt.Errorf("resize: %w", err)
	}
	defer f.Close() // nothing was written
	if _, err := unix.IoctlRetInt(int(f.Fd()), unix.LOOP_SET_CAPACITY); err != nil {
		return fmt.Errorf("resize %s: %w", dev, err)
	}
	return nil
}
