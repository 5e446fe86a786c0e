package main

import (
	"context"

	"github.com/lazyvol/lazyvol/fs"
)

// mountedOf returns where the filesystems on the loop devices of some volumes are
// mounted, each once, whoever mounted them. What else is snapshotted has none.
func (a *app) mountedOf(ctx context.Context, sources []string) (dirs []string, err error) {
	seen := make(map[string]bool)
	for _, source := range sources {
		if !isVolume(source) {
			continue
		}
		p, err := a.place(ctx, source)
		if err != nil {
			return nil, err
		}
		mounts, err := fs.Mountpoints()
		if err != nil {
			return nil, err
		}
		for _, dev := range p.devices {
			on, err := mountsOn(dev, mounts)
			if err != nil {
				return nil, err
			}
			for _, m := range on {
				if !seen[m.Device] {
					seen[m.Device] = true
					dirs = append(dirs, m.Dir)
				}
			}
		}
	}
	return dirs, nil
}
