package snapshot

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// MountedReadWrite returns where a block device is mounted read-write in this
// mount namespace, "" if it is not or is no block device. A filesystem on one of
// its partitions counts, as does one on a device made of it: LVM, RAID, crypt.
func MountedReadWrite(path string) (mountpoint string, err error) {
	mountpoint, err = mountedReadWrite(path)
	if err != nil {
		return "", fmt.Errorf("look for mounts of %s: %w", path, err)
	}
	return mountpoint, nil
}

func mountedReadWrite(path string) (string, error) {
	device, err := blockDevice(path)
	if device == "" || err != nil {
		return "", err
	}
	devices := make(map[string]bool)
	if err := addDependants("/sys/dev/block", device, devices); err != nil {
		return "", err
	}
	mounts, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	mountpoint, err := findReadWrite(mounts, func(number, source string) (bool, error) {
		if devices[number] {
			return true, nil
		}
		// btrfs shows a number of its own, and a device as the source.
		if !filepath.IsAbs(source) {
			return false, nil
		}
		device, err := blockDevice(source)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			return false, nil // a source of another namespace, or a path by chance
		}
		return devices[device], err
	})
	return mountpoint, errors.Join(err, mounts.Close())
}

// blockDevice returns the number of a block device, "major:minor"; "" if the
// path leads to something else.
func blockDevice(path string) (string, error) {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return "", &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFBLK {
		return "", nil
	}
	return fmt.Sprintf("%d:%d", unix.Major(uint64(stat.Rdev)), unix.Minor(uint64(stat.Rdev))), nil
}

// addDependants adds a device to the set, and all whose content is its: its
// partitions, what holds it, and theirs. sysfs has a folder for each by number.
func addDependants(sysfs, device string, set map[string]bool) error {
	if set[device] {
		return nil
	}
	set[device] = true
	dir := filepath.Join(sysfs, device)
	holders, err := filepath.Glob(filepath.Join(dir, "holders", "*", "dev"))
	if err != nil {
		return err
	}
	partitions, err := filepath.Glob(filepath.Join(dir, "*", "partition"))
	if err != nil {
		return err
	}
	for _, p := range partitions {
		holders = append(holders, filepath.Join(filepath.Dir(p), "dev"))
	}
	for _, h := range holders {
		number, err := os.ReadFile(h)
		if errors.Is(err, fs.ErrNotExist) {
			continue // gone this moment
		}
		if err != nil {
			return err
		}
		if err := addDependants(sysfs, strings.TrimSpace(string(number)), set); err != nil {
			return err
		}
	}
	return nil
}

// findReadWrite returns the first mountpoint in a mountinfo whose filesystem is
// writable and for which match, given its device number and source, is true.
// Its format is that of proc_pid_mountinfo(5).
func findReadWrite(mountinfo io.Reader, match func(number, source string) (bool, error)) (string, error) {
	lines := bufio.NewScanner(mountinfo)
	for lines.Scan() {
		mount, filesystem, ok := strings.Cut(lines.Text(), " - ")
		fields, rest := strings.Split(mount, " "), strings.Split(filesystem, " ")
		if !ok || len(fields) < 6 || len(rest) < 3 {
			return "", fmt.Errorf("cannot understand the mountinfo line %q", lines.Text())
		}
		// The filesystem's options, not the mountpoint's: a read-only bind
		// mount does not keep it from being written elsewhere.
		if !hasOption(rest[2], "rw") {
			continue
		}
		matches, err := match(fields[2], unescape(rest[1]))
		if err != nil {
			return "", err
		}
		if matches {
			return unescape(fields[4]), nil
		}
	}
	return "", lines.Err()
}

func hasOption(options, option string) bool {
	for o := range strings.SplitSeq(options, ",") {
		if o == option {
			return true
		}
	}
	return false
}

// unescape replaces the octal escapes of mountinfo, such as \040 for a space.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
