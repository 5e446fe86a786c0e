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
	"time"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// What a session's folder holds besides the daemon's socket and log.
const (
	recordName = "session.json"
	lockName   = "lock"
)

// A session is one read-only use of a snapshot by a process: a mount, an
// export. It pins the snapshot under its own id and has a folder, locked as
// long as the process lives, so that the pin of one that was killed is found
// and removed. That of a browse has no snapshot, and no pin: each image that is
// open has a session of its own.
type session struct {
	ID         string              `json:"id"`
	Snapshot   manifest.SnapshotID `json:"snapshot,omitzero"` // zero: a browse
	Store      string              `json:"store"`
	Mountpoint string              `json:"mountpoint,omitempty"`
	PID        int                 `json:"pid"`

	dir   string
	began time.Time // of those that were found: when the record was written
	lock  io.Closer
	store *snapshot.Store
}

// beginSession opens a snapshot for reading, pinned under a new session.
func (a *app) beginSession(ctx context.Context, store *snapshot.Store, id manifest.SnapshotID, mountpoint string) (_ *session, _ *snapshot.Image, err error) {
	a.sweepSessions(ctx, store)
	s := &session{Snapshot: id, Store: store.String(), Mountpoint: mountpoint, PID: os.Getpid(), store: store}
	if err := s.record(volume.SessionsDir(a.state)); err != nil {
		return nil, nil, fmt.Errorf("begin a session: %w", err)
	}
	defer func() {
		switch {
		case errors.Is(err, snapshot.ErrPinLeft): // the folder stays, and a later command tries again
			err = errors.Join(err, s.lock.Close())
		case err != nil:
			err = errors.Join(err, s.close())
		}
	}()
	img, err := store.Open(ctx, id, snapshot.Holder{ID: s.ID, Host: hostname()})
	if err != nil {
		return nil, nil, err
	}
	if !img.Pinned {
		a.warning("%s is not pinned, as these credentials may not write: if it is deleted meanwhile, reads fail", id)
	}
	return s, img, nil
}

// Session ids are as long as those of volumes.
const (
	sessionPrefix = "mount-"
	sessionDigits = 17
)

// isSessionID reports whether s is the id of a session.
func isSessionID(s string) bool {
	digits, ok := strings.CutPrefix(s, sessionPrefix)
	return ok && len(digits) == sessionDigits && strings.Trim(digits, "0123456789abcdef") == ""
}

// record makes a folder for the session, locked and with its record in it. The
// record comes before the pin: it is what the pin is found by, should we be
// killed.
func (s *session) record(sessions string) error {
	const tries = 4
	for try := 1; ; try++ {
		err := s.tryRecord(sessions)
		if err == nil {
			return nil
		}
		// A sweep may take a folder that has no record yet for a dead one's.
		swept := errors.Is(err, vfs.ErrLocked) || errors.Is(err, fs.ErrNotExist)
		if err = errors.Join(err, s.close()); !swept || try == tries {
			return err
		}
	}
}

func (s *session) tryRecord(sessions string) (err error) {
	s.ID = sessionPrefix + manifest.NewNonce()[:sessionDigits]
	s.dir, s.lock = filepath.Join(sessions, s.ID), nil
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	if s.lock, err = vfs.OS().Lock(filepath.Join(s.dir, lockName), true); err != nil {
		return err
	}
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return vfs.WriteFileAtomic(vfs.OS(), filepath.Join(s.dir, recordName), append(data, '\n'))
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

// close removes the session's folder, unless a loop device reads the file in it: that
// must not be evicted, which the name in the folder prevents. A later sweep removes
// it then.
func (s *session) close() error {
	given, err := takeBack(s.dir)
	if err == nil && !given {
		err = os.RemoveAll(s.dir)
	}
	if s.lock != nil {
		err = errors.Join(err, s.lock.Close())
	}
	return err
}

// sessions lists the sessions of the state directory that have a record. One that is
// damaged hides its session, and no other.
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
		record := filepath.Join(s.dir, recordName)
		data, err := vfs.ReadFile(vfs.OS(), record, 1<<16)
		if errors.Is(err, fs.ErrNotExist) {
			continue // just begun, or just ended
		}
		if err == nil {
			err = json.Unmarshal(data, s)
		}
		if err == nil && !isSessionID(s.ID) {
			err = fmt.Errorf("%q is not the id of a session", s.ID)
		}
		if err != nil {
			a.log().Warn("a mount or export is passed over: its record is damaged; remove the folder when it has ended", "record", record, "error", err)
			continue
		}
		if info, err := os.Stat(record); err == nil {
			s.began = info.ModTime()
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
		lock, err := vfs.OS().Lock(filepath.Join(s.dir, lockName), true)
		if err != nil {
			continue // alive
		}
		s.lock, s.store = lock, store
		if err := s.endDead(ctx); err != nil {
			a.log().Warn("could not remove a dead session's pin yet", "session", s.ID, "error", err)
		}
	}
	if err := a.sweepUnrecorded(); err != nil {
		a.log().Warn("could not remove the folder of a dead session", "error", err)
	}
}

// lateRequests is for how long a request of a process that was killed may still
// be carried out: S3 refuses those that were signed 15 minutes before.
const lateRequests = 15 * time.Minute

// endDead removes the pin of a session whose process was killed, and its folder
// when no late request can make the pin again. Until then each sweep looks after
// it. The clock only chooses when to stop: the pin is our own to remove.
func (s *session) endDead(ctx context.Context) error {
	if s.Snapshot.IsZero() {
		return s.close()
	}
	if err := s.store.Unpin(ctx, s.Snapshot, s.ID); err != nil {
		return errors.Join(err, s.lock.Close())
	}
	if _, err := takeBack(s.dir); err != nil {
		return errors.Join(err, s.lock.Close())
	}
	record, err := os.Stat(filepath.Join(s.dir, recordName))
	if err == nil && time.Since(record.ModTime()) < lateRequests {
		return s.lock.Close()
	}
	return errors.Join(err, s.close())
}

// sweepUnrecorded removes the folders of sessions that were killed before they
// had a record, and so a pin, or when they had none any more.
func (a *app) sweepUnrecorded() error {
	folders, err := globIn(volume.SessionsDir(a.state), sessionPrefix+"*")
	if err != nil {
		return err
	}
	for _, dir := range folders {
		if recorded, err := fileExists(filepath.Join(dir, recordName)); recorded || err != nil {
			continue
		}
		lock, err := vfs.OS().Lock(filepath.Join(dir, lockName), true)
		if err != nil {
			continue // alive, or gone by now
		}
		if err := errors.Join(removeUnrecorded(dir), lock.Close()); err != nil {
			return err
		}
	}
	return nil
}

// removeUnrecorded removes a session's folder that we have locked, unless it
// has a record by now.
func removeUnrecorded(dir string) error {
	if recorded, err := fileExists(filepath.Join(dir, recordName)); recorded || err != nil {
		return err
	}
	return vfs.RemoveLocked(vfs.OS(), dir, lockName)
}
