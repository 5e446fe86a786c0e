package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

const (
	boot      = "11111111-2222-3333-4444-555555555555"
	otherBoot = "99999999-2222-3333-4444-555555555555"
	page      = manifest.PageSize
	mib       = 1 << 20
)

// newWriteLayerAt creates a layer on the real filesystem.
func newWriteLayerAt(t testing.TB, dir string, size int64) *WriteLayer {
	t.Helper()
	w, err := CreateWriteLayer(vfs.OS(), dir, size, boot)
	must(t, err)
	t.Cleanup(func() {
		if err := w.Close(); err != nil && !errors.Is(err, fs.ErrClosed) {
			t.Error(err)
		}
	})
	return w
}

func fill(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

func TestWriteLayerShowsWhatWasWritten(t *testing.T) {
	size := int64(10*page + 512)
	w := newWriteLayerAt(t, filepath.Join(t.TempDir(), "w"), size)
	must(t, w.WriteAt(fill('a', 2*page), 1*page))
	must(t, w.WriteAt(fill('b', 100), 2*page-50))
	must(t, w.WriteAt(fill('c', 512), 10*page))
	must(t, w.Zero(7*page, size-7*page))
	must(t, w.WriteAt(fill('d', 512), 10*page))
	must(t, w.WriteAt(nil, 5))
	must(t, w.Zero(0, 0))

	want := []PageState{Absent, Data, Data, Absent, Absent, Absent, Absent, Zero, Zero, Zero, Data}
	for i, s := range want {
		if got := w.State(int64(i)); got != s {
			t.Errorf("page %d is %v, want %v", i, got, s)
		}
	}
	if got, want := w.DirtyBytes(), int64(5*page+512); got != want {
		t.Errorf("DirtyBytes = %d, want %d", got, want)
	}
	if s, n := w.Run(3, 3); s != Absent || n != 3 {
		t.Errorf("Run = %v, %d", s, n)
	}
	p := make([]byte, 200)
	must(t, w.ReadAt(p, 2*page-100))
	if want := slices.Concat(fill('a', 50), fill('b', 100), fill('a', 50)); !bytes.Equal(p, want) {
		t.Errorf("read %q", p)
	}
	for block, want := range map[int64]int64{0: 0, 1: 1, 2: 3, 3: 3, 5: 5} {
		if got, ok := w.NextBlock(block, 2*page); !ok || got != want {
			t.Errorf("NextBlock(%d) = %d, %v; want %d", block, got, ok, want)
		}
	}
	if got, ok := w.NextBlock(6, 2*page); ok {
		t.Errorf("NextBlock past the device = %d", got)
	}
}

func TestWriteLayerRefusesWhatItCannotKeep(t *testing.T) {
	size := int64(4*page + 512)
	w := newWriteLayerAt(t, filepath.Join(t.TempDir(), "w"), size)
	must(t, w.WriteAt(fill('a', page), page))
	for name, err := range map[string]error{
		"part of an absent page":     w.WriteAt(fill('b', 100), 0),
		"reaching into one":          w.WriteAt(fill('b', 100), 2*page-50),
		"part of the short page":     w.WriteAt(fill('b', 100), 4*page),
		"past the end":               w.WriteAt(fill('b', page), 4*page),
		"before the start":           w.WriteAt(fill('b', page), -page),
		"zero past the end":          w.Zero(4*page, page),
		"zero of part of a page":     w.Zero(0, 100),
		"zero from within a page":    w.Zero(100, page-100),
		"zero of a negative length":  w.Zero(page, -page),
		"read past the end":          w.ReadAt(make([]byte, 513), 4*page),
		"read from before the start": w.ReadAt(make([]byte, 1), -1),
	} {
		if err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	if w.DirtyBytes() != page {
		t.Errorf("%d bytes dirty", w.DirtyBytes())
	}
	must(t, w.Zero(4*page, 512))

	dir := t.TempDir()
	for name, create := range map[string]func() (*WriteLayer, error){
		"no boot id":      func() (*WriteLayer, error) { return CreateWriteLayer(vfs.OS(), dir, page, "") },
		"long boot id":    func() (*WriteLayer, error) { return CreateWriteLayer(vfs.OS(), dir, page, string(fill('b', 65))) },
		"too large":       func() (*WriteLayer, error) { return CreateWriteLayer(vfs.OS(), dir, MaxWriteLayerSize+1, boot) },
		"negative":        func() (*WriteLayer, error) { return CreateWriteLayer(vfs.OS(), dir, -1, boot) },
		"open no boot id": func() (*WriteLayer, error) { return OpenWriteLayer(vfs.OS(), dir, page, "") },
	} {
		if _, err := create(); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

func TestEmptyDeviceHasAnEmptyLayer(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "w")
	w := newWriteLayerAt(t, dir, 0)
	must(t, w.Sync())
	if _, ok := w.NextBlock(0, page); ok || w.DirtyBytes() != 0 {
		t.Error("something is dirty")
	}
	must(t, w.Close())
	w, err := OpenWriteLayer(vfs.OS(), dir, 0, otherBoot)
	must(t, err)
	must(t, w.Close())
}

func TestLayerOfAnotherSizeOrDamagedIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "w")
	must(t, newWriteLayerAt(t, dir, 8*page).Close())
	if _, err := CreateWriteLayer(vfs.OS(), dir, 8*page, boot); !errors.Is(err, fs.ErrExist) {
		t.Errorf("created twice: %v", err)
	}
	if _, err := OpenWriteLayer(vfs.OS(), dir, 9*page, boot); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("other size: %v", err)
	}
	must(t, os.Truncate(filepath.Join(dir, "data"), 7*page))
	if _, err := OpenWriteLayer(vfs.OS(), dir, 8*page, boot); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("data cut off: %v", err)
	}
	must(t, os.Remove(filepath.Join(dir, "data")))
	if _, err := OpenWriteLayer(vfs.OS(), dir, 8*page, boot); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("no data: %v", err)
	}
	// A damaged map must not make an older one count.
	dir = filepath.Join(t.TempDir(), "w")
	must(t, newWriteLayerAt(t, dir, 8*page).Close())
	must(t, os.WriteFile(filepath.Join(dir, mapName(2)), fill(0, 5000), 0o600))
	if _, err := OpenWriteLayer(vfs.OS(), dir, 8*page, boot); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("damaged map: %v", err)
	}
	must(t, RemoveWriteLayer(vfs.OS(), dir))
	must(t, RemoveWriteLayer(vfs.OS(), dir))
	if _, err := OpenWriteLayer(vfs.OS(), dir, 8*page, boot); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed: %v", err)
	}
}

