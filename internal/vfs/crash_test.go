package vfs_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/internal/vfs"
)

const sector = 512

// contents runs a history on many fresh filesystems and returns the set of what was
// in the file f after it, "none" if there was no such file.
func contents(t *testing.T, history func(c *vfs.Crash)) []string {
	t.Helper()
	seen := make(map[string]bool)
	for seed := range uint64(300) {
		c := vfs.NewCrash(seed)
		history(c)
		data, err := vfs.ReadFile(c, "f", 1<<20)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			seen["none"] = true
		case err != nil:
			t.Fatal(err)
		default:
			var s []byte
			for chunk := range slices.Chunk(data, sector) {
				s = append(s, max(chunk[0], '0'))
			}
			seen[string(s)] = true
		}
	}
	var all []string
	for s := range seen {
		all = append(all, s)
	}
	slices.Sort(all)
	return all
}

func sectors(s string) []byte {
	var p []byte
	for i := range len(s) {
		p = append(p, bytes.Repeat([]byte{s[i]}, sector)...)
	}
	return p
}

func expect(t *testing.T, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("after the crash %q, want %q", got, want)
	}
}

func TestPowerCutKeepsWhatWasSynced(t *testing.T) {
	expect(t, contents(t, func(c *vfs.Crash) {
		f := open(t, c, "f", os.O_RDWR|os.O_CREATE)
		write(t, f, sectors("ab"), 0)
		must(t, f.Sync())
		must(t, c.SyncDir("/"))
		c.PowerCut()
	}), "ab")
}

func TestPowerCutKeepsAnySectorsThatWereNotSynced(t *testing.T) {
	expect(t, contents(t, func(c *vfs.Crash) {
		f := open(t, c, "f", os.O_RDWR|os.O_CREATE)
		write(t, f, sectors("ab"), 0)
		must(t, f.Sync())
		must(t, c.SyncDir("/"))
		write(t, f, sectors("AB"), 0)
		c.PowerCut()
	}), "AB", "Ab", "aB", "ab")
}

func TestPowerCutMayShowAContentInBetween(t *testing.T) {
	expect(t, contents(t, func(c *vfs.Crash) {
		must(t, vfs.WriteFileAtomic(c, "f", sectors("a")))
		f := open(t, c, "f", os.O_RDWR)
		write(t, f, sectors("b"), 0)
		must(t, f.PunchHole(0, sector))
		write(t, f, sectors("c"), 0)
		c.PowerCut()
	}), "0", "a", "b", "c")
}

func TestPowerCutMayLoseANameAndASize(t *testing.T) {
	expect(t, contents(t, func(c *vfs.Crash) {
		f := open(t, c, "f", os.O_RDWR|os.O_CREATE)
		write(t, f, sectors("a"), 0)
		c.PowerCut()
	}), "", "0", "a", "none")
}

func TestKillLosesNothing(t *testing.T) {
	expect(t, contents(t, func(c *vfs.Crash) {
		f := open(t, c, "f", os.O_RDWR|os.O_CREATE)
		write(t, f, sectors("ab"), 0)
		c.Kill()
		if err := f.Sync(); !errors.Is(err, vfs.ErrStopped) {
			t.Errorf("file of a killed process: %v", err)
		}
		must(t, f.Close())
	}), "ab")
}

func TestFailedSyncForgetsWhatItDidNotWrite(t *testing.T) {
	expect(t, contents(t, func(c *vfs.Crash) {
		must(t, vfs.WriteFileAtomic(c, "f", sectors("a")))
		f := open(t, c, "f", os.O_RDWR)
		write(t, f, sectors("b"), 0)
		c.FailCall(0, syscall.EIO)
		if err := f.Sync(); !errors.Is(err, syscall.EIO) {
			t.Errorf("Sync: %v", err)
		}
		must(t, f.Sync())
		c.PowerCut()
	}), "a", "b")
}

func TestWriteFileAtomicNeverShowsAMix(t *testing.T) {
	seen := make(map[string]bool)
	for stop := 0; ; stop++ {
		faulted := false
		for _, content := range contents(t, func(c *vfs.Crash) {
			must(t, vfs.WriteFileAtomic(c, "f", sectors("aa")))
			c.StopCall(stop)
			err := vfs.WriteFileAtomic(c, "f", sectors("bb"))
			faulted = c.Faulted()
			if faulted != errors.Is(err, vfs.ErrStopped) {
				t.Fatalf("stop %d: %v", stop, err)
			}
			c.PowerCut()
		}) {
			if content != "bb" && (content != "aa" || !faulted) {
				t.Errorf("stop %d: %s", stop, content)
			}
			seen[content] = true
		}
		if !faulted {
			break
		}
	}
	if len(seen) != 2 {
		t.Errorf("crashes showed only %v", seen)
	}
}

func TestWriteFileAtomicLeavesTheOldContentWhenItFails(t *testing.T) {
	for n := 0; ; n++ {
		c := vfs.NewCrash(uint64(n))
		must(t, vfs.WriteFileAtomic(c, "f", sectors("a")))
		c.FailCall(n, syscall.ENOSPC)
		err := vfs.WriteFileAtomic(c, "f", sectors("b"))
		if !c.Faulted() {
			must(t, err)
			break
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("call %d: %v", n, err)
		}
		data, err := vfs.ReadFile(c, "f", sector)
		if err != nil || data[0] != 'a' && data[0] != 'b' {
			t.Errorf("call %d: %q, %v", n, data, err)
		}
		must(t, vfs.WriteFileAtomic(c, "f", sectors("c")))
	}
}

func TestCrashIsRepeatable(t *testing.T) {
	run := func() string {
		c := vfs.NewCrash(7)
		f := open(t, c, "f", os.O_RDWR|os.O_CREATE)
		must(t, f.Sync())
		must(t, c.SyncDir("/"))
		for i := range 100 {
			write(t, f, sectors(string(rune('a'+i%26))), int64(i*300))
		}
		c.PowerCut()
		data, err := vfs.ReadFile(c, "f", 1<<20)
		return fmt.Sprint(data, err)
	}
	if first, again := run(), run(); first != again {
		t.Error("two runs with one seed differ")
	}
}
