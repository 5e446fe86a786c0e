package cache

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// A Clean is a layer of clean blocks: copies of what the store has.
//
// Its folder has the file data, exactly as large as the device, and the file map:
// after a header page, four bytes for each page of the device with the CRC32C of its
// bytes, the last page's perhaps fewer than 4096; a checksum that is 0 is stored as
// 1, and 0 means absent. A page is there if its entry is not 0 and matches its
// bytes, which every read checks. So a page that another process evicts meanwhile, a
// flipped bit, a bad sector and whatever mix of old and new sectors a power cut
// leaves are all the same: a miss, to be fetched again. That needs no order among
// writes and no fsync, and any number of processes may share the folder, since
// nothing about presence is kept in memory.
//
// A layer that is sealed has [crypt.Pages] in its data, and 32 bytes for each page in
// its map: 1 if it is there (u32), nonce and tag. All else is the same. Without its key
// nothing can be read or written, but what is there can be counted and evicted.
//
// What a match cannot tell is which of several contents a page has had is the right
// one. In a base pages have one content only. In the clean layer of a volume a block
// gets a new content with each snapshot that changes it, and after a power cut the
// disk may show the former one, marks and bytes, or a block that was evicted. So
// before what shadows such a block is dropped, the block must have been written or
// evicted without error, and then [Clean.Sync] must have succeeded.
//
// All methods but Close are safe for concurrent use, in one process and among
// several. Reads and writes of the same block at the same time may miss, never lie.
type Clean struct {
	g       Geometry
	pages   *crypt.Pages // nil: not sealed, or without its key
	sealed  bool
	markLen int64 // of a page's entry in the map, in bytes
	data    vfs.File
	marks   vfs.File
	scratch sync.Pool // of *cleanScratch
	blocks  sync.Pool // of *[]byte, BlockSize long, for sealing
	used    usedBlocks

	// changing keeps writing and evicting one block apart in this process: its
	// marks would else stay when its bytes go. A block has the lock of its number
	// modulo the number of locks.
	changing [cleanStripes]sync.Mutex

	// failed is the first error that lost durability.
	failed atomic.Pointer[error]
}

const (
	cleanHeaderLen = manifest.PageSize
	plainMarkLen   = 4
	sealedMarkLen  = plainMarkLen + crypt.PageSealLen

	// batchPages bounds how many pages one read call of a file covers: 1 MiB, the
	// largest request the kernel sends.
	batchPages = 256

	// cleanStripes is more than there are fetches at a time.
	cleanStripes = 128
)

// cleanScratch is the working memory of one call.
type cleanScratch struct {
	marks [batchPages * sealedMarkLen]byte
	page  [manifest.PageSize]byte
	crypt crypt.PageScratch
}

// ReadAt fills p with bytes at any offset if all pages it touches are there;
// otherwise hit is false, and p has any content. A file that cannot be read is a
// miss. An error means that the range is not in the device or the layer closed.
//
// A read of whole pages costs a read of their marks and one of their bytes per MiB,
// and allocates nothing; a page read in part is read as a whole.
func (c *Clean) ReadAt(p []byte, off int64) (hit bool, err error) {
	if off < 0 || int64(len(p)) > c.g.Size()-off {
		return false, fmt.Errorf("clean layer: %d bytes at %d of a device of %d", len(p), off, c.g.Size())
	}
	s := c.scratch.Get().(*cleanScratch)
	defer c.scratch.Put(s)
	from := off
	for len(p) > 0 {
		n := int(min(int64(len(p)), (off/manifest.PageSize+batchPages)*manifest.PageSize-off))
		if err := c.readBatch(s, p[:n], off); errors.Is(err, fs.ErrClosed) {
			return false, fmt.Errorf("clean layer: %w", err)
		} else if err != nil {
			return false, nil
		}
		p = p[n:]
		off += int64(n)
	}
	if off > from {
		c.used.markRange(from/int64(c.g.BlockSize), (off-1)/int64(c.g.BlockSize))
	}
	return true, nil
}

// errMiss is what readBatch returns for a page that is not there.
var errMiss = errors.New("page is not in the layer")

