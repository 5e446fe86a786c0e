package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

const cleanMapName = "map"

// The header page of a clean layer's map: object header, size of the device (u64),
// block size (u32), zeros, and in the last four bytes the CRC32C of the rest.
func cleanFormat() manifest.ObjectFormat {
	return manifest.ObjectFormat{Name: "clean layer map", Magic: "LVCL", Version: 1}
}

// OpenClean opens the clean layer in the folder dir for devices of geometry g, and
// makes it when missing, with mode 0700. Any number of processes may have it open,
// and create it, at the same time. A layer of another geometry is an error that
// names both, one of another version manifest.ErrVersion. A filesystem that cannot
// hold a file as large as the device is syscall.EFBIG.
//
// pages seals a layer; nil: it is not sealed, or, if there is one that is, it is opened
// without its key, for evicting.
func OpenClean(fsys vfs.FS, dir string, g manifest.Geometry, pages *crypt.Pages) (_ *Clean, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("open clean layer %s: %w", dir, err)
		}
	}()
	if err := g.Validate(); err != nil {
		return nil, err
	}
	if err := fsys.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	c := &Clean{pages: pages}
	c.blocks.New = func() any {
		b := make([]byte, g.BlockSize)
		return &b
	}
	c.g.Set(g)
	c.used.grow(g.Blocks())
	c.scratch.New = func() any { return new(cleanScratch) }
	c.data, err = fsys.OpenFile(filepath.Join(dir, dataName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	c.marks, err = fsys.OpenFile(filepath.Join(dir, cleanMapName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, errors.Join(err, c.data.Close())
	}
	if err := c.format(); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// CleanGeometry returns the geometry of the device of the clean layer in the folder
// dir. One without a header that can be read is manifest.ErrCorrupt or fs.ErrNotExist.
func CleanGeometry(fsys vfs.FS, dir string) (manifest.Geometry, error) {
	g, _, err := readCleanHeader(fsys, dir)
	return g, err
}

func readCleanHeader(fsys vfs.FS, dir string) (g manifest.Geometry, sealed bool, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("look into clean layer %s: %w", dir, err)
		}
	}()
	f, err := fsys.OpenFile(filepath.Join(dir, cleanMapName), os.O_RDONLY, 0)
	if err != nil {
		return g, sealed, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	page := make([]byte, cleanHeaderLen)
	if err := readFull(f, page, 0); err != nil {
		return g, sealed, err
	}
	format := cleanFormat()
	sealed = isSealed(page)
	if err := format.CheckSealed(page, sealed); err != nil {
		return g, sealed, err
	}
	body, err := format.CutChecksum(page)
	if err != nil {
		return g, sealed, err
	}
	g = headerGeometry(body)
	return g, sealed, g.Validate()
}

// DataFile returns the name of the file of the clean layer in the folder dir that is
// laid out like the device: what is there lies at its offset.
func DataFile(dir string) string { return filepath.Join(dir, dataName) }

// CleanAllocated returns how many bytes of space the clean layer in the folder dir
// takes, open or not. A missing one takes none.
func CleanAllocated(fsys vfs.FS, dir string) (int64, error) {
	total := int64(0)
	for _, name := range []string{dataName, cleanMapName} {
		n, err := fsys.Allocated(filepath.Join(dir, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, fmt.Errorf("measure clean layer %s: %w", dir, err)
		}
		total += n
	}
	return total, nil
}

// EvictAll evicts all blocks of the clean layer in the folder dir, open or not, and
// frees their space, without knowing its geometry: of one whose header is damaged,
// for instance. A missing file is an empty one.
func EvictAll(fsys vfs.FS, dir string) error {
	for _, name := range []string{cleanMapName, dataName} { // in the order of Evict
		keep := int64(0)
		if name == cleanMapName {
			keep = cleanHeaderLen
		}
		if err := punchFrom(fsys, filepath.Join(dir, name), keep); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("evict clean layer %s: %w", dir, err)
		}
	}
	return nil
}

// punchFrom frees the space of a file from keep on.
func punchFrom(fsys vfs.FS, name string, keep int64) (err error) {
	f, err := fsys.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Size()
	if err != nil || size <= keep {
		return err
	}
	return f.PunchHole(keep, size-keep)
}

// RemoveClean removes the clean layer in the folder dir, which nobody has open, and
// leaves the folder. After a power cut files of it may be back, as they were, until
// the folder is synced.
func RemoveClean(fsys vfs.FS, dir string) error {
	for _, name := range []string{cleanMapName, dataName} {
		if err := fsys.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove clean layer %s: %w", dir, err)
		}
	}
	return nil
}

// format checks the header and both files' sizes, or sets them in a new layer.
// Whatever it writes is the same in every process, so it does not matter how far
// another one has got, or whether a power cut undoes a part.
func (c *Clean) format() error {
	if err := c.checkHeader(); err != nil {
		return err
	}
	if err := growFile(c.data, dataName, c.g.Size()); err != nil {
		return err
	}
	return growFile(c.marks, cleanMapName, c.markOffset(pagesOf(c.g.Size())))
}

// checkHeader checks the header, and writes it if there is none or none that can be
// read: the pages check themselves, and so does the size of the device.
func (c *Clean) checkHeader() error {
	format := cleanFormat()
	page := make([]byte, cleanHeaderLen)
	if _, err := c.marks.ReadAt(page, 0); err == nil {
		c.setSealed(c.pages != nil || isSealed(page))
		err := format.CheckSealed(page, c.sealed)
		if errors.Is(err, manifest.ErrVersion) {
			return err
		}
		if body, sumErr := format.CutChecksum(page); err == nil && sumErr == nil {
			return c.checkGeometry(body)
		}
	}
	c.setSealed(c.pages != nil)
	_, err := c.marks.WriteAt(encodeCleanHeader(c.g.Get(), c.sealed), 0)
	return err
}

func (c *Clean) setSealed(sealed bool) {
	c.sealed, c.markLen = sealed, plainMarkLen
	if sealed {
		c.markLen = sealedMarkLen
	}
}

// isSealed reports whether the header of a map says that its layer is sealed.
func isSealed(header []byte) bool {
	return bytes.HasPrefix(header, cleanFormat().AppendSealedHeader(nil))
}

func (c *Clean) checkGeometry(header []byte) error {
	if g := headerGeometry(header); g != c.g.Get() {
		return fmt.Errorf("it holds a device of %d bytes in blocks of %d, not one of %d in blocks of %d",
			g.Size, g.BlockSize, c.g.Size(), c.g.BlockSize)
	}
	return nil
}

// encodeCleanHeader returns the header page of a clean layer's map.
func encodeCleanHeader(g manifest.Geometry, sealed bool) []byte {
	format := cleanFormat()
	header := make([]byte, 0, cleanHeaderLen)
	if sealed {
		header = format.AppendSealedHeader(header)
	} else {
		header = format.AppendHeader(header)
	}
	header = binary.LittleEndian.AppendUint64(header, uint64(g.Size))
	header = binary.LittleEndian.AppendUint32(header, uint32(g.BlockSize))
	return format.AppendChecksum(header[:cleanHeaderLen-manifest.ChecksumLen])
}

// headerGeometry is the inverse, of a header that was checked.
func headerGeometry(header []byte) manifest.Geometry {
	return manifest.Geometry{
		Size:      int64(binary.LittleEndian.Uint64(header[8:])),
		BlockSize: int(binary.LittleEndian.Uint32(header[16:])),
	}
}

// growFile gives a file its size. One that is too short, as after a power cut, only
// lacks pages.
func growFile(f vfs.File, name string, size int64) error {
	have, err := f.Size()
	if err != nil {
		return err
	}
	if have > size {
		return corrupt("%s has %d bytes, not %d", name, have, size)
	}
	if have < size {
		return sizeFile(f, size)
	}
	return nil
}
