package volume

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// An ordeal is a long run of a host: random work on its volumes, while a
// hydrator, readers and evictors do theirs, with calls that fail, and the end of
// the process, or of the power, at any call. It goes on after each.
type ordeal struct {
	*world
	t       *testing.T
	tap     *tap
	script  *actor
	volumes []*subject
	images  []*image // committed and not deleted, in the order in which they were made
	writes  uint64   // contents written so far
	mounts  int
	doing   string       // what the script does
	writing atomic.Int64 // calls of WriteAt and Zero under way
	helpers atomic.Int64 // actors at work besides the script
	history []string
	mu      sync.Mutex // guards history, and images and doing
	broken  bool       // the store is
	lonely  bool       // nobody works besides the script
	tight   bool       // the disk is full, or nearly
	failed  []string   // files that the disk failed to make durable; guarded by tap.mu
}

// A subject is a volume and what it should hold.
type subject struct {
	id      manifest.VolumeID
	v       *Volume
	disk    *disk
	hurt    bool // a sync of its files failed: it must be opened again
	attempt *attempt
	tried   []int64 // sizes that it was to have since it was opened, and may have when it is opened again
}

// An attempt is a snapshot that is being made, or of which we do not know yet
// what became.
type attempt struct {
	image
	before fork
}

// An image is a snapshot and what it should hold.
type image struct {
	id   manifest.SnapshotID
	data []byte
}

// An actor does things, deterministically by its own numbers.
type actor struct {
	*ordeal
	rng *rand.Rand
}

func (a *actor) pick(n int) int { return a.rng.IntN(n) }

// errViolated: a promise was broken.
var errViolated = errors.New("VIOLATED")

func violated(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errViolated, fmt.Sprintf(format, args...))
}

// runOrdeal runs the ordeal of a seed and returns the digest of its trace. turns
// says that one goroutine runs at a time, so that the run can be repeated.
func runOrdeal(t *testing.T, seed uint64, steps int, turns bool, tally map[string]int, tell func(string)) (trace uint64) {
	t.Helper()
	cryptotest.SetGlobalRandom(t, seed) // ids, nonces
	if turns {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
		// A goroutine that helps the collector waits, and looks idle.
		defer debug.SetGCPercent(debug.SetGCPercent(-1))
	}
	synctest.Test(t, func(t *testing.T) {
		o := newOrdeal(t, seed, turns, tally, tell)
		defer func() {
			o.abandon()
			o.tap.turns.close()
		}()
		for range steps {
			o.step()
		}
		o.conclude()
		trace = o.tap.trace
	})
	if turns {
		runtime.GC()
	}
	return trace
}

func newOrdeal(t *testing.T, seed uint64, turns bool, tally map[string]int, tell func(string)) *ordeal {
	o := &ordeal{t: t, world: &world{tester: t, ctx: t.Context(), crash: vfs.NewCrash(seed), key: keyOf(seed)}}
	o.tester, o.lonely = telling{t, o}, seed%2 == 1
	o.script = &actor{o, rand.New(rand.NewPCG(seed, 1))}
	o.tap = &tap{
		crash: o.crash, tally: tally, tell: tell, unlogged: make(map[string]bool), request: -1,
		situation: o.situation, syncFailed: func(name string) { o.failed = append(o.failed, name) },
	}
	if turns {
		o.tap.turns = newTurnstile(seed)
	}
	o.mem = blockstore.NewMem()
	o.store = blockstoretest.NewFaulty(tapStore{o.tap, o.mem})
	if _, err := snapshot.Init(o.ctx, o.mem); err != nil {
		t.Fatal(err)
	}
	o.must(o.crash.MkdirAll("/state", 0o700))
	o.must(o.crash.SyncDir("/"))
	o.host = &Host{
		FS: tapFS{o.tap, o.crash}, State: "/state", Name: "host", Boot: "boot-0",
		Demand: o.store, Background: o.store, ReadDeadline: 20 * time.Second,
		Log: slog.New(slog.DiscardHandler),
	}
	o.limit = noLimit
	o.start()
	o.tap.turns.settle()
	id := o.create(nil, o.script.size())
	o.adopt(id, o.open(id), nil)
	return o
}

// telling tells what was done when something is wrong.
type telling struct {
	tester
	o *ordeal
}

