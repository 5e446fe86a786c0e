package blockstore

import (
	"context"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

func (s *dirStore) List(ctx context.Context, prefix string, fn func(Info) error) error {
	return s.listAfter(ctx, prefix, "", fn)
}

func (s *dirStore) listAfter(ctx context.Context, prefix, after string, fn func(Info) error) error {
	if err := checkPrefix(prefix); err != nil {
		return opError("list", s, prefix, err)
	}
	root, err := s.open()
	if err != nil {
		return opError("list", s, prefix, err)
	}
	defer root.Close()
	l := listing{root: root, prefix: prefix, after: after, fn: fn}
	err = l.walk(ctx, path.Dir(prefix+"x")) // the innermost directory that holds all of the prefix
	if l.fnErr != nil {
		return l.fnErr
	}
	return opError("list", s, prefix, fileError(err))
}

// listing is one walk over the directory. It keeps the names of one directory
// per level in memory.
type listing struct {
	root   *os.Root
	prefix string
	after  string
	fn     func(Info) error
	fnErr  error // what fn returned, which ended the walk
}

func (l *listing) walk(ctx context.Context, dir string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	names, err := l.names(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		key := path.Join(dir, name)
		if strings.HasSuffix(name, "/") {
			err = l.walk(ctx, key)
		} else {
			err = l.visit(key)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (l *listing) visit(key string) error {
	info, err := l.root.Lstat(key)
	if isAbsent(err) {
		return nil // deleted meanwhile
	}
	if err != nil {
		return err
	}
	now := time.Now()
	l.fnErr = l.fn(Info{Key: key, Size: info.Size(), ETag: fileETag(info), Age: max(0, now.Sub(info.ModTime())), Listed: now})
	return l.fnErr
}

// names returns what a directory has for the listing: files, and directories
// with a slash at the end, so that their order is that of the keys below them.
// Symbolic links and everything else that no Put made are passed over.
func (l *listing) names(dir string) ([]string, error) {
	entries, err := l.read(dir)
	if isAbsent(err) {
		return nil, nil // no such prefix, or deleted meanwhile
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for _, entry := range entries {
		key := path.Join(dir, entry.Name())
		if CheckKey(key) != nil {
			continue
		}
		switch {
		case entry.IsDir() && l.below(key+"/"):
			names = append(names, entry.Name()+"/")
		case entry.Type().IsRegular() && strings.HasPrefix(key, l.prefix) && key > l.after:
			names = append(names, entry.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

func (l *listing) read(dir string) ([]fs.DirEntry, error) {
	f, err := l.root.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.ReadDir(-1)
}

// below reports whether keys that begin with dir can be part of the listing.
func (l *listing) below(dir string) bool {
	matches := strings.HasPrefix(dir, l.prefix) || strings.HasPrefix(l.prefix, dir)
	passed := dir <= l.after && !strings.HasPrefix(l.after, dir)
	return matches && !passed
}
