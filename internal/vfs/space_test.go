package vfs_test

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/internal/vfs"
)

const filePage = 4096

func TestAllocatedIsWhatAFileTakes(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS, dir string) {
		name := filepath.Join(dir, "f")
		want := func(what string, least, most int64) {
			t.Helper()
			if n, err := fsys.Allocated(name); n < least || n > most || err != nil {
				t.Errorf("%s: %d bytes, %v; want %d to %d", what, n, err, least, most)
			}
		}
		f := open(t, fsys, name, os.O_RDWR|os.O_CREATE)
		must(t, f.Truncate(1<<30))
		want("empty", 0, 0)
		write(t, f, make([]byte, 16*filePage), 1<<20)
		want("written", 16*filePage, 16*filePage)
		write(t, f, make([]byte, 4*filePage), 1<<20)
		want("overwritten", 16*filePage, 16*filePage)
		must(t, f.PunchHole(1<<20, 6*filePage))
		want("punched", 10*filePage, 10*filePage)
		must(t, f.Truncate(1<<20+8*filePage))
		want("cut off", 2*filePage, 2*filePage)
		if _, err := fsys.Allocated(name + "?"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a missing file: %v", err)
		}
	})
}

func TestSpaceIsTheFilesystems(t *testing.T) {
	each(t, func(t *testing.T, fsys vfs.FS, dir string) {
		if c, ok := fsys.(*vfs.Crash); ok {
			c.SetCapacity(1 << 20)
		}
		total, free, err := fsys.Space(dir)
		if err != nil || total < 1<<20 || free <= 0 || free > total {
			t.Errorf("%d of %d bytes are free, %v", free, total, err)
		}
		if _, _, err := fsys.Space(filepath.Join(dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a missing file: %v", err)
		}
	})
}

// What needs space fails on a full disk, what does not goes on, and what gives space
// back lets the former go on too.
func TestFullDiskFailsWhatNeedsSpace(t *testing.T) {
	c := vfs.NewCrash(1)
	c.SetCapacity(20 * filePage)
	f := open(t, c, "f", os.O_RDWR|os.O_CREATE)
	must(t, f.Truncate(1<<20))
	for {
		n, err := f.WriteAt(bytes.Repeat([]byte{1}, 4*filePage), c.Used())
		if err == nil {
			continue
		}
		if !errors.Is(err, syscall.ENOSPC) || !vfs.IsFull(err) || n%filePage != 0 {
			t.Fatalf("the last write: %d bytes, %v", n, err)
		}
		break
	}
	if _, free, err := c.Space("/"); free != 0 || c.Used() != 20*filePage || err != nil {
		t.Fatalf("%d bytes are free, %d used, %v", free, c.Used(), err)
	}
	needs := map[string]func() error{
		"write":  func() error { _, err := f.WriteAt([]byte{1}, 1<<19); return err },
		"create": func() error { _, err := c.OpenFile("g", os.O_RDWR|os.O_CREATE, 0); return err },
		"mkdir":  func() error { return c.MkdirAll("d", 0) },
		"lock":   func() error { _, err := c.Lock("l", true); return err },
	}
	for name, call := range needs {
		if err := call(); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("%s on a full disk: %v", name, err)
		}
	}
	write(t, f, []byte{2}, 2*filePage) // in place
	must(t, f.Truncate(1<<21))
	must(t, f.Sync())
	must(t, c.Rename("f", "h"))
	must(t, f.PunchHole(2*filePage, 5*filePage))
	for name, call := range needs {
		if err := call(); err != nil {
			t.Errorf("%s with room again: %v", name, err)
		}
	}
}

func TestRemovedFileTakesSpaceWhileItIsOpen(t *testing.T) {
	c := vfs.NewCrash(1)
	before := c.Used()
	f := open(t, c, "f", os.O_RDWR|os.O_CREATE)
	write(t, f, make([]byte, 3*filePage), 0)
	must(t, c.Remove("f"))
	if n := c.Used() - before; n != 4*filePage {
		t.Errorf("removed, and open: %d bytes", n)
	}
	must(t, f.Close())
	if n := c.Used() - before; n != 0 {
		t.Errorf("removed and closed: %d bytes", n)
	}
	g := open(t, c, "g", os.O_RDWR|os.O_CREATE)
	write(t, g, make([]byte, filePage), 0)
	must(t, c.Remove("g"))
	c.Kill()
	if n := c.Used() - before; n != 0 {
		t.Errorf("removed, and its user dead: %d bytes", n)
	}
}

// TestUsedIsTheSumOfWhatIsThere: however it came about.
func TestUsedIsTheSumOfWhatIsThere(t *testing.T) {
	for seed := range uint64(50) {
		rng := rand.New(rand.NewPCG(seed, 0))
		c := vfs.NewCrash(seed)
		f := open(t, c, "f", os.O_RDWR|os.O_CREATE)
		must(t, c.SyncDir("/"))
		for range 60 {
			off, n := rng.Int64N(40*sector), 1+rng.Int64N(40*sector)
			var err error
			switch rng.IntN(5) {
			case 0, 1:
				_, err = f.WriteAt(make([]byte, n), off)
			case 2:
				err = f.PunchHole(off, n)
			case 3:
				err = f.Truncate(off)
			default:
				err = f.Sync()
			}
			must(t, err)
			if rng.IntN(20) == 0 {
				c.PowerCut()
				f = open(t, c, "f", os.O_RDWR)
			}
			allocated, err := c.Allocated("f")
			must(t, err)
			if want := 2*filePage + allocated; c.Used() != want { // the file and its folder
				t.Fatalf("seed %d: %d bytes are used, want %d", seed, c.Used(), want)
			}
			for at := int64(0); ; at++ { // each page that is taken is seen as data
				data, err := f.SeekData(at)
				if err != nil {
					break
				}
				allocated -= filePage
				at = data/filePage*filePage + filePage - 1
			}
			if allocated != 0 {
				t.Fatalf("seed %d: the pages that are data and those that are taken differ by %d bytes", seed, allocated)
			}
		}
	}
}
