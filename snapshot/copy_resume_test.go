package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// errKilled ends a run of a copy: it stands for the death of its process.
var errKilled = errors.New("killed")

// A mortalStore lets a process die: after a number of Puts of data every call
// fails. Those under way then are lost, or are carried out later.
type mortalStore struct {
	blockstore.Store

	mu    sync.Mutex // guards the fields below
	lives int        // Puts until death; -1: immortal
	dead  bool
	fate  func() bool // whether a Put under way is carried out late
	late  []latePut
	puts  map[string]int
}

func (m *mortalStore) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	if !strings.HasPrefix(key, "data/") {
		return m.Store.Put(ctx, key, data, c)
	}
	m.mu.Lock()
	if m.lives == 0 {
		m.dead = true
	}
	if m.dead {
		if m.fate() {
			m.late = append(m.late, latePut{key, slices.Clone(data), c})
		}
		m.mu.Unlock()
		return "", errKilled
	}
	m.lives--
	m.puts[key]++
	m.mu.Unlock()
	return m.Store.Put(ctx, key, data, c)
}

// A latePut is a request that the store carries out when nobody waits for it any more.
type latePut struct {
	key  string
	data []byte
	c    blockstore.Condition
}

// rise is the start of another process. Some of what is late is carried out now, the
// rest by carryOut, or never.
func (m *mortalStore) rise(lives int, fate func() bool) {
	m.carryOut(func(string) bool { return fate() })
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lives, m.dead, m.fate = lives, false, fate
}

// carryOut makes late requests happen.
func (m *mortalStore) carryOut(which func(key string) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.late = slices.DeleteFunc(m.late, func(p latePut) bool {
		if !which(p.key) {
			return false
		}
		_, _ = m.Store.Put(context.Background(), p.key, p.data, p.c) // nobody hears of it
		return true
	})
}

// threePacks returns what fills two packs and a bit.
func threePacks() *device {
	return newDevice(2*leafBytes).random(1, append(span(0, 300), span(1000, 1250)...)...)
}

// Whenever a copy dies, and whatever becomes of the requests it had under way, its
// next run completes it, sends nothing again that is there, and leaves nothing over.
func TestKilledCopyIsGoneOnWith(t *testing.T) {
	from := newWorld(t)
	parent, whole := newDevice(2*leafBytes).tiny(1, 3, 1001, 2000), threePacks()
	one := from.create(nil, nil, parent)
	two := from.create(one, parent, whole)
	for seed := range uint64(8) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			killAndGoOn(t, rand.New(rand.NewPCG(seed, 0)), from, one.ID(), two.ID(), whole)
		})
	}
}

func killAndGoOn(t *testing.T, rng *rand.Rand, from *world, one, two manifest.SnapshotID, whole *device) {
	objects := &mortalStore{Store: blockstore.NewMem(), lives: -1, puts: make(map[string]int)}
	c := &copier{from: from.in(t), to: newWorldIn(t, objects)}
	if rng.IntN(2) == 0 {
		c.copy(one)
	}
	fate := func() bool { return rng.IntN(2) == 0 } // called with the store's lock held
	var made manifest.SnapshotID
	for run := 0; made.IsZero(); run++ {
		lives := rng.IntN(6)
		if run > 5 {
			lives = -1
		}
		objects.rise(lives, fate)
		if rng.IntN(2) == 0 {
			c.to.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "data/", Times: 1},
				blockstoretest.Fault{Before: func(context.Context, blockstoretest.Call) { objects.carryOut(func(string) bool { return true }) }})
		}
		c.to.store = c.to.reopen()
		var err error
		if made, err = c.run(t.Context(), two); err != nil && !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
	}
	for key, n := range objects.puts {
		if strings.Contains(key, "/packs/") && n > 1 {
			t.Errorf("%s was put %d times", key, n)
		}
	}
	c.to.mustHold(c.to.open(made), whole)
	c.to.mustBeWhole()
	c.to.lineage = made.Lineage
	for id := range c.to.outcomes(made.Lineage) {
		c.to.delete(id)
	}
	c.to.reclaim()
	c.to.wantNone("data/")
}

func (w *world) outcomes(l manifest.LineageID) map[manifest.SnapshotID]bool {
	ids := make(map[manifest.SnapshotID]bool)
	for key := range w.objects(manifest.LineagePrefix(manifest.KindOutcomes, l)) {
		id, err := manifest.ParseSnapshotKey(manifest.KindOutcomes, key)
		if err != nil {
			w.t.Fatal(err)
		}
		ids[id] = true
	}
	return ids
}

