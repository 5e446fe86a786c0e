package cache

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/crypt"
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
func newWriteLayerAt(t testing.TB, dir string, size int64, key *crypt.Key) *WriteLayer {
	t.Helper()
	w, err := CreateWriteLayer(vfs.OS(), dir, size, boot, key)
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
	plainAndEncrypted(t, testWriteLayerShowsWhatWasWritten)
}

func testWriteLayerShowsWhatWasWritten(t *testing.T, key *crypt.Key) {
	size := int64(10*page + 512)
	w := newWriteLayerAt(t, filepath.Join(t.TempDir(), "w"), size, key)
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
	plainAndEncrypted(t, testWriteLayerRefusesWhatItCannotKeep)
}

func testWriteLayerRefusesWhatItCannotKeep(t *testing.T, key *crypt.Key) {
	size := int64(4*page + 512)
	w := newWriteLayerAt(t, filepath.Join(t.TempDir(), "w"), size, key)
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
		"no boot id":      func() (*WriteLayer, error) { return CreateWriteLayer(vfs.OS(), dir, page, "", key) },
		"long boot id":    func() (*WriteLayer, error) { return CreateWriteLayer(vfs.OS(), dir, page, string(fill('b', 65)), key) },
		"too large":       func() (*WriteLayer, error) { return CreateWriteLayer(vfs.OS(), dir, MaxWriteLayerSize+1, boot, key) },
		"negative":        func() (*WriteLayer, error) { return CreateWriteLayer(vfs.OS(), dir, -1, boot, key) },
		"open no boot id": func() (*WriteLayer, error) { return OpenWriteLayer(vfs.OS(), dir, page, "", key) },
	} {
		if _, err := create(); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

func TestEmptyDeviceHasAnEmptyLayer(t *testing.T) {
	plainAndEncrypted(t, testEmptyDeviceHasAnEmptyLayer)
}

func testEmptyDeviceHasAnEmptyLayer(t *testing.T, key *crypt.Key) {
	dir := filepath.Join(t.TempDir(), "w")
	w := newWriteLayerAt(t, dir, 0, key)
	must(t, w.Sync())
	if _, ok := w.NextBlock(0, page); ok || w.DirtyBytes() != 0 {
		t.Error("something is dirty")
	}
	must(t, w.Close())
	w, err := OpenWriteLayer(vfs.OS(), dir, 0, otherBoot, key)
	must(t, err)
	must(t, w.Close())
}

func TestLayerOfAnotherSizeOrDamagedIsRefused(t *testing.T) {
	plainAndEncrypted(t, testLayerOfAnotherSizeOrDamagedIsRefused)
}

func testLayerOfAnotherSizeOrDamagedIsRefused(t *testing.T, key *crypt.Key) {
	dir := filepath.Join(t.TempDir(), "w")
	must(t, newWriteLayerAt(t, dir, 8*page, key).Close())
	if _, err := CreateWriteLayer(vfs.OS(), dir, 8*page, boot, key); !errors.Is(err, fs.ErrExist) {
		t.Errorf("created twice: %v", err)
	}
	if _, err := OpenWriteLayer(vfs.OS(), dir, 9*page, boot, key); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("other size: %v", err)
	}
	must(t, os.Truncate(filepath.Join(dir, "data"), 7*page))
	if _, err := OpenWriteLayer(vfs.OS(), dir, 8*page, boot, key); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("data cut off: %v", err)
	}
	must(t, os.Remove(filepath.Join(dir, "data")))
	if _, err := OpenWriteLayer(vfs.OS(), dir, 8*page, boot, key); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("no data: %v", err)
	}
	// A damaged map must not make an older one count.
	dir = filepath.Join(t.TempDir(), "w")
	must(t, newWriteLayerAt(t, dir, 8*page, key).Close())
	must(t, os.WriteFile(filepath.Join(dir, mapName(2)), fill(0, 5000), 0o600))
	if _, err := OpenWriteLayer(vfs.OS(), dir, 8*page, boot, key); !errors.Is(err, manifest.ErrCorrupt) {
		t.Errorf("damaged map: %v", err)
	}
	must(t, RemoveWriteLayer(vfs.OS(), dir))
	must(t, RemoveWriteLayer(vfs.OS(), dir))
	if _, err := OpenWriteLayer(vfs.OS(), dir, 8*page, boot, key); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("removed: %v", err)
	}
}

