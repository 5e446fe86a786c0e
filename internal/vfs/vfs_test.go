package vfs_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/internal/vfs"
)

// each runs a promise of FS against both filesystems, in an empty folder.
func each(t *testing.T, promise func(t *testing.T, fsys vfs.FS, dir string)) {
	t.Run("OS", func(t *testing.T) { promise(t, vfs.OS(), t.TempDir()) })
	t.Run("Crash", func(t *testing.T) { promise(t, vfs.NewCrash(1), "/") })
}

func open(t *testing.T, fsys vfs.FS, name string, flag int) vfs.File {
	t.Helper()
	f, err := fsys.OpenFile(name, flag, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil && !errors.Is(err, fs.ErrClosed) {
			t.Error(err)
		}
	})
	return f
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, f vfs.File, p []byte, off int64) {
	t.Helper()
	if n, err := f.WriteAt(p, off); n != len(p) || err != nil {
		t.Fatalf("WriteAt = %d, %v", n, err)
	}
}

func TestFileBehavesAsAnArrayOfBytes(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS, dir string) {
		rng := rand.New(rand.NewPCG(1, 2))
		f := open(t, fsys, filepath.Join(dir, "f"), os.O_RDWR|os.O_CREATE)
		var want []byte
		for range 2000 {
			off, n := rng.IntN(40_000), rng.IntN(9_000)+1
			switch rng.IntN(5) {
			case 0, 1:
				p := make([]byte, n)
				for i := range p {
					p[i] = byte(rng.Uint32())
				}
				write(t, f, p, int64(off))
				if grow := off + n - len(want); grow > 0 {
					want = append(want, make([]byte, grow)...)
				}
				copy(want[off:], p)
			case 2:
				must(t, f.PunchHole(int64(off), int64(n)))
				if off < len(want) {
					clear(want[off:min(off+n, len(want))])
				}
			case 3:
				if rng.IntN(10) == 0 {
					must(t, f.Truncate(int64(off)))
					if off < len(want) {
						want = want[:off]
					} else {
						want = append(want, make([]byte, off-len(want))...)
					}
				}
			case 4:
				must(t, f.Sync())
			}
			p := make([]byte, n)
			got, err := f.ReadAt(p, int64(off))
			if (err == io.EOF) != (off+n > len(want)) || err != nil && err != io.EOF {
				t.Fatalf("ReadAt [%d, %d) of %d: %v", off, off+n, len(want), err)
			}
			if off+got != min(off+n, max(off, len(want))) || !bytes.Equal(p[:got], want[min(off, len(want)):][:got]) {
				t.Fatalf("ReadAt [%d, %d) of %d returned other bytes, or %d", off, off+n, len(want), got)
			}
			if size, err := f.Size(); err != nil || size != int64(len(want)) {
				t.Fatalf("Size = %d, %v; want %d", size, err, len(want))
			}
		}
	})
}

func TestSeekFindsDataAndHoles(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS, dir string) {
		f := open(t, fsys, filepath.Join(dir, "f"), os.O_RDWR|os.O_CREATE)
		must(t, f.Truncate(1<<20))
		if _, err := f.SeekData(0); err != io.EOF {
			t.Errorf("SeekData of a hole: %v", err)
		}
		write(t, f, make([]byte, 100), 512<<10)
		if at, err := f.SeekData(0); err != nil || at != 512<<10 {
			t.Errorf("SeekData = %d, %v", at, err)
		}
		if at, err := f.SeekHole(512 << 10); err != nil || at != 516<<10 {
			t.Errorf("SeekHole = %d, %v", at, err)
		}
		if at, err := f.SeekHole(5); err != nil || at != 5 {
			t.Errorf("SeekHole = %d, %v", at, err)
		}
		write(t, f, make([]byte, 100), 1<<20)
		if at, err := f.SeekHole(1 << 20); err != nil || at != 1<<20+100 {
			t.Errorf("SeekHole at the end = %d, %v", at, err)
		}
		if _, err := f.SeekHole(2 << 20); err != io.EOF {
			t.Errorf("SeekHole past the end: %v", err)
		}
		if _, err := f.SeekData(2 << 20); err != io.EOF {
			t.Errorf("SeekData past the end: %v", err)
		}
	})
}

