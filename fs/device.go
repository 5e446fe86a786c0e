package fs

import (
	"context"
	"errors"
)

// A Device is what a mount shows. Its methods are called from many goroutines
// at once, on overlapping ranges as well: what the kernel orders is ordered
// (a write that returned before a read began is seen by it), the rest is not.
//
// Ranges handed to a Device are never empty and lie within [0, Size).
//
// A context carries the caller's patience, nothing else: it ends when the
// caller is asked to end or when its time is up. Work done for several callers
// must not be tied to one of them.
//
// Errors become what the caller's system call returns, by the table of
// errno.go: wrap a syscall.Errno of that table for anything that should not be
// plain EIO.
type Device interface {
	// Size returns the number of bytes of the device. It never shrinks. When it has
	// grown, Server.Resized tells the kernel.
	Size() int64

	// ReadOnly reports whether writes, zeroing and syncing make no sense.
	// It never changes.
	ReadOnly() bool

	// ReadAt fills p with the bytes at off. As with io.ReaderAt, a result
	// shorter than p comes with an error, and then nothing of p is shown to
	// the caller.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)

	// WriteAt writes p at off. As with io.WriterAt, a result shorter than p
	// comes with an error. It must not keep or change p.
	WriteAt(ctx context.Context, p []byte, off int64) (int, error)

	// Zero makes n bytes at off read as zeros. It serves discard as well as
	// write-zeroes, neither of which may let older bytes through afterwards.
	Zero(ctx context.Context, off, n int64) error

	// Sync makes everything durable whose WriteAt or Zero returned before Sync
	// was called. Its context has no time limit.
	Sync(ctx context.Context) error

	// NextData returns the first offset at or after off that may hold data,
	// or io.EOF if only zeros follow. It may take zeros for data.
	NextData(ctx context.Context, off int64) (int64, error)

	// NextHole returns the first offset at or after off from where zeros
	// follow, Size if none do: the end of a device counts as a hole.
	NextHole(ctx context.Context, off int64) (int64, error)
}

// A Device may know how much of it is more than holes. The image then shows
// that as its allocated blocks, which is what du prints and what makes cp and
// tar look for holes in place of reading them.
type allocated interface {
	// Allocated returns the bytes of the device that are not holes, between 0
	// and Size. It is called on every stat and must not block.
	Allocated() int64
}

// A Device may have to be opened before it is used. Its size, and how much of it is
// allocated, are known before: looking at an image does not open it.
type opened interface {
	// Open is called by each open(2) of the image. What is read through a handle is
	// read after its Open has returned nil. ErrGone, ErrDenied and ErrTooMany become
	// what the caller's open returns.
	Open(ctx context.Context) error

	// Close is called once for each Open that returned nil, when no request of its
	// handle is left, nor will come. It must not block.
	Close()
}

// Why a Device cannot be opened, wrapped.
var (
	// ErrGone: what the image shows is not there any more (ENOENT).
	ErrGone = errors.New("it is gone")

	// ErrDenied: it may not be read, for want of a key or a permission (EACCES).
	ErrDenied = errors.New("it may not be read")

	// ErrTooMany: too many Devices are open (EMFILE).
	ErrTooMany = errors.New("too many images are open")
)
