package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/lazyvol/lazyvol/internal/loopdev"
)

// attachHere attaches target and serves it in this process, until it is detached or ctx
// ends.
func (a *app) attachHere(ctx context.Context, target string, f *attachFlags) error {
	p, lost, err := a.prepare(ctx, target, f)
	if err != nil {
		return err
	}
	if p.served {
		return refusal{fmt.Errorf("%s is served by another process on %s: detach or unmount it first", target, p.dir)}
	}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	f.up = func(ctx context.Context) (string, error) {
		dev, err := a.attachDevice(ctx, p, lost, &f.mount)
		if err != nil {
			return "", err
		}
		fmt.Fprintln(a.stdout, dev)
		if f.mount.dir != "" {
			return dev + ", mounted on " + f.mount.dir, nil
		}
		return dev, nil
	}
	f.down = func(log *slog.Logger) { a.letGo(p, log) }
	err = a.mountHere(ctx, target, p.dir, &f.mountFlags)
	if err == nil { // the last user has gone
		err = a.forgetAll(p.id)
	}
	if gone := os.Remove(p.dir); gone != nil && !errors.Is(gone, os.ErrNotExist) {
		err = errors.Join(err, gone)
	}
	return err
}

// letGo undoes what attach did as far as nobody uses it. What is in use stays, and
// goes when its last user is done: the filesystem when it is unmounted, and with it the
// device.
func (a *app) letGo(p *place, log *slog.Logger) {
	if err := a.tryLetGo(p); err != nil {
		log.Warn("what is attached is in use; it goes when its last user is done", "error", err)
	}
}

func (a *app) tryLetGo(p *place) error {
	if err := a.findDevices(p); err != nil {
		return err
	}
	ours, others, err := a.mountsOf(p.id, p.devices)
	if err != nil {
		return err
	}
	err = a.unmountAll(p.id, ours)
	for _, dev := range p.devices {
		detach := loopdev.Detach
		if err != nil || len(others) > 0 {
			detach = loopdev.Release
		}
		if detached := detach(dev); errors.Is(detached, loopdev.ErrBusy) {
			err = errors.Join(err, detached, loopdev.Release(dev))
		} else {
			err = errors.Join(err, detached)
		}
	}
	if err == nil {
		err = a.forgetAll(p.id)
	}
	return err
}
