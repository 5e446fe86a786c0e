package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// ErrLocked is returned by [FS.Lock] when another holder has the lock.
var ErrLocked = errors.New("locked by another holder")

// FS is a filesystem. All methods are safe for concurrent use. Errors wrap the
// operating system's, so errors.Is works with fs.ErrNotExist, fs.ErrExist and
// syscall.Errno values such as syscall.ENOSPC.
type FS interface {
	// OpenFile opens or, with os.O_CREATE, creates a file. os.O_APPEND is not
	// supported: all file I/O names its offset.
	OpenFile(name string, flag int, perm fs.FileMode) (File, error)

	// MkdirAll creates a folder and its missing parents. The new names are
	// durable after SyncDir of each parent.
	MkdirAll(name string, perm fs.FileMode) error

	// Rename replaces newName by oldName atomically. The change is durable after
	// SyncDir of the folder.
	Rename(oldName, newName string) error

	// Link gives the file oldName a second name, which must be free, and be on the
	// same filesystem. It is durable after SyncDir of the new name's folder.
	Link(oldName, newName string) error

	// Links returns how many names a file has.
	Links(name string) (int, error)

	// Remove removes a file or an empty folder.
	Remove(name string) error

	// RemoveAll removes a tree. A missing one is fine.
	RemoveAll(name string) error

	// ReadDir returns the names in a folder in ascending order.
	ReadDir(name string) ([]string, error)

	// SyncDir makes the names in a folder durable.
	SyncDir(name string) error

	// Lock takes a lock on the file name, which it creates when missing, and
	// returns at once: with ErrLocked when an exclusive holder, or for exclusive
	// any holder, has it. Locks bind all processes of the host, and two calls of
	// one process as well. Closing the result releases the lock, as does the end
	// of the process. Holding the lock means holding the file that bears the name
	// now: a lock whose file was removed meanwhile is taken anew.
	Lock(name string, exclusive bool) (io.Closer, error)

	// Space returns how large the filesystem that holds the file or folder name is,
	// and how much of it is free for whoever asks, in bytes.
	Space(name string) (total, free int64, err error)

	// Allocated returns how many bytes of space a file takes, holes left out, from
	// the moment they were written. What describes the file itself is not counted.
	Allocated(name string) (int64, error)
}

// IsFull reports whether a call failed for lack of space, of the filesystem or of a
// quota: syscall.ENOSPC or syscall.EDQUOT.
func IsFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// File is an open file. All methods but Close are safe for concurrent use;
// after Close they fail with fs.ErrClosed.
type File interface {
	// ReadAt fills p or fails, with io.EOF at the end of the file.
	io.ReaderAt

	// WriteAt writes all of p or fails. After a failure any part of p may have
	// been written. The bytes survive the process at once, a power cut after Sync.
	io.WriterAt

	io.Closer

	// Sync makes bytes and size durable (fdatasync). After a failure the kernel
	// may have dropped what it could not write, and a later Sync succeeds without
	// it: whoever promised durability must not try again.
	Sync() error

	// Truncate sets the size in bytes. New bytes read as zeros and take no space.
	Truncate(size int64) error

	// Size returns the size in bytes.
	Size() (int64, error)

	// PunchHole frees the space of [off, off+n), which then reads as zeros, and
	// keeps the size. errors.ErrUnsupported: the filesystem has no holes.
	PunchHole(off, n int64) error

	// SeekData returns the first offset ≥ off that may hold data; io.EOF: none.
	// A filesystem may report holes as data, never the reverse.
	SeekData(off int64) (int64, error)

	// SeekHole returns the first offset ≥ off inside a hole, the end of the file
	// counting as one; io.EOF: off lies at or past the end.
	SeekHole(off int64) (int64, error)
}

// RemoveLocked removes the folder dir with all that is in it. The caller holds the
// lock file in it, whose name is lock, exclusively. That goes last, and not with the
// folder at one stroke: who makes it anew in between keeps the folder, which is no
// error. Should RemoveLocked fail, or the process end, the lock file is there for as
// long as anything else is. Nothing is durable on return: after a power cut any of
// the files may be back.
func RemoveLocked(fsys FS, dir, lock string) error {
	names, err := fsys.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if name == lock {
			continue
		}
		if err := fsys.RemoveAll(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := fsys.Remove(filepath.Join(dir, lock)); err != nil {
		return err
	}
	// From here on somebody may have made it anew, or even removed it again.
	err = fsys.Remove(dir)
	if errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// ReadFile returns the content of a file of at most limit bytes; a larger one is
// an error.
func ReadFile(fsys FS, name string, limit int64) (data []byte, err error) {
	f, err := fsys.OpenFile(name, os.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, fmt.Errorf("read %s: %d bytes, at most %d are expected", name, size, limit)
	}
	data = make([]byte, size)
	if _, err := f.ReadAt(data, 0); err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return data, nil
}

// WriteFileAtomic replaces the content of a file by data, or creates it with mode
// 0600. The new content is durable on return, and at no time does the name bear
// anything but the whole old or the whole new content; after an error it may be
// either. It writes through name+".tmp", so a name must have one writer at a time.
func WriteFileAtomic(fsys FS, name string, data []byte) error {
	tmp := name + ".tmp"
	if err := writeFile(fsys, tmp, data); err != nil {
		if rmErr := fsys.Remove(tmp); rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
			err = errors.Join(err, rmErr)
		}
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := fsys.Rename(tmp, name); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := fsys.SyncDir(filepath.Dir(name)); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// writeFile writes data to a new or truncated file and makes its bytes durable.
func writeFile(fsys FS, name string, data []byte) (err error) {
	f, err := fsys.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.WriteAt(data, 0); err != nil {
		return err
	}
	return f.Sync()
}
