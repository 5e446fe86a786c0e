package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// A daemon's log, and what it is called when it has become too long: both together
// take no more than twice maxLogLength, and one message.
const (
	logName      = "daemon.log"
	oldLogName   = "daemon.log.1"
	maxLogLength = 10 << 20
)

// A logFile is the file that a process's standard error is. Whatever else writes
// there, such as the report of a panic, is in it too. It is safe for concurrent use.
type logFile struct {
	fd    int // standard error
	dir   string
	limit int64

	mu     sync.Mutex // held while a message is written
	opened bool       // standard error is our file
	spared int64      // the length at which it could not be moved away
}

// newLogFile returns the log of a daemon, which goes to standard error until open.
func newLogFile() *logFile { return &logFile{fd: unix.Stderr, limit: maxLogLength} }

// Fd is what isJournal looks at.
func (l *logFile) Fd() uintptr { return uintptr(l.fd) }

// open sends standard error to the log in dir from now on.
func (l *logFile) open(dir string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	l.dir = dir
	if err := l.reopen(); err != nil {
		return err
	}
	return l.bound(0)
}

// reopen makes standard error the file that the log's name has now, which it makes
// unless it is there. l.mu is held.
func (l *logFile) reopen() error {
	f, err := os.OpenFile(filepath.Join(l.dir, logName), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	if err := unix.Dup2(int(f.Fd()), l.fd); err != nil {
		return errors.Join(fmt.Errorf("open the log: %w", err), f.Close())
	}
	l.opened, l.spared = true, 0
	return f.Close()
}

// Write implements [io.Writer]. A log that cannot be moved away goes on growing:
// better than to say no more.
func (l *logFile) Write(message []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.opened {
		if err := l.bound(int64(len(message))); err != nil {
			_, _ = unix.Write(l.fd, fmt.Appendf(nil, "lazyvol: warning: %v\n", err)) // as what follows, if it cannot be
		}
	}
	n, err := unix.Write(l.fd, message)
	if err != nil {
		return max(n, 0), fmt.Errorf("write the log: %w", err)
	}
	return n, nil
}

// bound begins a new log if n more bytes would be too many for this one. l.mu is held.
func (l *logFile) bound(n int64) error {
	var st unix.Stat_t
	if err := unix.Fstat(l.fd, &st); err != nil {
		return fmt.Errorf("measure the log: %w", err)
	}
	if st.Size == 0 || st.Size-l.spared+n <= l.limit {
		return nil
	}
	if err := l.rotate(); err != nil {
		l.spared = st.Size // to be tried again when as much more was written
		return err
	}
	return nil
}

// rotate moves the log away, over the one moved before, and begins a new one. l.mu is
// held.
func (l *logFile) rotate() error {
	err := os.Rename(filepath.Join(l.dir, logName), filepath.Join(l.dir, oldLogName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("move the log away: %w", err)
	}
	return l.reopen()
}

// logToFile sends the log of a background process that ends by itself to its folder.
func logToFile(dir string) error { return newLogFile().open(dir) }
