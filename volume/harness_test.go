package volume

import (
	"bytes"
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

const (
	blockSize = manifest.MinBlockSize
	pageSize  = manifest.PageSize
)

// tester is what testing.T, testing.B and rapid.T have in common.
type tester interface {
	Helper()
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
}

// A world is one store and one host with one running process.
type world struct {
	tester
	ctx   context.Context
	mem   blockstore.Store
	store *blockstoretest.Faulty // all that the host asks
	crash *vfs.Crash             // nil if the host is on the real filesystem
	host  *Host
	boots int
	keys  *toyKeys  // of the host
	key   string    // that new lineages are encrypted under; "": none
	limit int64     // on the clean bytes of the host, in bytes; 0: by the space that is free
	lived []*Device // of the running process
}

// newWorld returns a world whose host lives in memory, and can crash. Of four seeds in a
// row the last two make new lineages encrypted.
func newWorld(t tester, seed uint64) *world {
	t.Helper()
	w := &world{tester: t, crash: vfs.NewCrash(seed), key: keyOf(seed)}
	w.begin(w.crash, "/state")
	return w
}

// keyOf returns the key under which a world of a seed has its lineages.
func keyOf(seed uint64) string {
	if seed/2%2 == 1 {
		return "toy"
	}
	return ""
}

// newEncryptedWorld returns a world whose host lives in memory, and whose new lineages
// are encrypted.
func newEncryptedWorld(t tester) *world {
	t.Helper()
	return newWorld(t, 2)
}

// newEncryptedRealWorld returns one whose host lives in a folder.
func newEncryptedRealWorld(t testing.TB) *world {
	t.Helper()
	w := newRealWorld(t)
	w.key = "toy"
	return w
}

// toyKeys wrap data keys by saying to whom they belong. They may be out of reach.
type toyKeys struct {
	down  atomic.Bool
	asked atomic.Int64 // how often
}

var errNoKeyService = errors.New("the key service is down")

func (k *toyKeys) Generate(_ context.Context, uri, lineage string) (plain, wrapped []byte, canonical string, err error) {
	k.asked.Add(1)
	if k.down.Load() {
		return nil, nil, "", errNoKeyService
	}
	plain = make([]byte, crypt.KeyLen)
	crand.Read(plain) // never fails
	return plain, append([]byte(uri+" "+lineage+" "), plain...), uri, nil
}

func (k *toyKeys) Unwrap(_ context.Context, uri string, wrapped []byte, lineage string) ([]byte, error) {
	k.asked.Add(1)
	if k.down.Load() {
		return nil, errNoKeyService
	}
	plain, ok := bytes.CutPrefix(wrapped, []byte(uri+" "+lineage+" "))
	if !ok {
		return nil, errors.New("wrong key")
	}
	return bytes.Clone(plain), nil
}

// storeIn returns the store of a host that has all keys.
func storeIn(objects blockstore.Store) *snapshot.Store {
	s := snapshot.New(objects)
	s.UseKeys(new(toyKeys))
	return s
}

// newRealWorld returns a world whose host lives in a folder.
func newRealWorld(t testing.TB) *world {
	t.Helper()
	w := &world{tester: t}
	w.begin(vfs.OS(), t.TempDir())
	t.Cleanup(w.end)
	return w
}

func (w *world) begin(fs vfs.FS, state string) {
	w.Helper()
	w.ctx = context.Background()
	w.mem = blockstore.NewMem()
	w.store = blockstoretest.NewFaulty(w.mem)
	if _, err := snapshot.Init(w.ctx, w.mem); err != nil {
		w.Fatalf("init: %v", err)
	}
	if err := fs.MkdirAll(state, 0o700); err != nil {
		w.Fatalf("make state: %v", err)
	}
	if err := fs.SyncDir("/"); err != nil {
		w.Fatalf("make state: %v", err)
	}
	w.host = &Host{
		FS: fs, State: state, Name: "host", Boot: "boot-0",
		Demand: w.store, Background: w.store, ReadDeadline: 20 * time.Second,
		Log: slog.New(slog.DiscardHandler),
	}
	w.limit = noLimit
	w.start()
}

// start begins a process.
func (w *world) start() {
	w.Helper()
	leaves, err := cache.NewLeaves(1 << 20)
	if err != nil {
		w.Fatalf("leaves: %v", err)
	}
	host := *w.host
	if w.keys == nil {
		w.keys = new(toyKeys)
	}
	host.Leaves, host.Store = leaves, snapshot.New(w.store)
	host.Store.UseKeys(w.keys)
	host.Budget = NewBudget(host.FS, host.State, w.limit, host.Log)
	w.host, w.lived = &host, nil
}

// end ends the process, which has closed its devices.
func (w *world) end() { w.host.Leaves.Close() }

// abandon ends the process as SIGKILL does: nothing is closed or synced.
func (w *world) abandon() {
	for _, d := range w.lived {
		d.work.stop()
	}
	w.end()
}

// kill ends the process and begins another one.
func (w *world) kill() {
	w.abandon()
	w.crash.Kill()
	w.start()
}

// powerCut ends the process and the boot, and begins others.
func (w *world) powerCut() {
	w.abandon()
	w.crash.PowerCut()
	w.boots++
	w.host.Boot = fmt.Sprintf("boot-%d", w.boots)
	w.start()
}

// setLimit bounds the clean bytes of the host from now on; 0 leaves a tenth of the
// disk free, noLimit takes the bound away.
func (w *world) setLimit(limit int64) {
	w.limit = limit
	w.host.Budget.setLimit(limit)
}

const noLimit = math.MaxInt64 / 4

func (b *Budget) setLimit(limit int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limit, b.measured = limit, time.Time{}
}

// roomNow returns how many bytes may be added, as the budget knows.
func (b *Budget) roomNow() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.room
}

