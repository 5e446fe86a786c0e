package fs_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	lazyfs "github.com/lazyvol/lazyvol/fs"
	"golang.org/x/sys/unix"
)

// A branch is one thing in a fake tree.
type branch struct {
	Path string // its folders are made
	Seed byte   // of an image's content
	Link string // not empty: it is a link
}

const (
	branchSize = 1<<20 + 512
	branchTime = 1_700_000_000 // Unix seconds
)

// fakeTree is a Tree whose images are opened lazily.
type fakeTree struct {
	mu     sync.Mutex // guards what follows
	now    *lazyfs.Folder
	next   *lazyfs.Folder // shown once it is asked for what is fresh; nil: nothing new
	images map[string]*lazyImage
}

func newFakeTree(branches []branch) *fakeTree {
	t := &fakeTree{images: make(map[string]*lazyImage)}
	t.now = t.grow(branches)
	return t
}

// grow makes a root of branches. An image that was there is the same.
func (t *fakeTree) grow(branches []branch) *lazyfs.Folder {
	newFolder := func() *lazyfs.Folder {
		return &lazyfs.Folder{Folders: make(map[string]*lazyfs.Folder), Images: make(map[string]lazyfs.Image), Links: make(map[string]lazyfs.Link)}
	}
	root := newFolder()
	at := time.Unix(branchTime, 0)
	for _, b := range branches {
		names := strings.Split(b.Path, "/")
		f, name := root, names[len(names)-1]
		for _, name := range names[:len(names)-1] {
			if f.Folders[name] == nil {
				f.Folders[name] = newFolder()
			}
			f = f.Folders[name]
		}
		if b.Link != "" {
			f.Links[name] = lazyfs.Link{To: b.Link, Modified: at}
			continue
		}
		if t.images[b.Path] == nil {
			t.images[b.Path] = &lazyImage{memory: newMemory(content(branchSize, b.Seed), true)}
		}
		f.Images[name] = lazyfs.Image{Device: t.images[b.Path], Modified: at}
	}
	return root
}

func (t *fakeTree) Root(_ context.Context, fresh bool) *lazyfs.Folder {
	t.mu.Lock()
	defer t.mu.Unlock()
	if fresh && t.next != nil {
		t.now, t.next = t.next, nil
	}
	return t.now
}

// lazyImage is a Device that is opened.
type lazyImage struct {
	*memory

	imageMu sync.Mutex // guards what follows
	opens   int
	users   int
	refuses error
}

func (i *lazyImage) Open(context.Context) error {
	i.imageMu.Lock()
	defer i.imageMu.Unlock()
	i.opens++
	if i.refuses != nil {
		return fmt.Errorf("opening: %w", i.refuses)
	}
	i.users++
	return nil
}

func (i *lazyImage) Close() {
	i.imageMu.Lock()
	defer i.imageMu.Unlock()
	i.users--
}

func (i *lazyImage) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	i.imageMu.Lock()
	users := i.users
	i.imageMu.Unlock()
	if users == 0 {
		return 0, errors.New("read while it is not open")
	}
	return i.memory.ReadAt(ctx, p, off)
}

// Grown is what a tree becomes once it is asked for what is fresh.
func (c *Control) Grown(branches []branch, _ *struct{}) error {
	c.tree.mu.Lock()
	defer c.tree.mu.Unlock()
	c.tree.next = c.tree.grow(branches)
	return nil
}

// Refusing makes an image refuse to be opened.
type Refusing struct{ Path, Why string }

var refusals = map[string]error{
	"gone": lazyfs.ErrGone, "denied": lazyfs.ErrDenied, "too many": lazyfs.ErrTooMany, "else": errors.New("the store said no"), "": nil,
}

func (c *Control) Refuse(r Refusing, _ *struct{}) error {
	i := c.tree.images[r.Path]
	i.imageMu.Lock()
	defer i.imageMu.Unlock()
	i.refuses = refusals[r.Why]
	return nil
}

// Opened counts an image's opens.
type Opened struct{ Opens, Users, Reads int }

func (c *Control) Opened(path string, o *Opened) error {
	i := c.tree.images[path]
	i.imageMu.Lock()
	defer i.imageMu.Unlock()
	i.mu.Lock()
	defer i.mu.Unlock()
	*o = Opened{i.opens, i.users, i.ops["read"].Calls}
	return nil
}

func (d *daemon) opened(path string) (o Opened) {
	d.t.Helper()
	d.call("Opened", path, &o)
	return o
}

