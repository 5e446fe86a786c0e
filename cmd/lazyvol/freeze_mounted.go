package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/lazyvol/lazyvol/fs"
)

// mountedOf returns where the filesystems on the loop devices of some volumes are
// mounted, each once, whoever mounted them. What else is snapshotted has none.
func (a *app) mountedOf(ctx context.Context, sources []string) (dirs []string, err error) {
	for _, source := range sources {
		if !isVolume(source) {
			continue
		}
		p, err := a.place(ctx, source)
		if err != nil {
			return nil, err
		}
		of, err := mountedFrom(p.devices)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", source, err)
		}
		dirs = append(dirs, of...)
	}
	return dirs, nil
}

// mountedFrom returns a folder of each filesystem on some devices, through which it can
// be frozen: one over which nothing else is mounted.
func mountedFrom(devs []string) (dirs []string, err error) {
	mounts, err := fs.Mountpoints()
	if err != nil {
		return nil, err
	}
	for _, dev := range devs {
		on, err := mountsOn(dev, mounts)
		if err != nil {
			return nil, err
		}
		inSight := make(map[string]string) // a folder of each filesystem
		for _, m := range on {
			top, _, err := fs.MountedOn(m.Dir)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return nil, err
			}
			if top == m {
				inSight[m.Device] = m.Dir
			}
		}
		for _, m := range on {
			dir := inSight[m.Device]
			if dir == "" {
				return nil, refusal{fmt.Errorf("the filesystem on %s cannot be frozen: something is mounted over it", m.Dir)}
			}
			if !slices.Contains(dirs, dir) {
				dirs = append(dirs, dir)
			}
		}
	}
	return dirs, nil
}
