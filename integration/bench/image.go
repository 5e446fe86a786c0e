package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	pageSize = 4096
	mib      = 1 << 20
)

// An image is a disk with an ext4 filesystem and real files.
type image struct {
	path string
	size int64
	data int64 // bytes of it that are not holes of the file
}

// The files of the image, of which each part takes a third: text, text that
// compresses less, and programs.
const imageParts = 3

// makeImage makes a disk of 1 GiB with 576 MiB of files, or a quarter of each,
// unless an earlier run left it. Which files is the same on one machine
// every time.
func makeImage(ctx context.Context, dir string, small bool) (*image, error) {
	size, files := int64(1<<30), int64(576*mib)
	if small {
		size, files = size/4, files/4
	}
	img := &image{path: filepath.Join(dir, fmt.Sprintf("disk-%dMiB.img", size/mib)), size: size}
	if _, err := os.Stat(img.path); errors.Is(err, fs.ErrNotExist) {
		if err := img.make(ctx, dir, files); err != nil {
			return nil, fmt.Errorf("make the image: %w", err)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(img.path, &st); err != nil {
		return nil, err
	}
	img.data = st.Blocks * 512
	return img, nil
}

func (i *image) make(ctx context.Context, dir string, files int64) (err error) {
	tree, err := os.MkdirTemp(dir, "tree-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tree)) }()
	goroot, err := command(ctx, "go", "env", "GOROOT")
	if err != nil {
		return err
	}
	modules, err := command(ctx, "go", "env", "GOMODCACHE")
	if err != nil {
		return err
	}
	parts := [imageParts][]string{{filepath.Join(goroot, "src")}, {modules}, {"/usr/bin", "/usr/lib"}}
	for n, part := range parts {
		room := files / int64(imageParts-n)
		for m, from := range part {
			used, err := copyTree(filepath.Join(tree, fmt.Sprintf("%d-%d", n, m)), from, room)
			if err != nil {
				return err
			}
			room -= used
			files -= used
		}
	}
	// A name that is only there when the image is whole.
	half := i.path + ".half"
	if err := errors.Join(os.WriteFile(half, nil, 0o644), os.Truncate(half, i.size)); err != nil {
		return err
	}
	if _, err := command(ctx, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", "-d", tree, half); err != nil {
		return err
	}
	return os.Rename(half, i.path)
}

// copyTree copies regular files, in the order of their names, until room bytes
// are used up. It returns how many it used.
func copyTree(to, from string, room int64) (used int64, err error) {
	err = filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if strings.Contains(path, "/cache/") { // of the module cache: changes by itself
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		blocks := (info.Size() + pageSize - 1) / pageSize * pageSize
		if used+blocks > room {
			return fs.SkipAll
		}
		used += blocks
		name, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		return copyFile(filepath.Join(to, name), path)
	})
	return used, err
}

func copyFile(to, from string) (err error) {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// copySparse copies a file with its holes, and has the copy on disk: what is
// measured next is not to wait for it.
func copySparse(ctx context.Context, to, from string) error {
	if _, err := command(ctx, "cp", "--sparse=always", from, to); err != nil {
		return err
	}
	_, err := command(ctx, "sync", to)
	return err
}