func (t telling) Fatalf(format string, args ...any) {
	t.tester.Helper()
	t.o.mu.Lock()
	defer t.o.mu.Unlock()
	t.tester.Fatalf("%s\nafter:\n%s", fmt.Sprintf(format, args...), strings.Join(t.o.history, "\n"))
}

func (o *ordeal) note(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.history = append(o.history, fmt.Sprintf(format, args...))
	if len(o.history) > 300 {
		o.history = o.history[100:]
	}
	if o.tap.tell != nil {
		o.tap.tell("# " + o.history[len(o.history)-1])
	}
}

func (o *ordeal) count(what string) {
	o.tap.mu.Lock()
	defer o.tap.mu.Unlock()
	o.tap.note(what)
}

// situation tells what is going on when a call of a kind of file goes wrong.
func (o *ordeal) situation(op, kind string) []string {
	all := []string{"during " + o.doing}
	if o.helpers.Load() > 0 {
		all = append(all, "while others worked")
	}
	if kind == "layer data" && (op == "write" || op == "punch") && o.writing.Load() == 0 {
		all = append(all, takingBack)
	}
	return all
}

// noticeLosses notes which files the disk failed to make durable since it was
// called last.
func (o *ordeal) noticeLosses() {
	o.tap.mu.Lock()
	failed := o.failed
	o.failed = nil
	o.tap.mu.Unlock()
	for _, name := range failed {
		for _, m := range o.volumes {
			if !strings.Contains(name, string(m.id)) {
				continue
			}
			m.hurt = true
			if strings.HasPrefix(kind(name), "layer") {
				m.disk.syncFailed()
			}
		}
	}
}

// check ends the run if a promise was broken. Other errors are those of the
// faults that were injected, if there was any.
func (o *ordeal) check(err error) {
	o.Helper()
	if err == nil {
		return
	}
	if errors.Is(err, errViolated) {
		o.Fatalf("%v", err)
	}
	if !o.disturbed() && !o.crash.Stopped() && !o.noRoom(err) {
		o.Fatalf("%s: %v", o.doing, err)
	}
}

// disturbed reports whether something was made to go wrong in this step.
func (o *ordeal) disturbed() bool {
	o.tap.mu.Lock()
	defer o.tap.mu.Unlock()
	return o.broken || o.tap.failing
}

// noRoom reports whether an error is that of a full disk, and it is.
func (o *ordeal) noRoom(err error) bool { return o.tight && vfs.IsFull(err) }

// makeRoom lets everything fit on the disk again.
func (o *ordeal) makeRoom() {
	o.tight = false
	o.crash.SetCapacity(0)
}

// reopen opens a volume, for which there may have to be room.
func (o *ordeal) reopen(m *subject) error {
	v, err := o.host.OpenVolume(m.id)
	if o.noRoom(err) {
		o.count("opens without room")
		o.makeRoom()
		v, err = o.host.OpenVolume(m.id)
	}
	if err != nil {
		return err
	}
	m.v = v
	o.lived = append(o.lived, v.Device)
	switch size := v.Size(); {
	case size == int64(len(m.disk.data)):
	case slices.Contains(m.tried, size):
		o.count("volumes that had grown when they were opened")
		m.disk.grow(size)
	default:
		return violated("%s has %d bytes, want %d or one of %d", m.id, size, len(m.disk.data), m.tried)
	}
	m.tried = nil
	return nil
}

func (o *ordeal) step() {
	o.Helper()
	s := o.script
	m := o.volumes[s.pick(len(o.volumes))]
	do := s.draw()
	o.doing = do.name
	o.note("%s %s", m.id, do.name)
	o.disturb()
	o.tap.aim(true)
	err := do.fn(s, m)
	o.tap.turns.settle() // fetched blocks are kept after their readers have them
	o.noticeLosses()
	o.check(err)
	o.calm()
	o.sweep()
	switch {
	case o.crash.Stopped():
		o.restart()
	case o.anyHurt() && s.pick(2) == 0:
		o.reopenHurt()
	case o.anyHurt() || s.pick(40) == 0:
		o.tap.power = s.pick(3) > 0
		o.restart()
	}
}

