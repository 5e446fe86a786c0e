package cache

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// MaxWriteLayerSize is the largest device a write layer can hold, in bytes. It
// bounds the memory for the map: 1 KiB for each 16 MiB of mixed pages.
const MaxWriteLayerSize = 64 << 40

// A WriteLayer holds what was written to a device since the last cut.
//
// Its folder has the file data, as large as the device, and a map file (its bytes:
// mapfile.go, marklog.go). In an encrypted layer data has [crypt.Sectors]; the map is
// in clear. A write puts the bytes into data, then a mark into the
// map's log, then changes the state in memory, and then returns. So a killed
// process loses nothing: the kernel has both. Pages that are data already are
// overwritten in place and need no new mark.
//
// # After a power cut
//
// Any sector written since the last finished [WriteLayer.Sync] may have its old or
// its new content, as on a disk, but never a third one:
//
//   - Sync notes the end P of the log, makes data durable, appends a barrier that
//     covers the marks below P, and makes the map durable. Each mark was appended
//     after its bytes were written, so what a readable barrier covers has durable
//     bytes; and when Sync has returned, its barrier and all before it are readable.
//   - [OpenWriteLayer] believes only covered marks if the host was started anew. So
//     a page that was absent before a write that was not synced is absent again and
//     shows what lies below, whatever the disk kept of its bytes; likewise a page
//     that was zero shows zeros.
//   - A page whose data state is covered and which was overwritten since has each
//     sector as the disk kept it.
//   - [WriteLayer.Zero] marks first and then frees the space. If the disk kept the
//     hole but the mark is not believed, sectors of a page that was data read as
//     zeros: its new content. If it is believed, the space does not matter.
//   - A page covered as zero never shows bytes: it becomes data again only by a
//     covered mark, hence with durable bytes, of the whole page.
//   - A checkpoint has only marks that were logged before data was made durable for
//     it, and replaces the older map only when it is durable itself.
//
// # Failures
//
// A failed write or discard leaves the state of its pages as it was; pages that
// were data may have any part of the new bytes. A full disk fails only writes:
// syncs find their space reserved. When the disk fails to make data or map durable,
// the kernel may have dropped what it could not write, so this and every later Sync
// of the open layer fails with that error. When it is opened again, also under the
// same boot id, only covered marks are believed, as after a power cut; but pages that
// were overwritten in place may look written from memory while the disk has the old
// bytes, which no program can tell.
//
// # Concurrency
//
// State, Run, NextBlock, DirtyBytes and ReadAt may be called at any time and take
// no lock. WriteAt of whole pages may run in parallel to itself, also on the same
// pages. WriteAt of parts of pages, and Zero, exclude each other and other WriteAts
// of the same pages; the caller sees to that. Sync may be called at any time.
// Close excludes everything.
type WriteLayer struct {
	fs     vfs.FS
	dir    string
	bootID string
	key    *crypt.Key // nil: not encrypted
	salt   []byte     // of the sectors' key; nil: not encrypted
	minLog int64      // minLogLen, less in tests
	data   vfs.File
	pages  atomic.Pointer[pageMap] // of the device's size; replaced when that grows

	// failed is the first error that lost durability.
	failed atomic.Pointer[error]

	// begun counts the sync passes that began.
	begun atomic.Uint64

	// syncMu makes sync passes and rotations one at a time. It is taken before
	// markMu and guards:
	syncMu   sync.Mutex
	synced   uint64 // the last pass that succeeded
	finished uint64 // slots of the log that a finished barrier covers

	// markMu keeps the order of the log and that of the changes in pages the same.
	// It guards the log and all writes to pages. The pointer log changes only
	// under both locks.
	markMu   sync.Mutex
	log      *markLog
	rotateAt int64 // length of the log at which it is rotated
}

// State returns the state of a page of the device.
func (w *WriteLayer) State(page int64) PageState { return w.pages.Load().state(page) }

// Run returns the state of a page and the number of pages, at least 1 and at most
// limit ≥ 1, from it on that have the same state. While writes go on, each of them
// had it at some moment during the call.
func (w *WriteLayer) Run(page, limit int64) (PageState, int64) {
	return w.pages.Load().run(page, limit)
}

// NextBlock returns the first block ≥ block with a page that is not absent, blocks
// being of blockSize bytes, a multiple of the page size; false: there is none. It
// costs no more than a few nanoseconds for each absent 16 MiB.
func (w *WriteLayer) NextBlock(block int64, blockSize int) (int64, bool) {
	perBlock := int64(blockSize / manifest.PageSize)
	page, ok := w.pages.Load().next(block * perBlock)
	if !ok {
		return 0, false
	}
	return page / perBlock, true
}

// DirtyBytes returns how many bytes of the device are data or zero.
func (w *WriteLayer) DirtyBytes() int64 { return w.pages.Load().dirty.Load() }

