package cache

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// The file map-<generation> of a write layer, all integers little-endian:
//
//	0    object header: magic "LVWL", version, flags
//	8    size of the device in bytes, u64
//	16   generation, u64
//	24   nonce of the log, u32: random; then 4 zeros
//	32   length of the checkpoint in bytes, u64
//	40   boot id, 64 bytes, padded with NUL; none once a sync has failed
//	104  salt of the sectors' key, 16 bytes, if the header has the flag for sealed
//	120  zeros
//	124  CRC32C of the above
//	128  checkpoint: extents, ascending
//	     then its CRC32C, then zeros up to a multiple of 4096
//	     log: records of 32 bytes, see marklog.go
//
// An extent is its first region (u32), its number of regions (u32) and their state
// (u32: 1 data, 2 zero). State 0 is one mixed region, whose 128 words (u64) follow.
const (
	mapHeaderLen  = 128
	bootIDLen     = 64
	saltAt        = 40 + bootIDLen
	extentLen     = 12
	regionLen     = regionWords * 8
	checkpointBuf = 256 << 10
)

// castagnoli is the polynomial of CRC32C, for which CPUs have instructions. The
// table never changes.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func mapFormat() manifest.ObjectFormat {
	return manifest.ObjectFormat{Name: "write layer map", Magic: "LVWL", Version: 1}
}

// A mapHeader is the fixed part of a map file.
type mapHeader struct {
	size          int64 // of the device
	generation    uint64
	nonce         uint32
	checkpointLen int64
	bootID        string
	salt          []byte // nil: the layer is not encrypted
}

// logStart is the offset of the log's first slot.
func (h mapHeader) logStart() int64 {
	end := mapHeaderLen + h.checkpointLen + manifest.ChecksumLen
	return ceilDiv(end, manifest.PageSize) * manifest.PageSize
}

func (h mapHeader) encode() []byte {
	b := make([]byte, 0, mapHeaderLen)
	if h.salt == nil {
		b = mapFormat().AppendHeader(b)
	} else {
		b = mapFormat().AppendSealedHeader(b)
	}
	b = binary.LittleEndian.AppendUint64(b, uint64(h.size))
	b = binary.LittleEndian.AppendUint64(b, h.generation)
	b = binary.LittleEndian.AppendUint32(b, h.nonce)
	b = binary.LittleEndian.AppendUint32(b, 0)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.checkpointLen))
	b = append(b, h.bootID...)
	b = append(b[:saltAt], h.salt...)
	return mapFormat().AppendChecksum(b[:mapHeaderLen-manifest.ChecksumLen])
}

// decodeMapHeader decodes the header of the map of a device of size bytes.
func decodeMapHeader(b []byte, size int64) (mapHeader, error) {
	format := mapFormat()
	sealed := bytes.HasPrefix(b, format.AppendSealedHeader(nil))
	if err := format.CheckSealed(b, sealed); err != nil {
		return mapHeader{}, err
	}
	body, err := format.CutChecksum(b)
	if err != nil {
		return mapHeader{}, err
	}
	h := mapHeader{
		size:          int64(binary.LittleEndian.Uint64(body[8:])),
		generation:    binary.LittleEndian.Uint64(body[16:]),
		nonce:         binary.LittleEndian.Uint32(body[24:]),
		checkpointLen: int64(binary.LittleEndian.Uint64(body[32:])),
		bootID:        string(bytes.TrimRight(body[40:40+bootIDLen], "\x00")),
	}
	if sealed {
		h.salt = bytes.Clone(body[saltAt : saltAt+crypt.SectorSaltLen])
	}
	if h.size < 0 || h.size > size { // smaller if the device has grown since
		return mapHeader{}, corrupt("%s is of a device of %d bytes, not %d", format.Name, h.size, size)
	}
	if limit := ceilDiv(pagesOf(h.size), regionPages) * (extentLen + regionLen); h.checkpointLen < 0 || h.checkpointLen > limit {
		return mapHeader{}, corrupt("checkpoint of %d bytes", h.checkpointLen)
	}
	return h, nil
}

// disown takes the boot id out of the header of a map file, in one sector: the
// kernel may have dropped what it could not write, so that from now on only covered
// marks are to be believed, as after a power cut.
func (h mapHeader) disown(f vfs.File) error {
	h.bootID = ""
	if _, err := f.WriteAt(h.encode(), 0); err != nil {
		return fmt.Errorf("disown marks: %w", err)
	}
	return nil
}