// disturb arms what is to go wrong in a step, if anything.
func (o *ordeal) disturb() {
	s, t := o.script, o.tap
	errno := []syscall.Errno{syscall.EIO, syscall.ENOSPC}[s.pick(2)]
	switch s.pick(12) {
	case 0:
		// Most steps are short, and some have hundreds of calls.
		o.stopWithin(s.pick(1 << s.pick(9)))
	case 1, 2:
		o.aimAt(nil)
	case 3:
		call, lost := s.pick(24), s.pick(2) == 0
		t.power = s.pick(3) > 0
		o.note("  the process stops at request %d, its reply lost: %t, power cut: %t", call, lost, t.power)
		t.stopAt(call, lost)
	case 4:
		call := s.pick(1 << s.pick(9))
		o.note("  file call %d fails: %v", call, errno)
		o.crash.FailCall(call, errno)
		t.armed = true
	case 5:
		o.aimAt(errno)
	case 6:
		o.breakStore()
	}
}

// targets are the calls that change what is on the disk, in steps where their
// order matters.
func targets() []string {
	return []string{
		"write layer data", "sync layer data", "write layer map", "sync layer map", "rename layer map", "punch layer data",
		"remove layer map", "write clean data", "sync clean data", "write clean map", "sync clean map", "punch clean data",
		"write clean diverged", "sync clean diverged", "rename clean diverged", "write base data", "write base map", "punch base data",
		"write record", "sync record", "rename record", "write root copy", "rename root copy", "sync folder folder", "remove folder",
		takingBack,
	}
}

// takingBack is what goes on while a sealed layer is copied into the open one.
const takingBack = "while changes were taken back"

// aimAt makes the process stop, or if err is set the call fail, at a target, in
// this step or a later one.
func (o *ordeal) aimAt(err error) {
	s, t := o.script, o.tap
	if t.target != nil {
		return
	}
	all := targets()
	t.target = &target{what: all[s.pick(len(all))], skip: s.pick(1 << s.pick(4)), err: err}
	power := s.pick(3) > 0
	t.target.power = power
	o.note("  from now on, after %d others, this goes wrong: %s: %v, power cut: %t", t.target.skip, t.target.what, err, power)
}

// stopWithin makes the process stop, or the power fail, so many file calls from
// now.
func (o *ordeal) stopWithin(call int) {
	o.tap.power = o.script.pick(3) > 0
	o.note("  the process stops at file call %d, power cut: %t", call, o.tap.power)
	o.crash.StopCall(call)
	o.tap.armed = true
}

// breakStore makes requests fail, or lose their replies.
func (o *ordeal) breakStore() {
	s := o.script
	rule := blockstoretest.Rule{Skip: s.pick(20), Times: s.pick(5)} // 0: from then on
	fault := blockstoretest.Fault{Err: blockstore.ErrUnavailable}
	if s.pick(2) == 0 {
		fault = blockstoretest.Fault{LoseReply: true}
	}
	o.note("  the store from request %d on fails %d times, only replies: %t", rule.Skip, rule.Times, fault.LoseReply)
	o.store.Inject(rule, fault)
	o.broken = true
}

// calm ends what goes wrong.
func (o *ordeal) calm() {
	if !o.crash.Stopped() {
		o.crash.ClearFault()
	}
	o.store.Heal()
	o.store.Reset()
	o.tap.stopAt(-1, false)
	o.tap.mu.Lock()
	o.tap.armed, o.tap.failing, o.tap.aiming = false, false, false
	o.tap.mu.Unlock()
	o.broken = false
}

// restart ends the process, or the power, opens everything anew, and compares.
// That may be interrupted too, again and again.
func (o *ordeal) restart() {
	o.Helper()
	for power, again := false, true; again; {
		power = power || o.tap.power // since the volumes were compared last
		o.end()
		again = !o.reopenAll(&power)
	}
	if o.anyHurt() { // while settling
		o.reopenHurt()
	}
}

// end ends the process, or the power, and begins another one.
func (o *ordeal) end() {
	o.noteEnd(o.tap.power)
	for _, m := range o.volumes {
		m.hurt = false
	}
	o.tap.mu.Lock()
	clear(o.tap.unlogged)
	o.tap.committed = false
	o.tap.mu.Unlock()
	if o.tap.power {
		o.powerCut()
	} else {
		o.kill()
	}
	o.calm()
	o.tap.turns.settle()
}

