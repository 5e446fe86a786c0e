package fs

import "context"

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