// must ends the test if a step of it that is beside its point failed.
func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatalf("%v", err)
	}
}

func (w *world) create(from *manifest.SnapshotID, size int64) manifest.VolumeID {
	w.Helper()
	id, err := w.host.Create(w.ctx, from, size, blockSize, w.blankKey(from))
	w.must(err)
	return id
}

// blankKey returns the key for a volume; one of a snapshot has that one's.
func (w *world) blankKey(from *manifest.SnapshotID) string {
	if from != nil {
		return ""
	}
	return w.key
}

func (w *world) open(id manifest.VolumeID) *Volume {
	w.Helper()
	v, err := w.host.OpenVolume(id)
	w.must(err)
	w.lived = append(w.lived, v.Device)
	return v
}

// openNew creates a volume and opens it.
func (w *world) openNew(from *manifest.SnapshotID, size int64) *Volume {
	w.Helper()
	return w.open(w.create(from, size))
}

// mount opens a snapshot read-only, as a session of this host; the function
// returned closes it.
func (w *world) mount(id manifest.SnapshotID) (*Device, func()) {
	w.Helper()
	const session = "mnt-0"
	img, err := w.host.Store.Open(w.ctx, id, snapshot.Holder{ID: session, Host: "host"})
	w.must(err)
	d, err := w.host.OpenSnapshot(w.ctx, img)
	w.must(err)
	return d, func() {
		w.Helper()
		w.must(d.Close())
		w.must(w.host.Store.Unpin(w.ctx, id, session))
	}
}

func (w *world) snapshot(v *Volume) manifest.SnapshotID {
	w.Helper()
	outcome, err := v.Snapshot(w.ctx, SnapshotOptions{})
	w.must(err)
	return outcome.Snapshot
}

func (w *world) write(v *Volume, p []byte, off int64) {
	w.Helper()
	if n, err := v.WriteAt(w.ctx, p, off); n != len(p) || err != nil {
		w.Fatalf("write %d bytes at %d: %d, %v", len(p), off, n, err)
	}
}

// overwrite writes n bytes of noise at off, of the volume and of data, what it holds.
func (w *world) overwrite(v *Volume, data []byte, n int, off int64, seed uint64) {
	w.Helper()
	p := noise(n, seed)
	w.write(v, p, off)
	copy(data[off:], p)
}

// hydrate fetches all that the device lacks.
func (w *world) hydrate(d *Device) error {
	for leaf := int64(0); ; {
		runs, next, err := d.Plan(w.ctx, leaf)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		for _, run := range runs {
			if err := d.Warm(w.ctx, run.Blocks); err != nil {
				return err
			}
		}
		leaf = next
	}
}

