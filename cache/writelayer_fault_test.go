package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
)

// A log that grows beyond its bound is replaced, again and again, and nothing of
// what was marked before and meanwhile is lost.
func TestRotationKeepsAllMarks(t *testing.T) { plainAndEncrypted(t, testRotationKeepsAllMarks) }

func testRotationKeepsAllMarks(t *testing.T, key *crypt.Key) {
	for _, reopenAs := range []string{boot, otherBoot} {
		dir := filepath.Join(t.TempDir(), "w")
		const pages = 3*regionPages + 7
		w := newWriteLayerAt(t, dir, pages*page, key)
		w.minLog, w.rotateAt = 1000, 1000
		want := make([]PageState, pages)
		p := make([]byte, page)
		for i := range int64(2000) {
			at := i * 7919 % pages
			if i%3 == 0 {
				must(t, w.Zero(at*page, page))
				want[at] = Zero
			} else {
				must(t, w.WriteAt(p, at*page))
				want[at] = Data
			}
		}
		if w.log.header.generation < 5 {
			t.Errorf("generation %d", w.log.header.generation)
		}
		must(t, w.Sync())
		must(t, w.Close())
		w, err := OpenWriteLayer(vfs.OS(), dir, pages*page, reopenAs, key)
		must(t, err)
		checkStates(t, w.pages.Load(), want)
		must(t, w.Close())
		if names, err := vfs.OS().ReadDir(dir); err != nil || len(names) != 2 {
			t.Errorf("files %v, %v", names, err)
		}
	}
}

// The nth call of the filesystem fails, or the process stops there, for every n. Then
// the layer is created, is not, or can be created again.
func TestCreationIsAllOrNothing(t *testing.T) { plainAndEncrypted(t, testCreationIsAllOrNothing) }

func testCreationIsAllOrNothing(t *testing.T, key *crypt.Key) {
	const size = 4 * page
	for _, powerCut := range []bool{false, true} {
		for _, fault := range []error{nil, syscall.EIO, syscall.ENOSPC} {
			for n := 0; ; n++ {
				c := vfs.NewCrash(uint64(n))
				must(t, c.MkdirAll("vol", 0o700))
				must(t, c.SyncDir("/"))
				if fault == nil {
					c.StopCall(n)
				} else {
					c.FailCall(n, fault)
				}
				w, err := CreateWriteLayer(c, layerDir, size, boot, key)
				if !c.Faulted() {
					must(t, err)
					must(t, w.Close())
					break
				}
				if err == nil || fault != nil && !errors.Is(err, fault) {
					t.Errorf("call %d fails with %v, creation with %v", n, fault, err)
				}
				c.ClearFault()
				if powerCut {
					c.PowerCut()
				} else {
					c.Kill()
				}
				w, err = OpenWriteLayer(c, layerDir, size, otherBoot, key)
				if errors.Is(err, fs.ErrNotExist) {
					w, err = CreateWriteLayer(c, layerDir, size, otherBoot, key)
				}
				must(t, err)
				must(t, w.WriteAt(fill('a', page), 0))
				must(t, w.Sync())
				c.PowerCut()
				w, err = OpenWriteLayer(c, layerDir, size, boot, key)
				must(t, err)
				if w.State(0) != Data || w.DirtyBytes() != page {
					t.Errorf("call %d: a synced page was lost", n)
				}
			}
		}
	}
}

func TestCreatedLayerSurvivesAPowerCut(t *testing.T) {
	plainAndEncrypted(t, testCreatedLayerSurvivesAPowerCut)
}

func testCreatedLayerSurvivesAPowerCut(t *testing.T, key *crypt.Key) {
	for seed := range uint64(100) {
		c := vfs.NewCrash(seed)
		must(t, c.MkdirAll("vol", 0o700))
		must(t, c.SyncDir("/"))
		_, err := CreateWriteLayer(c, layerDir, 4*page, boot, key)
		must(t, err)
		c.PowerCut()
		_, err = OpenWriteLayer(c, layerDir, 4*page, otherBoot, key)
		must(t, err)
	}
}

func TestInterruptedRemovalLeavesALayerOrNone(t *testing.T) {
	plainAndEncrypted(t, testInterruptedRemovalLeavesALayerOrNone)
}

