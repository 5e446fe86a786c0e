package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// frozenPatience is for how long filesystems are frozen for a volume to be sealed. That
// takes milliseconds, unless an interrupted snapshot has to be settled before, and the
// store does not answer.
const frozenPatience = holdPatience

// errFrozenLong: a volume was not sealed within frozenPatience.
var errFrozenLong = fmt.Errorf("the volume was not cut within %v, and what was frozen for it goes on: if the store is away, try again when it is back", frozenPatience)

// freezeForCut is freezeAll for a volume, which is then sealed with the context
// returned: sealed says that it was. Should that take too long all is thawed, the
// context ends, and sealed fails with errFrozenLong: the cut would be of no one moment.
// thaw is called in the end, whatever came of it.
func (a *app) freezeForCut(ctx context.Context, f *createFlags) (sealing context.Context, sealed, thaw func() error, err error) {
	all, err := a.freezeAll(f) // thaws all
	if err != nil || len(f.freeze)+len(f.mounted) == 0 {
		return ctx, all, all, err
	}
	ctx, tooLong := context.WithCancelCause(ctx)
	limit := time.AfterFunc(frozenPatience, func() { tooLong(errors.Join(errFrozenLong, all())) })
	sealed = sync.OnceValue(func() error {
		if limit.Stop() {
			return all()
		}
		<-ctx.Done() // it is thawed by then
		return context.Cause(ctx)
	})
	thaw = func() error {
		limit.Stop()
		defer tooLong(nil)
		return all()
	}
	return ctx, sealed, thaw, nil
}

// frozenLong returns what a command failed with, or why ctx of freezeForCut ended if that
// is what it failed by: to who was asked its client just went away.
func frozenLong(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && errors.Is(cause, errFrozenLong) {
		return cause
	}
	return err
}

// freezeAll freezes the filesystems that f names, and those that it had looked for, until
// thaw is called, which may be called again, and at the same time. Of what was looked
// for, what Linux cannot freeze is synced instead.
func (a *app) freezeAll(f *createFlags) (thaw func() error, err error) {
	var mu sync.Mutex // held while it thaws
	var thaws []func() error
	thaw = func() (err error) {
		mu.Lock()
		defer mu.Unlock()
		for _, thaw := range slices.Backward(thaws) {
			err = errors.Join(err, thaw())
		}
		thaws = nil
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

// freeze freezes the filesystem mounted on dir until thaw is called.
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
	return func() error {
		err := unix.IoctlSetInt(int(f.Fd()), fiThaw, 0)
		if err != nil {
			err = fmt.Errorf("thaw %s: %w", dir, err)
		}
		return errors.Join(err, f.Close())
	}, nil
}
