package fs_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/fs"
)

func TestMountpointsTellWhatIsMounted(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20})
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	odd := filepath.Join(dir, "a b")
	if err := os.Mkdir(odd, 0o700); err != nil {
		t.Fatal(err)
	}
	if on, path, err := fs.MountedOn(odd); on.Dir != "" || path != odd || err != nil {
		t.Errorf("nothing: %+v, %s, %v", on, path, err)
	}
	if err := unix.Mount("some source", odd, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(odd, 0); err != nil {
			t.Error(err)
		}
	})
	all, err := fs.Mountpoints()
	if err != nil {
		t.Fatal(err)
	}
	for where, want := range map[string]struct{ kind, source, id string }{
		d.dir: {"fuse.lazyvol", "lazyvol:vol-test", "vol-test"},
		odd:   {"tmpfs", "some source", ""},
	} {
		on, _, err := fs.MountedOn(where)
		if err != nil || on.Dir != where || on.Type != want.kind || on.Source != want.source || on.ID() != want.id || on.Device == "" {
			t.Errorf("on %s is %+v, %v", where, on, err)
		}
		if !slices.Contains(all, on) {
			t.Errorf("%+v is not among all", on)
		}
	}
	if ours, err := fs.Mounted(); err != nil || !slices.Contains(ours, d.dir) || slices.Contains(ours, odd) {
		t.Errorf("ours are %v, %v", ours, err)
	}
	if on, _, err := fs.MountedOn(filepath.Join(odd, "..", "a b")); err != nil || on.Dir != odd {
		t.Errorf("by another path: %+v, %v", on, err)
	}
	if err := os.Mkdir(filepath.Join(odd, "below"), 0o700); err != nil {
		t.Fatal(err)
	}
	if on, _, err := fs.MountedOn(filepath.Join(odd, "below")); err != nil || on.Dir != "" {
		t.Errorf("below it: %+v, %v", on, err)
	}
	below := filepath.Join(odd, "below")
	if err := unix.Mount("inner", below, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	all, err = fs.Mountpoints()
	if err := errors.Join(err, unix.Unmount(below, 0)); err != nil {
		t.Fatal(err)
	}
	at := func(dir string) fs.Mountpoint {
		return all[slices.IndexFunc(all, func(m fs.Mountpoint) bool { return m.Dir == dir })]
	}
	if !at(below).In(at(odd)) || at(odd).In(at(below)) || at(d.dir).In(at(odd)) {
		t.Errorf("what is in what: %+v", all)
	}
	if _, _, err := fs.MountedOn(filepath.Join(odd, "missing")); !os.IsNotExist(err) {
		t.Errorf("a missing folder: %v", err)
	}
}
