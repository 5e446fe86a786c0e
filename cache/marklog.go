package cache

import (
	"encoding/binary"
	"hash/crc32"
	"io"
	"math"

	"github.com/lazyvol/lazyvol/internal/vfs"
)

// The log of a map file is an array of slots of 32 bytes, which divides the disk's
// sector, so that no record spans two:
//
//	0   number of the slot, u64
//	8   first page, u64; of a barrier: number of the first slot it does not cover
//	16  number of pages, u64; of a barrier: what the last finished barrier covered
//	24  kind, u32: 1 pages became data, 2 pages became zero, 3 barrier
//	28  CRC32C of the 28 bytes above, begun from the log's nonce
//
// The log ends before the first slot that does not hold its record. Number and
// nonce keep bytes that an older file left on the disk from being taken for one.
const (
	slotLen     = 32
	kindBarrier = 3

	// reserveLen is how far ahead of its end the log is filled with zeros, at
	// least. Inside it a record needs neither new space nor a new file size, so a
	// full disk fails writes, not syncs, and fdatasync has no metadata to journal.
	reserveLen = 64 << 10

	// reserveSlots is what a mark needs: its own slot, and those of the two
	// barriers that can follow the last mark, one whose sync began before it and
	// one whose sync began after.
	reserveSlots = 3
)

// A record is the content of a slot.
type record struct {
	kind  uint32
	first uint64
	count uint64
}

func (rec record) encode(p *[slotLen]byte, slot uint64, nonce uint32) {
	binary.LittleEndian.PutUint64(p[0:], slot)
	binary.LittleEndian.PutUint64(p[8:], rec.first)
	binary.LittleEndian.PutUint64(p[16:], rec.count)
	binary.LittleEndian.PutUint32(p[24:], rec.kind)
	binary.LittleEndian.PutUint32(p[28:], slotChecksum(p, nonce))
}

// decodeRecord returns false if p is not the record of that slot of that log.
func decodeRecord(p *[slotLen]byte, slot uint64, nonce uint32) (record, bool) {
	rec := record{
		first: binary.LittleEndian.Uint64(p[8:]),
		count: binary.LittleEndian.Uint64(p[16:]),
		kind:  binary.LittleEndian.Uint32(p[24:]),
	}
	ok := binary.LittleEndian.Uint64(p[0:]) == slot &&
		binary.LittleEndian.Uint32(p[28:]) == slotChecksum(p, nonce)
	return rec, ok
}

func slotChecksum(p *[slotLen]byte, nonce uint32) uint32 {
	return crc32.Update(nonce, castagnoli, p[:28])
}

// A markLog is the log of an open map file. Its owner serialises the calls.
type markLog struct {
	file     vfs.File
	header   mapHeader
	end      uint64 // slots written
	lastMark uint64 // slot after the last mark
	reserved int64  // offset up to which the file is filled

	buf [slotLen]byte // here, so that an append allocates nothing
}

func newMarkLog(f vfs.File, h mapHeader) *markLog {
	return &markLog{file: f, header: h, reserved: h.logStart()}
}

func (l *markLog) offset(slot uint64) int64 { return l.header.logStart() + int64(slot)*slotLen }

// len is the length of the log in bytes.
func (l *markLog) len() int64 { return int64(l.end) * slotLen }

// appendMark logs that pages have a new state. After a failure the log is as
// before: what the failure left in the slot is overwritten by the next record.
func (l *markLog) appendMark(first, n int64, s PageState) error {
	if err := l.append(record{kind: uint32(s), first: uint64(first), count: uint64(n)}); err != nil {
		return err
	}
	l.lastMark = l.end
	return nil
}

// appendBarrier logs that the data of all marks below the slot covers is durable,
// and that a barrier which covers the slots below finished is.
func (l *markLog) appendBarrier(covers, finished uint64) error {
	return l.append(record{kind: kindBarrier, first: covers, count: finished})
}

func (l *markLog) append(rec record) error {
	slots := uint64(1)
	if rec.kind < kindBarrier {
		slots = reserveSlots
	}
	if err := l.reserve(l.end + slots); err != nil {
		return err
	}
	rec.encode(&l.buf, l.end, l.header.nonce)
	if _, err := l.file.WriteAt(l.buf[:], l.offset(l.end)); err != nil {
		return err
	}
	l.end++
	return nil
}

