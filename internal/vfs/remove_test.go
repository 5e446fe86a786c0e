package vfs_test

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/internal/vfs"
)

// locked makes the folder d in dir, durably, with files before and after its lock
// file and a folder in it, and locks it.
func locked(t *testing.T, fsys vfs.FS, dir string) (folder string, lock io.Closer) {
	t.Helper()
	folder = filepath.Join(dir, "d")
	must(t, fsys.MkdirAll(filepath.Join(folder, "sub"), 0o700))
	for _, name := range []string{"a", "sub/b", "z"} {
		must(t, open(t, fsys, filepath.Join(folder, name), os.O_RDWR|os.O_CREATE).Close())
	}
	lock, err := fsys.Lock(filepath.Join(folder, "lock"), true)
	must(t, err)
	for _, name := range []string{filepath.Join(folder, "sub"), folder, dir} {
		must(t, fsys.SyncDir(name))
	}
	return folder, lock
}

func wantGone(t *testing.T, fsys vfs.FS, folder string) {
	t.Helper()
	if names, err := fsys.ReadDir(folder); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v is left, %v", names, err)
	}
}

func TestRemoveLockedRemovesAll(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS, dir string) {
		folder, lock := locked(t, fsys, dir)
		must(t, vfs.RemoveLocked(fsys, folder, "lock"))
		wantGone(t, fsys, folder)
		must(t, lock.Close())
	})
}

// Wherever it is cut short, the folder has its lock file for as long as it has
// anything else, and is removed by who locks it again.
func TestRemoveLockedTakesTheLockFileLast(t *testing.T) {
	for how, cut := range map[string]struct {
		fault func(c *vfs.Crash, n int)
		want  error
		after func(c *vfs.Crash)
	}{
		"failure":   {func(c *vfs.Crash, n int) { c.FailCall(n, syscall.EIO) }, syscall.EIO, nil},
		"kill":      {(*vfs.Crash).StopCall, vfs.ErrStopped, (*vfs.Crash).Kill},
		"power cut": {(*vfs.Crash).StopCall, vfs.ErrStopped, (*vfs.Crash).PowerCut},
	} {
		t.Run(how, func(t *testing.T) {
			for n := 0; ; n++ {
				for seed := range uint64(20) {
					c := vfs.NewCrash(seed)
					folder, lock := locked(t, c, "/")
					cut.fault(c, n)
					err := vfs.RemoveLocked(c, folder, "lock")
					if !c.Faulted() {
						must(t, err)
						c.ClearFault()
						wantGone(t, c, folder)
						return
					}
					if !errors.Is(err, cut.want) {
						t.Errorf("call %d, seed %d: %v, want %v", n, seed, err, cut.want)
					}
					if cut.after != nil {
						cut.after(c)
					}
					must(t, lock.Close())
					names, err := c.ReadDir(folder)
					if errors.Is(err, fs.ErrNotExist) {
						continue
					}
					must(t, err)
					if how != "power cut" && len(names) > 0 && !slices.Contains(names, "lock") {
						t.Errorf("call %d, seed %d: %v is left without its lock file", n, seed, names)
					}
					lock, err = c.Lock(filepath.Join(folder, "lock"), true)
					must(t, err)
					must(t, vfs.RemoveLocked(c, folder, "lock"))
					wantGone(t, c, folder)
					must(t, lock.Close())
				}
			}
		})
	}
}

// A lateFS lets somebody else act as soon as the lock file is gone.
type lateFS struct {
	vfs.FS
	act func()
}

func (l lateFS) Remove(name string) error {
	err := l.FS.Remove(name)
	if filepath.Base(name) == "lock" {
		l.act()
	}
	return err
}

func TestRemoveLockedLeavesWhatIsMadeAnew(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS, dir string) {
		folder, lock := locked(t, fsys, dir)
		var anew io.Closer
		must(t, vfs.RemoveLocked(lateFS{fsys, func() {
			var err error
			anew, err = fsys.Lock(filepath.Join(folder, "lock"), true)
			must(t, err)
			open(t, fsys, filepath.Join(folder, "a"), os.O_RDWR|os.O_CREATE)
		}}, folder, "lock"))
		if names, err := fsys.ReadDir(folder); err != nil || !slices.Equal(names, []string{"a", "lock"}) {
			t.Errorf("of a and lock, made anew, %v is left, %v", names, err)
		}
		must(t, errors.Join(lock.Close(), anew.Close()))
	})
}

func TestRemoveLockedIsDoneWhenAnotherRemovesTheFolder(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS, dir string) {
		folder, lock := locked(t, fsys, dir)
		must(t, vfs.RemoveLocked(lateFS{fsys, func() { must(t, fsys.Remove(folder)) }}, folder, "lock"))
		wantGone(t, fsys, folder)
		must(t, lock.Close())
	})
}
