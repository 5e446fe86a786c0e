package fs_test

import (
	"bytes"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Grow makes the device larger by zeros, and tells the kernel.
func (c *Control) Grow(size int64, _ *struct{}) error {
	m := c.memory
	m.dataMu.Lock()
	m.data = append(m.data, make([]byte, size-int64(len(m.data)))...)
	m.dataMu.Unlock()
	m.size.Store(size)
	c.server.Resized()
	return nil
}

// The kernel believes attributes for an hour, but not across Resized: who has the
// image open, or cached, and a loop device see the new size.
func TestGrownDeviceIsSeenByAllWhoHaveItOpen(t *testing.T) {
	const before, after = 1<<20 + 512, 2<<20 + 1024
	d := start(t, daemonConfig{Size: before, Seed: 3})
	loop := d.attachLoop()
	f := d.open(unix.O_RDWR)
	want := content(before, 3)
	if got := readAt(t, f, before, 0); !bytes.Equal(got, want) {
		t.Error("other bytes")
	}
	d.call("Grow", int64(after), new(struct{}))
	if st, err := os.Stat(d.image); err != nil || st.Size() != after {
		t.Fatalf("stat: %v, %v", st, err)
	}
	if end, err := f.Seek(0, io.SeekEnd); err != nil || end != after {
		t.Errorf("the end of an open file is at %d, %v", end, err)
	}
	want = append(want, make([]byte, after-before)...)
	if got := readAt(t, f, after, 0); !bytes.Equal(got, want) {
		t.Error("other bytes after growing")
	}
	if _, err := unix.IoctlRetInt(int(loop.Fd()), unix.LOOP_SET_CAPACITY); err != nil {
		t.Fatal(err)
	}
	sector := alignedBuffer(512)
	for i := range sector {
		sector[i] = 7
	}
	writeAt(t, loop, sector, after-512)
	if size, err := loop.Seek(0, io.SeekEnd); err != nil || size != after {
		t.Errorf("the loop device ends at %d, %v", size, err)
	}
	d.eventually("a buffered reader sees the loop device's write", func() bool {
		return readAt(t, f, 1, after-1)[0] == 7
	})
}
