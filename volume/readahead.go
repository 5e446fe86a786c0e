package volume

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lazyvol/lazyvol/manifest"
)

const (
	// aheadStreams is how many sequential readers a device follows at once.
	aheadStreams = 8

	// aheadAfter is how many reads must miss, each right behind the one
	// before, until they count as a stream.
	aheadAfter = 3

	// A stream is read ahead by so many bytes at first, and then by twice as
	// much each time.
	aheadFirst = 2 << 20

	// aheadPatience is how long a stream waits for its reader. Whoever comes by
	// later is another one.
	aheadPatience = 5 * time.Second

	// aheadSpan bounds one request, so that a window takes several at once, and
	// its first blocks do not wait for the last.
	aheadSpan = 4 << 20
)

// noBlock is none: no read touches it.
const noBlock = -1

// A readahead finds sequential streams among the reads that miss. Random reads
// never amount to one, so they fetch what they touch and nothing else.
type readahead struct {
	blockSize   int64
	first, most int64 // blocks of the smallest and the largest window

	// next is, for each stream, the block whose reading makes it go on. Every
	// read looks at it, so it is kept apart from the lock.
	next [aheadStreams]atomic.Int64

	mu      sync.Mutex // guards what follows, and writes to next
	streams [aheadStreams]stream
	clock   uint64    // counts the uses of streams
	rests   time.Time // nothing is read ahead until then
}

// A stream is a sequential reader, or what may become one.
type stream struct {
	reads  int   // that missed, one behind the other
	last   int64 // the highest block they touched
	window int64 // blocks that were last read ahead; 0: none yet
	end    int64 // the first block that was not
	used   uint64
	since  time.Time // the last use
}

// newReadahead returns one that reads at most so many bytes ahead at a time.
func newReadahead(blockSize int, most int64) *readahead {
	r := &readahead{blockSize: int64(blockSize)}
	r.most = max(1, most/r.blockSize)
	r.first = min(max(1, aheadFirst/r.blockSize), r.most)
	for i := range r.next {
		r.next[i].Store(noBlock)
		r.streams[i].last = noBlock - 2 // next to no block
	}
	return r
}

// follow learns of a read of the blocks from first to last, and whether some of
// them were missing. It returns which blocks to read ahead: n of them.
func (r *readahead) follow(first, last int64, missed bool) (from, n int64) {
	i := r.reaches(first, last)
	if i < 0 && !missed {
		return 0, 0
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if i < 0 || r.next[i].Load() < first || r.next[i].Load() > last { // another read was faster
		if !missed {
			return 0, 0
		}
		if i = r.behind(first, last); i < 0 {
			return 0, 0
		}
	}
	s := &r.streams[i]
	if s.window > 0 && time.Since(s.since) > aheadPatience {
		r.begin(i, last)
		return 0, 0
	}
	if time.Now().Before(r.rests) {
		r.begin(i, last)
		return 0, 0
	}
	from = max(s.end, last+1)
	s.window = max(min(2*s.window, r.most), r.first)
	s.end = from + s.window
	r.touch(s)
	r.next[i].Store(from)
	return from, s.window
}

// rest stops reading ahead for a while: what is fetched now cannot be kept until
// it is read.
func (r *readahead) rest() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rests = time.Now().Add(aheadPatience)
}

// reaches returns the stream that goes on with a read of these blocks, or -1.
func (r *readahead) reaches(first, last int64) int {
	for i := range r.next {
		if b := r.next[i].Load(); b >= first && b <= last {
			return i
		}
	}
	return -1
}

// behind finds the stream that a read which missed continues, and returns it if
// it is time to read ahead, else -1. A read that continues none may begin one.
// r.mu is held.
func (r *readahead) behind(first, last int64) int {
	oldest := 0
	for i := range r.streams {
		s := &r.streams[i]
		switch {
		case s.window > 0 && first >= s.end-2*s.window && first < s.end:
			return -1 // on its way already
		case s.window > 0 && first == s.end:
			return i
		case s.window == 0 && last > s.last && first >= s.last-1 && first <= s.last+1:
			s.reads, s.last = s.reads+1, last
			r.touch(s)
			if s.reads < aheadAfter {
				return -1
			}
			return i
		case s.older(&r.streams[oldest]):
			oldest = i
		}
	}
	r.begin(oldest, last)
	return -1
}

// begin makes of a read that missed what may become a stream. r.mu is held.
func (r *readahead) begin(i int, last int64) {
	s := &r.streams[i]
	*s = stream{reads: 1, last: last}
	r.touch(s)
	r.next[i].Store(noBlock)
}

// older reports whether s is rather given up than o: one that was never read
// ahead, and then the one whose last use is longer ago.
func (s *stream) older(o *stream) bool {
	if (s.window == 0) != (o.window == 0) {
		return s.window == 0
	}
	return s.used < o.used
}

func (r *readahead) touch(s *stream) {
	r.clock++
	s.used, s.since = r.clock, time.Now()
}

// readAhead fetches what a sequential reader will want after n bytes at off, in
// the background.
func (d *Device) readAhead(v *view, off, n int64, missed bool) {
	if d.ahead == nil || v.image == nil || n <= 0 {
		return
	}
	from, count := d.ahead.follow(off/d.ahead.blockSize, (off+n-1)/d.ahead.blockSize, missed)
	count = min(count, v.blocks()-from)
	if count <= 0 {
		return
	}
	v.refs.Add(1)
	started := d.work.start(func(ctx context.Context) {
		defer v.release()
		d.prefetch(ctx, v, from, count)
	})
	if !started {
		v.release()
	}
}

// prefetch starts flights for those of count blocks that are missing. What
// fails is told to whoever reads it.
func (d *Device) prefetch(ctx context.Context, v *view, from, count int64) {
	if d.trusted() != nil {
		return
	}
	ctx, cancel := context.WithTimeoutCause(ctx, d.host.ReadDeadline, errDeadline)
	defer cancel()
	blocks := make([]int64, count)
	for i := range blocks {
		blocks[i] = from + int64(i)
	}
	blocks, refs, err := d.lacking(ctx, v, blocks)
	if err != nil {
		return
	}
	d.flights.mu.Lock()
	defer d.flights.mu.Unlock()
	fresh := 0
	for i, block := range blocks {
		layer, _ := d.place(block)
		if has, err := layer.Has(block); has || err != nil {
			continue // it landed meanwhile
		}
		key := flightKey{v.image, block}
		if _, warming := d.flights.warming[key]; warming || d.flights.table[key] != nil {
			continue
		}
		d.flights.add(v, block)
		blocks[fresh], refs[fresh] = block, refs[i]
		fresh++
	}
	for _, run := range manifest.GroupRuns(blocks[:fresh], refs[:fresh], maxRunGap, aheadSpan) {
		d.launch(v, run)
	}
}
