package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// A scene is a lineage in which there is something to do for every operation:
// a chain of three, the middle one deleted, and a branch.
type scene struct {
	*world
	first, branch manifest.SnapshotID
	third         *snapshot.Image
	content       map[manifest.SnapshotID]*device // of what is live
}

func newScene(t *testing.T) *scene {
	w := newWorld(t)
	d1 := newDevice(8*testBlock+512).tiny(1, span(0, 4)...).tiny(1, 8)
	d2 := d1.tiny(2, 0, 1)
	d3 := d2.tiny(3, 1, 2).punched(3)
	d4 := d2.tiny(4, 0)
	first := w.create(nil, nil, d1)
	second := w.create(first, d1, d2)
	third := w.create(second, d2, d3)
	branch := w.create(second, d2, d4)
	w.delete(second.ID())
	return &scene{
		world: w, first: first.ID(), third: third, branch: branch.ID(),
		content: map[manifest.SnapshotID]*device{first.ID(): d1, third.ID(): d3, branch.ID(): d4},
	}
}

// copy returns the same scene in a store of its own.
func (s *scene) copy() *scene {
	s.t.Helper()
	objects := blockstore.NewMem()
	for key := range s.objects("") {
		data, _, err := s.faults.Get(s.ctx, key, blockstore.MaxObjectSize)
		if err != nil {
			s.t.Fatal(err)
		}
		if _, err := objects.Put(s.ctx, key, data, blockstore.IfAbsent); err != nil {
			s.t.Fatal(err)
		}
	}
	c := *s
	c.world = (&world{faults: blockstoretest.NewFaulty(objects), lineage: s.lineage}).in(s.t)
	c.content = maps.Clone(s.content)
	c.third = c.open(s.third.ID())
	return &c
}

// mustHoldAll checks that every live snapshot reads as it did.
func (s *scene) mustHoldAll() {
	s.t.Helper()
	for id, d := range s.content {
		s.mustHold(s.open(id), d)
	}
}

// mustVerifyAll checks that every live snapshot verifies.
func (s *scene) mustVerifyAll() {
	s.t.Helper()
	report, err := s.store.Check(s.ctx, snapshot.Check{Share: 1})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range report.Findings {
		s.t.Error(f)
	}
}

// mustEndEmpty deletes everything and checks that nothing is left.
func (s *scene) mustEndEmpty() {
	s.t.Helper()
	if err := s.store.Delete(s.ctx, s.branch); err != nil && !errors.Is(err, snapshot.ErrNotFound) {
		s.t.Fatal(err)
	}
	delete(s.content, s.branch)
	for id := range s.content {
		s.delete(id)
		if err := s.store.Unpin(s.ctx, id, "vol-1"); err != nil {
			s.t.Fatal(err)
		}
	}
	s.reclaim()
	for _, prefix := range []string{"data/", "pins/", "progress/"} {
		if left := s.objects(prefix); len(left) > 0 {
			s.t.Errorf("left: %v", left)
		}
	}
}

// operations are what is made to fail. Each may be tried again after it did.
var operations = map[string]func(ctx context.Context, s *scene) error{
	"create": func(ctx context.Context, s *scene) error {
		before := s.content[s.third.ID()]
		d := before.grown(9*testBlock).tiny(9, 2, 8).punched(1)
		plan := s.plan(s.third, d)
		plan.Holder = snapshot.Holder{ID: "vol-1"}
		_, err := s.store.Create(ctx, plan, d.since(before), nil)
		if err == nil {
			s.content[plan.ID] = d
		}
		return err
	},
	"create the first": func(ctx context.Context, s *scene) error {
		d := newDevice(2*leafBytes).tiny(9, 2, 1024)
		plan := s.plan(nil, d)
		_, err := s.store.Create(ctx, plan, d.whole(), nil)
		if err == nil {
			s.content[plan.ID] = d
		}
		return err
	},
	"delete": func(ctx context.Context, s *scene) error {
		delete(s.content, s.branch) // from now on it may be gone
		err := s.store.Delete(ctx, s.branch)
		if errors.Is(err, snapshot.ErrNotFound) { // by the try before
			return nil
		}
		return err
	},
	"reclaim": func(ctx context.Context, s *scene) error {
		_, err := s.store.Reclaim(ctx, s.lineage)
		return err
	},
	"open": func(ctx context.Context, s *scene) error {
		img, err := s.reopen().Open(ctx, s.third.ID(), snapshot.Holder{ID: "mount-1"})
		if err == nil {
			err = holds(ctx, img, s.content[s.third.ID()])
		}
		return errors.Join(err, s.store.Unpin(context.WithoutCancel(ctx), s.third.ID(), "mount-1"))
	},
	"measure": func(ctx context.Context, s *scene) error {
		_, err := s.store.UniqueBytes(ctx, s.third.ID())
		return err
	},
	"list": func(ctx context.Context, s *scene) error {
		found, err := s.store.List(ctx, true)
		if err == nil && len(found) < len(s.content) {
			err = fmt.Errorf("%d snapshots listed", len(found))
		}
		return err
	},
	"verify": func(ctx context.Context, s *scene) error {
		report, err := s.store.Verify(ctx, s.third.ID(), nil)
		if err == nil && report.Problems > 0 {
			err = fmt.Errorf("%d problems", report.Problems)
		}
		return err
	},
}