func (o *ordeal) noteEnd(power bool) {
	what := "kill"
	if power {
		what = "power cut"
	}
	o.note("%s", what)
	o.count(what + "s")
	for _, m := range o.volumes {
		if m.v != nil && m.v.hasSealed() {
			o.count(what + " with a sealed layer")
		}
		if m.disk.failed {
			o.count(what + " after a failed sync")
		}
	}
}

// reopenAll opens all volumes, compares and settles them. It returns false if
// that was interrupted. power says that the power failed since the volumes were
// compared last.
func (o *ordeal) reopenAll(power *bool) (done bool) {
	o.Helper()
	s := o.script
	o.doing = "recovery"
	if s.pick(5) == 0 {
		o.stopWithin(s.pick(1 << s.pick(8)))
		o.tap.aim(o.tap.target != nil && o.tap.target.err == nil)
	}
	for _, m := range o.volumes {
		err := o.reopen(m)
		if err != nil && o.crash.Stopped() {
			return false
		}
		o.must(err)
	}
	if o.crash.Stopped() {
		return false
	}
	o.calm()
	o.sweep()
	for _, m := range o.volumes {
		o.compare(m, *power)
	}
	*power = false
	for _, m := range o.volumes {
		if s.pick(3) == 0 {
			continue
		}
		if s.pick(3) == 0 {
			o.disturb()
			o.tap.aim(true)
		}
		o.doing = "settle"
		err := s.settle(m)
		o.noticeLosses()
		o.check(err)
		o.calm()
		if o.crash.Stopped() {
			return false
		}
	}
	return true
}

// compare compares a volume that was opened anew with what it should hold.
func (o *ordeal) compare(m *subject, power bool) {
	o.Helper()
	if a := m.attempt; a != nil {
		committed := o.outcome(a)
		m.disk.join(a.before, committed)
		m.attempt = nil
	}
	got := make([]byte, len(m.disk.data))
	if _, err := m.v.ReadAt(o.ctx, got, 0); err != nil {
		o.Fatalf("read %s after a restart: %v", m.id, err)
	}
	o.tap.turns.settle()
	lost, between, err := m.disk.restarted(got, power)
	if err != nil {
		o.Fatalf("%s after a restart, power cut %t: %v", m.id, power, err)
	}
	o.writeAgain(m)
	if lost > 0 {
		o.count("restarts that lost sectors that were not synced")
	}
	if between > 0 {
		o.count("restarts that show sectors of in between")
	}
	o.equal(m.v.Device, m.disk.data, string(m.id)+" read again")
	o.tap.turns.settle()
}

// writeAgain writes what the disk may have dropped when it failed to make it
// durable: it still shows it, and would not write it by itself.
func (o *ordeal) writeAgain(m *subject) {
	o.Helper()
	dropped := m.disk.dropped()
	if len(dropped) == 0 {
		return
	}
	o.makeRoom() // this is no test of a full disk
	for _, at := range dropped {
		p := m.disk.sector(at)
		o.write(m.v, p, at*manifest.SectorSize)
		m.disk.write(at*manifest.SectorSize, p)
	}
	o.must(m.v.Sync(o.ctx))
	m.disk.synced()
}

// outcome asks the store what became of an attempt that is over.
func (o *ordeal) outcome(a *attempt) (committed bool) {
	o.Helper()
	if a.id.IsZero() {
		return false
	}
	d, err := storeIn(o.mem).Describe(o.ctx, a.id)
	switch {
	case errors.Is(err, snapshot.ErrNotFound):
		return false
	case err != nil:
		o.Fatalf("describe %s: %v", a.id, err)
	case d.State != snapshot.Completed:
		o.count("attempts that were not committed")
		return false
	}
	o.count("attempts that were committed")
	o.addImage(a.image)
	return true
}

func (o *ordeal) addImage(i image) {
	o.Helper()
	if slices.ContainsFunc(o.images, func(other *image) bool { return other.id == i.id }) {
		return
	}
	o.mu.Lock()
	o.images = append(o.images, &i)
	o.mu.Unlock()
	o.restores(&i)
}

func (o *ordeal) anyHurt() bool {
	return slices.ContainsFunc(o.volumes, func(m *subject) bool { return m.hurt })
}