// readBatch reads p, which touches at most batchPages pages.
func (c *Clean) readBatch(s *cleanScratch, p []byte, off int64) error {
	first := off / manifest.PageSize
	end := off + int64(len(p))
	markLen := c.markLen
	marks := s.marks[:(ceilDiv(end, manifest.PageSize)-first)*markLen]
	if err := c.readMarks(marks, first); err != nil {
		return err
	}
	// A head and a tail that are not whole pages go through the scratch page.
	if skip := off % manifest.PageSize; skip != 0 || len(p) < c.pageLen(first) {
		page, err := c.readPage(s, first, marks)
		if err != nil {
			return err
		}
		n := copy(p, page[skip:])
		p, marks, first = p[n:], marks[markLen:], first+1
	}
	if last := first + int64(len(marks))/markLen - 1; len(p) > 0 && end < c.g.Size() && end%manifest.PageSize != 0 {
		page, err := c.readPage(s, last, marks[int64(len(marks))-markLen:])
		if err != nil {
			return err
		}
		n := end % manifest.PageSize
		copy(p[int64(len(p))-n:], page)
		p, marks = p[:int64(len(p))-n], marks[:int64(len(marks))-markLen]
	}
	if len(p) == 0 {
		return nil
	}
	if _, err := c.data.ReadAt(p, first*manifest.PageSize); err != nil {
		return err
	}
	for len(p) > 0 {
		n := min(len(p), manifest.PageSize)
		if !c.open(s, first, p[:n], marks) {
			return errMiss
		}
		p, marks, first = p[n:], marks[markLen:], first+1
	}
	return nil
}

// open reports whether a page, as it is in the data file, matches its mark, and makes
// its bytes of it.
func (c *Clean) open(s *cleanScratch, number int64, page, mark []byte) bool {
	if !c.sealed {
		return binary.LittleEndian.Uint32(mark) == markOf(page)
	}
	return c.pages != nil && binary.LittleEndian.Uint32(mark) == sealedMark &&
		c.pages.Open(page, mark[plainMarkLen:sealedMarkLen], number, &s.crypt)
}

// sealedMark is what the entry of a sealed page begins with.
const sealedMark = 1

// readMarks reads the marks of pages from first on and fails if one is absent.
func (c *Clean) readMarks(marks []byte, first int64) error {
	if _, err := c.marks.ReadAt(marks, c.markOffset(first)); err != nil {
		return err
	}
	if !c.allMarked(marks) {
		return errMiss
	}
	return nil
}

// readPage reads a whole page into the scratch page and checks it.
func (c *Clean) readPage(s *cleanScratch, page int64, mark []byte) ([]byte, error) {
	p := s.page[:c.pageLen(page)]
	if _, err := c.data.ReadAt(p, page*manifest.PageSize); err != nil {
		return nil, err
	}
	if !c.open(s, page, p, mark) {
		return nil, errMiss
	}
	return p, nil
}

// WriteBlock stores a block. data is BlockSize bytes of plaintext that the caller
// has verified; of the device's last block only the bytes inside the device are
// kept. After an error each page of the block is there with its new content, or its
// former one, or not at all.
func (c *Clean) WriteBlock(block int64, data []byte) error {
	if err := c.checkBlock(block); err != nil {
		return err
	}
	if len(data) != c.g.BlockSize {
		return fmt.Errorf("clean layer: write block %d: %d bytes, not %d", block, len(data), c.g.BlockSize)
	}
	if c.sealed && c.pages == nil {
		return fmt.Errorf("clean layer: write block %d: the layer is sealed, and opened without its key", block)
	}
	data = data[:c.g.BlockLen(block)]
	off := block * int64(c.g.BlockSize)
	marks := make([]byte, pagesOf(int64(len(data)))*c.markLen)
	if c.sealed {
		buffer := c.blocks.Get().(*[]byte)
		defer c.blocks.Put(buffer)
		data = c.seal((*buffer)[:len(data)], marks, off/manifest.PageSize, data)
	} else {
		markPages(marks, data)
	}
	changing := c.lockBlock(block)
	defer changing.Unlock()
	if _, err := c.data.WriteAt(data, off); err != nil {
		return fmt.Errorf("clean layer: write block %d: %w", block, err)
	}
	// The marks come last: the other way round readers would see a block that is
	// there miss for longer.
	if _, err := c.marks.WriteAt(marks, c.markOffset(off/manifest.PageSize)); err != nil {
		return fmt.Errorf("clean layer: mark block %d: %w", block, err)
	}
	return nil
}

