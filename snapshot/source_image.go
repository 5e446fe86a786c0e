package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/manifest"
)

var (
	// ErrSourceSize: an image's size is not a whole number of sectors.
	ErrSourceSize = errors.New("size is not a multiple of 512 bytes")

	// ErrSourceChanged: an image changed while it was read.
	ErrSourceChanged = errors.New("the image changed while it was read")

	// ErrSourceKind: a path leads to something that is no image.
	ErrSourceKind = errors.New("neither a file nor a block device")
)

// A FileSource is an image file or a block device to make a snapshot of. Its
// methods may be called concurrently, Close last.
type FileSource struct {
	file    *os.File
	size    int64     // in bytes
	device  bool      // a block device
	changed time.Time // when it was before it was opened; of a file
}

// OpenSource opens an image file or a block device for reading. It fails with
// fs.ErrNotExist, ErrSourceKind, ErrSourceSize, or what the system says. What
// it reads of a block device is one moment's content only if nobody writes to
// it meanwhile: see MountedReadWrite.
func OpenSource(path string) (*FileSource, error) {
	f, err := openSource(path)
	if err != nil {
		return nil, fmt.Errorf("open source: %w", err)
	}
	return f, nil
}

func openSource(path string) (_ *FileSource, err error) {
	// Looked at before it is opened, which may block on a fifo, and do worse
	// to a character device.
	if info, err := os.Stat(path); err != nil {
		return nil, err
	} else if !isImage(info) {
		return nil, fmt.Errorf("%s is %s: %w", path, kindOf(info), ErrSourceKind)
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, file.Close())
		}
	}()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !isImage(info) {
		return nil, fmt.Errorf("%s is %s: %w", path, kindOf(info), ErrSourceKind)
	}
	f := &FileSource{file: file, device: !info.Mode().IsRegular(), changed: info.ModTime()}
	if f.size, err = f.measure(); err != nil {
		return nil, err
	}
	if f.size%manifest.SectorSize != 0 {
		return nil, fmt.Errorf("%s has %d bytes: %w; lengthen it with 'truncate -s %%%d %s'", path, f.size, ErrSourceSize, manifest.SectorSize, path)
	}
	return f, nil
}

func isImage(info fs.FileInfo) bool {
	return info.Mode().IsRegular() || info.Mode().Type() == fs.ModeDevice
}

func kindOf(info fs.FileInfo) string {
	switch mode := info.Mode(); {
	case mode.IsDir():
		return "a directory"
	case mode&fs.ModeNamedPipe != 0:
		return "a fifo"
	case mode&fs.ModeSocket != 0:
		return "a socket"
	case mode&fs.ModeCharDevice != 0:
		return "a character device"
	default:
		return "of mode " + mode.String()
	}
}

// measure returns the size now, of a device as BLKGETSIZE64 has it.
func (f *FileSource) measure() (int64, error) {
	return f.file.Seek(0, io.SeekEnd)
}

// Size returns the size in bytes when the source was opened.
func (f *FileSource) Size() int64 { return f.size }

// Close closes the file.
func (f *FileSource) Close() error { return f.file.Close() }

// Source returns what an attempt with blocks of a given size, in bytes, is to
// upload. It may be made with a parent: the whole of the image is compared.
func (f *FileSource) Source(blockSize int) Source {
	extents := func(yield func(Extent, error) bool) { f.extents(int64(blockSize), yield) }
	return Source{Extents: extents, Read: f.read, Check: f.Changed, Bytes: ExtentBytes(extents, blockSize)}
}

// extents yields every block of the image, ascending. A block that lies in the
// file's holes with all of it is a hole.
func (f *FileSource) extents(blockSize int64, yield func(Extent, error) bool) {
	blocks := manifest.Geometry{Size: f.size, BlockSize: int(blockSize)}.Blocks()
	for next := int64(0); next < blocks; {
		first, end, err := f.nextData(next*blockSize, blockSize)
		if err != nil {
			yield(Extent{}, fmt.Errorf("look for data in %s: %w", f.file.Name(), err))
			return
		}
		if first > next && !yield(Extent{First: next, Count: first - next, Hole: true}, nil) {
			return
		}
		if end > first && !yield(Extent{First: first, Count: end - first}, nil) {
			return
		}
		next = end
	}
}

// nextData returns the next blocks that have data, at or after an offset, and
// the number of all blocks twice when there are none.
func (f *FileSource) nextData(off, blockSize int64) (first, end int64, err error) {
	blocks := manifest.Geometry{Size: f.size, BlockSize: int(blockSize)}.Blocks()
	if f.device {
		return off / blockSize, blocks, nil
	}
	data, err := f.file.Seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return blocks, blocks, nil
	case errors.Is(err, unix.EINVAL): // a filesystem that does not know
		return off / blockSize, blocks, nil
	case err != nil:
		return 0, 0, err
	}
	hole, err := f.file.Seek(data, unix.SEEK_HOLE)
	if errors.Is(err, unix.ENXIO) {
		return 0, 0, fmt.Errorf("%w: it shrank", ErrSourceChanged)
	}
	if err != nil {
		return 0, 0, err
	}
	// What grew is beyond the device, until Changed is asked.
	end = min(blocks, (hole+blockSize-1)/blockSize)
	return min(data/blockSize, end), end, nil
}

// read fills p with a block, zeros beyond the end.
func (f *FileSource) read(ctx context.Context, block int64, p []byte) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	off := block * int64(len(p))
	n := int(min(int64(len(p)), f.size-off))
	clear(p[n:])
	_, err := f.file.ReadAt(p[:n], off)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: it shrank", ErrSourceChanged)
	}
	return err
}

// Changed fails with ErrSourceChanged if the size, or a file's modification
// time, is not what it was when the source was opened. Writes to a block device
// do not show.
func (f *FileSource) Changed() error {
	size, err := f.measure()
	if err != nil {
		return err
	}
	info, err := f.file.Stat()
	if err != nil {
		return err
	}
	if size != f.size {
		return fmt.Errorf("%s: %w: its size was %d and is %d", f.file.Name(), ErrSourceChanged, f.size, size)
	}
	if !f.device && !info.ModTime().Equal(f.changed) {
		return fmt.Errorf("%s: %w: it was written to at %s", f.file.Name(), ErrSourceChanged, info.ModTime().Format(time.TimeOnly))
	}
	return nil
}
