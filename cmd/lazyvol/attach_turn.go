package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/lazyvol/lazyvol/internal/vfs"
)

// turnPatience is how long a command waits for another one that attaches or detaches
// the same. That one may wait for the store, to find the filesystem to mount.
const turnPatience = defaultReadDeadline + 30*time.Second

// A turn is the right to attach or detach one snapshot or volume. Of two that look at
// once for its loop device and find none, each would make one, and a filesystem that is
// mounted from both is soon damaged.
type turn struct {
	file string // in which it is locked, and which is there as long as it is
	lock io.Closer
}

// takeTurn waits for the turn of a snapshot or volume that is known to be one.
func (a *app) takeTurn(ctx context.Context, id string) (*turn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, turnPatience, refusal{fmt.Errorf("another command has been attaching or detaching %s for %v: try again", id, turnPatience)})
	defer cancel()
	for {
		t, err := a.tryTurn(id)
		if !errors.Is(err, vfs.ErrLocked) {
			return t, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// tryTurn is takeTurn without waiting: vfs.ErrLocked: it is another one's.
func (a *app) tryTurn(id string) (*turn, error) {
	if err := os.MkdirAll(a.attachDir(""), 0o700); err != nil {
		return nil, err
	}
	file := a.attachDir(id) + ".lock"
	lock, err := vfs.OS().Lock(file, true)
	if err != nil {
		return nil, fmt.Errorf("attach or detach %s: %w", id, err)
	}
	return &turn{file, lock}, nil
}

// end lets the next one have its turn.
func (t *turn) end() error { return errors.Join(os.Remove(t.file), t.lock.Close()) }
