package fs

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// passed are the errors a Device may choose for the caller. No others pass: an
// ECONNREFUSED from some network call means nothing to a process that reads a
// file, and an ENOSYS would make the kernel stop asking.
var passed = [...]syscall.Errno{
	unix.EDQUOT,
	unix.EINVAL,
	unix.EIO,
	unix.ENOMEM,
	unix.ENOSPC,
	unix.EOPNOTSUPP,
	unix.EROFS,
}

// errnoOf is the only place where an error becomes what a system call returns:
//
//	nil                         0
//	context.DeadlineExceeded    EIO: the caller's time is up
//	context.Canceled            EINTR: the caller is going away
//	ErrGone                     ENOENT
//	ErrDenied                   EACCES
//	ErrTooMany                  EMFILE
//	syscall.Errno               itself if in passed
//	all others                  EIO
//
// The contexts come first, as what gave up because of one may well wrap the
// network's errno too.
func errnoOf(err error) syscall.Errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, context.DeadlineExceeded):
		return unix.EIO
	case errors.Is(err, context.Canceled):
		return unix.EINTR
	case errors.Is(err, ErrGone):
		return unix.ENOENT
	case errors.Is(err, ErrDenied):
		return unix.EACCES
	case errors.Is(err, ErrTooMany):
		return unix.EMFILE
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		for _, p := range passed {
			if errno == p {
				return errno
			}
		}
	}
	return unix.EIO
}

// quiet is how long a kind of failure stays out of the log after one of it was
// logged. A guest filesystem on a failing device retries thousands of times a
// second.
const quiet = 10 * time.Second

// failure is a kind of failure, as far as the log tells them apart. There are
// as many as operations times table entries.
type failure struct {
	op    string
	errno syscall.Errno
}

// failures translates errors and logs them, each kind at most once in quiet.
// It is safe for concurrent use.
type failures struct {
	log *slog.Logger

	mu     sync.Mutex // guards logged
	logged map[failure]*silence
}

// silence is the state of one kind of failure.
type silence struct {
	until      time.Time
	suppressed int // failures since the last one logged
}

func newFailures(log *slog.Logger) *failures {
	return &failures{log: log, logged: make(map[failure]*silence)}
}

// errno returns what the operation op on [off, off+n) reports for err. An
// operation that failed because its caller went away is nobody's concern; all
// other errors are logged, since the caller sees no more of them than a number.
func (f *failures) errno(op string, off, n int64, err error) syscall.Errno {
	errno := errnoOf(err)
	if errno == 0 || errno == unix.EINTR {
		return errno
	}
	if suppressed, speak := f.due(failure{op, errno}, time.Now()); speak {
		f.log.Error("device failed",
			"op", op, "offset", off, "length", n,
			"errno", unix.ErrnoName(errno), "err", err, "suppressed", suppressed)
	}
	return errno
}

// due reports whether kind is to be logged at now, and how often it was not
// since the last time.
func (f *failures) due(kind failure, now time.Time) (suppressed int, speak bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.logged[kind]
	if s == nil {
		s = new(silence)
		f.logged[kind] = s
	}
	if now.Before(s.until) {
		s.suppressed++
		return 0, false
	}
	suppressed, s.suppressed = s.suppressed, 0
	s.until = now.Add(quiet)
	return suppressed, true
}

// panicked turns a panic in a request's handler into EIO for that request. It
// runs before the stack is unwound.
func (f *failures) panicked(v any) fuse.Status {
	if suppressed, speak := f.due(failure{"panic", unix.EIO}, time.Now()); speak {
		f.log.Error("panic while answering the kernel",
			"panic", fmt.Sprint(v), "stack", string(debug.Stack()), "suppressed", suppressed)
	}
	return fuse.EIO
}
