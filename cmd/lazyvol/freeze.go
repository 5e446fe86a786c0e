package main

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// freezeAll freezes the filesystems that f names, and those that it had looked for, until
// thaw is called, which may be called again. Of what was looked for, what Linux cannot
// freeze is synced instead.
func (a *app) freezeAll(f *createFlags) (thaw func() error, err error) {
	var thaws []func() error
	thaw = func() (err error) {
		for _, thaw := range slices.Backward(thaws) {
			err = errors.Join(err, thaw())
		}
		return err
	}
	for _, dir := range slices.Concat(f.freeze, f.mounted) {
		err := a.refuseOwn(dir)
		if err == nil {
			var one func() error
			if one, err = freeze(dir); err == nil {
				thaws = append(thaws, one)
			} else if errors.Is(err, unix.EOPNOTSUPP) && !slices.Contains(f.freeze, dir) {
				a.warning("the filesystem on %s cannot be frozen: in the snapshot it is as after a power cut", dir)
				err = syncFilesystem(dir)
			}
		}
		if err != nil {
			return nil, errors.Join(err, thaw())
		}
	}
	return thaw, nil
}

// refuseOwn refuses to freeze the filesystem that has the state directory: who
// makes the snapshot would wait for itself.
func (a *app) refuseOwn(dir string) error {
	var theirs, ours unix.Stat_t
	if err := unix.Stat(dir, &theirs); err != nil {
		return fmt.Errorf("freeze %s: %w", dir, err)
	}
	err := unix.Stat(a.state, &ours)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("freeze %s: look at the state directory: %w", dir, err)
	}
	if err == nil && theirs.Dev == ours.Dev {
		return refusal{fmt.Errorf("freeze %s: the state directory %s is on the same filesystem, and could not be written to", dir, a.state)}
	}
	return nil
}

// syncFilesystem writes what the filesystem mounted on dir has in memory.
func syncFilesystem(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	defer f.Close() // nothing was written through it
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}

// freeze freezes the filesystem mounted on dir until thaw is called; thaw may be
// called again.
func freeze(dir string) (thaw func() error, err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("freeze: %w", err)
	}
	// FIFREEZE and FITHAW of linux/fs.h, which x/sys does not have.
	const fiFreeze, fiThaw = 0xc0045877, 0xc0045878
	if err := unix.IoctlSetInt(int(f.Fd()), fiFreeze, 0); err != nil {
		return nil, errors.Join(fmt.Errorf("freeze %s: %w", dir, err), f.Close())
	}
	frozen := true
	return func() error {
		if !frozen {
			return nil
		}
		frozen = false
		err := unix.IoctlSetInt(int(f.Fd()), fiThaw, 0)
		if err != nil {
			err = fmt.Errorf("thaw %s: %w", dir, err)
		}
		return errors.Join(err, f.Close())
	}, nil
}