func testInterruptedRemovalLeavesALayerOrNone(t *testing.T, key *crypt.Key) {
	for seed := range uint64(50) {
		for n := 0; ; n++ {
			c := vfs.NewCrash(seed)
			must(t, c.MkdirAll("vol", 0o700))
			must(t, c.SyncDir("/"))
			w, err := CreateWriteLayer(c, layerDir, 4*page, boot, key)
			must(t, err)
			must(t, w.Close())
			c.StopCall(n)
			err = RemoveWriteLayer(c, layerDir)
			stopped := c.Stopped()
			c.PowerCut()
			_, openErr := OpenWriteLayer(c, layerDir, 4*page, otherBoot, key)
			if !errors.Is(openErr, fs.ErrNotExist) && (openErr != nil || err == nil) {
				t.Fatalf("seed %d, stopped in call %d: removed %v, opened %v", seed, n, err, openErr)
			}
			if !stopped {
				must(t, err)
				break
			}
		}
	}
}

// A full disk fails writes and not syncs: they find what they need reserved.
func TestSyncNeedsNoSpace(t *testing.T) { plainAndEncrypted(t, testSyncNeedsNoSpace) }

func testSyncNeedsNoSpace(t *testing.T, key *crypt.Key) {
	full := &fullFS{FS: vfs.OS()}
	full.left.Store(2 * mib)
	w, err := CreateWriteLayer(full, filepath.Join(t.TempDir(), "w"), 4*mib, boot, key)
	must(t, err)
	p := fill('a', page)
	written := 0
	for i := range int64(4 * mib / page) {
		err := w.WriteAt(p, i*page)
		if err != nil {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
			if w.State(i) != Absent {
				t.Fatal("a failed write left a mark")
			}
			continue
		}
		written++
		if i%3 == 0 {
			must(t, w.Sync())
		}
	}
	if written == 0 || written == 4*mib/page {
		t.Errorf("%d pages written", written)
	}
	must(t, w.Sync())
	full.left.Store(mib)
	must(t, w.Zero(0, 4*mib))
	must(t, w.Sync())
	must(t, w.Close())
}

// Marks fill the log to the last slot they may take; then the sync still fits.
func TestSyncNeedsNoSpaceInAFullLog(t *testing.T) {
	plainAndEncrypted(t, testSyncNeedsNoSpaceInAFullLog)
}

func testSyncNeedsNoSpaceInAFullLog(t *testing.T, key *crypt.Key) {
	for extra := range 2 { // marks between a sync's start and its barrier
		full := &fullFS{FS: vfs.OS()}
		full.left.Store(100 << 10)
		hook := &hookFS{FS: full}
		w, err := CreateWriteLayer(hook, filepath.Join(t.TempDir(), "w"), 256*mib, boot, key)
		must(t, err)
		at := int64(0)
		for ; err == nil; at++ {
			if at == 10_000 {
				t.Fatal("the log is never full")
			}
			// The last mark that fits is made while the sync runs.
			if extra == 1 && w.log.offset(w.log.end+reserveSlots) == w.log.reserved {
				break
			}
			err = w.Zero(2*at*page, page)
		}
		hook.afterSync = func() {
			if extra == 1 {
				must(t, w.Zero(2*at*page, page))
			}
			hook.afterSync = nil
		}
		must(t, w.Sync())
		must(t, w.Sync())
		must(t, w.Close())
	}
}

// hookFS calls afterSync, if it is set, when the data of a layer has been synced.
type hookFS struct {
	vfs.FS
	afterSync func()
}

type hookFile struct {
	vfs.File
	fs *hookFS
}

func (h *hookFS) OpenFile(name string, flag int, perm fs.FileMode) (vfs.File, error) {
	f, err := h.FS.OpenFile(name, flag, perm)
	if filepath.Base(name) != dataName {
		return f, err
	}
	return hookFile{f, h}, err
}

func (f hookFile) Sync() error {
	err := f.File.Sync()
	if f.fs.afterSync != nil {
		f.fs.afterSync()
	}
	return err
}

// A page written after a sync or rotation made data durable, and before it appends its
// barrier or replaces the map, is not covered by it. But the next sync covers it.
func TestWritesDuringASyncAreLeftToTheNext(t *testing.T) {
	plainAndEncrypted(t, testWritesDuringASyncAreLeftToTheNext)
}