// A request of a run that died can be carried out after later runs have begun, which
// know more or less than that run did. None meets one of theirs.
func TestLateRequestOfAKilledCopySpoilsNothing(t *testing.T) {
	from := newWorld(t)
	whole := threePacks()
	source := from.create(nil, nil, whole)
	all := func() bool { return true }
	none := func() bool { return false }
	objects := &mortalStore{Store: blockstore.NewMem(), lives: 1, puts: make(map[string]int), fate: all}
	c := &copier{from: from, to: newWorldIn(t, objects), memory: 50 << 20} // one pack at a time
	die := func() {
		t.Helper()
		if _, err := c.run(t.Context(), source.ID()); !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
	}
	die() // pack 0 is there, 1 is late
	first := slices.Clone(objects.late)
	objects.late = nil
	objects.rise(0, all) // nothing is carried out yet
	die()                // all that this one sends is late
	second := slices.Clone(objects.late)
	if len(first) == 0 || len(second) == 0 {
		t.Fatalf("%d and %d requests are late", len(first), len(second))
	}
	objects.late = first
	objects.carryOut(func(string) bool { return true })
	objects.late = second
	c.to.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "data/", Times: 1}, blockstoretest.Fault{
		Before: func(context.Context, blockstoretest.Call) { objects.carryOut(func(string) bool { return true }) },
	})
	objects.mu.Lock()
	objects.lives, objects.dead, objects.fate = -1, false, none
	objects.mu.Unlock()
	c.to.store = c.to.reopen()
	made := c.copy(source.ID())
	c.to.mustHold(made, whole)
	c.to.mustBeWhole()
}

// Leaves can be there before the pack to which they refer.
func TestLeavesOfAKilledCopyAreNotTakenForThoseOfTheNext(t *testing.T) {
	c := newCopier(t)
	whole := threePacks()
	source := c.from.create(nil, nil, whole)
	part := func(what string) blockstoretest.Rule {
		return blockstoretest.Rule{Op: blockstoretest.OpPut, Match: func(call blockstoretest.Call) bool { return strings.HasSuffix(call.Keys[0], what) }}
	}
	c.to.faults.Inject(part("/packs/00000002"), blockstoretest.Fault{Hang: true})
	c.to.faults.Inject(part("/leaves/00000000"), blockstoretest.Fault{LoseReply: true})
	if _, err := c.run(t.Context(), source.ID()); !errors.Is(err, blockstore.ErrUnavailable) {
		t.Fatal(err)
	}
	c.to.faults.Heal()
	if len(c.to.objects(manifest.LeavesPrefix(c.record.Snapshot))) != 1 {
		t.Fatal("there are no leaves")
	}
	c.to.mustHold(c.copy(source.ID()), whole)
	c.to.mustBeWhole()
}

// What is in the store is not fetched again, nor sent.
func TestResumedCopyFetchesOnlyWhatIsMissing(t *testing.T) {
	c := newCopier(t)
	whole := threePacks()
	source := c.from.create(nil, nil, whole)
	packs := func() int { return len(c.to.objects(manifest.DataPrefix(c.record.Snapshot) + "packs/")) }
	last := blockstoretest.Rule{Op: blockstoretest.OpPut, Match: func(call blockstoretest.Call) bool { return strings.HasSuffix(call.Keys[0], "/packs/00000002") }}
	c.to.faults.Inject(last, blockstoretest.Fault{Err: blockstore.ErrUnavailable, Before: func(ctx context.Context, _ blockstoretest.Call) {
		for packs() < 2 && ctx.Err() == nil {
			time.Sleep(time.Millisecond) // those before it are on their way
		}
	}})
	if _, err := c.run(t.Context(), source.ID()); !errors.Is(err, blockstore.ErrUnavailable) {
		t.Fatal(err)
	}
	c.to.faults.Heal()
	began := c.record.Snapshot
	if n := packs(); n != 2 {
		t.Fatalf("%d packs are there", n)
	}
	c.from.faults.Reset()
	made := c.copy(source.ID())
	if made.ID() != began {
		t.Errorf("%s instead of %s", made.ID(), began)
	}
	if n := c.from.asked(blockstoretest.OpReadRange, "/packs/"); n > 2 { // of 550 blocks, 512 are there
		t.Errorf("%d requests for blocks", n)
	}
	c.to.wantNone("progress/")
	if o := made.Outcome; o.UploadedBlocks != 550 || o.Packs != 3 {
		t.Errorf("%+v", o)
	}
	c.to.mustHold(made, whole)
	c.to.mustBeWhole()
}

