package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// fileExists reports whether something is at path.
func fileExists(path string) (bool, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// globIn returns the paths of what is in a folder and matches a pattern, sorted. The
// folder's own path is taken as it is, unlike by filepath.Glob: a state directory may be
// called "[a]". What cannot be looked at is left out; only a bad pattern is an error.
func globIn(folder, pattern string) ([]string, error) {
	found, err := fs.Glob(os.DirFS(folder), pattern)
	for i, name := range found {
		found[i] = filepath.Join(folder, name)
	}
	return found, err
}