func TestDataBeyondAFilesystemsLimitIsRefusedByName(t *testing.T) {
	w, err := CreateWriteLayer(limitedFS{vfs.OS()}, filepath.Join(t.TempDir(), "w"), 1<<40, boot)
	if !errors.Is(err, syscall.EFBIG) {
		t.Errorf("%v, %v", w, err)
	}
}

// limitedFS has no room for large files.
type limitedFS struct{ vfs.FS }

type limitedFile struct{ vfs.File }

func (l limitedFS) OpenFile(name string, flag int, perm fs.FileMode) (vfs.File, error) {
	f, err := l.FS.OpenFile(name, flag, perm)
	return limitedFile{f}, err
}

func (limitedFile) Truncate(int64) error { return syscall.EFBIG }

func TestWriteOfDataPagesNeedsNoMark(t *testing.T) {
	w := newWriteLayerAt(t, filepath.Join(t.TempDir(), "w"), mib)
	must(t, w.WriteAt(fill('a', 8*page), 0))
	must(t, w.Sync())
	end := w.log.end
	must(t, w.WriteAt(fill('b', 3*page), page))
	must(t, w.WriteAt(fill('b', 3), 7))
	must(t, w.Sync())
	if w.log.end != end {
		t.Errorf("%d records more", w.log.end-end)
	}
	must(t, w.Zero(0, page))
	must(t, w.Zero(0, page))
	if w.log.end != end+1 {
		t.Errorf("%d records for one discard", w.log.end-end)
	}
}

