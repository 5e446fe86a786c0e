package cache

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

// A stamp is the content of a sector: itself, over and over.
type stamp uint64

const (
	lower stamp = iota // what lies below the layer
	zeros
	firstStamp

	sectorSize     = manifest.SectorSize
	sectorsPerPage = manifest.PageSize / sectorSize

	layerDir = "vol/layer"
)

// A layerModel is a write layer on a filesystem that crashes and fails, and what may
// be read from it. The device is a region and a bit; all happens in the window around
// the region's end.
type layerModel struct {
	*rapid.T
	fs    *vfs.Crash
	w     *WriteLayer
	key   *crypt.Key // nil: the layer is not encrypted
	boot  int
	size  int64
	from  int64 // first sector of the window
	next  stamp
	floor int64 // of the log

	sectors []modelSector

	// distrusted: after a failed sync, a killed process is like a power cut.
	distrusted bool
}

type modelSector struct {
	now     stamp
	allowed []stamp // after a power cut; now is one of them

	// tainted: a failed sync may have dropped it, so later ones promise nothing
	// until it is written again.
	tainted bool

	unsure bool // the process stopped while it wrote the sector
}

func newLayerModel(t *rapid.T) *layerModel {
	pages := int64(regionPages + 12)
	m := &layerModel{
		T:     t,
		fs:    vfs.NewCrash(rapid.Uint64().Draw(t, "seed")),
		size:  pages*manifest.PageSize - 3*sectorSize,
		from:  (regionPages - 12) * sectorsPerPage,
		next:  firstStamp,
		floor: rapid.SampledFrom([]int64{0, 100, 400, 16 << 20}).Draw(t, "log floor"),
	}
	if rapid.Bool().Draw(t, "encrypted") {
		m.key = testKey(1)
	}
	m.sectors = make([]modelSector, m.size/sectorSize-m.from)
	for i := range m.sectors {
		m.sectors[i].allowed = []stamp{lower}
	}
	m.noError(m.fs.MkdirAll("vol", 0o700))
	m.noError(m.fs.SyncDir("/"))
	w, err := CreateWriteLayer(m.fs, layerDir, m.size, m.bootID(), m.key)
	m.noError(err)
	m.use(w)
	return m
}

func (m *layerModel) bootID() string { return fmt.Sprintf("boot-%d", m.boot) }

func (m *layerModel) use(w *WriteLayer) {
	w.minLog = m.floor
	w.rotateAt = m.floor
	m.w = w
}

func (m *layerModel) noError(err error) {
	m.Helper()
	if err != nil {
		m.Fatalf("unexpected: %v", err)
	}
}

// read returns what the layer shows in a sector of the window.
func (m *layerModel) read(sector int64) stamp {
	m.Helper()
	page := (m.from + sector) / sectorsPerPage
	switch m.w.State(page) {
	case Absent:
		return lower
	case Zero:
		return zeros
	}
	var p [sectorSize]byte
	m.noError(m.w.ReadAt(p[:], (m.from+sector)*sectorSize))
	s := stamp(binary.LittleEndian.Uint64(p[:]))
	if !bytes.Equal(p[:], s.bytes()) {
		m.Fatalf("sector %d is mixed", sector)
	}
	if s == 0 {
		return zeros
	}
	return s
}

func (s stamp) bytes() []byte {
	return bytes.Repeat(binary.LittleEndian.AppendUint64(nil, uint64(s)), sectorSize/8)
}

// update records that content, which may now be there, was attempted in sectors. ok
// says that the call succeeded.
func (m *layerModel) update(first int64, content []stamp, ok bool) {
	m.Helper()
	for i, s := range content {
		sector := &m.sectors[first+int64(i)]
		if !slices.Contains(sector.allowed, s) {
			sector.allowed = append(sector.allowed, s)
		}
		got := m.read(first + int64(i))
		if got != s && (ok || got != sector.now) {
			m.Fatalf("sector %d shows %d; was %d, set to %d, success %v", first+int64(i), got, sector.now, s, ok)
		}
		if page := (m.from + first + int64(i)) / sectorsPerPage; !ok && s == zeros && m.w.State(page) != Zero && got != sector.now {
			m.Fatalf("sector %d was %d and lost it to a discard that failed", first+int64(i), sector.now)
		}
		sector.now = got
		sector.tainted = sector.tainted && !ok
	}
}