// openIn opens a file of the mount, and closes it when the test is over at the latest.
func (d *daemon) openIn(path string) *os.File {
	d.t.Helper()
	f, err := os.Open(filepath.Join(d.dir, path))
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { f.Close() }) // closed twice at worst
	return f
}

var someTree = []branch{
	{Path: "by-id/a.img", Seed: 1},
	{Path: "by-id/b.img", Seed: 2},
	{Path: "by-tag/env/prod/a.img", Link: "../../../by-id/a.img"},
	{Path: "by-tag/env/%empty/b.img", Link: "../../../by-id/b.img"},
}

// walk lists what is below a directory, and what the names of its folders said it was.
func walk(t *testing.T, dir string) map[string]fs.FileMode {
	t.Helper()
	found := make(map[string]fs.FileMode)
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		if info.Mode().Type() != e.Type() {
			t.Errorf("%s is listed as %s and is %s", path, e.Type(), info.Mode())
		}
		name, err := filepath.Rel(dir, path)
		found[name] = info.Mode()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestTreeShowsItsFoldersAndOpensNothingForIt(t *testing.T) {
	d := start(t, daemonConfig{Tree: someTree, Status: "{}"})
	const folder, image, link = fs.ModeDir | 0o500, fs.FileMode(0o400), fs.ModeSymlink | 0o777
	want := map[string]fs.FileMode{
		".": folder, "status.json": image, "by-id": folder, "by-id/a.img": image, "by-id/b.img": image,
		"by-tag": folder, "by-tag/env": folder, "by-tag/env/prod": folder, "by-tag/env/prod/a.img": link,
		"by-tag/env/%empty": folder, "by-tag/env/%empty/b.img": link,
	}
	if got := walk(t, d.dir); !maps.Equal(got, want) {
		t.Errorf("the tree is %v, want %v", got, want)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(d.dir, "by-tag/env/prod/a.img"), &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != branchSize || st.Mtim.Sec != branchTime || st.Blocks != (branchSize/2+511)/512 {
		t.Errorf("an image has size %d, time %d and %d blocks", st.Size, st.Mtim.Sec, st.Blocks)
	}
	entries, err := as(0, "ls", "-i", filepath.Join(d.dir, "by-id"))
	if err != nil || !strings.Contains(entries, fmt.Sprintf("%d a.img", st.Ino)) {
		t.Errorf("the inode %d is not what ls -i says: %s, %v", st.Ino, entries, err)
	}
	for _, path := range []string{"by-id/a.img", "by-id/b.img"} {
		if o := d.opened(path); o.Opens != 0 || o.Reads != 0 {
			t.Errorf("%s was opened: %+v", path, o)
		}
	}
	if status, err := os.ReadFile(d.status); err != nil || string(status) != "{}" {
		t.Errorf("the status is %q, %v", status, err)
	}
}

// Whichever way leads to an image, it is one file: opened for each handle, closed when
// the last request of that is over, its content kept by the kernel.
func TestImageOfATreeIsOneFileWhicheverWayLeadsToIt(t *testing.T) {
	d := start(t, daemonConfig{Tree: someTree})
	want := content(branchSize, 1)
	first := d.openIn("by-id/a.img")
	if got := readAt(t, first, branchSize, 0); !bytes.Equal(got, want) {
		t.Error("other bytes")
	}
	var second *os.File
	throughTheCache(t, func() (reads int) {
		if second != nil {
			second.Close() // once more at the end
			d.eventually("it is closed", func() bool { return d.opened("by-id/a.img").Users == 1 })
		}
		before := d.opened("by-id/a.img")
		second = d.openIn("by-tag/env/prod/a.img")
		if got := readAt(t, second, branchSize, 0); !bytes.Equal(got, want) {
			t.Error("other bytes through the link")
		}
		after := d.opened("by-id/a.img")
		if after.Opens != before.Opens+1 || after.Users != 2 {
			t.Errorf("through the link it was opened as another one: %+v, after %+v", after, before)
		}
		return after.Reads - before.Reads
	})
	mapped, err := unix.Mmap(int(first.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []*os.File{first, second} {
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	d.eventually("only the mapping uses it", func() bool { return d.opened("by-id/a.img").Users == 1 })
	if err := unix.Munmap(mapped); err != nil {
		t.Fatal(err)
	}
	d.eventually("nobody uses it", func() bool { return d.opened("by-id/a.img").Users == 0 })
	if o := d.opened("by-id/b.img"); o.Opens != 0 {
		t.Errorf("the other image was opened: %+v", o)
	}
}

func TestRefusalToOpenIsToldByItsErrno(t *testing.T) {
	d := start(t, daemonConfig{Tree: someTree})
	for why, want := range map[string]syscall.Errno{"gone": unix.ENOENT, "denied": unix.EACCES, "too many": unix.EMFILE, "else": unix.EIO} {
		d.call("Refuse", Refusing{"by-id/a.img", why}, new(struct{}))
		_, err := os.Open(filepath.Join(d.dir, "by-id/a.img"))
		wantErrno(t, why, err, want)
	}
	d.call("Refuse", Refusing{"by-id/a.img", ""}, new(struct{}))
	readAt(t, d.openIn("by-id/a.img"), 4096, 0)
	if o := d.opened("by-id/a.img"); o.Users != 1 {
		t.Errorf("refused opens were counted: %+v", o)
	}
	if log := d.log(); !strings.Contains(log, "the store said no") {
		t.Errorf("the log does not say why: %s", log)
	}
}

func TestNamesOfATreeComeAndGo(t *testing.T) {
	d := start(t, daemonConfig{Tree: someTree})
	walk(t, d.dir) // the kernel knows all of it
	f := d.openIn("by-id/a.img")
	d.call("Grown", []branch{{Path: "by-id/b.img", Seed: 2}, {Path: "by-id/c.img", Seed: 3}, {Path: "by-volume/v/c.img", Link: "../../by-id/c.img"}}, new(struct{}))
	if entries, err := os.ReadDir(filepath.Join(d.dir, "by-id")); err != nil || len(entries) != 2 || entries[1].Name() != "c.img" {
		t.Errorf("it is listed as %v, %v", entries, err)
	}
	if got := readAt(t, d.openIn("by-id/c.img"), branchSize, 0); !bytes.Equal(got, content(branchSize, 3)) {
		t.Error("a new name shows other bytes")
	}
	if got := slices.Sorted(maps.Keys(walk(t, d.dir))); !slices.Equal(got, []string{".", "by-id", "by-id/b.img", "by-id/c.img", "by-volume", "by-volume/v", "by-volume/v/c.img"}) {
		t.Errorf("the tree has %q", got)
	}
	for _, path := range []string{"by-id/a.img", "by-tag/env/prod"} {
		d.eventually(path+" is gone", func() bool {
			_, err := os.Lstat(filepath.Join(d.dir, path))
			return errors.Is(err, fs.ErrNotExist)
		})
	}
	if got := readAt(t, f, branchSize, 0); !bytes.Equal(got, content(branchSize, 1)) {
		t.Error("who has it open reads other bytes")
	}
	if o := d.opened("by-id/a.img"); o.Users != 1 {
		t.Errorf("it is not open any more: %+v", o)
	}
}

func TestNothingOfATreeCanBeChanged(t *testing.T) {
	d := start(t, daemonConfig{Tree: someTree, Options: mountOptions{AllowOther: true}})
	image := filepath.Join(d.dir, "by-id/a.img")
	_, err := os.OpenFile(image, os.O_RDWR, 0)
	wantErrno(t, "opening to write", err, unix.EROFS)
	wantErrno(t, "removing", os.Remove(image), unix.EROFS)
	wantErrno(t, "removing a folder", os.Remove(filepath.Join(d.dir, "by-id")), unix.EROFS)
	wantErrno(t, "making a folder", os.Mkdir(filepath.Join(d.dir, "mine"), 0o700), unix.EROFS)
	wantErrno(t, "touching", os.Chtimes(image, time.Now(), time.Now()), unix.EROFS)
	wantErrno(t, "renaming", os.Rename(image, image+"2"), unix.EROFS)
	if line := mounted(t, d.dir); !strings.Contains(line, " fuse.lazyvol ro,nosuid,nodev,") {
		t.Errorf("mount table: %s", line)
	}
}

// A listing comes in many parts.
func TestLongFolderIsListedWhole(t *testing.T) {
	const n = 3000
	branches := make([]branch, n)
	want := make([]string, n)
	for i := range branches {
		want[i] = fmt.Sprintf("%04d %s.img", i, strings.Repeat("x", 200))
		branches[i] = branch{Path: "links/" + want[i], Link: "../nowhere"}
	}
	d := start(t, daemonConfig{Tree: []branch{}})
	d.call("Grown", branches, new(struct{}))
	f := d.openIn("links")
	for range 2 { // rewound
		names, err := f.Readdirnames(-1)
		if err != nil || !slices.Equal(names, want) {
			t.Errorf("%d names, %v, want %d in order", len(names), err, n)
		}
		if _, err := f.Seek(0, 0); err != nil {
			t.Fatal(err)
		}
	}
}
