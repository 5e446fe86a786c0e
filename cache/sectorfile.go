package cache

import (
	"sync"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
)

// sectorChunk bounds how many bytes are encrypted at a time: what the kernel sends at
// most, and a sector at each end.
const sectorChunk = 1<<20 + 2*crypt.SectorLen

// A sectorFile is a file whose sectors are encrypted. A range that does not consist of
// whole sectors is read and written by way of those it lies in; the caller keeps such
// writes and other writes of the same sectors apart. Holes read as zeros.
type sectorFile struct {
	vfs.File
	sectors *crypt.Sectors
	buffers sync.Pool // of *[]byte, sectorChunk long
}

func newSectorFile(f vfs.File, sectors *crypt.Sectors) *sectorFile {
	s := &sectorFile{File: f, sectors: sectors}
	s.buffers.New = func() any {
		b := make([]byte, sectorChunk)
		return &b
	}
	return s
}

// ReadAt is [vfs.File.ReadAt].
func (f *sectorFile) ReadAt(p []byte, off int64) (int, error) {
	if wholeSectors(off, len(p)) {
		n, err := f.File.ReadAt(p, off)
		if err != nil {
			return 0, err
		}
		f.sectors.Decrypt(p, off/crypt.SectorLen)
		return n, nil
	}
	return f.each(p, off, func(part, sectors []byte, at int64, within int) error {
		if err := f.read(sectors, at); err != nil {
			return err
		}
		copy(part, sectors[within:])
		return nil
	})
}

// WriteAt is [vfs.File.WriteAt].
func (f *sectorFile) WriteAt(p []byte, off int64) (int, error) {
	return f.each(p, off, func(part, sectors []byte, at int64, within int) error {
		if len(part) == len(sectors) {
			f.sectors.Encrypt(sectors, part, at/crypt.SectorLen)
		} else {
			if err := f.read(sectors, at); err != nil {
				return err
			}
			copy(sectors[within:], part)
			f.sectors.Encrypt(sectors, sectors, at/crypt.SectorLen)
		}
		_, err := f.File.WriteAt(sectors, at)
		return err
	})
}

// read reads whole sectors.
func (f *sectorFile) read(p []byte, at int64) error {
	if _, err := f.File.ReadAt(p, at); err != nil {
		return err
	}
	f.sectors.Decrypt(p, at/crypt.SectorLen)
	return nil
}

// each cuts p into parts, and calls do with each, a buffer for the sectors it lies in,
// the offset of those, and that of the part in them.
func (f *sectorFile) each(p []byte, off int64, do func(part, sectors []byte, at int64, within int) error) (int, error) {
	buffer := f.buffers.Get().(*[]byte)
	defer f.buffers.Put(buffer)
	done := 0
	for done < len(p) {
		at := (off + int64(done)) / crypt.SectorLen * crypt.SectorLen
		within := int(off + int64(done) - at)
		n := min(len(p)-done, sectorChunk-within)
		sectors := (*buffer)[:ceilDiv(int64(within+n), crypt.SectorLen)*crypt.SectorLen]
		if err := do(p[done:done+n], sectors, at, within); err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

func wholeSectors(off int64, n int) bool { return off%crypt.SectorLen == 0 && n%crypt.SectorLen == 0 }
