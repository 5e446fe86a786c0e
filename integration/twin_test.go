package integration

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A twin is a volume and the bytes it must hold. Whatever is done to one is done
// to the other.
type twin struct {
	t testing.TB
	h *host
	r *rand.Rand

	vol   string
	bytes []byte

	mount            *mount // nil: not mounted
	buffered, direct *os.File
	killed           atomic.Bool // somebody kills the daemon
	steps, kills     int
}

// attach mounts the volume and opens it.
func (w *twin) attach() {
	w.mount = w.h.mount(w.vol, w.hydration()...)
	w.open()
}

// hydration returns flags for the next mount.
func (w *twin) hydration() []string {
	switch w.r.IntN(3) {
	case 0:
		return []string{"--no-hydrate"}
	case 1:
		return []string{"--hydrate-rate=2MiB"}
	}
	return nil
}

func (w *twin) open() {
	// In this order: a handle that was opened before the first direct one uses
	// the page cache, and may see what it held a moment longer.
	w.direct, w.buffered = w.mount.open(os.O_RDWR|unix.O_DIRECT), w.mount.open(os.O_RDWR)
}

// span draws a range of the device. Direct ones are in sectors.
func (w *twin) span(direct bool, longest int) (off, n int) {
	off = w.r.IntN(len(w.bytes))
	if w.r.IntN(4) == 0 {
		off &^= pageSize - 1
	}
	if w.r.IntN(8) == 0 {
		off = max(0, off/blockSize*blockSize-w.r.IntN(2*pageSize)) // around the edge of a block
	}
	n = 1 + w.r.IntN(longest)>>w.r.IntN(10)
	if direct {
		off, n = off&^511, (n+511)&^511
	}
	return off, min(n, len(w.bytes)-off)
}

// file draws which handle is used.
func (w *twin) file() (f *os.File, direct bool) {
	if w.r.IntN(2) == 0 {
		return w.direct, true
	}
	return w.buffered, false
}

func (w *twin) read() {
	f, direct := w.file()
	off, n := w.span(direct, mib)
	p := aligned(n)
	if _, err := f.ReadAt(p, int64(off)); err != nil && err != io.EOF {
		w.t.Fatalf("step %d: read: %v", w.steps, err)
	}
	sameBytes(w.t, fmt.Sprintf("step %d: read of %d+%d (direct: %t)", w.steps, off, n, direct), p, w.bytes[off:off+n])
}

// checkAll compares all of the device.
func (w *twin) checkAll() {
	got := make([]byte, len(w.bytes))
	if _, err := w.buffered.ReadAt(got, 0); err != nil {
		w.t.Fatalf("step %d: read all: %v", w.steps, err)
	}
	sameBytes(w.t, fmt.Sprintf("step %d: the device", w.steps), got, w.bytes)
}

// random returns n bytes: random, or the same over and over.
func (w *twin) random(n int) []byte {
	p := aligned(n)
	switch w.r.IntN(4) {
	case 0: // zeros
	case 1:
		copy(p, bytes.Repeat([]byte{byte(w.r.Uint32())}, n))
	default:
		fill(w.r, p)
	}
	return p
}

func (w *twin) write() {
	f, direct := w.file()
	off, n := w.span(direct, mib)
	p := w.random(n)
	if _, err := f.WriteAt(p, int64(off)); err != nil {
		w.t.Fatalf("step %d: write: %v", w.steps, err)
	}
	copy(w.bytes[off:], p)
}

func (w *twin) zero() {
	mode := uint32(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE)
	if w.r.IntN(2) == 0 {
		mode = unix.FALLOC_FL_ZERO_RANGE
	}
	off, n := w.span(false, 3*mib)
	if err := unix.Fallocate(int(w.buffered.Fd()), mode, int64(off), int64(n)); err != nil {
		w.t.Fatalf("step %d: fallocate %x: %v", w.steps, mode, err)
	}
	clear(w.bytes[off : off+n])
}

// remount ends the mount and mounts again.
func (w *twin) remount(end func(*mount)) {
	end(w.mount)
	w.mount = w.mount.again(w.vol, w.hydration()...)
	w.open()
}

// kill kills the daemon and mounts again.
func (w *twin) kill() {
	w.kills++
	w.remount((*mount).kill)
}

// killWhileWriting kills the daemon while writes are under way. Those that
// were acknowledged stay; of the one that failed each sector is old or new.
func (w *twin) killWhileWriting() {
	delay := time.Duration(w.r.IntN(20)) * time.Millisecond
	w.killed.Store(false)
	w.kills++
	done := make(chan struct{})
	go func() {
		defer close(done)
		time.Sleep(delay)
		w.killed.Store(true)
		w.mount.kill()
	}()
	for {
		f, direct := w.file()
		off, n := w.span(direct, mib)
		p := w.random(n)
		if _, err := f.WriteAt(p, int64(off)); err != nil {
			if !w.killed.Load() {
				w.t.Fatalf("step %d: write: %v", w.steps, err)
			}
			w.remount(func(*mount) { <-done })
			w.adopt(off, p)
			w.checkAll()
			return
		}
		copy(w.bytes[off:], p)
	}
}

// adopt takes over what became of a write of p that failed.
func (w *twin) adopt(off int, p []byte) {
	const sector = 512
	start, end := off&^(sector-1), min((off+len(p)+sector-1)&^(sector-1), len(w.bytes))
	got := make([]byte, end-start)
	if _, err := w.buffered.ReadAt(got, int64(start)); err != nil && err != io.EOF {
		w.t.Fatalf("step %d: read: %v", w.steps, err)
	}
	written := bytes.Clone(w.bytes[start:end])
	copy(written[off-start:], p)
	for at := 0; at < len(got); at += sector {
		to := min(at+sector, len(got))
		if now := got[at:to]; !bytes.Equal(now, w.bytes[start+at:start+to]) && !bytes.Equal(now, written[at:to]) {
			w.t.Fatalf("step %d: after a kill in a write of %d+%d, the sector at %d is neither old nor new:\n%x\nold\n%x\nnew\n%x",
				w.steps, off, len(p), start+at, now, w.bytes[start+at:start+to], written[at:to])
		}
	}
	copy(w.bytes[start:], got)
}

// detach takes the mount away.
func (w *twin) detach() {
	w.mount.unmount()
	w.mount = nil
}
