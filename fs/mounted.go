package fs

import (
	"bytes"
	"fmt"
	"os"
	"strings"
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
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	dirs := make(map[string][]string)
	for line := range bytes.Lines(info) {
		m, err := parseMountinfo(string(line))
		if err != nil {
			return nil, err
		}
		if id, ours := strings.CutPrefix(m.source, subtype+":"); ours && m.fsType == fsType {
			dirs[id] = append(dirs[id], m.path)
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
		if m.fsType == "fuse."+subtype {
			dirs = append(dirs, m.path)
		}
	}
	return dirs, nil
}