// reserve fills the file with zeros at least up to the end of the slots below slot.
func (l *markLog) reserve(slot uint64) error {
	for l.offset(slot) > l.reserved {
		if _, err := l.file.WriteAt(make([]byte, reserveLen), l.reserved); err != nil {
			return err
		}
		l.reserved += reserveLen
	}
	return nil
}

// appendFrom appends the records of another log's slots [from, to).
func (l *markLog) appendFrom(o *markLog, from, to uint64) error {
	buf := make([]byte, reserveLen)
	for from < to {
		n := min(to-from, reserveLen/slotLen)
		chunk := buf[:n*slotLen]
		if err := readFull(o.file, chunk, o.offset(from)); err != nil {
			return err
		}
		for i := range n {
			p := (*[slotLen]byte)(chunk[i*slotLen:])
			rec, ok := decodeRecord(p, from+i, o.header.nonce)
			if !ok {
				return corrupt("slot %d", from+i)
			}
			rec.encode(p, l.end+i, l.header.nonce)
		}
		if err := l.reserve(l.end + n + reserveSlots); err != nil {
			return err
		}
		if _, err := l.file.WriteAt(chunk, l.offset(l.end)); err != nil {
			return err
		}
		from += n
		l.end += n
		l.lastMark = l.end
	}
	return nil
}

// replay applies the log of a map file to m: after a killed process, sameBoot, all
// records, since the kernel still has what was written; otherwise, as after a power
// cut, only those that a barrier covers, since their data is durable.
//
// A record that the log must have and that is not readable is an error: any before a
// readable one if all are to be applied, else any that a finished barrier covered.
func replay(r io.ReaderAt, h mapHeader, m *pageMap, sameBoot bool) error {
	s, err := surveyLog(r, h)
	if err != nil {
		return err
	}
	limit := s.end
	switch {
	case sameBoot && s.beyond > 0:
		return corrupt("slot %d is unreadable, slot %d is not", s.end, s.beyond)
	case !sameBoot && s.finished > s.end:
		return corrupt("slot %d is unreadable, %d slots were synced", s.end, s.finished)
	case !sameBoot:
		limit = s.covered
	}
	return scan(r, h, limit, func(slot uint64, rec record, _ bool) error {
		switch rec.kind {
		case uint32(Data), uint32(Zero):
			pages := uint64(m.pages)
			if rec.first >= pages || rec.count == 0 || rec.count > pages-rec.first {
				return corrupt("slot %d: %d pages from %d", slot, rec.count, rec.first)
			}
			m.set(int64(rec.first), int64(rec.count), PageState(rec.kind))
		case kindBarrier:
		default:
			return corrupt("slot %d: kind %d", slot, rec.kind)
		}
		return nil
	})
}

// A logSurvey is what a log says about itself.
type logSurvey struct {
	end      uint64 // slots before the first unreadable one
	covered  uint64 // slots that a barrier among these covers
	beyond   uint64 // the last readable slot after an unreadable one; 0: there is none
	finished uint64 // slots that were covered by a finished barrier
}

func surveyLog(r io.ReaderAt, h mapHeader) (logSurvey, error) {
	var s logSurvey
	err := scan(r, h, math.MaxUint64, func(slot uint64, rec record, ok bool) error {
		if !ok {
			return nil
		}
		inOrder := slot == s.end
		if inOrder {
			s.end++
		} else {
			s.beyond = slot
		}
		if rec.kind != kindBarrier {
			return nil
		}
		if rec.first > slot || rec.count > rec.first {
			return corrupt("slot %d: barrier for %d slots after one for %d", slot, rec.first, rec.count)
		}
		s.finished = max(s.finished, rec.count)
		if inOrder {
			s.covered = max(s.covered, rec.first)
		}
		return nil
	})
	return s, err
}

// scan calls fn for the slots of a map file below limit in order, until fn fails. ok
// is false for a slot that does not hold its record.
func scan(r io.ReaderAt, h mapHeader, limit uint64, fn func(slot uint64, rec record, ok bool) error) error {
	buf := make([]byte, reserveLen)
	for slot := uint64(0); slot < limit; {
		n, readErr := r.ReadAt(buf, h.logStart()+int64(slot)*slotLen)
		if readErr != nil && readErr != io.EOF {
			return readErr
		}
		for p := buf[:n]; len(p) >= slotLen && slot < limit; p = p[slotLen:] {
			rec, ok := decodeRecord((*[slotLen]byte)(p), slot, h.nonce)
			if err := fn(slot, rec, ok); err != nil {
				return err
			}
			slot++
		}
		if readErr == io.EOF {
			return nil
		}
	}
	return nil
}
