package fs

// Mounted returns the directories on which something of ours is mounted in this
// process's namespace, in the order of mounting. It asks the filesystems nothing,
// so it does not wait for a slow one.
func Mounted() (dirs []string, err error) {
	all, err := Mountpoints()
	if err != nil {
		return nil, err
	}
	for _, m := range all {
		if m.Type == fsType {
			dirs = append(dirs, m.Dir)
		}
	}
	return dirs, nil
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
