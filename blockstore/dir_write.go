package blockstore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"syscall"
	"time"
)

const (
	// The store's own names; keys have no parts that begin with a dot.
	dirTemp = ".tmp"  // directory of the files being written
	dirLock = ".lock" // see locked

	dirTempAge = 24 * time.Hour        // a file in .tmp as old as this was left by a crash
	dirTick    = 100 * time.Nanosecond // ETags rest on times this fine (NTFS and SMB keep no finer ones)
	dirTries   = 1000                  // to make a directory and use it before a Delete removes it
	dirMaxWait = 5 * time.Millisecond  // between looks at the lock
)

// tempFile is an object's data, durable and with its ETag, that has no key yet.
type tempFile struct {
	root    *os.Root
	perm    fs.FileMode // of the root, for directories on the way
	name    string      // in root
	file    *os.File
	modTime time.Time
	etag    string
}

// writeTemp writes a temporary file. The caller discards it.
func writeTemp(ctx context.Context, root *os.Root, data []byte) (*tempFile, error) {
	info, err := root.Stat(".")
	if err != nil {
		return nil, err
	}
	f := &tempFile{root: root, perm: info.Mode().Perm(), name: path.Join(dirTemp, rand.Text())}
	if err := root.Mkdir(dirTemp, f.perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	f.file, err = root.OpenFile(f.name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, f.perm&0o666)
	if err != nil {
		return nil, err
	}
	if err := f.fill(ctx, data); err != nil {
		f.discard()
		return nil, err
	}
	return f, nil
}

func (f *tempFile) fill(ctx context.Context, data []byte) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if len(data) == 0 {
			return f.seal(time.Now())
		}
		n, err := f.file.Write(data[:min(len(data), dirChunk)])
		if err != nil {
			return err
		}
		data = data[n:]
	}
}

// seal gives the file its modification time, and so its ETag, and makes it
// durable.
func (f *tempFile) seal(t time.Time) error {
	f.modTime = t.Truncate(dirTick)
	if err := f.root.Chtimes(f.name, f.modTime, f.modTime); err != nil {
		return err
	}
	info, err := f.file.Stat()
	if err != nil {
		return err
	}
	if !info.ModTime().Equal(f.modTime) {
		return fmt.Errorf("the filesystem keeps times too coarsely for a store: it made %v of %v", info.ModTime(), f.modTime)
	}
	f.etag = fileETag(info)
	return f.file.Sync()
}

// link gives the file a key that nothing has yet.
func (f *tempFile) link(key string) error {
	err := f.publish(key, func() error { return f.root.Link(f.name, key) })
	if !errors.Is(err, fs.ErrExist) {
		return err
	}
	if info, err := f.root.Lstat(key); err == nil && info.IsDir() {
		return errKeyNests(key)
	}
	return ErrExists
}

// replace gives the file a key that may be taken, if the condition holds. The
// caller holds the lock.
func (f *tempFile) replace(key string, c Condition) error {
	old, err := f.root.Lstat(key)
	exists := err == nil
	switch {
	case exists && old.IsDir():
		return errKeyNests(key)
	case !exists && !isAbsent(err):
		return err
	}
	if etag, ok := c.Match(); ok && (!exists || fileETag(old) != etag) {
		return ErrChanged
	}
	if exists && !f.modTime.After(old.ModTime()) {
		if err := f.seal(old.ModTime().Truncate(dirTick).Add(dirTick)); err != nil {
			return err
		}
	}
	return f.publish(key, func() error { return f.root.Rename(f.name, key) })
}

// publish calls place, which gives the file its key, and makes the key's
// directory first if that is what was missing.
func (f *tempFile) publish(key string, place func() error) error {
	for range dirTries {
		err := place()
		if errors.Is(err, fs.ErrNotExist) {
			err = f.root.MkdirAll(path.Dir(key), f.perm)
			if err == nil || errors.Is(err, fs.ErrNotExist) {
				continue // a Delete may remove it again, before it has an object
			}
		}
		if errors.Is(err, syscall.ENOTDIR) {
			return errKeyNests(key)
		}
		return err
	}
	return fmt.Errorf("%q cannot get its key: the file or the directory vanished %d times", f.name, dirTries)
}

// errKeyNests says that two keys exclude each other.
func errKeyNests(key string) error {
	return fmt.Errorf("%w: %q and an object already there cannot both exist, as one is a directory of the other", ErrKey, key)
}

// discard closes the file and removes its temporary name, if it still has it.
// Its errors cost nothing: the data is durable or not wanted, and a name left
// behind is swept up later.
func (f *tempFile) discard() {
	f.file.Close()
	f.root.Remove(f.name)
}

// sweepTemp removes the temporary files that crashes left behind, as far as it
// can: they take space, but are in nobody's way.
func sweepTemp(root *os.Root) {
	dir, err := root.Open(dirTemp)
	if err != nil {
		return
	}
	defer dir.Close()
	files, err := dir.ReadDir(-1)
	if err != nil {
		return
	}
	for _, file := range files {
		if info, err := file.Info(); err == nil && time.Since(info.ModTime()) > dirTempAge {
			root.Remove(path.Join(dirTemp, file.Name()))
		}
	}
}

// locked calls fn while holding the store's lock: an flock(2), which the death
// of its process releases. fn takes milliseconds at most, so asking again soon
// is good enough, and ends with ctx as waiting inside flock would not.
func locked(ctx context.Context, root *os.Root, fn func() error) (err error) {
	info, err := root.Stat(".")
	if err != nil {
		return err
	}
	f, err := root.OpenFile(dirLock, os.O_RDWR|os.O_CREATE, info.Mode().Perm()&0o666)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }() // unlocks
	for wait := 50 * time.Microsecond; ; wait = min(2*wait, dirMaxWait) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return fn()
		}
		if err != syscall.EWOULDBLOCK && err != syscall.EINTR {
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("wait for the lock %s: %w", f.Name(), context.Cause(ctx))
		}
	}
}

// syncParents makes durable the directory entries that lead from the root to a
// key, whoever made them.
func syncParents(root *os.Root, key string) error {
	for dir := path.Dir(key); ; dir = path.Dir(dir) {
		f, err := root.Open(dir)
		if err == nil {
			err = errors.Join(f.Sync(), f.Close())
		}
		if err != nil && !isAbsent(err) { // if absent, a Delete removed it, with the entry
			return err
		}
		if dir == "." {
			return nil
		}
	}
}

// makeDir makes a store's directory and its missing parents, durably, for this
// user alone.
func makeDir(dir string) error {
	var changed []string // directories that get an entry, innermost first
	for d := dir; ; {
		_, err := os.Stat(d)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return fileError(err)
		}
		d = path.Dir(d)
		changed = append(changed, d)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil { // also if it is there, but no directory
		return fileError(err)
	}
	for _, d := range changed {
		f, err := os.Open(d)
		if err != nil {
			return fileError(err)
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	return nil
}