// ReadAt fills p with bytes at any offset. It is meant for ranges in which all
// pages are data: of others it returns what happens to lie in the file.
func (w *WriteLayer) ReadAt(p []byte, off int64) error {
	if err := w.checkRange(off, int64(len(p))); err != nil {
		return err
	}
	if _, err := w.data.ReadAt(p, off); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("write layer: read %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}

// WriteAt writes p, after which its pages are data. The range must consist of whole
// pages, the device's last one possibly short, or lie in pages that are all data.
// On return a killed process no longer matters; for power cuts, see Sync.
func (w *WriteLayer) WriteAt(p []byte, off int64) error {
	if err := w.checkRange(off, int64(len(p))); err != nil || len(p) == 0 {
		return err
	}
	first, n := w.pageRange(off, int64(len(p)))
	state, run := w.pages.Load().run(first, n)
	marked := state == Data && run == n
	if !marked && !w.wholePages(off, int64(len(p))) {
		return fmt.Errorf("write layer: %d bytes at %d are neither whole pages nor in data pages", len(p), off)
	}
	if _, err := w.data.WriteAt(p, off); err != nil {
		return fmt.Errorf("write layer: write %d bytes at %d: %w", len(p), off, err)
	}
	if marked {
		return nil
	}
	return w.mark(first, n, Data)
}

// Zero makes the pages of [off, off+n) zero and frees their space. The range must
// consist of whole pages, the device's last one possibly short. If only freeing
// the space fails, the pages are zero and the error is returned; a filesystem
// without holes is no error.
func (w *WriteLayer) Zero(off, n int64) error {
	if err := w.checkRange(off, n); err != nil || n == 0 {
		return err
	}
	if !w.wholePages(off, n) {
		return fmt.Errorf("write layer: zero %d bytes at %d: not whole pages", n, off)
	}
	first, count := w.pageRange(off, n)
	zero, data := w.survey(first, count)
	if zero {
		return nil
	}
	if err := w.mark(first, count, Zero); err != nil {
		return err
	}
	if !data {
		return nil
	}
	if err := w.data.PunchHole(off, n); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("write layer: free %d bytes at %d: %w", n, off, err)
	}
	return nil
}

// survey reports whether all of n pages are zero and whether any of them is data.
func (w *WriteLayer) survey(first, n int64) (allZero, anyData bool) {
	allZero = true
	for n > 0 {
		state, run := w.pages.Load().run(first, n)
		allZero = allZero && state == Zero
		if state == Data {
			return false, true
		}
		first += run
		n -= run
	}
	return allZero, false
}

// mark logs the new state of pages and then changes it.
func (w *WriteLayer) mark(first, n int64, s PageState) error {
	w.markMu.Lock()
	err := w.log.appendMark(first, n, s)
	if err == nil {
		w.pages.Load().set(first, n, s)
	}
	full := w.log.len() > w.rotateAt
	w.markMu.Unlock()
	if err != nil {
		return fmt.Errorf("write layer: mark %d pages from %d: %w", n, first, err)
	}
	// A sync under way rotates by itself when it is done.
	if full && w.syncMu.TryLock() {
		w.rotateIfFull()
		w.syncMu.Unlock()
	}
	return nil
}

// Sync makes everything durable that was written or zeroed by calls which had
// returned when Sync was called. Calls at the same time share the work.
func (w *WriteLayer) Sync() error {
	begun := w.begun.Load()
	w.syncMu.Lock()
	defer w.syncMu.Unlock()
	if w.synced > begun {
		return nil // by a pass that began after this call did
	}
	pass := w.begun.Add(1)
	if err := w.syncPass(); err != nil {
		return fmt.Errorf("write layer: sync: %w", err)
	}
	w.synced = pass
	w.rotateIfFull()
	return nil
}

// syncPass runs with syncMu held.
func (w *WriteLayer) syncPass() error {
	w.markMu.Lock()
	end := w.log.end
	uncovered := w.log.lastMark > w.finished
	w.markMu.Unlock()
	if err := w.makeDurable(w.data); err != nil {
		return err
	}
	if !uncovered {
		return nil
	}
	w.markMu.Lock()
	err := w.log.appendBarrier(end, w.finished)
	w.markMu.Unlock()
	if err != nil {
		return err
	}
	if err := w.makeDurable(w.log.file); err != nil {
		return err
	}
	w.finished = end
	return nil
}

// makeDurable syncs a file. Once a sync has failed, all do. It runs with syncMu held.
func (w *WriteLayer) makeDurable(f vfs.File) error {
	if err := w.failed.Load(); err != nil {
		return *err
	}
	err := f.Sync()
	if err == nil {
		return nil
	}
	return errors.Join(w.fail(err), w.log.header.disown(w.log.file))
}

// fail makes every later sync fail with err, or the error of an earlier call.
func (w *WriteLayer) fail(err error) error {
	w.failed.CompareAndSwap(nil, &err)
	return *w.failed.Load()
}

// Close closes the files. It does not sync: what was written survives the process,
// not a power cut.
func (w *WriteLayer) Close() error {
	return errors.Join(w.data.Close(), w.log.file.Close())
}

func (w *WriteLayer) checkRange(off, n int64) error {
	if off < 0 || n < 0 || n > w.size()-off {
		return fmt.Errorf("write layer: %d bytes at %d of a device of %d", n, off, w.size())
	}
	return nil
}

// size is that of the device, in bytes.
func (w *WriteLayer) size() int64 { return w.pages.Load().size }

func (w *WriteLayer) wholePages(off, n int64) bool {
	end := off + n
	return off%manifest.PageSize == 0 && (end%manifest.PageSize == 0 || end == w.size())
}

// pageRange returns the pages that [off, off+n) touches, n > 0.
func (w *WriteLayer) pageRange(off, n int64) (first, count int64) {
	first = off / manifest.PageSize
	return first, ceilDiv(off+n, manifest.PageSize) - first
}
