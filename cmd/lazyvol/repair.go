package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// repair checks and repairs, tells what was written and what could not be, and
// returns the report of a check after it.
func (a *app) repair(ctx context.Context, store *snapshot.Store, how snapshot.Check) (_ *snapshot.Report, err error) {
	a.sweepSessions(ctx, store)
	id, err := store.ID(ctx)
	if err != nil {
		return nil, err
	}
	salvage := volume.OpenSalvage(vfs.OS(), a.state, id, keyOf(ctx, store))
	defer func() { err = errors.Join(err, salvage.Close()) }()
	repaired, err := store.Repair(ctx, snapshot.Repair{
		Check: how, From: salvage,
		Pin: func(ctx context.Context, id manifest.SnapshotID) (func(), error) { return a.pin(ctx, store, id) },
	})
	for _, key := range repaired.Objects {
		fmt.Fprintf(a.stderr, "repaired %s\n", key)
	}
	for _, obstacle := range repaired.Obstacles {
		fmt.Fprintf(a.stderr, "not repaired: %s\n", obstacle)
	}
	return repaired.Report, err
}

// pin pins a snapshot under a session, whose index need not be readable.
func (a *app) pin(ctx context.Context, store *snapshot.Store, id manifest.SnapshotID) (unpin func(), err error) {
	s := &session{Snapshot: id, Store: store.String(), PID: os.Getpid(), store: store}
	if err := s.record(volume.SessionsDir(a.state)); err != nil {
		return nil, fmt.Errorf("begin a session: %w", err)
	}
	if err := store.Pin(ctx, id, snapshot.Holder{ID: s.ID, Host: hostname()}); err != nil {
		// Whether the pin was made is not known: if it cannot be removed now, a
		// later command finds the session.
		return nil, errors.Join(err, s.end(context.WithoutCancel(ctx), true))
	}
	return func() { a.endSession(ctx, s, &snapshot.Image{Pinned: true}) }, nil
}

// keyOf returns what gets the keys of a store's lineages.
func keyOf(ctx context.Context, store *snapshot.Store) func(manifest.LineageID) (*crypt.Key, error) {
	return func(id manifest.LineageID) (*crypt.Key, error) { return store.Key(ctx, id) }
}