// remove deletes a snapshot and reclaims its lineage.
func (w *world) remove(id manifest.SnapshotID) {
	w.Helper()
	store := storeIn(w.mem)
	w.must(store.Delete(w.ctx, id))
	_, err := store.Reclaim(w.ctx, id.Lineage)
	w.must(err)
}

// wantNonePending makes sure that every attempt was ended.
func (w *world) wantNonePending() {
	w.Helper()
	w.must(w.mem.List(w.ctx, "intents/", func(info blockstore.Info) error {
		id, err := manifest.ParseSnapshotKey(manifest.KindIntents, info.Key)
		w.must(err)
		d, err := storeIn(w.mem).Describe(w.ctx, id)
		if err == nil && d.State == snapshot.Pending {
			w.Errorf("%s is pending for ever", id)
		}
		if errors.Is(err, snapshot.ErrNotFound) { // deleted
			return nil
		}
		return err
	}))
}

// equal compares a device with what it should hold.
func (w *world) equal(d *Device, want []byte, what string) {
	w.Helper()
	got := make([]byte, len(want))
	if n, err := d.ReadAt(w.ctx, got, 0); n != len(want) || err != nil && len(want) > 0 {
		w.Fatalf("%s: read %d bytes of %d: %v", what, n, len(want), err)
	}
	if i := firstDifference(got, want); i >= 0 {
		w.Fatalf("%s: differs at byte %d (block %d, page %d): %#x, want %#x", what, i, i/blockSize, i/pageSize, got[i], want[i])
	}
}

// equalSnapshot compares a snapshot with what it should hold, as a host sees it
// that has nothing of it yet.
func (w *world) equalSnapshot(id manifest.SnapshotID, want []byte, what string) {
	w.Helper()
	here := w.host
	defer func() { w.host = here }()
	leaves, err := cache.NewLeaves(1 << 20)
	w.must(err)
	defer leaves.Close()
	elsewhere := *here
	elsewhere.FS, elsewhere.State, elsewhere.Leaves, elsewhere.Budget = vfs.NewCrash(0), "/", leaves, nil
	w.host = &elsewhere
	d, closeIt := w.mount(id)
	defer closeIt()
	if d.Size() != int64(len(want)) {
		w.Fatalf("%s: %s has %d bytes, want %d", what, id, d.Size(), len(want))
	}
	w.equal(d, want, fmt.Sprintf("%s: %s", what, id))
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

// noise returns n bytes that no two seeds share.
func noise(n int, seed uint64) []byte {
	p := make([]byte, n)
	var key [32]byte
	key[0], key[1], key[2], key[3] = byte(seed), byte(seed>>8), byte(seed>>16), byte(seed>>24)
	_, _ = rand.NewChaCha8(key).Read(p) // never fails
	return p
}

// packGets counts the requests for data among those since the last Reset.
func (w *world) packGets() int {
	n := 0
	for _, c := range w.store.Calls() {
		if c.Op == blockstoretest.OpReadRange && isPack(c) {
			n++
		}
	}
	return n
}

func isPack(c blockstoretest.Call) bool {
	_, err := manifest.ParsePackKey(c.Keys[0])
	return err == nil
}

// packReads is the rule of all requests for data.
func packReads() blockstoretest.Rule {
	return blockstoretest.Rule{Op: blockstoretest.OpReadRange, Match: isPack}
}

var errInjected = errors.New("injected")

// eventually waits for something that happens soon.
func (w *world) eventually(what string, ok func() bool) {
	w.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			w.Fatalf("it never happened: %s", what)
		}
	}
}

// hold makes requests for data wait until the function returned is called, and
// tells how many do.
func (w *world) hold() (waiting *atomic.Int64, letGo func()) { return w.holdSome(0, nil) }

// holdSome is hold for the next so many requests (0: all), which then fail unless
// err is nil.
func (w *world) holdSome(times int, err error) (waiting *atomic.Int64, letGo func()) {
	waiting, gate := new(atomic.Int64), make(chan struct{})
	rule := packReads()
	rule.Times = times
	w.store.Inject(rule, blockstoretest.Fault{Err: err, Before: func(ctx context.Context, _ blockstoretest.Call) {
		waiting.Add(1)
		defer waiting.Add(-1)
		select {
		case <-gate:
		case <-ctx.Done():
		}
	}})
	return waiting, func() {
		w.store.Heal()
		close(gate)
	}
}