// A copy that was committed, its reply and its process lost, is not made again.
func TestCopyThatWasCommittedIsNotMadeAgain(t *testing.T) {
	c := newCopier(t)
	source := c.from.create(nil, nil, newDevice(leafBytes).random(1, 1))
	made := c.copy(source.ID())
	c.record = &snapshot.CopyRecord{Snapshot: made.ID(), Nonce: made.Outcome.Nonce}
	c.to.faults.Reset()
	again, err := c.run(t.Context(), source.ID())
	if err != nil || again != made.ID() || c.to.faults.Count(blockstoretest.OpPut) > 0 {
		t.Errorf("%s, %v, %v", again, err, c.to.faults.Calls())
	}
	c.record = &snapshot.CopyRecord{Snapshot: made.ID(), Nonce: made.Outcome.Nonce}
	c.to.delete(made.ID())
	if again, err := c.run(t.Context(), source.ID()); err != nil || again == made.ID() {
		t.Errorf("after it was deleted: %s, %v", again, err)
	}
}

func TestCopyThatAReclaimHasAbortedBeginsAnew(t *testing.T) {
	c := newCopier(t)
	d := threePacks()
	source := c.from.create(nil, nil, d)
	c.to.faults.Inject(blockstoretest.Rule{Op: blockstoretest.OpPut, Prefix: "outcomes/", Times: 1}, blockstoretest.Fault{Err: errKilled})
	if _, err := c.run(t.Context(), source.ID()); !errors.Is(err, errKilled) {
		t.Fatal(err)
	}
	before := c.record.Snapshot
	if _, _, err := c.to.store.Resolve(t.Context(), before, c.record.Nonce, "silence"); err != nil {
		t.Fatal(err)
	}
	made := c.copy(source.ID())
	if made.ID() == before {
		t.Errorf("%s was aborted", before)
	}
	c.to.wantNone(manifest.DataPrefix(before))
	c.to.mustHold(made, d)
}

// Whatever request fails, the copy either is made or can be gone on with, and no
// goroutine stays.
func TestCopyOutlivesTheFailureOfAnyRequest(t *testing.T) {
	from := newWorld(t)
	before, d := newDevice(2*leafBytes).random(1, span(0, 3)...), newDevice(2*leafBytes).random(2, span(0, 300)...)
	one := from.create(nil, nil, before)
	two := from.create(one, before, d)
	for _, side := range []string{"source", "destination"} {
		for n := 0; ; n++ {
			c := &copier{from: from.in(t), to: newWorld(t)}
			c.copy(one.ID())
			w := c.to
			if side == "source" {
				w = c.from
			}
			copied := c.plan(two.ID()) // opens it
			w.faults.Inject(blockstoretest.Rule{Skip: n, Times: 1}, blockstoretest.Fault{Err: errKilled})
			w.faults.Reset()
			outcome, err := copied.Run(t.Context())
			done := w.faults.Calls()
			w.faults.Heal()
			if err == nil && len(done) <= n {
				break // it is made without coming to this request
			}
			made := outcome.Snapshot
			if err != nil {
				if !errors.Is(err, errKilled) {
					t.Errorf("%s, request %d: %v", side, n, err)
				}
				if made, err = c.run(t.Context(), two.ID()); err != nil {
					t.Fatalf("%s, request %d, %v: then %v", side, n, done[n], err)
				}
			}
			c.to.t = named{t, fmt.Sprintf("%s, request %d, %v", side, n, done[n])}
			c.to.mustHold(c.to.open(made), d)
			c.to.mustBeWhole()
		}
	}
}

// A named test says with what it failed.
type named struct {
	testing.TB
	name string
}

func (n named) Fatal(args ...any) { n.TB.Fatal(append([]any{n.name, ": "}, args...)...) }
func (n named) Fatalf(format string, args ...any) {
	n.TB.Fatalf("%s: "+format, append([]any{n.name}, args...)...)
}
