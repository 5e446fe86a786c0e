package integration

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// modelTime is how long each run of the model takes, besides the last check.
func modelTime() time.Duration {
	if stressed() {
		return 10 * time.Minute
	}
	return 12 * time.Second
}

// modelSeed is where the randomness of a run comes from. A run repeats only as
// far as time allows: kills hit where they hit.
func modelSeed(t testing.TB, n uint64) uint64 {
	seed := n
	if stressed() {
		seed = rand.Uint64()
	}
	if s := os.Getenv("LAZYVOL_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("LAZYVOL_SEED=%d", seed)
	return seed
}

func TestVolumeBehavesAsAByteArray(t *testing.T) {
	t.Parallel()
	for i, newStore := range []func(testing.TB) *store{newDirStore, newS3Store} {
		t.Run([]string{"folder", "S3"}[i], func(t *testing.T) {
			t.Parallel()
			s := newStore(t)
			h := newHost(t, s)
			h.binary = lazyvol(t, true)
			m := newModel(t, h, modelSeed(t, uint64(i)))
			for end := time.Now().Add(modelTime()); time.Now().Before(end); {
				m.step()
			}
			m.finish()
		})
	}
}

// A model is a volume and the bytes it must hold.
type model struct {
	t testing.TB
	h *host
	r *rand.Rand

	vol   string
	bytes []byte
	snaps map[string][]byte // contents of snapshots that were not checked yet
	other *host             // checks them

	mount            *mount
	buffered, direct *os.File
	killed           atomic.Bool // somebody kills the daemon
	steps            int
}

func newModel(t testing.TB, h *host, seed uint64) *model {
	m := &model{t: t, h: h, r: newRand(seed), snaps: make(map[string][]byte), other: newHost(t, h.store)}
	m.bytes = diskBytes(seed, 11*mib+3*512)
	snap := h.ok("snapshot", "create", h.image(m.bytes))
	m.bytes = append(m.bytes, make([]byte, 2*mib+512)...)
	m.vol = h.ok("volume", "create", "--snapshot", snap, "--size", strconv.Itoa(len(m.bytes)))
	m.mount = h.mount(m.vol, m.hydration()...)
	m.open()
	return m
}

// hydration returns flags for the next mount.
func (m *model) hydration() []string {
	switch m.r.IntN(3) {
	case 0:
		return []string{"--no-hydrate"}
	case 1:
		return []string{"--hydrate-rate=2MiB"}
	}
	return nil
}

func (m *model) open() {
	// In this order: a handle that was opened before the first direct one uses
	// the page cache, and may see what it held a moment longer.
	m.direct, m.buffered = m.mount.open(os.O_RDWR|unix.O_DIRECT), m.mount.open(os.O_RDWR)
}

// span draws a range of the device. Direct ones are in sectors.
func (m *model) span(direct bool, longest int) (off, n int) {
	off = m.r.IntN(len(m.bytes))
	if m.r.IntN(4) == 0 {
		off &^= pageSize - 1
	}
	if m.r.IntN(8) == 0 {
		off = max(0, off/blockSize*blockSize-m.r.IntN(2*pageSize)) // around the edge of a block
	}
	n = 1 + m.r.IntN(longest)>>m.r.IntN(10)
	if direct {
		off, n = off&^511, (n+511)&^511
	}
	return off, min(n, len(m.bytes)-off)
}

// file draws which handle is used.
func (m *model) file() (f *os.File, direct bool) {
	if m.r.IntN(2) == 0 {
		return m.direct, true
	}
	return m.buffered, false
}

func (m *model) step() {
	m.steps++
	switch n := m.r.IntN(1000); {
	case n < 400:
		m.read()
	case n < 800:
		m.write()
	case n < 930:
		m.zero()
	case n < 980:
		if err := m.buffered.Sync(); err != nil {
			m.t.Fatal(err)
		}
	case n < 986:
		m.snapshot()
	case n < 990:
		m.remount((*mount).unmount)
		m.checkAll()
	case n < 994:
		m.remount((*mount).kill)
		m.checkAll()
	case n < 998:
		m.killWhileWriting()
	default:
		m.killWhileSnapshotting()
	}
}

func (m *model) read() {
	f, direct := m.file()
	off, n := m.span(direct, mib)
	p := aligned(n)
	if _, err := f.ReadAt(p, int64(off)); err != nil && err != io.EOF {
		m.t.Fatalf("step %d: read: %v", m.steps, err)
	}
	sameBytes(m.t, fmt.Sprintf("step %d: read of %d+%d (direct: %t)", m.steps, off, n, direct), p, m.bytes[off:off+n])
}

// checkAll compares all of the device.
func (m *model) checkAll() {
	got := make([]byte, len(m.bytes))
	if _, err := m.buffered.ReadAt(got, 0); err != nil {
		m.t.Fatalf("step %d: read all: %v", m.steps, err)
	}
	sameBytes(m.t, fmt.Sprintf("step %d: the device", m.steps), got, m.bytes)
}

// random returns n bytes: random, or the same over and over.
func (m *model) random(n int) []byte {
	p := aligned(n)
	switch m.r.IntN(4) {
	case 0: // zeros
	case 1:
		copy(p, bytes.Repeat([]byte{byte(m.r.Uint32())}, n))
	default:
		fill(m.r, p)
	}
	return p
}

func (m *model) write() {
	f, direct := m.file()
	off, n := m.span(direct, mib)
	p := m.random(n)
	if _, err := f.WriteAt(p, int64(off)); err != nil {
		m.t.Fatalf("step %d: write: %v", m.steps, err)
	}
	copy(m.bytes[off:], p)
}

func (m *model) zero() {
	mode := uint32(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE)
	if m.r.IntN(2) == 0 {
		mode = unix.FALLOC_FL_ZERO_RANGE
	}
	off, n := m.span(false, 3*mib)
	if err := unix.Fallocate(int(m.buffered.Fd()), mode, int64(off), int64(n)); err != nil {
		m.t.Fatalf("step %d: fallocate %x: %v", m.steps, mode, err)
	}
	clear(m.bytes[off : off+n])
}

func (m *model) snapshot() {
	m.snaps[m.h.ok("snapshot", "create", m.vol)] = bytes.Clone(m.bytes)
	if len(m.snaps) >= 4 {
		m.checkSnapshots()
	}
}

// checkSnapshots compares all snapshots with what the device held, and deletes
// some.
func (m *model) checkSnapshots() {
	for snap, want := range m.snaps {
		sameBytes(m.t, fmt.Sprintf("step %d: %s", m.steps, snap), m.other.exported(snap), want)
		if m.r.IntN(2) == 0 {
			m.other.ok("snapshot", "delete", snap)
		}
	}
	clear(m.snaps)
}

// remount ends the mount and mounts again.
func (m *model) remount(end func(*mount)) {
	end(m.mount)
	m.mount = m.mount.again(m.vol, m.hydration()...)
	m.open()
}

// killWhileWriting kills the daemon while writes are under way. Those that
// were acknowledged stay; of the one that failed each sector is old or new.
func (m *model) killWhileWriting() {
	delay := time.Duration(m.r.IntN(20)) * time.Millisecond
	m.killed.Store(false)
	done := make(chan struct{})
	go func() {
		defer close(done)
		time.Sleep(delay)
		m.killed.Store(true)
		m.mount.kill()
	}()
	for {
		f, direct := m.file()
		off, n := m.span(direct, mib)
		p := m.random(n)
		if _, err := f.WriteAt(p, int64(off)); err != nil {
			if !m.killed.Load() {
				m.t.Fatalf("step %d: write: %v", m.steps, err)
			}
			m.remount(func(*mount) { <-done })
			m.adopt(off, p)
			m.checkAll()
			return
		}
		copy(m.bytes[off:], p)
	}
}

// adopt takes over what became of a write of p that failed.
func (m *model) adopt(off int, p []byte) {
	const sector = 512
	start, end := off&^(sector-1), min((off+len(p)+sector-1)&^(sector-1), len(m.bytes))
	got := make([]byte, end-start)
	if _, err := m.buffered.ReadAt(got, int64(start)); err != nil && err != io.EOF {
		m.t.Fatalf("step %d: read: %v", m.steps, err)
	}
	written := bytes.Clone(m.bytes[start:end])
	copy(written[off-start:], p)
	for at := 0; at < len(got); at += sector {
		to := min(at+sector, len(got))
		if now := got[at:to]; !bytes.Equal(now, m.bytes[start+at:start+to]) && !bytes.Equal(now, written[at:to]) {
			m.t.Fatalf("step %d: after a kill in a write of %d+%d, the sector at %d is neither old nor new:\n%x\nold\n%x\nnew\n%x",
				m.steps, off, len(p), start+at, now, m.bytes[start+at:start+to], written[at:to])
		}
	}
	copy(m.bytes[start:], got)
}

// killWhileSnapshotting kills the daemon at some moment of a snapshot, which
// is then whole or not there.
func (m *model) killWhileSnapshotting() {
	before := make(map[string]bool)
	for _, info := range m.h.list() {
		before[info.SnapshotId] = true
	}
	create := m.h.begin("snapshot", "create", m.vol)
	time.Sleep(time.Duration(m.r.IntN(60)) * time.Millisecond)
	m.remount((*mount).kill)
	m.checkAll()
	r := create.wait()
	m.h.waitSettled()
	m.checkAll()
	made := ""
	for _, info := range m.h.list() {
		if !before[info.SnapshotId] {
			made = info.SnapshotId
			m.snaps[made] = bytes.Clone(m.bytes)
		}
	}
	if printed := strings.TrimSpace(r.stdout); printed != "" && printed != made {
		m.t.Fatalf("step %d: %s\nbut the store has %q", m.steps, r, made)
	}
}

// waitSettled waits until no snapshot of the store is pending.
func (h *host) waitSettled() {
	h.t.Helper()
	waitFor(h.t, "interrupted snapshots are settled", 20*time.Second, func() bool {
		for _, info := range h.list() {
			if info.State == "pending" {
				return false
			}
		}
		return true
	})
}

// finish checks everything one last time.
func (m *model) finish() {
	m.checkAll()
	m.snapshot()
	m.checkSnapshots()
	m.remount((*mount).unmount)
	m.checkAll()
	m.t.Logf("%d steps", m.steps)
}
