package volume

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
)

// ErrFull: this host may cache no more clean bytes.
var ErrFull = errors.New("the cache is full")

const (
	// reserve is the share of a filesystem that clean bytes leave free, unless
	// they have a limit of their own: a tenth.
	reserve = 10

	// measureEvery is how old a measurement may get, and measureShare how many
	// times as long as it took it is good for even when there is no room left.
	measureEvery = time.Second
	measureShare = 10

	// A step is how many bytes may be added between two measurements, and evicted
	// at a time beyond what is needed: a share of the limit, within bounds.
	stepShare        = 64
	minStep, maxStep = 64 << 10, 64 << 20

	// makeRoomRounds bounds how often what was evicted may turn out too little, as
	// other processes add meanwhile.
	makeRoomRounds = 16

	// evictorPatience bounds the wait for another process that is evicting.
	evictorPatience = 2 * time.Second
	evictorPoll     = 2 * time.Millisecond

	evictorName = "evictor"
)

// A Budget bounds the clean bytes of a host: all bases and clean layers of a state
// directory, whichever processes fill them. All methods are safe for concurrent
// use; those of a nil Budget find that everything fits.
//
// Each process counts what it adds, and measures what there is at least once for
// each step of it, a sixty-fourth of the limit and at most 64 MiB. So the host is
// over the limit by no more than one step for each process that adds.
//
// To make room the Budget evicts, in this order:
//
//   - whole bases that nobody has open, that which was opened least recently first;
//   - the clean layers of volumes that nobody has open, in the same order;
//   - of the layers that this process has open, roughly the blocks that it used
//     least recently. Of how other processes use them it knows nothing.
//
// The last only for reads and writes, and never for background work.
type Budget struct {
	fs    vfs.FS
	state string
	limit int64
	log   *slog.Logger

	// rounds counts the evictions that freed something.
	rounds  atomic.Int64
	evicted atomic.Int64 // bytes freed by these, roughly

	// evicting is held by who evicts, one at a time in this process; it guards
	// layers and hand. It may be taken while the locks of writers are held, so no
	// lock of a Device or Volume is waited for under it.
	evicting sync.Mutex
	layers   []*evictable // that this process has open
	hand     hand

	mu       sync.Mutex // guards the fields below; taken after evicting
	room     int64      // bytes that may be added: as measured, less what was added since
	added    int64      // since then
	pending  int64      // admitted and not done: a measurement may lack them
	total    int64      // size of the filesystem
	measured time.Time
	cost     time.Duration // of that measurement
	barred   bool          // the background had no room, and there has not been much since
	pressed  bool          // a write found the disk full, and its reserve has not been free since
}

// NewBudget returns the budget of the state directory, which is on the filesystem
// fsys. limit is in bytes; 0 leaves a tenth of the filesystem free.
func NewBudget(fsys vfs.FS, state string, limit int64, log *slog.Logger) *Budget {
	return &Budget{fs: fsys, state: state, limit: limit, log: log}
}

// aheadShare is how much of the limit one sequential reader may fill with what it
// has not read yet: with more, several would evict each other's.
const aheadShare = 8

// bound returns how many of n bytes may be read ahead within the limit.
func (b *Budget) bound(n int64) int64 {
	if b == nil || b.limit == 0 {
		return n
	}
	return min(n, b.limit/aheadShare)
}

// admit counts n bytes that are about to be cached: for a read, which may evict
// what is in use, or in the background. Without error they may be, and the caller
// calls done when they are, or are not after all; ErrFull.
func (b *Budget) admit(n int64, forRead bool) error {
	_, err := b.admitSome(1, n, forRead)
	return err
}

// admitSome is admit for as many of n units of size bytes as there is room for, and
// returns how many. ErrFull: fewer than n.
func (b *Budget) admitSome(n int, size int64, forRead bool) (int, error) {
	if b == nil {
		return n, nil
	}
	want := int64(n) * size
	granted, err := b.take(want, want, forRead)
	if granted == 0 && err == nil {
		granted, err = b.makeRoom(want, size, forRead)
	}
	if err == nil && granted < want {
		err = errNoRoom
		b.bar(forRead)
	}
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrFull, err)
	}
	return int(granted / size), err
}

var errNoRoom = errors.New("the clean bytes of this host are as many as --cache-size allows, or less than a tenth of the filesystem is free")

// done says that bytes that were admitted have been written, or will not be.
func (b *Budget) done(n int64) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.pending -= n
}

// bar keeps the background out until there is more room than reads leave.
func (b *Budget) bar(forRead bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.barred = b.barred || !forRead
}

// take grants n bytes, or as many units of size bytes as there is room for.
func (b *Budget) take(n, size int64, forRead bool) (granted int64, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	age := time.Since(b.measured)
	if b.added+n > b.step() || age > measureEvery || n > b.room && age > measureShare*b.cost {
		if err := b.measure(); err != nil {
			return 0, err
		}
	}
	return b.grant(n, size, forRead), nil
}

