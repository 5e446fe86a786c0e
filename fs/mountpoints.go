package fs

import (
	"bytes"
	"fmt"
	"os"
	"strings"
)

// A Mountpoint is what is mounted on a directory, of whatever kind.
type Mountpoint struct {
	Dir    string // absolute, and free of symbolic links
	Device string // number of the filesystem, as "7:3"; of btrfs it is none of its devices'
	Type   string // as /proc/mounts has it
	Source string // what was mounted, such as a device's path

	id, parent int
}

// In reports whether m is mounted on a folder of the filesystem that is mounted as
// outer, its root included. Both come from the same call of Mountpoints.
func (m Mountpoint) In(outer Mountpoint) bool { return m.parent == outer.id }

// ID returns the ID of a mount of this package, and "" for any other.
func (m Mountpoint) ID() string {
	id, ours := strings.CutPrefix(m.Source, subtype+":")
	if !ours || m.Type != fsType {
		return ""
	}
	return id
}

// Mountpoints returns all mountpoints of this process's namespace in the order of
// mounting. It asks the filesystems nothing, so it does not wait for a slow one.
func Mountpoints() ([]Mountpoint, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return parseMountpoints(info)
}

// parseMountpoints parses a whole /proc/PID/mountinfo.
func parseMountpoints(info []byte) (all []Mountpoint, err error) {
	for line := range bytes.Lines(info) {
		m, err := parseMountinfo(string(line))
		if err != nil {
			return nil, err
		}
		all = append(all, m.public())
	}
	return all, nil
}

func (m mountPoint) public() Mountpoint {
	return Mountpoint{Dir: m.path, Device: m.dev, Type: m.fsType, Source: m.source, id: m.id, parent: m.parent}
}

// MountedOn returns what is mounted on dir, the topmost of several, and the path of
// dir free of symbolic links. Dir is "" if there is nothing. It does not
// wait for a slow filesystem on dir, and works on a dead one.
func MountedOn(dir string) (on Mountpoint, path string, err error) {
	m, path, err := mountAt(dir)
	if err != nil || m.path != path {
		return Mountpoint{}, path, err
	}
	return m.public(), path, nil
}
