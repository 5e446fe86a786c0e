package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// A session is one read-only use of a snapshot by a process: a mount, an
// export. It pins the snapshot under its own id and has a folder, locked as
// long as the process lives, so that the pin of one that was killed is found
// and removed.
type session struct {
	ID         string              `json:"id"`
	Snapshot   manifest.SnapshotID `json:"snapshot"`
	Store      string              `json:"store"`
	Mountpoint string              `json:"mountpoint,omitempty"`
	PID        int                 `json:"pid"`

	dir   string
	lock  io.Closer
	store *snapshot.Store
}

// beginSession opens a snapshot for reading, pinned under a new session.
func (a *app) beginSession(ctx context.Context, store *snapshot.Store, id manifest.SnapshotID, mountpoint string) (_ *session, _ *snapshot.Image, err error) {
	a.sweepSessions(ctx, store)
	s := &session{
		ID: "mount-" + manifest.NewNonce()[:17], Snapshot: id, Store: store.String(),
		Mountpoint: mountpoint, PID: os.Getpid(), store: store,
	}
	s.dir = filepath.Join(volume.SessionsDir(a.state), s.ID)
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, nil, fmt.Errorf("begin a session: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	if s.lock, err = vfs.OS().Lock(filepath.Join(s.dir, "lock"), true); err != nil {
		return nil, nil, fmt.Errorf("begin a session: %w", err)
	}
	// The record first: it is what the pin is found by, should we be killed.
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return nil, nil, err
	}
	if err := vfs.WriteFileAtomic(vfs.OS(), filepath.Join(s.dir, "session.json"), append(data, '\n')); err != nil {
		return nil, nil, fmt.Errorf("begin a session: %w", err)
	}
	img, err := store.Open(ctx, id, snapshot.Holder{ID: s.ID, Host: hostname()})
	if err != nil {
		return nil, nil, err
	}
	if !img.Pinned {
		fmt.Fprintf(a.stderr, "lazyvol: warning: %s is not pinned, as these credentials may not write: if it is deleted meanwhile, reads fail\n", id)
	}
	return s, img, nil
}

// end removes the session's pin and its folder. If the pin cannot be removed
// the folder stays, and a later command tries again.
func (s *session) end(ctx context.Context, pinned bool) error {
	if pinned {
		if err := s.store.Unpin(ctx, s.Snapshot, s.ID); err != nil {
			return errors.Join(err, s.lock.Close())
		}
	}
	return s.close()
}

func (s *session) close() error {
	err := os.RemoveAll(s.dir)
	if s.lock != nil {
		err = errors.Join(err, s.lock.Close())
	}
	return err
}

// sessions lists the sessions of the state directory that have a record.
func (a *app) sessions() ([]*session, error) {
	entries, err := os.ReadDir(volume.SessionsDir(a.state))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list sessions: %w", err)
	}
	var found []*session
	for _, e := range entries {
		s := &session{dir: filepath.Join(volume.SessionsDir(a.state), e.Name())}
		data, err := vfs.ReadFile(vfs.OS(), filepath.Join(s.dir, "session.json"), 1<<16)
		if err != nil || json.Unmarshal(data, s) != nil || !strings.HasPrefix(s.ID, "mount-") {
			continue // just begun, or just ended
		}
		found = append(found, s)
	}
	return found, nil
}

// sweepSessions removes what killed processes left in this store. What cannot
// be removed now is left to the next time.
func (a *app) sweepSessions(ctx context.Context, store *snapshot.Store) {
	sessions, err := a.sessions()
	if err != nil {
		a.log().Warn("could not look for dead sessions", "error", err)
		return
	}
	for _, s := range sessions {
		if s.Store != store.String() {
			continue
		}
		lock, err := vfs.OS().Lock(filepath.Join(s.dir, "lock"), true)
		if err != nil {
			continue // alive
		}
		s.lock, s.store = lock, store
		if err := s.end(ctx, true); err != nil {
			a.log().Warn("could not remove a dead session's pin yet", "session", s.ID, "error", err)
		}
	}
}