// markPages makes the marks of pages that are not sealed.
func markPages(marks, data []byte) {
	for len(data) > 0 {
		n := min(len(data), manifest.PageSize)
		binary.LittleEndian.PutUint32(marks, markOf(data[:n]))
		data, marks = data[n:], marks[plainMarkLen:]
	}
}

// seal seals pages from number first on into dst, which it returns, and makes their
// marks.
func (c *Clean) seal(dst, marks []byte, first int64, data []byte) []byte {
	s := c.scratch.Get().(*cleanScratch)
	defer c.scratch.Put(s)
	for off := 0; off < len(data); off += manifest.PageSize {
		end := min(off+manifest.PageSize, len(data))
		binary.LittleEndian.PutUint32(marks, sealedMark)
		c.pages.Seal(dst[off:end], marks[plainMarkLen:sealedMarkLen], first, data[off:end], &s.crypt)
		marks, first = marks[sealedMarkLen:], first+1
	}
	return dst
}

// Has reports whether all pages of a block are marked. Their bytes are not checked,
// so a read may still miss. A map that cannot be read is an absent block; an error
// means that there is no such block or the layer is closed.
func (c *Clean) Has(block int64) (bool, error) {
	if err := c.checkBlock(block); err != nil {
		return false, err
	}
	s := c.scratch.Get().(*cleanScratch)
	defer c.scratch.Put(s)
	first := block * int64(c.g.BlockSize) / manifest.PageSize
	for n := pagesOf(int64(c.g.BlockLen(block))); n > 0; {
		k := min(n, batchPages)
		if err := c.readMarks(s.marks[:k*c.markLen], first); errors.Is(err, fs.ErrClosed) {
			return false, fmt.Errorf("clean layer: %w", err)
		} else if err != nil {
			return false, nil
		}
		first += k
		n -= k
	}
	return true, nil
}

// Evict removes a block and frees its space. After an error the block may still be
// there; errors.ErrUnsupported, from a filesystem without holes, means that it is
// not but its space is still taken.
func (c *Clean) Evict(block int64) error {
	if err := c.checkBlock(block); err != nil {
		return err
	}
	changing := c.lockBlock(block)
	defer changing.Unlock()
	return c.evictLocked(block)
}

func (c *Clean) evictLocked(block int64) error {
	off, n := block*int64(c.g.BlockSize), int64(c.g.BlockLen(block))
	// The marks go first, so that readers need not read a hole to find a miss.
	if _, err := c.marks.WriteAt(make([]byte, pagesOf(n)*c.markLen), c.markOffset(off/manifest.PageSize)); err != nil {
		return fmt.Errorf("clean layer: evict block %d: %w", block, err)
	}
	if err := c.data.PunchHole(off, n); err != nil {
		return fmt.Errorf("clean layer: evict block %d: %w", block, err)
	}
	return nil
}

// Sync makes durable what was written and evicted by calls that had returned when
// Sync was called. When the disk fails to, the kernel may have dropped what it could
// not write, so this and every later Sync of the open layer fails with that error.
func (c *Clean) Sync() error {
	if err := c.failed.Load(); err != nil {
		return *err
	}
	if err := errors.Join(c.data.Sync(), c.marks.Sync()); err != nil {
		err = fmt.Errorf("clean layer: sync: %w", err)
		c.failed.CompareAndSwap(nil, &err)
		return err
	}
	return nil
}

// Close closes the files. No other call may be under way.
func (c *Clean) Close() error { return errors.Join(c.data.Close(), c.marks.Close()) }

// Blocks returns how many blocks the device has now.
func (c *Clean) Blocks() int64 { return c.g.Blocks() }

// lockBlock locks out other changes of a block, until the lock returned is unlocked.
func (c *Clean) lockBlock(block int64) *sync.Mutex {
	m := &c.changing[block%cleanStripes]
	m.Lock()
	return m
}

func (c *Clean) checkBlock(block int64) error {
	if block < 0 || block >= c.g.Blocks() {
		return fmt.Errorf("clean layer: block %d of %d", block, c.g.Blocks())
	}
	return nil
}

// pageLen is how many bytes of a page lie inside the device.
func (c *Clean) pageLen(page int64) int {
	return int(min(manifest.PageSize, c.g.Size()-page*manifest.PageSize))
}

// markOf is the entry of a page that is not sealed.
func markOf(page []byte) uint32 { return max(1, manifest.Checksum(page)) }

func (c *Clean) markOffset(page int64) int64 { return cleanHeaderLen + page*c.markLen }
