package volume

import (
	"context"
	"fmt"
	"hash/crc32"
	"hash/fnv"
	"io"
	"io/fs"
	"math/rand/v2"
	"runtime"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"testing/synctest"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/internal/vfs"
)

// A turnstile lets the goroutines of a run make their calls, of the filesystem
// and of the store, one after the other. Whenever all of them wait, for each
// other or for their turn, it draws who is next. So a seed decides on the whole
// run, however many goroutines there are, and a run can stop at any call while
// others are in the midst of theirs.
//
// It needs GOMAXPROCS=1: then, while it runs, nobody else does, and the runtime's
// count of goroutines that could is exact. That way it also knows of those that
// wait for a mutex, which synctest takes for running.
type turnstile struct {
	rng     *rand.Rand
	alone   int           // goroutines there are when nobody but the script runs
	arrived chan struct{} // somebody waits
	count   []metrics.Sample

	mu      sync.Mutex // guards waiting
	waiting []turn
}

type turn struct {
	key  string
	pass chan struct{}
}

func newTurnstile(seed uint64) *turnstile {
	t := &turnstile{
		rng: rand.New(rand.NewPCG(seed, 2)), arrived: make(chan struct{}, 1),
		count: []metrics.Sample{{Name: "/sched/goroutines/runnable:goroutines"}},
	}
	go t.run()
	return t
}

// settle waits until nobody but the caller runs, who says that it has ended the
// others.
func (t *turnstile) settle() {
	synctest.Wait()
	if t != nil {
		t.alone = runtime.NumGoroutine()
	}
}

// enter waits for the caller's turn.
func (t *turnstile) enter(op, name string, off int64) {
	if t == nil || runtime.NumGoroutine() <= t.alone {
		return
	}
	me := turn{fmt.Sprint(op, " ", name, " ", off), make(chan struct{})}
	t.mu.Lock()
	t.waiting = append(t.waiting, me)
	t.mu.Unlock()
	select {
	case t.arrived <- struct{}{}:
	default:
	}
	<-me.pass
}

func (t *turnstile) run() {
	for range t.arrived {
		for {
			for t.busy() {
				runtime.Gosched()
			}
			if !t.next() {
				break
			}
		}
	}
}

// busy reports whether any goroutine could go on without us.
func (t *turnstile) busy() bool {
	metrics.Read(t.count)
	return t.count[0].Value.Uint64() > 0
}

// next lets one of those who wait pass, and reports whether there was one.
func (t *turnstile) next() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(t.waiting)
	if n == 0 {
		return false
	}
	// In which order they came does not count.
	slices.SortStableFunc(t.waiting, func(a, b turn) int { return strings.Compare(a.key, b.key) })
	i := 0
	if n > 1 {
		i = t.rng.IntN(n)
	}
	close(t.waiting[i].pass)
	t.waiting = slices.Delete(t.waiting, i, i+1)
	return true
}

func (t *turnstile) close() {
	if t != nil {
		close(t.arrived)
	}
}

// A tap is the filesystem and the store as the host of a run sees them: each call
// waits for its turn, is added to the trace, and counted.
type tap struct {
	turns *turnstile // nil: calls may be made at once
	crash *vfs.Crash

	mu        sync.Mutex // guards all below
	trace     uint64     // digest of all calls so far, and what came of them
	calls     int
	tell      func(string) // if set, is told of each call
	tally     map[string]int
	unlogged  map[string]bool // maps of write layers with records that were not synced
	armed     bool            // a fault is to happen
	target    *target         // nil: none
	aiming    bool            // now, and not while the run looks at what became of it
	failing   bool            // a call was made to fail since the calm
	power     bool            // the armed stop is a power cut
	request   int             // requests until the process stops; negative: it does not
	lostReply bool            // it stops before it hears of the request

	committed bool // an outcome was put, and the record does not say so yet

	// syncFailed is told, with mu held, of each file that the disk failed to
	// make durable.
	syncFailed func(name string)

	// situation tells what goes on when a call on a kind of file goes wrong.
	situation func(op, kind string) []string
}

func (t *tap) note(what string) { t.tally[what]++ }

// kind says what a file is for.
func kind(name string) string {
	parts := strings.Split(strings.TrimPrefix(name, "/state/"), "/")
	last := parts[len(parts)-1]
	switch {
	case last == "lock" || last == "hydrator":
		return "lock"
	case parts[0] == "bases" && len(parts) > 3:
		return "base " + last
	case parts[0] == "volumes" && len(parts) == 3 && strings.HasPrefix(last, "volume.json"):
		return "record"
	case parts[0] == "volumes" && len(parts) == 3 && strings.HasPrefix(last, rootPrefix):
		return "root copy"
	case len(parts) == 5 && parts[2] == "layers" && strings.HasPrefix(last, "map"):
		return "layer map"
	case len(parts) == 5 && parts[2] == "layers":
		return "layer " + last
	case len(parts) == 4 && parts[2] == "clean":
		return "clean " + strings.TrimSuffix(last, ".tmp")
	}
	return "folder"
}

