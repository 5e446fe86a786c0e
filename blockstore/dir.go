package blockstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path"
	"sync"
	"syscall"
)

// dirChunk is how many bytes are read or written between looks at the context.
const dirChunk = 4 << 20

// dirStore is a Store whose objects are plain files, at their keys' paths below
// one directory. It needs a filesystem with hard links, flock and timestamps of
// 100 ns, and any number of processes may use the directory at once; they
// coordinate through it alone:
//
//   - A file is written under .tmp and appears under its key whole, by link(2)
//     for IfAbsent, which fails if the name is taken, and by rename(2) else.
//     Published files never change.
//   - The ETag is the file's modification time and size, so that a listing gets
//     it without opening the file. It cannot repeat: replacing an object sets a
//     time later than the replaced one's, even within one tick or after the
//     clock was set back. A deleted object's ETag could only return if the clock
//     were set back to the same 100 ns. The inode number would add nothing, as
//     filesystems reuse it at once.
//   - Whoever renames or removes holds the lock (see locked), so IfMatch is
//     exact against every other Put and Delete. IfAbsent needs no lock: link(2)
//     fails while the object that IfMatch checked exists.
//   - A directory is removed with its last object. A Put that lost its directory
//     so between making it and using it makes it again.
type dirStore struct {
	path  string
	sweep sync.Once // of old files in .tmp, before the first Put
}

// NewDir returns the store in a directory, given by its absolute path. The
// directory must exist when the store is used (else: ErrNoStore); only Create
// makes it, so that nothing is ever written below the mount point of a disk that
// is not there. Files and directories in it get its permissions, less the umask.
func NewDir(path string) Store { return &dirStore{path: path} }

func (s *dirStore) String() string { return (&url.URL{Scheme: "file", Path: s.path}).String() }

// open opens the directory. Everything below it is reached through the result,
// which no symbolic link can leave.
func (s *dirStore) open() (*os.Root, error) {
	root, err := os.OpenRoot(s.path)
	if isAbsent(err) {
		return nil, fmt.Errorf("%w: %w", ErrNoStore, err)
	}
	return root, fileError(err)
}

// isAbsent reports whether an error says that there is nothing at a path, be it
// that an object is where a directory would have to be.
func isAbsent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

// fileError adds the sentinel that an error of the filesystem means.
func fileError(err error) error {
	switch {
	case isAbsent(err):
		return fmt.Errorf("%w: %w", ErrNotExist, err)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: %w", ErrDenied, err)
	}
	return err
}

func fileETag(info fs.FileInfo) string {
	return fmt.Sprintf("%x-%x", info.ModTime().UnixNano(), info.Size())
}

func (s *dirStore) Get(ctx context.Context, key string, limit int64) ([]byte, string, error) {
	data, etag, err := s.get(ctx, key, min(limit, MaxObjectSize))
	return data, etag, opError("get", s, key, err)
}

func (s *dirStore) get(ctx context.Context, key string, limit int64) ([]byte, string, error) {
	if err := CheckKey(key); err != nil {
		return nil, "", err
	}
	f, info, err := s.openObject(key)
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	if info.Size() > limit {
		return nil, "", fmt.Errorf("%w: %d bytes, limit %d", ErrTooLarge, info.Size(), limit)
	}
	data := make([]byte, info.Size())
	if err := readAt(ctx, f, 0, data); err != nil {
		return nil, "", err
	}
	return data, fileETag(info), nil
}

func (s *dirStore) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	return opError("read", s, key, s.readRange(ctx, key, off, p))
}

func (s *dirStore) readRange(ctx context.Context, key string, off int64, p []byte) error {
	if err := checkRange(key, off, p); err != nil || len(p) == 0 {
		return err
	}
	f, _, err := s.openObject(key)
	if err != nil {
		return err
	}
	defer f.Close()
	return readAt(ctx, f, off, p)
}

func (s *dirStore) openObject(key string) (*os.File, fs.FileInfo, error) {
	root, err := s.open()
	if err != nil {
		return nil, nil, err
	}
	defer root.Close()
	// O_NONBLOCK: a named pipe that someone left there must not hang the reader.
	f, err := root.OpenFile(key, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, fileError(err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%w: it is a %v", ErrNotExist, info.Mode().Type())
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

func readAt(ctx context.Context, f *os.File, off int64, p []byte) error {
	for len(p) > 0 {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := f.ReadAt(p[:min(len(p), dirChunk)], off)
		p, off = p[n:], off+int64(n)
		if err == io.EOF && len(p) > 0 {
			return fmt.Errorf("%w: %d bytes missing at %d", ErrShort, len(p), off)
		}
		if err != nil && err != io.EOF {
			return err
		}
	}
	return nil
}

func (s *dirStore) Put(ctx context.Context, key string, data []byte, c Condition) (string, error) {
	etag, err := s.put(ctx, key, data, c)
	return etag, opError("put", s, key, err)
}

func (s *dirStore) put(ctx context.Context, key string, data []byte, c Condition) (etag string, err error) {
	if err := checkPut(key, data); err != nil {
		return "", err
	}
	root, err := s.open()
	if err != nil {
		return "", err
	}
	defer root.Close()
	s.sweep.Do(func() { sweepTemp(root) })

	f, err := writeTemp(ctx, root, data)
	if err != nil {
		return "", fileError(err)
	}
	defer f.discard()
	if c.Absent() {
		err = f.link(key)
	} else {
		err = locked(ctx, root, func() error { return f.replace(key, c) })
	}
	if err != nil && !errors.Is(err, ErrExists) {
		return "", fileError(err)
	}
	// Also before reporting ErrExists: whoever acts on an object's existence
	// must not lose it, and the process that made it may have died before this.
	if err := errors.Join(err, fileError(syncParents(root, key))); err != nil {
		return "", err
	}
	return f.etag, nil
}

func (s *dirStore) Delete(ctx context.Context, keys ...string) error {
	if err := s.delete(ctx, keys); err != nil {
		return fmt.Errorf("delete in %s: %w", s, err)
	}
	return nil
}

func (s *dirStore) delete(ctx context.Context, keys []string) error {
	for _, key := range keys {
		if err := CheckKey(key); err != nil {
			return err
		}
	}
	root, err := s.open()
	if err != nil {
		return err
	}
	defer root.Close()
	parents := make(map[string]string) // one of the keys in each directory
	for _, key := range keys {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := locked(ctx, root, func() error { return s.remove(root, key) }); err != nil {
			return fmt.Errorf("%q: %w", key, fileError(err))
		}
		parents[path.Dir(key)] = key
	}
	for _, key := range parents {
		if err := syncParents(root, key); err != nil {
			return fileError(err)
		}
	}
	return nil
}

// remove removes an object, and the directories that it leaves empty.
func (s *dirStore) remove(root *os.Root, key string) error {
	info, err := root.Lstat(key)
	if err == nil && info.Mode().IsRegular() {
		err = root.Remove(key)
	}
	if err != nil && !isAbsent(err) {
		return err
	}
	for dir := path.Dir(key); dir != "."; dir = path.Dir(dir) {
		// Not root.Remove, which would remove a file of that name too. Only
		// empty directories go, so it is safe against a concurrent Put.
		if syscall.Rmdir(path.Join(s.path, dir)) != nil {
			break // not empty, most likely; one that stays does no harm
		}
	}
	return nil
}
