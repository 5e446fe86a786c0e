package vfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// lockAttempts bounds how often Lock starts anew because the file it locked had
// been removed. Each time means another process removed a lock file just then.
const lockAttempts = 16

// OS returns the filesystem of the host.
func OS() FS { return osFS{} }

type osFS struct{}

func (osFS) OpenFile(name string, flag int, perm fs.FileMode) (File, error) {
	f, err := os.OpenFile(name, flag, perm)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (osFS) MkdirAll(name string, perm fs.FileMode) error { return os.MkdirAll(name, perm) }
func (osFS) Rename(oldName, newName string) error         { return os.Rename(oldName, newName) }
func (osFS) Remove(name string) error                     { return os.Remove(name) }
func (osFS) RemoveAll(name string) error                  { return os.RemoveAll(name) }

func (osFS) Link(oldName, newName string) error { return os.Link(oldName, newName) }

func (osFS) Links(name string) (int, error) {
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	return int(st.Nlink), nil
}

func (osFS) ReadDir(name string) ([]string, error) {
	entries, err := os.ReadDir(name)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

func (osFS) SyncDir(name string) (err error) {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Sync()
}

func (osFS) Lock(name string, exclusive bool) (io.Closer, error) {
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	for range lockAttempts {
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		current, err := flock(f, how)
		if err == nil && current {
			return f, nil
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("lock %s: its file keeps being removed: %w", name, ErrLocked)
}

func (osFS) Space(name string) (total, free int64, err error) {
	var st unix.Statfs_t
	for {
		if err = unix.Statfs(name, &st); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return 0, 0, &fs.PathError{Op: "statfs", Path: name, Err: err}
	}
	return int64(st.Blocks) * st.Frsize, int64(st.Bavail) * st.Frsize, nil
}

// statBlock is the unit in which stat counts space, whatever the filesystem.
const statBlock = 512

func (osFS) Allocated(name string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	return st.Blocks * statBlock, nil
}

// flock locks f and reports whether f is still the file that bears its name:
// between open and flock another process may have removed it, and a lock on a
// nameless file excludes nobody.
func flock(f *os.File, how int) (current bool, err error) {
	err = osFile{f}.control("flock", func(fd int) error { return unix.Flock(fd, how|unix.LOCK_NB) })
	if errors.Is(err, unix.EWOULDBLOCK) {
		return false, fmt.Errorf("lock %s: %w", f.Name(), ErrLocked)
	}
	if err != nil {
		return false, err
	}
	locked, err := f.Stat()
	if err != nil {
		return false, err
	}
	named, err := os.Stat(f.Name())
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return os.SameFile(locked, named), nil
}

type osFile struct{ *os.File }

func (f osFile) Sync() error {
	return f.control("fdatasync", unix.Fdatasync)
}

func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (f osFile) PunchHole(off, n int64) error {
	return f.control("punch hole", func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, off, n)
	})
}

func (f osFile) SeekData(off int64) (int64, error) { return f.seek("seek data", off, unix.SEEK_DATA) }
func (f osFile) SeekHole(off int64) (int64, error) { return f.seek("seek hole", off, unix.SEEK_HOLE) }

// seek moves the offset all users of the descriptor share, which is harmless
// because nothing here reads or writes at it.
func (f osFile) seek(op string, off int64, whence int) (found int64, err error) {
	err = f.control(op, func(fd int) (err error) {
		found, err = unix.Seek(fd, off, whence)
		return err
	})
	if errors.Is(err, unix.ENXIO) {
		return 0, io.EOF
	}
	return found, err
}

// control runs a system call on the descriptor, which cannot be closed and
// reused meanwhile, again for as long as signals interrupt it.
func (f osFile) control(op string, call func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	err = conn.Control(func(fd uintptr) {
		for {
			if callErr = call(int(fd)); callErr != unix.EINTR {
				return
			}
		}
	})
	if err != nil {
		// The one reason there is, as an error that package os keeps to itself.
		callErr = fs.ErrClosed
	}
	if callErr != nil {
		return &fs.PathError{Op: op, Path: f.Name(), Err: callErr}
	}
	return nil
}