// inFlight records the last attempt of a process that has stopped. It may have
// stopped after the attempt was acknowledged.
func (m *layerModel) inFlight(first int64, content []stamp, acknowledged bool) {
	for i, s := range content {
		sector := &m.sectors[first+int64(i)]
		sector.allowed = append(sector.allowed, s)
		if acknowledged {
			sector.now = s
		} else {
			sector.unsure = true
		}
	}
}

// checkKind expects injected errors only.
func (m *layerModel) checkKind(err error) {
	m.Helper()
	for _, injected := range []error{nil, vfs.ErrStopped, syscall.EIO, syscall.ENOSPC} {
		if errors.Is(err, injected) {
			return
		}
	}
	m.Fatalf("not injected: %v", err)
}

// change runs an operation that sets sectors to content.
func (m *layerModel) change(first int64, content []stamp, op func() error) {
	m.Helper()
	before := m.states()
	err := op()
	m.fs.ClearFault()
	m.checkKind(err)
	if m.fs.Stopped() {
		m.inFlight(first, content, err == nil)
		m.restart()
		return
	}
	m.update(first, content, err == nil)
	if err != nil && !slices.Contains(content, zeros) && !slices.Equal(m.states(), before) {
		m.Fatalf("failed write changed the state of pages")
	}
	m.noticeLoss()
}

func (m *layerModel) states() []PageState {
	var s []PageState
	for page := m.from / sectorsPerPage; page < m.w.pages.Load().pages; page++ {
		s = append(s, m.w.State(page))
	}
	return s
}

// noticeLoss taints what a failed sync may have dropped, which nobody else may have
// been told of if it was part of a rotation.
func (m *layerModel) noticeLoss() {
	if m.w.failed.Load() != nil {
		m.taint()
	}
}

func (m *layerModel) taint() {
	m.distrusted = true
	for i := range m.sectors {
		m.sectors[i].tainted = m.sectors[i].tainted || len(m.sectors[i].allowed) > 1
	}
}

func (m *layerModel) sync() {
	m.Helper()
	err := m.w.Sync()
	m.fs.ClearFault()
	m.checkKind(err)
	if err == nil {
		m.settle()
	}
	if m.fs.Stopped() {
		m.restart()
	} else {
		m.noticeLoss()
	}
}

// settle records that what is there is durable.
func (m *layerModel) settle() {
	for i := range m.sectors {
		s := &m.sectors[i]
		if s.tainted {
			continue
		}
		s.allowed = []stamp{s.now}
	}
}

// restart ends the process, perhaps by a power cut, and opens the layer anew.
func (m *layerModel) restart() {
	m.Helper()
	powerCut := rapid.Bool().Draw(m.T, "power cut")
	if powerCut {
		m.fs.PowerCut()
		m.boot++
		m.distrusted = false
		for i := range m.sectors {
			m.sectors[i].tainted = false // what the disk has is there now
		}
	} else {
		m.fs.Kill()
	}
	m.reopen()
	lost := powerCut || m.distrusted
	for i := range m.sectors {
		s := &m.sectors[i]
		got := m.read(int64(i))
		if !slices.Contains(s.allowed, got) {
			m.Fatalf("after the restart sector %d shows %d; allowed are %d", i, got, s.allowed)
		}
		if !lost && !s.unsure && got != s.now {
			m.Fatalf("after a kill sector %d shows %d instead of %d", i, got, s.now)
		}
		s.now, s.unsure = got, false
	}
	m.distrusted = false
	m.settle()
	if s, n := m.w.Run(0, m.w.pages.Load().pages); n < m.from/sectorsPerPage || s != Absent && n != m.w.pages.Load().pages {
		m.Fatalf("outside of the window: %v × %d", s, n)
	}
}

// reopen opens the layer, the first time perhaps with faults.
func (m *layerModel) reopen() {
	m.Helper()
	if rapid.IntRange(0, 3).Draw(m.T, "fault in open") == 0 {
		m.fs.FailCall(rapid.IntRange(0, 25).Draw(m.T, "call"), syscall.EIO)
	}
	w, err := OpenWriteLayer(m.fs, layerDir, m.size, m.bootID(), m.key)
	m.fs.ClearFault()
	if err != nil {
		m.checkKind(err)
		m.taint()
		m.fs.Kill()
		w, err = OpenWriteLayer(m.fs, layerDir, m.size, m.bootID(), m.key)
	}
	m.noError(err)
	m.use(w)
}

