package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"github.com/lazyvol/lazyvol/internal/loopdev"
	"github.com/lazyvol/lazyvol/internal/vfs"
)

// attachHere attaches target and serves it in this process, until it is detached or ctx
// ends.
func (a *app) attachHere(ctx context.Context, target string, f *attachFlags) error {
	a.flushOwn() // begins anew, which must not be after what is dead was buried
	p, turn, err := a.placeInTurn(ctx, target)
	if err != nil {
		return err
	}
	endTurn := sync.OnceValue(turn.end)
	err = a.serveInTurn(ctx, p, f, endTurn)
	return errors.Join(err, endTurn(), a.tidyAttached(context.WithoutCancel(ctx), p, err == nil))
}

// serveInTurn is attachHere, which ends the turn as soon as it is attached.
func (a *app) serveInTurn(ctx context.Context, p *place, f *attachFlags, endTurn func() error) error {
	if err := a.prepare(p, f); err != nil {
		return err
	}
	if p.served {
		return refusal{fmt.Errorf("%s is served by another process on %s: detach or unmount it first", p.id, p.dir)}
	}
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	f.up = func(ctx context.Context) (string, error) {
		dev, err := a.attachDevice(ctx, p, &f.mount)
		if err != nil {
			return "", err
		}
		if err := endTurn(); err != nil {
			return "", err
		}
		fmt.Fprintln(a.stdout, dev)
		if f.mount.dir != "" {
			return dev + ", mounted on " + f.mount.dir, nil
		}
		return dev, nil
	}
	f.down = func(log *slog.Logger) error { return a.letGo(p, log) }
	return a.mountHere(ctx, p.id, p.dir, &f.mountFlags)
}

// tidyAttached removes the folder of what is attached no more, and the record if it is to
// be forgotten. Whoever attaches or detaches it just now, or has attached it since, looks
// after them.
func (a *app) tidyAttached(ctx context.Context, p *place, forget bool) (err error) {
	turn, err := a.tryTurn(p.id)
	if errors.Is(err, vfs.ErrLocked) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, turn.end()) }()
	now, err := a.place(ctx, p.id)
	if err != nil || now.served || now.hidden != nil || len(now.devices)+len(now.broken)+len(now.dead) > 0 {
		return err
	}
	if err := os.Remove(p.dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if !forget {
		return nil
	}
	return a.forgetAll(p.id)
}

// letGo undoes what attach did as far as nobody uses it. What is in use stays, and
// goes when its last user is done: the filesystem when it is unmounted, and with it the
// device. That is no error: only that writes are lost is.
func (a *app) letGo(p *place, log *slog.Logger) error {
	err := a.tryLetGo(p)
	if errors.Is(err, loopdev.ErrFlush) {
		return err
	}
	if err != nil {
		log.Warn("what is attached stays until its last user is done", "error", err)
	}
	return nil
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