// reopenHurt opens those volumes again which the disk has failed, as everybody
// is told to do.
func (o *ordeal) reopenHurt() {
	o.Helper()
	o.doing = "reopen"
	for _, m := range o.volumes {
		if !m.hurt {
			continue
		}
		o.note("%s is opened again after a failed sync", m.id)
		o.count("volumes opened again after a failed sync")
		_ = m.v.Close() // cannot make everything durable, and says so
		m.hurt = false
		o.must(o.reopen(m))
		o.compare(m, false)
	}
}

// restores makes sure that a snapshot is what it should be, as another host sees
// it that has nothing of it.
func (o *ordeal) restores(i *image) {
	o.Helper()
	img, err := storeIn(o.mem).Open(o.ctx, i.id, snapshot.Holder{})
	o.must(err)
	got := &exported{data: make([]byte, img.Geometry().Size)}
	o.must(img.Export(o.ctx, got, nil))
	if at := firstDifference(got.data, i.data); at >= 0 {
		o.Fatalf("%s differs at byte %d (block %d, page %d)", i.id, at, at/blockSize, at/pageSize)
	}
}

type exported struct{ data []byte }

func (e *exported) WriteAt(p []byte, off int64) (int, error) { return copy(e.data[off:], p), nil }

// adopt takes a volume that was made of data, nil for zeros, into the run.
func (o *ordeal) adopt(id manifest.VolumeID, v *Volume, data []byte) *subject {
	m := &subject{id: id, v: v, disk: newDisk(make([]byte, v.Size()))}
	copy(m.disk.data, data)
	o.volumes = append(o.volumes, m)
	return m
}

// sweep deletes volumes that were being made or deleted when something went
// wrong.
func (o *ordeal) sweep() {
	o.Helper()
	if o.crash.Stopped() {
		return
	}
	records, failed, err := List(o.host.FS, o.host.State)
	o.must(errors.Join(append(failed, err)...))
	for _, r := range records {
		if !slices.ContainsFunc(o.volumes, func(m *subject) bool { return m.id == r.ID }) {
			err := o.host.Delete(o.ctx, r.ID)
			if o.noRoom(err) {
				continue
			}
			o.must(err)
			o.count("half-made or half-deleted volumes")
		}
	}
}

// conclude compares everything: each volume, the snapshot made of it last, and
// all snapshots before. Then it removes all, after which nothing is left.
func (o *ordeal) conclude() {
	o.Helper()
	o.doing = "conclusion"
	o.note("conclude")
	o.tap.target = nil
	o.makeRoom()
	o.setLimit(noLimit)
	o.sweep()
	for _, m := range o.volumes {
		o.check(o.script.settle(m))
		o.equal(m.v.Device, m.disk.data, "in the end")
		o.check(o.script.snapshotOf(m, o.ctx))
		o.equal(m.v.Device, m.disk.data, "after the last snapshot")
		o.must(m.v.Close())
	}
	for _, i := range o.images {
		o.restores(i)
	}
	for _, m := range o.volumes {
		o.must(o.host.Delete(o.ctx, m.id))
	}
	o.wantNonePending()
	o.must(o.mem.List(o.ctx, "pins/", func(info blockstore.Info) error {
		if strings.Contains(info.Key, "mnt-") {
			return o.mem.Delete(o.ctx, info.Key) // of a session that was killed
		}
		return fmt.Errorf("pin %s was left behind", info.Key)
	}))
	for _, i := range o.images {
		o.world.remove(i.id)
	}
	o.must(o.mem.List(o.ctx, "data/", func(info blockstore.Info) error {
		return fmt.Errorf("object %s was left behind", info.Key)
	}))
	o.tap.turns.settle()
}

// together runs actors at once with fn, and returns the first error that is a
// violation, else fn's.
func (o *ordeal) together(fn func() error, others ...func() error) error {
	errs := make([]error, len(others))
	var running sync.WaitGroup
	for i, other := range others {
		o.helpers.Add(1)
		running.Go(func() {
			defer o.helpers.Add(-1)
			errs[i] = other()
		})
	}
	err := fn()
	running.Wait()
	for _, other := range errs {
		if errors.Is(other, errViolated) || err == nil && other != nil {
			err = other
		}
	}
	return err
}

// another returns an actor with numbers of its own.
func (a *actor) another() *actor { return &actor{a.ordeal, rand.New(rand.NewPCG(a.rng.Uint64(), 3))} }
