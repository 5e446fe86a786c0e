package fs

import (
	"bytes"
	"fmt"
	"os"
)

// Mounted returns the directories on which something of ours is mounted in this
// process's namespace, in the order of mounting. It asks the filesystems nothing,
// so it does not wait for a slow one.
func Mounted() ([]string, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return mounted(info)
}

// MountedIDs returns the same directories by the ID that Options had.
func MountedIDs() (map[string][]string, error) {
	all, err := Mountpoints()
	if err != nil {
		return nil, err
	}
	dirs := make(map[string][]string)
	for _, m := range all {
		if id := m.ID(); id != "" {
			dirs[id] = append(dirs[id], m.Dir)
		}
	}
	return dirs, nil
}

func mounted(mountinfo []byte) (dirs []string, err error) {
	for line := range bytes.Lines(mountinfo) {
		m, err := parseMountinfo(string(line))
		if err != nil {
			return nil, err
		}
		if m.fsType == fsType {
			dirs = append(dirs, m.path)
		}
	}
	return dirs, nil
}