func TestNamesComeAndGo(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS, dir string) {
		at := func(name string) string { return filepath.Join(dir, name) }
		must(t, fsys.MkdirAll(at("a/b"), 0o700))
		must(t, fsys.MkdirAll(at("a/b"), 0o700))
		for _, name := range []string{"a/y", "a/x", "a/b/z"} {
			write(t, open(t, fsys, at(name), os.O_RDWR|os.O_CREATE|os.O_EXCL), []byte(name), 0)
		}
		if names, err := fsys.ReadDir(at("a")); err != nil || !slices.Equal(names, []string{"b", "x", "y"}) {
			t.Errorf("ReadDir = %v, %v", names, err)
		}
		must(t, fsys.Rename(at("a/x"), at("a/y")))
		if data, err := vfs.ReadFile(fsys, at("a/y"), 3); err != nil || string(data) != "a/x" {
			t.Errorf("ReadFile = %q, %v", data, err)
		}
		must(t, fsys.SyncDir(at("a")))
		must(t, fsys.Remove(at("a/y")))
		must(t, fsys.RemoveAll(at("a")))
		must(t, fsys.RemoveAll(at("a")))

		if _, err := fsys.OpenFile(at("a/y"), os.O_RDWR|os.O_CREATE, 0o600); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("OpenFile in a missing folder: %v", err)
		}
		open(t, fsys, at("f"), os.O_RDWR|os.O_CREATE)
		for op, err := range map[string]error{
			"ReadDir":   second(fsys.ReadDir(at("a"))),
			"Remove":    fsys.Remove(at("a")),
			"Rename":    fsys.Rename(at("a"), at("c")),
			"SyncDir":   fsys.SyncDir(at("a")),
			"OpenFile":  second(fsys.OpenFile(at("a"), os.O_RDWR, 0)),
			"ReadFile":  second(vfs.ReadFile(fsys, at("a"), 1)),
			"WriteFile": vfs.WriteFileAtomic(fsys, at("a/f"), nil),
		} {
			if !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s of a missing name: %v", op, err)
			}
		}
		if _, err := fsys.OpenFile(at("f"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); !errors.Is(err, fs.ErrExist) {
			t.Errorf("OpenFile with O_EXCL: %v", err)
		}
		if err := fsys.MkdirAll(at("f/g"), 0o700); !errors.Is(err, syscall.ENOTDIR) {
			t.Errorf("MkdirAll below a file: %v", err)
		}
	})
}

func second[T any](_ T, err error) error { return err }

func TestClosedFileRefusesEverything(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS, dir string) {
		f := open(t, fsys, filepath.Join(dir, "f"), os.O_RDWR|os.O_CREATE)
		must(t, f.Truncate(10))
		must(t, f.Close())
		p := make([]byte, 1)
		for op, err := range map[string]error{
			"ReadAt": second(f.ReadAt(p, 0)), "WriteAt": second(f.WriteAt(p, 0)), "Sync": f.Sync(), "Truncate": f.Truncate(0),
			"Size": second(f.Size()), "PunchHole": f.PunchHole(0, 1), "SeekData": second(f.SeekData(0)),
			"SeekHole": second(f.SeekHole(0)), "Close": f.Close(),
		} {
			if !errors.Is(err, fs.ErrClosed) {
				t.Errorf("%s after Close: %v", op, err)
			}
		}
	})
}