func TestZeroFreesSpace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "w")
	w := newWriteLayerAt(t, dir, 8*mib)
	must(t, w.WriteAt(fill('a', 8*mib), 0))
	must(t, w.Sync())
	must(t, w.Zero(0, 8*mib))
	if at, err := w.data.SeekData(0); err == nil {
		t.Errorf("data left at %d", at)
	}
}

// A log that grows beyond its bound is replaced, again and again, and nothing of
// what was marked before and meanwhile is lost.
func TestRotationKeepsAllMarks(t *testing.T) {
	for _, reopenAs := range []string{boot, otherBoot} {
		dir := filepath.Join(t.TempDir(), "w")
		const pages = 3*regionPages + 7
		w := newWriteLayerAt(t, dir, pages*page)
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
		w, err := OpenWriteLayer(vfs.OS(), dir, pages*page, reopenAs)
		must(t, err)
		checkStates(t, w.pages, want)
		must(t, w.Close())
		if names, err := vfs.OS().ReadDir(dir); err != nil || len(names) != 2 {
			t.Errorf("files %v, %v", names, err)
		}
	}
}

func TestDiscardOfAWholeHugeDeviceIsQuick(t *testing.T) {
	// Just below 16 TiB, where ext4 stops.
	size := int64(16<<40 - 1<<20)
	dir := filepath.Join(t.TempDir(), "w")
	w := newWriteLayerAt(t, dir, size)
	must(t, w.WriteAt(fill('a', 3*page), size/2/page*page))
	start := time.Now()
	must(t, w.Zero(0, size))
	// It takes milliseconds, on a busy machine with the race detector up to a second.
	// Anything done for each of the four billion pages takes minutes.
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
	if w.DirtyBytes() != size {
		t.Errorf("%d of %d bytes", w.DirtyBytes(), size)
	}
	must(t, w.Sync())
	must(t, w.Close())
	w, err := OpenWriteLayer(vfs.OS(), dir, size, otherBoot)
	must(t, err)
	if s, n := w.Run(0, size); s != Zero || n != size/page {
		t.Errorf("%v × %d after reopening", s, n)
	}
	must(t, w.Close())
}

// The nth call of the filesystem fails, or the process stops there, for every n. Then
// the layer is created, is not, or can be created again.
func TestCreationIsAllOrNothing(t *testing.T) {
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
				w, err := CreateWriteLayer(c, layerDir, size, boot)
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
				w, err = OpenWriteLayer(c, layerDir, size, otherBoot)
				if errors.Is(err, fs.ErrNotExist) {
					w, err = CreateWriteLayer(c, layerDir, size, otherBoot)
				}
				must(t, err)
				must(t, w.WriteAt(fill('a', page), 0))
				must(t, w.Sync())
				c.PowerCut()
				w, err = OpenWriteLayer(c, layerDir, size, boot)
				must(t, err)
				if w.State(0) != Data || w.DirtyBytes() != page {
					t.Errorf("call %d: a synced page was lost", n)
				}
			}
		}
	}
}

func TestCreatedLayerSurvivesAPowerCut(t *testing.T) {
	for seed := range uint64(100) {
		c := vfs.NewCrash(seed)
		must(t, c.MkdirAll("vol", 0o700))
		must(t, c.SyncDir("/"))
		_, err := CreateWriteLayer(c, layerDir, 4*page, boot)
		must(t, err)
		c.PowerCut()
		_, err = OpenWriteLayer(c, layerDir, 4*page, otherBoot)
		must(t, err)
	}
}