func TestDataBeyondAFilesystemsLimitIsRefusedByName(t *testing.T) {
	plainAndEncrypted(t, testDataBeyondAFilesystemsLimitIsRefusedByName)
}

func testDataBeyondAFilesystemsLimitIsRefusedByName(t *testing.T, key *crypt.Key) {
	w, err := CreateWriteLayer(limitedFS{vfs.OS()}, filepath.Join(t.TempDir(), "w"), 1<<40, boot, key)
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
	plainAndEncrypted(t, testWriteOfDataPagesNeedsNoMark)
}

func testWriteOfDataPagesNeedsNoMark(t *testing.T, key *crypt.Key) {
	w := newWriteLayerAt(t, filepath.Join(t.TempDir(), "w"), mib, key)
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

func TestZeroFreesSpace(t *testing.T) { plainAndEncrypted(t, testZeroFreesSpace) }

func testZeroFreesSpace(t *testing.T, key *crypt.Key) {
	dir := filepath.Join(t.TempDir(), "w")
	w := newWriteLayerAt(t, dir, 8*mib, key)
	must(t, w.WriteAt(fill('a', 8*mib), 0))
	must(t, w.Sync())
	must(t, w.Zero(0, 8*mib))
	if at, err := w.data.SeekData(0); err == nil {
		t.Errorf("data left at %d", at)
	}
}

func TestDiscardOfAWholeHugeDeviceIsQuick(t *testing.T) {
	plainAndEncrypted(t, testDiscardOfAWholeHugeDeviceIsQuick)
}

func testDiscardOfAWholeHugeDeviceIsQuick(t *testing.T, key *crypt.Key) {
	// Just below 16 TiB, where ext4 stops.
	size := int64(16<<40 - 1<<20)
	dir := filepath.Join(t.TempDir(), "w")
	w := newWriteLayerAt(t, dir, size, key)
	must(t, w.WriteAt(fill('a', 3*page), size/2/page*page))
	start := time.Now()
	must(t, w.Zero(0, size))
	// It takes a millisecond. Anything done for each of the four billion pages would
	// take many seconds.
	if took := time.Since(start); took > time.Second {
		t.Errorf("took %v", took)
	}
	if w.DirtyBytes() != size {
		t.Errorf("%d of %d bytes", w.DirtyBytes(), size)
	}
	must(t, w.Sync())
	must(t, w.Close())
	w, err := OpenWriteLayer(vfs.OS(), dir, size, otherBoot, key)
	must(t, err)
	if s, n := w.Run(0, size); s != Zero || n != size/page {
		t.Errorf("%v × %d after reopening", s, n)
	}
	must(t, w.Close())
}

func TestReadersNeedNoLock(t *testing.T) { plainAndEncrypted(t, testReadersNeedNoLock) }

func testReadersNeedNoLock(t *testing.T, key *crypt.Key) {
	w := newWriteLayerAt(t, filepath.Join(t.TempDir(), "w"), 2*regionPages*page, key)
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

func TestLookupAllocatesNothing(t *testing.T) { plainAndEncrypted(t, testLookupAllocatesNothing) }

func testLookupAllocatesNothing(t *testing.T, key *crypt.Key) {
	w := newWriteLayerAt(t, filepath.Join(t.TempDir(), "w"), mib, key)
	pooled := racing && key != nil // what is encrypted goes through buffers of a pool
	p := fill('a', page)
	must(t, w.WriteAt(p, 0))
	if n := testing.AllocsPerRun(100, func() {
		w.State(0)
		w.Run(0, 100)
		must(t, w.ReadAt(p, 0))
		must(t, w.WriteAt(p, 0))
	}); n != 0 && !pooled {
		t.Errorf("%v allocations", n)
	}
	at := int64(0)
	if n := testing.AllocsPerRun(100, func() {
		at++
		must(t, w.WriteAt(p, at*page))
	}); n != 0 && !pooled {
		t.Errorf("%v allocations in a write that marks", n)
	}
}