// Whichever of its store calls fails or loses its reply, an operation fails,
// loses nothing, and works when it is tried again.
func TestEveryCallMayFail(t *testing.T) {
	t.Parallel()
	for name, operate := range operations {
		faults := map[string]blockstoretest.Fault{"fails": {Err: blockstore.ErrUnavailable}}
		if name != "list" && name != "measure" && name != "verify" { // to which it would be the same
			faults["loses its reply"] = blockstoretest.Fault{LoseReply: true}
		}
		for how, fault := range faults {
			t.Run(name+" "+how, func(t *testing.T) {
				template := newScene(t)
				for n := 0; ; n++ {
					s := template.copy()
					s.faults.Reset()
					s.faults.Inject(blockstoretest.Rule{Skip: n, Times: 1}, fault)
					err := operate(s.ctx, s)
					calls := len(s.faults.Calls())
					s.faults.Heal()
					if err != nil && !errors.Is(err, blockstore.ErrUnavailable) {
						t.Fatalf("call %d: %v", n, err)
					}
					if err := operate(s.ctx, s); err != nil {
						t.Fatalf("again after call %d: %v", n, err)
					}
					s.mustHoldAll()
					s.mustVerifyAll()
					s.mustEndEmpty()
					if calls <= n {
						if err != nil {
							t.Errorf("failed without a fault: %v", err)
						}
						return
					}
				}
			})
		}
	}
}

// Wherever the context ends, nothing is left that shows as a snapshot, unless
// it was committed.
func TestCancelledAtAnyCall(t *testing.T) {
	t.Parallel()
	for name, operate := range operations {
		t.Run(name, func(t *testing.T) {
			template := newScene(t)
			for n := 0; ; n++ {
				s := template.copy()
				s.faults.Reset()
				ctx, cancel := context.WithCancel(s.ctx)
				s.faults.Inject(blockstoretest.Rule{Skip: n, Times: 1}, blockstoretest.Fault{
					Before: func(context.Context, blockstoretest.Call) { cancel() },
				})
				err := operate(ctx, s)
				calls := len(s.faults.Calls())
				cancel()
				s.faults.Heal()
				if err != nil && !errors.Is(err, context.Canceled) {
					t.Fatalf("call %d: %v", n, err)
				}
				found, err := s.store.List(s.ctx, false)
				if err != nil {
					t.Fatal(err)
				}
				for _, d := range found {
					if s.content[d.ID] == nil && d.ID != s.branch {
						t.Errorf("cancelled at call %d: %s is %s", n, d.ID, d.State)
					}
				}
				if err := operate(s.ctx, s); err != nil {
					t.Fatalf("again after call %d: %v", n, err)
				}
				s.mustHoldAll()
				s.mustEndEmpty()
				if calls <= n {
					return
				}
			}
		})
	}
}

