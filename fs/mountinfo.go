package fs

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// fsType is what /proc/mounts calls a mount of this package.
const fsType = "fuse." + subtype

// subtype is the part of fsType that FUSE leaves to us.
const subtype = "lazyvol"

// mountPoint is a line of /proc/self/mountinfo (see proc_pid_mountinfo(5)).
type mountPoint struct {
	id     int    // unique among the mounts that exist now, used again later
	dev    string // major:minor of the filesystem
	path   string // where it is mounted
	fsType string
	source string
	uid    int // of the user who mounted it, if it is a FUSE mount; else -1
	parent int // id of the mount that path is on
}

// mountAt returns the mount that dir lies on and the path of dir free of
// symbolic links. It asks the filesystem nothing, so it works on a dead mount
// and does not wait for a slow one. Of several mounts on one directory it finds
// the one on top. In a chroot the mount may have its mountpoint out of sight; then
// only its id is known.
func mountAt(dir string) (m mountPoint, path string, err error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return mountPoint{}, "", &os.PathError{Op: "open", Path: dir, Err: err}
	}
	f := os.NewFile(uintptr(fd), dir)
	defer f.Close() // O_PATH: there is nothing to lose
	if path, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil {
		return mountPoint{}, "", err
	}
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return mountPoint{}, "", err
	}
	id, err := mountID(info)
	if err != nil {
		return mountPoint{}, "", fmt.Errorf("mount of %s: %w", path, err)
	}
	m, ok, err := mountByID(id)
	if err != nil {
		return mountPoint{}, "", err
	}
	if !ok {
		return mountPoint{id: id, uid: -1}, path, nil
	}
	return m, path, nil
}

// mountID returns the mnt_id of a /proc/PID/fdinfo file.
func mountID(fdinfo []byte) (int, error) {
	for line := range bytes.Lines(fdinfo) {
		if value, ok := bytes.CutPrefix(line, []byte("mnt_id:")); ok {
			return strconv.Atoi(string(bytes.TrimSpace(value)))
		}
	}
	return 0, fmt.Errorf("fdinfo has no mnt_id")
}

// mountByID finds a mount of this process's namespace.
func mountByID(id int) (m mountPoint, ok bool, err error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return mountPoint{}, false, err
	}
	for line := range bytes.Lines(info) {
		if bytes.HasPrefix(line, fmt.Appendf(nil, "%d ", id)) {
			m, err := parseMountinfo(string(line))
			return m, err == nil, err
		}
	}
	return mountPoint{}, false, nil
}

// parseMountinfo parses a line such as
//
//	36 35 0:52 / /mnt/a\040b rw,nosuid shared:1 - fuse.lazyvol lazyvol:vol-1 rw
//
// whose optional fields before the dash vary in number.
func parseMountinfo(line string) (mountPoint, error) {
	bad := fmt.Errorf("malformed line in mountinfo: %q", line)
	fields := bytes.Split(bytes.TrimSuffix([]byte(line), []byte("\n")), []byte(" ")) // a source may be empty
	dash := -1
	for i, f := range fields {
		if i >= 6 && string(f) == "-" {
			dash = i
			break
		}
	}
	if dash < 0 || len(fields) != dash+4 {
		return mountPoint{}, bad
	}
	id, err := strconv.Atoi(string(fields[0]))
	if err != nil {
		return mountPoint{}, bad
	}
	parent, err := strconv.Atoi(string(fields[1]))
	if err != nil {
		return mountPoint{}, bad
	}
	m := mountPoint{
		id:     id,
		parent: parent,
		dev:    string(fields[2]),
		path:   unescape(fields[4]),
		fsType: string(fields[dash+1]),
		source: unescape(fields[dash+2]),
		uid:    -1,
	}
	for option := range bytes.SplitSeq(fields[dash+3], []byte(",")) {
		if value, ok := bytes.CutPrefix(option, []byte("user_id=")); ok {
			if m.uid, err = strconv.Atoi(string(value)); err != nil {
				return mountPoint{}, bad
			}
		}
	}
	return m, nil
}

// unescape undoes the kernel's octal escapes: \040 for a space, and likewise
// for tabs, newlines and backslashes.
func unescape(s []byte) string {
	out := make([]byte, 0, len(s))
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if c, err := strconv.ParseUint(string(s[i+1:i+4]), 8, 8); err == nil {
				out = append(out, byte(c))
				i += 3
				continue
			}
		}
		out = append(out, s[i])
	}
	return string(out)
}
