package loopdev

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Check compares what sysfs says of an attached device with how it was to be
// attached, and returns what differs, in words for people; nothing if all is as
// it should be. Others may have changed it since, and a read-only sysfs keeps
// Attach from setting the readahead.
func Check(dev string, o Options) (differences []string, err error) {
	direct, err := attribute(dev, "loop/dio")
	if err != nil {
		return nil, fmt.Errorf("check %s: %w", dev, err)
	}
	if direct != "1" {
		differences = append(differences, "direct I/O is off: all data is kept in memory twice, and writes are slower")
	}
	if o.ReadAheadKB != 0 {
		kb, err := attribute(dev, "queue/read_ahead_kb")
		if err != nil {
			return nil, fmt.Errorf("check %s: %w", dev, err)
		}
		if kb != strconv.Itoa(o.ReadAheadKB) {
			differences = append(differences, fmt.Sprintf("the readahead is %s KiB, not %d: sequential reads of what is not on this host are slower", kb, o.ReadAheadKB))
		}
	}
	if o.PartScan {
		scan, err := attribute(dev, "loop/partscan")
		if err != nil {
			return nil, fmt.Errorf("check %s: %w", dev, err)
		}
		if scan != "1" {
			differences = append(differences, "partitions are not looked for")
		}
	}
	return differences, nil
}

// Release lets go of a device that others still use: it serves them, and is
// detached when the last of them closes it. One that nobody uses is detached at
// once. Nothing that is written meanwhile is lost, and who attaches the file again
// gets another device.
func Release(dev string) error {
	f, err := os.OpenFile(dev, os.O_RDONLY, 0)
	if err != nil {
		return fmt.Errorf("release: %w", err)
	}
	defer f.Close() // nothing was written
	err = clearBacking(f)
	if errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("release %s: %w", dev, ErrNotAttached)
	}
	if err != nil {
		return fmt.Errorf("release %s: %w", dev, err)
	}
	return nil
}