func TestLockExcludesOthersAtOnce(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := filepath.Join(dir, "lock")
		lock := func(exclusive bool) io.Closer {
			t.Helper()
			l, err := fsys.Lock(name, exclusive)
			if err != nil {
				t.Fatal(err)
			}
			return l
		}
		refused := func(exclusive bool) {
			t.Helper()
			if _, err := fsys.Lock(name, exclusive); !errors.Is(err, vfs.ErrLocked) {
				t.Errorf("lock is not refused: %v", err)
			}
		}
		alone := lock(true)
		refused(true)
		refused(false)
		must(t, alone.Close())
		a, b := lock(false), lock(false)
		refused(true)
		must(t, a.Close())
		refused(true)
		must(t, b.Close())
		must(t, lock(true).Close())
	})
}

func TestLockOfARemovedFileIsNoLock(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := filepath.Join(dir, "lock")
		old, err := fsys.Lock(name, true)
		must(t, err)
		must(t, fsys.Remove(name))
		current, err := fsys.Lock(name, true)
		must(t, err)
		if _, err := fsys.Lock(name, false); !errors.Is(err, vfs.ErrLocked) {
			t.Errorf("the new file's lock does not bind: %v", err)
		}
		must(t, errors.Join(old.Close(), current.Close()))
	})
}

// A racing remover makes lockers open files that lose their name before they lock
// them. However that goes, no two of them hold the lock under one name.
func TestLockSurvivesRemovers(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	fsys := vfs.OS()
	var holders sync.Mutex
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 300 {
				l, err := fsys.Lock(name, true)
				if errors.Is(err, vfs.ErrLocked) {
					continue
				}
				if err != nil {
					t.Error(err)
					return
				}
				if !holders.TryLock() {
					t.Error("two hold the lock")
				} else {
					// Removed while held, as who removes a base does. From then on
					// another may hold the lock.
					holders.Unlock()
					if err := fsys.Remove(name); err != nil {
						t.Error(err)
					}
				}
				if err := l.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestReadFileRefusesWhatIsTooLarge(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := filepath.Join(dir, "f")
		for _, content := range []string{"", "abc"} {
			must(t, vfs.WriteFileAtomic(fsys, name, []byte(content)))
			if data, err := vfs.ReadFile(fsys, name, 3); err != nil || string(data) != content {
				t.Errorf("ReadFile = %q, %v", data, err)
			}
		}
		if data, err := vfs.ReadFile(fsys, name, 2); err == nil {
			t.Errorf("ReadFile returned %q of at most 2 bytes", data)
		}
		if names, err := fsys.ReadDir(dir); err != nil || len(names) != 1 {
			t.Errorf("left behind: %v, %v", names, err)
		}
	})
}

func TestFileWithTwoNamesGoesWithTheLast(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS, dir string) {
		first, folder := filepath.Join(dir, "first"), filepath.Join(dir, "folder")
		second := filepath.Join(folder, "second")
		must(t, fsys.MkdirAll(folder, 0o700))
		f := open(t, fsys, first, os.O_RDWR|os.O_CREATE)
		wantLinks := func(name string, want int) {
			t.Helper()
			if n, err := fsys.Links(name); n != want || err != nil {
				t.Errorf("%s has %d names, %v, want %d", name, n, err, want)
			}
		}
		wantLinks(first, 1)
		must(t, fsys.Link(first, second))
		wantLinks(first, 2)
		wantLinks(second, 2)
		write(t, f, []byte("both"), 0)
		p := make([]byte, 4)
		if _, err := open(t, fsys, second, os.O_RDONLY).ReadAt(p, 0); err != nil || string(p) != "both" {
			t.Errorf("through the other name: %q, %v", p, err)
		}
		if err := fsys.Link(first, second); !errors.Is(err, fs.ErrExist) {
			t.Errorf("a name that is taken: %v", err)
		}
		if err := fsys.Link(filepath.Join(dir, "none"), filepath.Join(dir, "x")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a file that is not there: %v", err)
		}
		if err := fsys.Link(folder, filepath.Join(dir, "x")); !errors.Is(err, syscall.EPERM) {
			t.Errorf("a folder: %v", err)
		}
		must(t, fsys.Remove(first))
		wantLinks(second, 1)
		if _, err := fsys.Links(first); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("links of a removed name: %v", err)
		}
		must(t, fsys.Remove(second))
	})
}