// A target is a call that is to go wrong, whenever it is made: the first after
// skip others of its sort.
type target struct {
	what string
	skip int
	err  error // nil: the process stops

	power bool // it is a power cut
}

// anyCall is a target that each call is.
const anyCall = "any call"

// strike makes the call to come go wrong if it is the target. mu is held.
func (t *tap) strike(op, kind string) {
	g := t.target
	if g == nil || !t.aiming || t.crash.Stopped() {
		return
	}
	if g.what != anyCall && g.what != op+" "+kind && !slices.Contains(t.situation(op, kind), g.what) {
		return
	}
	if g.skip--; g.skip >= 0 {
		return
	}
	if g.err == nil {
		t.power = g.power
		t.crash.StopCall(0)
	} else {
		t.crash.FailCall(0, g.err)
	}
	t.target, t.armed = nil, true
}

// do makes one call of the filesystem.
func (t *tap) do(op, name string, off int64, data []byte, fn func() error) error {
	t.turns.enter(op, name, off)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.strike(op, kind(name))
	err := fn()
	t.record(op, name, off, data, err)
	t.observe(op, name, err)
	return err
}

func (t *tap) record(op, name string, off int64, data []byte, err error) {
	h := fnv.New64a()
	fmt.Fprint(h, t.trace, op, name, off, len(data), crc32.ChecksumIEEE(data), err)
	t.trace = h.Sum64()
	t.calls++
	if t.tell != nil {
		t.tell(fmt.Sprintf("%s %s %d+%d %v", op, name, off, len(data), err))
	}
}

// observe keeps book of the states in which something may go wrong.
func (t *tap) observe(op, name string, err error) {
	k := kind(name)
	if t.armed && t.crash.Faulted() {
		t.armed = false
		t.hit(op, k)
	}
	if err != nil {
		if op == "sync" && t.syncFailed != nil && !t.crash.Stopped() {
			t.syncFailed(name)
		}
		return
	}
	switch {
	case k == "layer map" && op == "write":
		t.unlogged[name] = true
	case k == "layer map" && (op == "sync" || op == "remove"):
		delete(t.unlogged, name)
	case k == "record" && op == "rename":
		t.committed = false
	}
}

// hit notes where something went wrong.
func (t *tap) hit(op, kind string) {
	if !t.crash.Stopped() {
		t.failing = true
		t.note("failed: " + op + " " + kind)
		for _, what := range t.situation(op, kind) {
			t.note("failed: " + what)
		}
		return
	}
	how := "killed"
	if t.power {
		how = "power cut"
	}
	t.note(how + ": " + op + " " + kind)
	if t.committed {
		t.note(how + " between outcome and record")
	}
	if len(t.unlogged) > 0 {
		t.note(how + " with unsynced log records")
	}
	for _, what := range t.situation(op, kind) {
		t.note(how + " " + what)
	}
}

// aim says whether a call that is the target is to go wrong.
func (t *tap) aim(now bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.aiming = now
}

// hold lets no target be hit until aim is called, with what it returns.
func (t *tap) hold() (aiming bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	aiming, t.aiming = t.aiming, false
	return aiming
}

// stopAt makes the process stop at a request from now.
func (t *tap) stopAt(request int, lostReply bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.request, t.lostReply = request, lostReply
}

// A tapFS is the tap's filesystem.
type tapFS struct {
	*tap
	vfs.FS
}

