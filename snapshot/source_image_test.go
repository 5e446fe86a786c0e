package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/snapshot"
)

// writeImage writes a device to a sparse file.
func writeImage(t *testing.T, d *device) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(d.geometry.Size); err != nil {
		t.Fatal(err)
	}
	for block, data := range d.blocks {
		if _, err := f.WriteAt(data[:d.geometry.BlockLen(block)], block*testBlock); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func openSource(t *testing.T, path string) *snapshot.FileSource {
	t.Helper()
	f, err := snapshot.OpenSource(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func TestSnapshotOfAnImageFile(t *testing.T) {
	for name, d := range map[string]*device{
		"empty":          newDevice(0),
		"a sector":       newDevice(512).tiny(1, 0),
		"all holes":      newDevice(5*testBlock + 512),
		"ends in data":   newDevice(5*testBlock+512).random(1, 0, 2, 5),
		"ends in a hole": newDevice(9*testBlock).random(1, 1, 2, 6),
		"large":          newDevice(10<<40-4096).random(1, 0, 1<<20, 1<<27, 10<<40/testBlock-1),
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			f := openSource(t, writeImage(t, d))
			if f.Size() != d.geometry.Size {
				t.Errorf("size %d", f.Size())
			}
			outcome, err := w.store.Create(w.ctx, w.plan(nil, d), f.Source(testBlock), nil)
			if err != nil {
				t.Fatal(err)
			}
			w.mustHold(w.open(outcome.Snapshot), d)
		})
	}
}

// With a parent, the holes of a file override the parent's data.
func TestIncrementOfAnImageFile(t *testing.T) {
	w := newWorld(t)
	first := newDevice(3*leafBytes).random(1, span(0, 10)...).random(1, 1500, 3000)
	second := first.random(2, 3).punched(1500).punched(span(5, 9)...)
	parent := w.create(nil, nil, first)
	f := openSource(t, writeImage(t, second))
	outcome, err := w.store.Create(w.ctx, w.plan(parent, second), f.Source(testBlock), nil)
	if err != nil {
		t.Fatal(err)
	}
	if outcome.UploadedBlocks != 1 {
		t.Errorf("uploaded %d blocks", outcome.UploadedBlocks)
	}
	w.mustHold(w.open(outcome.Snapshot), second)
}

// A block is a hole only if all of it is; extents are ascending, whole and
// tell of every block.
func TestExtentsOfASparseFile(t *testing.T) {
	const blocks = 64
	rng := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		path := filepath.Join(t.TempDir(), "image")
		size := int64(blocks*testBlock - rng.Int64N(8)*4096)
		file, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := file.Truncate(size); err != nil {
			t.Fatal(err)
		}
		data := make(map[int64]bool)
		for range rng.IntN(20) {
			off := rng.Int64N(size - 5000)
			if _, err := file.WriteAt(make([]byte, 5000), off); err != nil {
				t.Fatal(err)
			}
			data[off/testBlock], data[(off+4999)/testBlock] = true, true
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		next := int64(0)
		for e, err := range openSource(t, path).Source(testBlock).Extents {
			if err != nil {
				t.Fatal(err)
			}
			if e.First != next || e.Count <= 0 {
				t.Fatalf("extent %+v after %d", e, next)
			}
			for block := e.First; block < e.First+e.Count; block++ {
				if data[block] && e.Hole {
					t.Errorf("block %d has data and is in the hole %+v", block, e)
				}
				if !data[block] && !e.Hole {
					t.Errorf("block %d is a hole and is in %+v", block, e)
				}
			}
			next = e.First + e.Count
		}
		if next != blocks {
			t.Errorf("the extents end at %d", next)
		}
	}
}

func TestImageThatChangesWhileRead(t *testing.T) {
	d := newDevice(40*testBlock).random(1, span(0, 40)...)
	for name, change := range map[string]func(path string) error{
		"shrinks":    func(path string) error { return os.Truncate(path, 20*testBlock) },
		"is emptied": func(path string) error { return os.Truncate(path, 0) },
		"grows":      func(path string) error { return os.Truncate(path, 50*testBlock) },
		"grows, and its time is put back": func(path string) error {
			info, err := os.Stat(path)
			if err != nil {
				return err
			}
			return errors.Join(os.Truncate(path, 50*testBlock), os.Chtimes(path, info.ModTime(), info.ModTime()))
		},
		"is written to": func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			_, err = f.WriteAt([]byte("changed"), 39*testBlock)
			return errors.Join(err, f.Close())
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			path := writeImage(t, d)
			old := time.Now().Add(-time.Hour) // not in the same tick of the clock
			if err := os.Chtimes(path, old, old); err != nil {
				t.Fatal(err)
			}
			f := openSource(t, path)
			src := f.Source(testBlock)
			read := src.Read
			src.Read = func(ctx context.Context, block int64, p []byte) error {
				if block == 10 {
					if err := change(path); err != nil {
						return err
					}
				}
				return read(ctx, block, p)
			}
			_, err := w.store.Create(w.ctx, w.plan(nil, d), src, nil)
			if !errors.Is(err, snapshot.ErrSourceChanged) {
				t.Errorf("create: %v", err)
			}
			if err := f.Changed(); !errors.Is(err, snapshot.ErrSourceChanged) {
				t.Errorf("changed: %v", err)
			}
			found, err := w.store.List(w.ctx, false)
			if err != nil || len(found) > 0 {
				t.Errorf("listed %v, %v", found, err)
			}
			if left := w.objects("data/"); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func TestSourcesThatAreRefused(t *testing.T) {
	dir := t.TempDir()
	odd := filepath.Join(dir, "odd")
	if err := os.WriteFile(odd, make([]byte, 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "socket")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for _, c := range []struct {
		path string
		want error
		says string
	}{
		{odd, snapshot.ErrSourceSize, "truncate -s %512 " + odd},
		{dir, snapshot.ErrSourceKind, "a directory"},
		{fifo, snapshot.ErrSourceKind, "a fifo"},
		{socket, snapshot.ErrSourceKind, "a socket"},
		{"/dev/null", snapshot.ErrSourceKind, "a character device"},
		{filepath.Join(dir, "missing"), fs.ErrNotExist, "missing"},
	} {
		_, err := snapshot.OpenSource(c.path)
		if !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), c.says) {
			t.Errorf("%s: %v", c.path, err)
		}
	}
}

// Nothing is mounted from a file, and a device is told from one.
func TestMountedReadWriteOfNoDevice(t *testing.T) {
	file := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, "/", "/dev/null"} {
		if at, err := snapshot.MountedReadWrite(path); at != "" || err != nil {
			t.Errorf("%s is mounted at %q, %v", path, at, err)
		}
	}
	if _, err := snapshot.MountedReadWrite(filepath.Join(t.TempDir(), "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}