// writeCheckpoint writes header and extents to an empty file. It does not sync.
// h.checkpointLen is set here.
func writeCheckpoint(f vfs.File, h *mapHeader, extents []extent) error {
	h.checkpointLen = 0
	for _, e := range extents {
		h.checkpointLen += extentLen
		if e.state == Absent {
			h.checkpointLen += regionLen
		}
	}
	if _, err := f.WriteAt(h.encode(), 0); err != nil {
		return err
	}
	crc := crc32.New(castagnoli)
	out := io.NewOffsetWriter(f, mapHeaderLen)
	w := bufio.NewWriterSize(io.MultiWriter(out, crc), checkpointBuf)
	var buf [regionLen]byte
	for _, e := range extents {
		b := binary.LittleEndian.AppendUint32(buf[:0], e.first)
		b = binary.LittleEndian.AppendUint32(b, e.count)
		b = binary.LittleEndian.AppendUint32(b, uint32(e.state))
		if _, err := w.Write(b); err != nil {
			return err
		}
		if e.state != Absent {
			continue
		}
		for i := range e.region.words {
			binary.LittleEndian.PutUint64(buf[i*8:], e.region.words[i].Load())
		}
		if _, err := w.Write(buf[:]); err != nil {
			return err
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	_, err := out.Write(binary.LittleEndian.AppendUint32(nil, crc.Sum32()))
	return err
}

// readCheckpoint reads the header and the checkpoint of a map file, of a device that
// has size bytes by now.
func readCheckpoint(r io.ReaderAt, size int64) (mapHeader, *pageMap, error) {
	var b [mapHeaderLen]byte
	if err := readFull(r, b[:], 0); err != nil {
		return mapHeader{}, nil, err
	}
	h, err := decodeMapHeader(b[:], size)
	if err != nil {
		return mapHeader{}, nil, err
	}
	// The checksum first: what it vouches for was written by writeCheckpoint, and
	// a hostile length cannot make us build anything.
	if err := checkCheckpoint(r, h); err != nil {
		return mapHeader{}, nil, err
	}
	m := newPageMap(h.size)
	in := bufio.NewReaderSize(io.NewSectionReader(r, mapHeaderLen, h.checkpointLen), checkpointBuf)
	buf := new([regionLen]byte)
	for read, next := int64(0), int64(0); read < h.checkpointLen; {
		n, end, err := readExtent(in, buf, m, next)
		if err != nil {
			return mapHeader{}, nil, err
		}
		read += n
		next = end
	}
	if h.size < size {
		m = m.grown(size)
	}
	return h, m, nil
}

func checkCheckpoint(r io.ReaderAt, h mapHeader) error {
	crc := crc32.New(castagnoli)
	n, err := io.CopyBuffer(crc, io.NewSectionReader(r, mapHeaderLen, h.checkpointLen), make([]byte, checkpointBuf))
	if err != nil {
		return err
	}
	if n < h.checkpointLen {
		return corrupt("checkpoint ends after %d of %d bytes", n, h.checkpointLen)
	}
	var sum [manifest.ChecksumLen]byte
	if err := readFull(r, sum[:], mapHeaderLen+h.checkpointLen); err != nil {
		return err
	}
	if want, got := binary.LittleEndian.Uint32(sum[:]), crc.Sum32(); got != want {
		return corrupt("checksum of the checkpoint is %08x, not %08x", got, want)
	}
	return nil
}

// readExtent reads the extent that begins at region next or later into m, by way
// of buf. It returns its length in bytes and the region behind it.
func readExtent(in io.Reader, buf *[regionLen]byte, m *pageMap, next int64) (n, end int64, err error) {
	if err := readExtentPart(in, buf[:extentLen]); err != nil {
		return 0, 0, err
	}
	first := int64(binary.LittleEndian.Uint32(buf[0:]))
	count := int64(binary.LittleEndian.Uint32(buf[4:]))
	state := binary.LittleEndian.Uint32(buf[8:])
	end = first + count
	if first < next || count == 0 || end > m.regions() || state > uint32(Zero) || state == 0 && count != 1 {
		return 0, 0, corrupt("extent of %d regions from %d in state %d", count, first, state)
	}
	if state != 0 {
		pages := min(end*regionPages, m.pages) - first*regionPages
		m.set(first*regionPages, pages, PageState(state))
		return extentLen, end, nil
	}
	if err := readExtentPart(in, buf[:]); err != nil {
		return 0, 0, err
	}
	r := new(region)
	for i := range r.words {
		r.words[i].Store(binary.LittleEndian.Uint64(buf[i*8:]))
	}
	if err := m.load(first, r); err != nil {
		return 0, 0, err
	}
	return extentLen + regionLen, end, nil
}

func readExtentPart(in io.Reader, p []byte) error {
	_, err := io.ReadFull(in, p)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return corrupt("checkpoint ends inside an extent")
	}
	return err
}

// readFull reads all of p, or says that the file ends too early.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == io.EOF {
		return corrupt("file ends at %d", off+int64(n))
	}
	return err
}

// corrupt makes an error that wraps manifest.ErrCorrupt.
func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", manifest.ErrCorrupt, fmt.Sprintf(format, args...))
}