func testWritesDuringASyncAreLeftToTheNext(t *testing.T, key *crypt.Key) {
	for seed := range uint64(20) {
		for _, rotation := range []bool{false, true} {
			for _, next := range []bool{false, true} {
				c := vfs.NewCrash(seed)
				hook := &hookFS{FS: c}
				w, err := CreateWriteLayer(hook, "w", 4*page, boot, key)
				must(t, err)
				hook.afterSync = func() {
					hook.afterSync = nil
					must(t, w.WriteAt(fill('b', page), page))
				}
				if rotation {
					w.rotateAt = 0
				}
				must(t, w.WriteAt(fill('a', page), 0))
				if !rotation || next {
					must(t, w.Sync())
				}
				if next && !rotation {
					must(t, w.Sync())
				}
				if rotation && w.log.header.generation == 1 {
					t.Fatal("no rotation")
				}
				c.PowerCut()
				w, err = OpenWriteLayer(c, "w", 4*page, otherBoot, key)
				must(t, err)
				for at, b := range []byte{'a', 'b'} {
					if w.State(int64(at)) == Absent && (at == 1 || rotation) && !next {
						continue
					}
					p := make([]byte, page)
					must(t, w.ReadAt(p, int64(at)*page))
					if w.State(int64(at)) != Data || !bytes.Equal(p, fill(b, page)) {
						t.Errorf("seed %d, rotation %v, next %v: page %d is %v, with %d", seed, rotation, next, at, w.State(int64(at)), p[0])
					}
				}
			}
		}
	}
}

// The nth call of a rotation fails, for every n. The writes go on, and a sync that
// succeeds afterwards has told the truth.
func TestRotationMayFailAnywhere(t *testing.T) { plainAndEncrypted(t, testRotationMayFailAnywhere) }

func testRotationMayFailAnywhere(t *testing.T, key *crypt.Key) {
	for seed := range uint64(16) {
		for n := 0; ; n++ {
			c := vfs.NewCrash(seed)
			w, err := CreateWriteLayer(c, "w", 4*page, boot, key)
			must(t, err)
			must(t, w.WriteAt(fill('a', page), 0))
			w.rotateAt = 0
			c.FailCall(n, syscall.EIO)
			wrote := w.WriteAt(fill('b', page), page)
			c.ClearFault()
			synced := w.Sync()
			if wrote != nil && n > 2 {
				t.Errorf("call %d: a write failed with its rotation: %v", n, wrote)
			}
			c.PowerCut()
			w, err = OpenWriteLayer(c, "w", 4*page, otherBoot, key)
			must(t, err)
			if synced == nil && (w.State(0) != Data || wrote == nil && w.State(1) != Data) {
				t.Fatalf("seed %d, call %d: a synced page was lost", seed, n)
			}
			if !c.Faulted() {
				must(t, synced)
				break
			}
		}
	}
}

// fullFS has room for so many bytes more, counted where files grow into holes.
type fullFS struct {
	vfs.FS
	left atomic.Int64
}

type fullFile struct {
	vfs.File
	fs *fullFS
}

func (f *fullFS) OpenFile(name string, flag int, perm fs.FileMode) (vfs.File, error) {
	file, err := f.FS.OpenFile(name, flag, perm)
	return fullFile{file, f}, err
}

func (f fullFile) WriteAt(p []byte, off int64) (int, error) {
	hole, err := f.SeekHole(off)
	if (err != nil || hole < off+int64(len(p))) && f.fs.left.Add(-int64(len(p))) < 0 {
		return 0, fmt.Errorf("write: %w", syscall.ENOSPC)
	}
	return f.File.WriteAt(p, off)
}

func TestFailedSyncFailsAllLaterOnes(t *testing.T) {
	plainAndEncrypted(t, testFailedSyncFailsAllLaterOnes)
}