func (t tapFS) OpenFile(name string, flag int, perm fs.FileMode) (f vfs.File, err error) {
	err = t.do("open", name, int64(flag), nil, func() error {
		f, err = t.FS.OpenFile(name, flag, perm)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &tapFile{t.tap, name, f}, nil
}

func (t tapFS) MkdirAll(name string, perm fs.FileMode) error {
	return t.do("mkdir", name, 0, nil, func() error { return t.FS.MkdirAll(name, perm) })
}

func (t tapFS) Rename(oldName, newName string) error {
	return t.do("rename", newName, 0, nil, func() error { return t.FS.Rename(oldName, newName) })
}

func (t tapFS) Remove(name string) error {
	return t.do("remove", name, 0, nil, func() error { return t.FS.Remove(name) })
}

func (t tapFS) RemoveAll(name string) error {
	return t.do("remove", name, -1, nil, func() error { return t.FS.RemoveAll(name) })
}

func (t tapFS) ReadDir(name string) (names []string, err error) {
	err = t.do("list", name, 0, nil, func() error {
		names, err = t.FS.ReadDir(name)
		return err
	})
	return names, err
}

func (t tapFS) Link(oldName, newName string) error {
	return t.do("link", newName, 0, nil, func() error { return t.FS.Link(oldName, newName) })
}

func (t tapFS) Links(name string) (n int, err error) {
	err = t.do("count names", name, 0, nil, func() error {
		n, err = t.FS.Links(name)
		return err
	})
	return n, err
}

func (t tapFS) Space(name string) (total, free int64, err error) {
	err = t.do("statfs", name, 0, nil, func() error {
		total, free, err = t.FS.Space(name)
		return err
	})
	return total, free, err
}

func (t tapFS) Allocated(name string) (n int64, err error) {
	err = t.do("measure", name, 0, nil, func() error {
		n, err = t.FS.Allocated(name)
		return err
	})
	return n, err
}

func (t tapFS) SyncDir(name string) error {
	return t.do("sync folder", name, 0, nil, func() error { return t.FS.SyncDir(name) })
}

func (t tapFS) Lock(name string, exclusive bool) (l io.Closer, err error) {
	err = t.do("lock", name, 0, nil, func() error {
		l, err = t.FS.Lock(name, exclusive)
		return err
	})
	return l, err
}

type tapFile struct {
	*tap
	name string
	vfs.File
}

func (f *tapFile) ReadAt(p []byte, off int64) (n int, err error) {
	err = f.do("read", f.name, off, p, func() error {
		n, err = f.File.ReadAt(p, off)
		return err
	})
	return n, err
}

func (f *tapFile) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.do("write", f.name, off, p, func() error {
		n, err = f.File.WriteAt(p, off)
		return err
	})
	return n, err
}

func (f *tapFile) Sync() error { return f.do("sync", f.name, 0, nil, f.File.Sync) }

func (f *tapFile) Truncate(size int64) error {
	return f.do("truncate", f.name, size, nil, func() error { return f.File.Truncate(size) })
}

func (f *tapFile) Size() (size int64, err error) {
	err = f.do("stat", f.name, 0, nil, func() error {
		size, err = f.File.Size()
		return err
	})
	return size, err
}

func (f *tapFile) PunchHole(off, n int64) error {
	return f.do("punch", f.name, off, nil, func() error { return f.File.PunchHole(off, n) })
}

func (f *tapFile) SeekData(off int64) (at int64, err error) {
	err = f.do("seek", f.name, off, nil, func() error {
		at, err = f.File.SeekData(off)
		return err
	})
	return at, err
}

func (f *tapFile) SeekHole(off int64) (at int64, err error) {
	err = f.do("seek", f.name, off, nil, func() error {
		at, err = f.File.SeekHole(off)
		return err
	})
	return at, err
}

// A tapStore is the tap's store. Nothing of a process that has stopped reaches it.
type tapStore struct {
	*tap
	store blockstore.Store
}

func (s tapStore) ask(ctx context.Context, op, key string, off int64, data []byte, fn func() error) error {
	if ctx.Err() != nil {
		// Whether what was ended still comes this far is the scheduler's to say, and
		// nothing comes of it.
		return fmt.Errorf("%s %s: %w", op, key, context.Cause(ctx))
	}
	s.turns.enter(op, key, off)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.crash.Stopped() {
		return fmt.Errorf("%s %s: %w", op, key, vfs.ErrStopped)
	}
	s.request--
	stops := s.request == -1
	if stops && !s.lostReply {
		s.stop(op, key)
		return fmt.Errorf("%s %s: %w", op, key, vfs.ErrStopped)
	}
	err := fn()
	s.record(op, key, off, data, err)
	if err == nil && op == "put" && strings.HasPrefix(key, "outcomes/") {
		s.committed = true
	}
	if stops {
		s.stop(op, key)
		return fmt.Errorf("%s %s: %w", op, key, vfs.ErrStopped)
	}
	return err
}

// stop stops the process at a request.
func (s tapStore) stop(op, key string) {
	s.armed = false
	s.crash.StopCall(0)
	_, _ = s.crash.ReadDir("/") // is told so
	what, _, _ := strings.Cut(key, "/")
	s.hit(op, "of "+what)
}

func (s tapStore) String() string { return s.store.String() }

func (s tapStore) Get(ctx context.Context, key string, limit int64) (data []byte, etag string, err error) {
	err = s.ask(ctx, "get", key, 0, nil, func() error {
		data, etag, err = s.store.Get(ctx, key, limit)
		return err
	})
	return data, etag, err
}

func (s tapStore) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	return s.ask(ctx, "fetch", key, off, p, func() error { return s.store.ReadRange(ctx, key, off, p) })
}

func (s tapStore) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (etag string, err error) {
	err = s.ask(ctx, "put", key, 0, data, func() error {
		etag, err = s.store.Put(ctx, key, data, c)
		return err
	})
	return etag, err
}

func (s tapStore) Delete(ctx context.Context, keys ...string) error {
	return s.ask(ctx, "delete", strings.Join(keys, " "), 0, nil, func() error { return s.store.Delete(ctx, keys...) })
}

func (s tapStore) List(ctx context.Context, prefix string, fn func(blockstore.Info) error) error {
	// What fn does is not part of the call.
	var found []blockstore.Info
	err := s.ask(ctx, "list", prefix, 0, nil, func() error {
		return s.store.List(ctx, prefix, func(info blockstore.Info) error {
			found = append(found, info)
			return nil
		})
	})
	for _, info := range found {
		if err == nil {
			err = fn(info)
		}
	}
	return err
}
