package cache

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"
	"testing/iotest"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
)

func TestCheckpointThatCannotBeIsRefused(t *testing.T) {
	const pages = regionPages + 10 // of the second region, 10 pages are in the device
	mixed := func(words ...uint64) *region {
		r := new(region)
		for i, w := range words {
			r.words[i].Store(w)
		}
		return r
	}
	for name, extents := range map[string][]extent{
		"descending":        {{first: 1, count: 1, state: Data}, {first: 0, count: 1, state: Data}},
		"overlap":           {{first: 0, count: 2, state: Data}, {first: 1, count: 1, state: Zero}},
		"empty":             {{first: 0, count: 0, state: Data}},
		"past the end":      {{first: 1, count: 2, state: Zero}},
		"unknown state":     {{first: 0, count: 1, state: 3}},
		"mixed but uniform": {{first: 0, count: 1, region: newPageMap(1).uniformRegion[Data]}},
		"mixed but absent":  {{first: 0, count: 1, region: mixed()}},
		"page in state 3":   {{first: 0, count: 1, region: mixed(3)}},
		"beyond the device": {{first: 1, count: 1, region: mixed(1 << 20)}},
	} {
		f, err := vfs.NewCrash(0).OpenFile("map", os.O_RDWR|os.O_CREATE, 0)
		must(t, err)
		h := mapHeader{size: pages * page, generation: 1, bootID: "b"}
		must(t, writeCheckpoint(f, &h, extents))
		if _, _, err := readCheckpoint(f, h.size); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// encodeMap returns a map file with a checkpoint of a few extents and a log.
func encodeMap(t testing.TB, size int64, log func(l *markLog)) []byte {
	c := vfs.NewCrash(0)
	f, err := c.OpenFile("map", os.O_RDWR|os.O_CREATE, 0)
	must(t, err)
	m := newPageMap(size)
	m.set(3, 4, Data)
	m.set(9, 1, Zero)
	m.set(regionPages, min(regionPages, m.pages-regionPages), Zero)
	h := mapHeader{size: size, generation: 1, nonce: 0x1234, bootID: "boot"}
	must(t, writeCheckpoint(f, &h, m.freeze()))
	l := newMarkLog(f, h)
	log(l)
	data, err := vfs.ReadFile(c, "map", 1<<30)
	must(t, err)
	return data[:min(int64(len(data)), l.offset(l.end))]
}

func decodeMap(data []byte, size int64, sameBoot bool) (*pageMap, error) {
	h, m, err := readCheckpoint(bytes.NewReader(data), size)
	if err != nil {
		return nil, err
	}
	return m, replay(bytes.NewReader(data), h, m, sameBoot)
}

const fuzzSize = 3*regionPages*page - 512

func someLog(t testing.TB) func(l *markLog) {
	return func(l *markLog) {
		must(t, l.appendMark(100, 50, Data))
		must(t, l.appendMark(120, 5000, Zero))
		must(t, l.appendBarrier(2, 0))
		must(t, l.appendMark(2*regionPages, regionPages, Data))
		must(t, l.appendBarrier(4, 2))
		must(t, l.appendMark(1, 1, Zero))
	}
}

// A header's checksum hides what is behind it from a fuzzer, so it mends that of the
// header, the checkpoint and the records.
func FuzzMapDecoder(f *testing.F) {
	f.Add(encodeMap(f, fuzzSize, someLog(f)), true)
	f.Add(encodeMap(f, fuzzSize, func(*markLog) {}), false)
	f.Fuzz(func(t *testing.T, data []byte, sameBoot bool) {
		for _, data := range [][]byte{data, mendMap(data)} {
			m, err := decodeMap(data, fuzzSize, sameBoot)
			if err != nil {
				if !errors.Is(err, manifest.ErrCorrupt) && !errors.Is(err, manifest.ErrVersion) {
					t.Fatalf("unexpected kind of error: %v", err)
				}
				continue
			}
			want := make([]PageState, m.pages)
			for i := range want {
				want[i] = m.state(int64(i))
			}
			checkPageMap(t, m, want)
			checkPageMap(t, roundTrip(t, m.freeze(), fuzzSize), want)
		}
	})
}

// mendMap returns a copy of a map file with correct checksums, where it has any.
func mendMap(data []byte) []byte {
	data = bytes.Clone(data)
	format := mapFormat()
	if len(data) < mapHeaderLen {
		return data
	}
	copy(data, format.AppendChecksum(bytes.Clone(data[:mapHeaderLen-manifest.ChecksumLen])))
	h, err := decodeMapHeader(data[:mapHeaderLen], fuzzSize)
	end := mapHeaderLen + h.checkpointLen
	if err != nil || end+manifest.ChecksumLen > int64(len(data)) {
		return data
	}
	copy(data[mapHeaderLen:], format.AppendChecksum(bytes.Clone(data[mapHeaderLen:end])))
	for slot, at := uint64(0), h.logStart(); at+slotLen <= int64(len(data)); slot, at = slot+1, at+slotLen {
		p := (*[slotLen]byte)(data[at:])
		rec, _ := decodeRecord(p, slot, h.nonce)
		rec.encode(p, slot, h.nonce)
	}
	return data
}

func TestFlippedBitOfACheckpointIsNoticed(t *testing.T) {
	data := encodeMap(t, fuzzSize, func(*markLog) {})
	end := mapHeaderLen + extentLen + regionLen + extentLen + manifest.ChecksumLen
	for i := range end {
		data[i] ^= 1 << (i % 8)
		if _, err := decodeMap(data, fuzzSize, true); err == nil {
			t.Errorf("bit %d of byte %d", i%8, i)
		}
		data[i] ^= 1 << (i % 8)
	}
	for n := range end {
		if _, err := decodeMap(data[:n], fuzzSize, true); !errors.Is(err, manifest.ErrCorrupt) {
			t.Errorf("first %d bytes: %v", n, err)
		}
	}
}

// states are the states of a map's first pages after so many records of someLog.
func statesAfter(t testing.TB, records int) []PageState {
	m := newPageMap(fuzzSize)
	m.set(3, 4, Data)
	m.set(9, 1, Zero)
	m.set(regionPages, regionPages, Zero)
	for i, change := range []func(){
		func() { m.set(100, 50, Data) },
		func() { m.set(120, 5000, Zero) },
		func() {},
		func() { m.set(2*regionPages, regionPages, Data) },
		func() {},
		func() { m.set(1, 1, Zero) },
	} {
		if i < records {
			change()
		}
	}
	s := make([]PageState, m.pages)
	for i := range s {
		s[i] = m.state(int64(i))
	}
	return s
}

func TestLogTornAtAnyPlaceKeepsWhatItPromised(t *testing.T) {
	data := encodeMap(t, fuzzSize, someLog(t))
	start := len(data) - 6*slotLen
	covered := []int{0, 0, 0, 2, 2, 4, 4} // by the barriers among the first n records
	for cut := start; cut <= len(data); cut += 16 {
		n := (cut - start) / slotLen
		for _, torn := range [][]byte{
			data[:cut],
			append(bytes.Clone(data[:cut]), make([]byte, 10_000)...),
			append(bytes.Clone(data[:cut]), bytes.Repeat([]byte{0xa5}, 10_000)...),
		} {
			for sameBoot, records := range map[bool]int{true: n, false: covered[n]} {
				m, err := decodeMap(torn, fuzzSize, sameBoot)
				if err != nil {
					t.Fatalf("cut at record %d, same boot %v: %v", n, sameBoot, err)
				}
				checkStates(t, m, statesAfter(t, records))
			}
		}
	}
}

func checkStates(t testing.TB, m *pageMap, want []PageState) {
	t.Helper()
	for i, s := range want {
		if m.state(int64(i)) != s {
			t.Fatalf("page %d is %v, want %v", i, m.state(int64(i)), s)
		}
	}
}

func TestDamageInsideTheLogIsNoEnd(t *testing.T) {
	data := encodeMap(t, fuzzSize, someLog(t))
	start := len(data) - 6*slotLen
	for n := range 6 {
		damaged := bytes.Clone(data)
		damaged[start+n*slotLen+9] ^= 4

		// The kernel had everything in memory, so only the last record can be torn.
		_, err := decodeMap(damaged, fuzzSize, true)
		if want := n < 5; errors.Is(err, manifest.ErrCorrupt) != want {
			t.Errorf("same boot, record %d: %v", n, err)
		}
		// The second barrier says that the first, of two records, was finished. What
		// follows may have reached the disk in any order.
		m, err := decodeMap(damaged, fuzzSize, false)
		if want := n < 2; errors.Is(err, manifest.ErrCorrupt) != want {
			t.Errorf("other boot, record %d: %v", n, err)
		}
		if err == nil && n >= 2 {
			checkStates(t, m, statesAfter(t, map[int]int{2: 0, 3: 2, 4: 2, 5: 4}[n]))
		}
	}
}

func TestUnreadableMapIsAnErrorAndNotAnEnd(t *testing.T) {
	data := encodeMap(t, fuzzSize, someLog(t))
	for bad := int64(0); bad < int64(len(data)); bad += 512 {
		r := badSector{bytes.NewReader(data), bad}
		h, m, err := readCheckpoint(r, fuzzSize)
		if err == nil {
			err = replay(r, h, m, false)
		}
		// Between checkpoint and log nobody reads.
		gap := bad > mapHeaderLen+extentLen*2+regionLen+4 && bad < h.logStart()
		if !gap && !errors.Is(err, iotest.ErrTimeout) {
			t.Errorf("bad sector at %d: %v", bad, err)
		}
	}
}

// badSector fails reads that touch the sector at the offset.
type badSector struct {
	io.ReaderAt
	offset int64
}

func (b badSector) ReadAt(p []byte, off int64) (int, error) {
	if off < b.offset+512 && b.offset < off+int64(len(p)) {
		return 0, fmt.Errorf("sector at %d: %w", b.offset, iotest.ErrTimeout)
	}
	return b.ReaderAt.ReadAt(p, off)
}