func testFailedSyncFailsAllLaterOnes(t *testing.T, key *crypt.Key) {
	for n := 0; ; n++ {
		c := vfs.NewCrash(uint64(n))
		w, err := CreateWriteLayer(c, "w", 8*page, boot, key)
		must(t, err)
		must(t, w.WriteAt(fill('a', page), 0))
		c.FailCall(n, syscall.EIO)
		err = w.Sync()
		if !c.Faulted() {
			must(t, err)
			break
		}
		if !errors.Is(err, syscall.EIO) {
			t.Fatalf("call %d: %v", n, err)
		}
		// Appending the barrier is call 1: nothing is lost when only that fails.
		if err := w.Sync(); errors.Is(err, syscall.EIO) != (n != 1) {
			t.Errorf("sync after call %d failed: %v", n, err)
		}
		c.Kill()
		w, err = OpenWriteLayer(c, "w", 8*page, boot, key)
		must(t, err)
		// Call 0 makes data durable. From then on it is.
		if got := w.State(0); (got == Data) != (n > 0) {
			t.Errorf("call %d: after a failed sync and a kill the page is %v", n, got)
		}
		must(t, w.Sync())
	}
}

// Writers, each with pages of its own, and syncs all run at once, with frequent
// rotations, until the process stops somewhere. Each writer knows what must be there
// after a power cut.
func TestConcurrentWritersSurvivePowerCuts(t *testing.T) {
	plainAndEncrypted(t, testConcurrentWritersSurvivePowerCuts)
}

func testConcurrentWritersSurvivePowerCuts(t *testing.T, key *crypt.Key) {
	const (
		writers        = 4
		pagesPerWriter = 6
		pages          = writers * pagesPerWriter
	)
	for seed := range uint64(60) {
		c := vfs.NewCrash(seed)
		w, err := CreateWriteLayer(c, "w", pages*page, boot, key)
		must(t, err)
		w.minLog, w.rotateAt = 300, 300
		c.StopCall(int(50 + seed*7))
		var wrote, durable [pages]uint64 // versions: the last attempt, what a Sync covered
		var wg sync.WaitGroup
		for i := range writers {
			wg.Go(func() {
				mine := int64(i * pagesPerWriter)
				for version := uint64(1); ; version++ {
					at := mine + int64(version*version)%pagesPerWriter
					wrote[at] = version
					var err error
					if version%5 == 0 {
						err = w.Zero(at*page, page)
					} else {
						err = w.WriteAt(bytes.Repeat(binary.LittleEndian.AppendUint64(nil, version), page/8), at*page)
					}
					if err == nil && version%4 == 0 {
						if err = w.Sync(); err == nil {
							copy(durable[mine:mine+pagesPerWriter], wrote[mine:mine+pagesPerWriter])
						}
					}
					if err != nil {
						if !errors.Is(err, vfs.ErrStopped) {
							t.Error(err)
						}
						return
					}
				}
			})
		}
		wg.Wait()
		c.PowerCut()
		w, err = OpenWriteLayer(c, "w", pages*page, otherBoot, key)
		must(t, err)
		for at := range int64(pages) {
			for off := int64(0); off < page; off += sectorSize {
				checkVersion(t, w, at*page+off, durable[at], wrote[at])
			}
		}
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// checkVersion expects a sector to have a version from durable to wrote, of which
// multiples of 5 are zeros and 0 is absent.
func checkVersion(t *testing.T, w *WriteLayer, off int64, durable, wrote uint64) {
	t.Helper()
	var version uint64
	state := w.State(off / page)
	if state == Data {
		p := make([]byte, sectorSize)
		must(t, w.ReadAt(p, off))
		version = binary.LittleEndian.Uint64(p)
		if !bytes.Equal(p, bytes.Repeat(p[:8], sectorSize/8)) {
			t.Errorf("sector at %d is mixed", off)
		}
	}
	if version != 0 {
		if version < durable || version > wrote || version%5 == 0 {
			t.Errorf("sector at %d has version %d, expected %d to %d", off, version, durable, wrote)
		}
		return
	}
	// Zeros: a multiple of 5 in the range. Absent: nothing was durable.
	if zero := durable > 0 && wrote/5 >= (durable+4)/5 || durable == 0 && wrote >= 5; state != Absent && !zero {
		t.Errorf("sector at %d is zeros, expected versions %d to %d", off, durable, wrote)
	}
	if state == Absent && durable > 0 {
		t.Errorf("sector at %d is absent, expected versions %d to %d", off, durable, wrote)
	}
}