// grant is take with mu held.
func (b *Budget) grant(n, size int64, forRead bool) int64 {
	if !forRead {
		// What a read leaves of the room it made is for the next read.
		b.barred = b.barred && b.room < 2*b.step()
		if b.barred || b.pressed {
			return 0
		}
	}
	n = min(n, max(0, b.room)) / size * size
	b.room -= n
	b.added += n
	b.pending += n
	return n
}

// measure finds out how much room there is. mu is held.
func (b *Budget) measure() error {
	begin := time.Now()
	total, free, err := b.fs.Space(b.state)
	if err != nil {
		return fmt.Errorf("look for free space: %w", err)
	}
	b.total = total
	spare := free - total/reserve
	b.pressed = b.pressed && spare < 0
	b.room = spare
	if b.limit > 0 {
		used, err := b.cleanBytes()
		if err != nil {
			return err
		}
		b.room = b.limit - used
	}
	b.room -= b.pending
	b.added, b.measured, b.cost = 0, time.Now(), time.Since(begin)
	return nil
}

// step is a share of the limit or, without one, of a sixteenth of the filesystem. mu
// is held.
func (b *Budget) step() int64 {
	limit := b.limit
	if limit == 0 {
		limit = b.total / 16
	}
	return min(max(limit/stepShare, minStep), maxStep)
}

// cleanBytes returns the space that all clean layers of the host take.
func (b *Budget) cleanBytes() (int64, error) {
	total := int64(0)
	add := func(dir string) error {
		n, err := cache.CleanAllocated(b.fs, dir)
		total += n
		return err
	}
	if err := errors.Join(b.eachBase(add), b.eachVolume(func(dir string) error { return add(cleanDir(dir)) })); err != nil {
		return 0, fmt.Errorf("measure the clean bytes of this host: %w", err)
	}
	return total, nil
}

// makeRoom evicts until n bytes fit, and grants them, or as many units of size bytes
// as there is room for.
func (b *Budget) makeRoom(n, size int64, forRead bool) (int64, error) {
	b.evicting.Lock()
	defer b.evicting.Unlock()
	if granted, err := b.take(n, n, forRead); granted > 0 || err != nil { // somebody else made room
		return granted, err
	}
	release, err := b.lockEvictor()
	if err != nil {
		return 0, err
	}
	defer release()
	for range makeRoomRounds {
		short, err := b.shortage(n, forRead)
		if err != nil {
			return 0, err
		}
		if short <= 0 {
			break
		}
		how := idle
		if forRead {
			how = own
		}
		freed := b.evict(short, how)
		if b.replaces(freed, forRead) || freed == 0 {
			break
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.grant(n, size, forRead), nil
}

// replaces reports whether what was freed for a read is room enough, whoever else
// filled the disk; it then is the room there is.
func (b *Budget) replaces(freed int64, forRead bool) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.limit > 0 || !forRead {
		return false
	}
	b.room = max(b.room, freed)
	return true
}

// shortage measures, and returns how many bytes to evict so that n more fit; 0 or
// less: they do.
func (b *Budget) shortage(n int64, forRead bool) (int64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.measure(); err != nil {
		return 0, err
	}
	if n <= b.room {
		return 0, nil
	}
	short := n - b.room + b.step()
	if b.limit == 0 && forRead {
		// Others than us may have filled the disk. What reads cache must not grow
		// then, but need not make up for them at once.
		short = min(short, n+b.step())
	}
	return short, nil
}

// reclaim evicts at least want bytes, if there are so many, because something
// found the disk full. seen is what rounds was before that. It reports whether it
// is worth trying again.
func (b *Budget) reclaim(seen, want int64, how reach) bool {
	if b == nil {
		return false
	}
	b.evicting.Lock()
	defer b.evicting.Unlock()
	if b.rounds.Load() != seen {
		return true
	}
	release, err := b.lockEvictor()
	if err != nil {
		return false
	}
	defer release()
	freed := b.evict(want, how)
	b.mu.Lock()
	b.pressed = true
	b.measured = time.Time{}
	b.mu.Unlock()
	return freed > 0
}

// lockEvictor makes this process the only one that evicts. The lock saves work, and
// keeps two evictors from getting into each other's way, no more: so one that
// cannot be had, on a full disk for instance, is done without.
func (b *Budget) lockEvictor() (release func(), err error) {
	var lock io.Closer
	for end := time.Now().Add(evictorPatience); ; time.Sleep(evictorPoll) {
		lock, err = b.fs.Lock(filepath.Join(b.state, evictorName), true)
		if err == nil {
			return func() { b.warn("unlock the evictor", lock.Close()) }, nil
		}
		if !errors.Is(err, vfs.ErrLocked) {
			return func() {}, nil
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("another process is evicting: %w", err)
		}
	}
}

// warn logs an error that stands in the way of evicting something.
func (b *Budget) warn(what string, err error) {
	if err != nil && !errors.Is(err, vfs.ErrStopped) {
		b.log.Warn("eviction: could not "+what, "error", err)
	}
}