func TestInterruptedRemovalLeavesALayerOrNone(t *testing.T) {
	for seed := range uint64(50) {
		for n := 0; ; n++ {
			c := vfs.NewCrash(seed)
			must(t, c.MkdirAll("vol", 0o700))
			must(t, c.SyncDir("/"))
			w, err := CreateWriteLayer(c, layerDir, 4*page, boot)
			must(t, err)
			must(t, w.Close())
			c.StopCall(n)
			err = RemoveWriteLayer(c, layerDir)
			stopped := c.Stopped()
			c.PowerCut()
			_, openErr := OpenWriteLayer(c, layerDir, 4*page, otherBoot)
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
func TestSyncNeedsNoSpace(t *testing.T) {
	full := &fullFS{FS: vfs.OS()}
	full.left.Store(2 * mib)
	w, err := CreateWriteLayer(full, filepath.Join(t.TempDir(), "w"), 4*mib, boot)
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
	for extra := range 2 { // marks between a sync's start and its barrier
		full := &fullFS{FS: vfs.OS()}
		full.left.Store(100 << 10)
		hook := &hookFS{FS: full}
		w, err := CreateWriteLayer(hook, filepath.Join(t.TempDir(), "w"), 256*mib, boot)
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
	for seed := range uint64(20) {
		for _, rotation := range []bool{false, true} {
			for _, next := range []bool{false, true} {
				c := vfs.NewCrash(seed)
				hook := &hookFS{FS: c}
				w, err := CreateWriteLayer(hook, "w", 4*page, boot)
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
				w, err = OpenWriteLayer(c, "w", 4*page, otherBoot)
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
func TestRotationMayFailAnywhere(t *testing.T) {
	for seed := range uint64(16) {
		for n := 0; ; n++ {
			c := vfs.NewCrash(seed)
			w, err := CreateWriteLayer(c, "w", 4*page, boot)
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
			w, err = OpenWriteLayer(c, "w", 4*page, otherBoot)
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
	for n := 0; ; n++ {
		c := vfs.NewCrash(uint64(n))
		w, err := CreateWriteLayer(c, "w", 8*page, boot)
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
		w, err = OpenWriteLayer(c, "w", 8*page, boot)
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
	const (
		writers        = 4
		pagesPerWriter = 6
		pages          = writers * pagesPerWriter
	)
	for seed := range uint64(60) {
		c := vfs.NewCrash(seed)
		w, err := CreateWriteLayer(c, "w", pages*page, boot)
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
		w, err = OpenWriteLayer(c, "w", pages*page, otherBoot)
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

func TestReadersNeedNoLock(t *testing.T) {
	w := newWriteLayerAt(t, filepath.Join(t.TempDir(), "w"), 2*regionPages*page)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			p := make([]byte, page)
			for {
				select {
				case <-stop:
					return
				default:
				}
				for at := range int64(2 * regionPages) {
					if w.State(at) == Data {
						must(t, w.ReadAt(p, at*page))
						if p[0] != 'a' && p[0] != 0 {
							t.Errorf("page %d begins with %d", at, p[0])
						}
					}
					if _, n := w.Run(at, 100); n < 1 || n > 100 {
						t.Errorf("run of %d", n)
					}
				}
				w.NextBlock(0, 64<<10)
				w.DirtyBytes()
			}
		})
	}
	p := fill('a', page)
	for i := range int64(4 * regionPages) {
		at := i * 31 % (2 * regionPages)
		if i%5 == 0 {
			must(t, w.Zero(at*page, page))
		} else {
			must(t, w.WriteAt(p, at*page))
		}
	}
	must(t, w.Zero(0, 2*regionPages*page))
	close(stop)
	wg.Wait()
}

func TestLookupAllocatesNothing(t *testing.T) {
	w := newWriteLayerAt(t, filepath.Join(t.TempDir(), "w"), mib)
	p := fill('a', page)
	must(t, w.WriteAt(p, 0))
	if n := testing.AllocsPerRun(100, func() {
		w.State(0)
		w.Run(0, 100)
		must(t, w.ReadAt(p, 0))
		must(t, w.WriteAt(p, 0))
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	at := int64(0)
	if n := testing.AllocsPerRun(100, func() {
		at++
		must(t, w.WriteAt(p, at*page))
	}); n != 0 {
		t.Errorf("%v allocations in a write that marks", n)
	}
}