func (m *layerModel) drawPages() (first, n int64) {
	pages := (int64(len(m.sectors)) + sectorsPerPage - 1) / sectorsPerPage
	first = rapid.Int64Range(0, pages-1).Draw(m.T, "page")
	return first, rapid.Int64Range(1, min(8, pages-first)).Draw(m.T, "pages")
}

func (m *layerModel) step() {
	m.Helper()
	switch rapid.IntRange(0, 9).Draw(m.T, "fault") {
	case 0:
		fault := rapid.SampledFrom([]error{syscall.EIO, syscall.ENOSPC}).Draw(m.T, "error")
		m.fs.FailCall(rapid.IntRange(0, 14).Draw(m.T, "call"), fault)
	case 1:
		m.fs.StopCall(rapid.IntRange(0, 14).Draw(m.T, "call"))
	}
	first, n := m.drawPages()
	sector := first * sectorsPerPage
	count := min(n*sectorsPerPage, int64(len(m.sectors))-sector)
	off := (m.from + sector) * sectorSize
	switch rapid.SampledFrom([]string{"write", "write", "write", "part", "part", "zero", "sync", "sync", "restart", "grow"}).Draw(m.T, "op") {
	case "write":
		content, p := m.draw(count)
		m.change(sector, content, func() error { return m.w.WriteAt(p, off) })
	case "part":
		skip := rapid.Int64Range(0, count-1).Draw(m.T, "skip")
		content, p := m.draw(rapid.Int64Range(1, count-skip).Draw(m.T, "sectors"))
		off += skip * sectorSize
		firstPage, pages := m.w.pageRange(off, int64(len(p)))
		if s, run := m.w.Run(firstPage, pages); (s != Data || run < pages) && !m.w.wholePages(off, int64(len(p))) {
			if err := m.w.WriteAt(p, off); err == nil {
				m.Fatalf("write of part of a page that is not data")
			}
			return
		}
		m.change(sector+skip, content, func() error { return m.w.WriteAt(p, off) })
	case "zero":
		content := slices.Repeat([]stamp{zeros}, int(count))
		m.change(sector, content, func() error { return m.w.Zero(off, count*sectorSize) })
	case "sync":
		m.sync()
	case "restart":
		m.restart()
	case "grow":
		m.grow(rapid.Int64Range(0, 20).Draw(m.T, "more"))
	}
}

// grow makes the device some sectors larger, with or without the process that does.
func (m *layerModel) grow(sectors int64) {
	m.Helper()
	size := m.size + sectors*sectorSize
	err := m.w.Extend(size)
	m.fs.ClearFault()
	m.checkKind(err)
	if err != nil {
		if m.fs.Stopped() {
			m.restart()
		}
		m.noticeLoss()
		return
	}
	// From here on the size is on record.
	short := m.w.pages.Load().pages * sectorsPerPage
	m.size = size
	for at := m.from + int64(len(m.sectors)); at < size/sectorSize; at++ {
		s := modelSector{now: lower, allowed: []stamp{lower}}
		if at < short { // a page that has other sectors may go on with zeros
			s = modelSector{allowed: []stamp{lower, zeros}, unsure: true}
		}
		m.sectors = append(m.sectors, s)
	}
	if m.fs.Stopped() || rapid.IntRange(0, 3).Draw(m.T, "dies") == 0 {
		m.restart()
		return
	}
	m.w.Grow(size)
	for i := range m.sectors {
		if s := &m.sectors[i]; s.unsure {
			s.now, s.unsure = m.read(int64(i)), false
		}
	}
}

// draw returns fresh content for n sectors.
func (m *layerModel) draw(n int64) (content []stamp, p []byte) {
	for range n {
		content = append(content, m.next)
		p = append(p, m.next.bytes()...)
		m.next++
	}
	return content, p
}

// This is promise 7: after a kill everything is there, after a power cut whatever a
// Sync covered is, and each sector has its old or its new content.
func TestWriteLayerKeepsItsPromisesThroughCrashesAndFaults(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newLayerModel(t)
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			m.step()
		}
		m.restart()
	})
}
