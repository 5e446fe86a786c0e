package vfs_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/internal/vfs"
)

func TestBadSectorFailsWhatTouchesItUntilItIsReplaced(t *testing.T) {
	c := vfs.NewCrash(1)
	f := open(t, c, "f", os.O_RDWR|os.O_CREATE)
	write(t, f, sectors("abc"), 0)
	must(t, f.Sync())
	must(t, c.SyncDir("/"))
	must(t, c.BadSector("f", sector+1))
	expectEIO := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, syscall.EIO) {
			t.Errorf("%s: %v, want EIO", what, err)
		}
	}
	p := make([]byte, sector)
	for range 2 { // before and after a power cut
		expectEIO("read across", second(f.ReadAt(make([]byte, 3*sector), 0)))
		expectEIO("read of its last byte", second(f.ReadAt(p[:1], 2*sector-1)))
		expectEIO("write of its first byte", second(f.WriteAt(p[:1], sector)))
		expectEIO("write up to its middle", second(f.WriteAt(p, sector/2)))
		for at, want := range map[int64]byte{0: 'a', 2 * sector: 'c'} {
			if _, err := f.ReadAt(p, at); err != nil || p[0] != want {
				t.Errorf("its neighbour at %d: %q, %v", at, p[0], err)
			}
		}
		c.PowerCut()
		f = open(t, c, "f", os.O_RDWR)
	}
	write(t, f, sectors("x"), sector)
	if _, err := f.ReadAt(p, sector); err != nil || p[0] != 'x' {
		t.Errorf("written anew: %q, %v", p[0], err)
	}
	must(t, c.BadSector("f", 0))
	must(t, f.PunchHole(0, sector))
	if _, err := f.ReadAt(p, 0); err != nil || p[0] != 0 {
		t.Errorf("punched: %q, %v", p[0], err)
	}
	if err := c.BadSector("none", 0); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a file that does not exist: %v", err)
	}
}

func TestFlippedBitStaysFlipped(t *testing.T) {
	c := vfs.NewCrash(1)
	f := open(t, c, "f", os.O_RDWR|os.O_CREATE)
	write(t, f, sectors("ab"), 0)
	must(t, f.Sync())
	must(t, c.SyncDir("/"))
	must(t, c.FlipBit("f", sector+3))
	want := sectors("ab")
	want[sector+3] ^= 1
	for range 2 {
		got, err := vfs.ReadFile(c, "f", 2*sector)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("other bytes, or %v", err)
		}
		c.PowerCut()
	}
}
