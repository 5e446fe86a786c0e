package volume

import (
	"bytes"
	"fmt"
	"maps"
	"slices"

	"github.com/lazyvol/lazyvol/manifest"
)

// A disk is what a volume should hold: promise 7, sector by sector.
type disk struct {
	data []byte // as a process that was not interrupted sees it

	// open are the sectors of which a power cut may show something else.
	open map[int64]*fate

	// unsure are the sectors that were being written when the process stopped,
	// with their new contents.
	unsure map[int64][]byte

	// failed says that the disk has told us, in this process, that it lost
	// something: the next process may miss it, even of the same boot.
	failed bool
}

// A fate has all contents that a sector may have after a power cut, the oldest
// first. The present one is among them.
type fate struct {
	contents [][]byte

	// lost: a sync failed since it was written. The disk may have dropped it,
	// and a later sync promises nothing.
	lost bool
}

func newDisk(data []byte) *disk {
	return &disk{data: data, open: make(map[int64]*fate), unsure: make(map[int64][]byte)}
}

// grow makes the device larger, durably.
func (d *disk) grow(size int64) {
	d.data = append(d.data, make([]byte, size-int64(len(d.data)))...)
}

func (d *disk) sector(at int64) []byte {
	return bytes.Clone(d.data[at*manifest.SectorSize:][:manifest.SectorSize])
}

// sectorsOf returns the sectors that a range touches.
func sectorsOf(off, n int64) (first, end int64) {
	return off / manifest.SectorSize, (off + n + manifest.SectorSize - 1) / manifest.SectorSize
}

// write notes a write that was acknowledged.
func (d *disk) write(off int64, p []byte) {
	first, end := sectorsOf(off, int64(len(p)))
	for at := first; at < end; at++ {
		d.touch(at)
	}
	copy(d.data[off:], p)
	for at := first; at < end; at++ {
		f := d.open[at]
		f.contents, f.lost = append(f.contents, d.sector(at)), false
	}
}

func (d *disk) touch(at int64) *fate {
	f := d.open[at]
	if f == nil {
		f = &fate{contents: [][]byte{d.sector(at)}}
		d.open[at] = f
	}
	return f
}

// interrupted notes a write that the end of its process cut short.
func (d *disk) interrupted(off int64, p []byte) {
	then := bytes.Clone(d.data)
	copy(then[off:], p)
	first, end := sectorsOf(off, int64(len(p)))
	for at := first; at < end; at++ {
		content := then[at*manifest.SectorSize:][:manifest.SectorSize]
		f := d.touch(at)
		f.contents = append(f.contents, content)
		d.unsure[at] = content
	}
}

// failedWrite notes a write that failed, after which the range holds got. Each
// sector is old or new.
func (d *disk) failedWrite(off int64, p, got []byte) error {
	first, end := sectorsOf(off, int64(len(p)))
	before := bytes.Clone(d.data[first*manifest.SectorSize : end*manifest.SectorSize])
	d.write(off, p)
	for at := first; at < end; at++ {
		now := got[(at-first)*manifest.SectorSize:][:manifest.SectorSize]
		old := before[(at-first)*manifest.SectorSize:][:manifest.SectorSize]
		if !bytes.Equal(now, old) && !bytes.Equal(now, d.sector(at)) {
			return fmt.Errorf("a failed write left a third content in sector %d", at)
		}
		copy(d.data[at*manifest.SectorSize:], now)
	}
	return nil
}

// synced notes that what was written is durable, but for what was lost.
func (d *disk) synced() {
	maps.DeleteFunc(d.open, func(_ int64, f *fate) bool { return !f.lost })
}

// syncFailed notes that the disk failed to make something durable.
func (d *disk) syncFailed() {
	d.failed = true
	for _, f := range d.open {
		f.lost = true
	}
}

// dropped returns the sectors that the disk may have dropped.
func (d *disk) dropped() []int64 {
	var all []int64
	for at, f := range d.open {
		if f.lost {
			all = append(all, at)
		}
	}
	slices.Sort(all)
	return all
}

// A fork is what a power cut may show while it is open whether an attempt is
// committed: what was not durable before the cut, of which a snapshot is made.
type fork map[int64]*fate

// cut notes that a snapshot is being made of what is there now.
func (d *disk) cut() fork {
	before := d.open
	d.open = make(map[int64]*fate)
	return before
}

// join notes what became of the attempt.
func (d *disk) join(before fork, committed bool) {
	for at, f := range before {
		if committed && !f.lost {
			// The snapshot has it, and the volume is what the snapshot has. But what
			// the disk has dropped shows until the volume has moved on to that.
			continue
		}
		if since := d.open[at]; since != nil {
			f.contents = append(f.contents, since.contents...)
			f.lost = f.lost && since.lost
		}
		d.open[at] = f
	}
}

// restarted compares what is there after the end of a process with what may be,
// and takes it for granted. A power cut brings to an end what was open.
func (d *disk) restarted(got []byte, power bool) (lost, between int, err error) {
	for at := range int64(len(got) / manifest.SectorSize) {
		now := got[at*manifest.SectorSize:][:manifest.SectorSize]
		want := d.data[at*manifest.SectorSize:][:manifest.SectorSize]
		if bytes.Equal(now, want) {
			continue
		}
		if unsure := d.unsure[at]; unsure != nil && bytes.Equal(now, unsure) {
			continue
		}
		f := d.open[at]
		if !power && !d.failed || f == nil {
			return 0, 0, fmt.Errorf("sector %d is not what was written", at)
		}
		i := slices.IndexFunc(f.contents, func(p []byte) bool { return bytes.Equal(p, now) })
		if i < 0 {
			return 0, 0, fmt.Errorf("sector %d has none of the %d contents it may have", at, len(f.contents))
		}
		lost++
		if i > 0 {
			between++
		}
	}
	copy(d.data, got)
	clear(d.unsure)
	if power {
		clear(d.open)
	}
	d.failed = false
	return lost, between, nil
}