// Several reclaims at once, and then one more, do what one does.
func TestReclaimsAtOnce(t *testing.T) {
	template := newScene(t)
	for range 20 {
		s := template.copy()
		s.delete(s.first)
		delete(s.content, s.first)
		errs := make(chan error)
		for range 3 {
			go func() {
				_, err := s.reopen().Reclaim(s.ctx, s.lineage)
				errs <- err
			}()
		}
		for range 3 {
			if err := <-errs; err != nil {
				t.Error(err)
			}
		}
		s.mustVerifyAll()
		alone := template.copy()
		alone.delete(alone.first)
		alone.reclaim()
		if got, want := len(s.objects("data/")), len(alone.objects("data/")); got != want {
			t.Errorf("%d objects are left, and %d by one reclaim", got, want)
		}
		if r := s.reclaim(); r.Bytes != 0 || r.Objects != 0 {
			t.Errorf("one more did %+v", r)
		}
		s.mustEndEmpty()
	}
}

// Hosts that make, pin, delete and reclaim snapshots of one lineage at the same
// time lose nothing that is live, and keep nothing that is not.
func TestHostsAtTheSameTime(t *testing.T) {
	t.Parallel()
	const hosts, steps = 4, 25
	w := newWorld(t)
	base := newDevice(leafBytes+512).tiny(1, span(0, 12)...)
	root := w.create(nil, nil, base)

	var mu sync.Mutex // guards live
	live := map[manifest.SnapshotID]*device{root.ID(): base}
	pick := func(rng *rand.Rand) (manifest.SnapshotID, *device) {
		mu.Lock()
		defer mu.Unlock()
		for id, d := range live { // in random order
			if rng.IntN(3) == 0 {
				return id, d
			}
		}
		return manifest.SnapshotID{}, nil
	}
	// A host is a volume: it moves from snapshot to snapshot.
	host := func(n int) error {
		rng := rand.New(rand.NewPCG(uint64(n), 7))
		store := w.reopen()
		me := snapshot.Holder{ID: fmt.Sprintf("vol-%d", n)}
		own, content, err := root, base, store.Pin(w.ctx, root.ID(), me)
		if err != nil {
			return err
		}
		for step := range steps {
			switch rng.IntN(4) {
			case 0:
				if id, d := pick(rng); d != nil && id != root.ID() {
					mu.Lock()
					delete(live, id)
					mu.Unlock()
					if err := store.Delete(w.ctx, id); err != nil && !errors.Is(err, snapshot.ErrNotFound) {
						return err
					}
				}
			case 1:
				if _, err := store.Reclaim(w.ctx, w.lineage); err != nil {
					return err
				}
			case 2:
				id, d := pick(rng)
				if d == nil {
					continue
				}
				h := snapshot.Holder{ID: fmt.Sprintf("mount-%d-%d", n, step)}
				img, err := store.Open(w.ctx, id, h)
				if errors.Is(err, snapshot.ErrNotFound) {
					continue
				}
				if err == nil {
					err = holds(w.ctx, img, d)
				}
				if err := errors.Join(err, store.Unpin(w.ctx, id, h.ID)); err != nil {
					return fmt.Errorf("mount: %w", err)
				}
			default:
				d := content.tiny(n*1000+step, rng.Int64N(12), rng.Int64N(12)).punched(rng.Int64N(12))
				plan := w.plan(own, d)
				plan.Holder = me
				outcome, err := store.Create(w.ctx, plan, d.since(content), nil)
				if err != nil {
					return fmt.Errorf("snapshot: %w", err)
				}
				mu.Lock()
				live[plan.ID] = d
				mu.Unlock()
				old := own.ID()
				if own, err = store.Load(w.ctx, outcome); err != nil {
					return err
				}
				content = d
				if err := store.Unpin(w.ctx, old, me.ID); err != nil {
					return err
				}
			}
			if err := holds(w.ctx, own, content); err != nil {
				return fmt.Errorf("the volume's own root, pinned: %w", err)
			}
		}
		return store.Unpin(w.ctx, own.ID(), me.ID)
	}
	errs := make(chan error)
	for n := range hosts {
		go func() { errs <- host(n) }()
	}
	for range hosts {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	for id, d := range live {
		w.mustHold(w.open(id), d)
		w.mustVerify(id)
	}
	for id := range live {
		w.delete(id)
	}
	w.reclaim()
	w.wantNone("data/", "pins/")
}
