package volume

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// openMate makes another volume, that of a set.
func (d *drill) openMate() {
	d.Helper()
	d.mate = d.openNew(nil, blockSize)
	d.write(d.mate, noise(blockSize, 20), 0)
	d.must(d.mate.Sync(d.ctx))
}

// snapshotSet is Snapshot of both volumes at once, and returns what became of the
// first one's.
func (d *drill) snapshotSet(ctx context.Context, o SnapshotOptions) (manifest.Outcome, error) {
	set := manifest.NewSetID()
	var members []*Member
	for _, v := range []*Volume{d.mate, d.v} {
		m, err := v.Join(set)
		d.must(err)
		members = append(members, m)
	}
	cut := o.Cut
	o.Cut = func(a *snapshot.Attempt) {
		d.made = append(d.made, a.ID())
		cut(a)
	}
	options := []SnapshotOptions{{Cut: func(a *snapshot.Attempt) { d.made = append(d.made, a.ID()) }}, o}
	outcomes, err := makeSet(ctx, members, options)
	if err == nil {
		err = d.host.Store.CommitSet(ctx, set, outcomes)
	}
	committed := make([]bool, len(members))
	for i, m := range members {
		var finishErr error
		committed[i], finishErr = m.Finish(ctx)
		err = errors.Join(err, finishErr)
	}
	if committed[1] {
		err = nil // as of a Snapshot, of which only the store's reply was lost
	} else if err == nil {
		d.Fatalf("the set is committed, and its members: %v", committed)
	}
	if len(outcomes) < len(members) {
		return manifest.Outcome{}, err
	}
	return outcomes[1], err
}

// makeSet takes members as far as their uploads.
func makeSet(ctx context.Context, members []*Member, options []SnapshotOptions) (outcomes []manifest.Outcome, err error) {
	for _, step := range []func(*Member) error{
		func(m *Member) error { return m.Ready(ctx) },
		(*Member).Hold, (*Member).Cut,
		func(m *Member) error {
			_, err := m.Release()
			return err
		},
	} {
		for _, m := range members {
			if err := step(m); err != nil {
				return nil, err
			}
		}
	}
	for i, m := range members {
		outcome, err := m.Upload(ctx, options[i])
		if err != nil {
			return nil, err
		}
		outcomes = append(outcomes, outcome)
	}
	return outcomes, nil
}

// wantWhole makes sure that both snapshots of a set are committed, or none.
func (d *drill) wantWhole(what string) {
	d.Helper()
	committed := 0
	for _, id := range d.made {
		described, err := d.host.Store.Describe(d.ctx, id)
		if err != nil && !errors.Is(err, snapshot.ErrNotFound) {
			d.Fatalf("%s: %v", what, err)
		}
		if described.State == snapshot.Completed {
			committed++
		}
	}
	if committed != 0 && committed != 2 {
		d.Fatalf("%s: half a set: %d of %v are committed", what, committed, d.made)
	}
}

// checkMate is check for the other volume of a set.
func (d *drill) checkMate(what string) {
	d.Helper()
	if d.mate == nil {
		return
	}
	want := noise(blockSize, 20)
	d.equal(d.mate.Device, want, what+": mate before Settle")
	d.must(d.mate.Settle(d.ctx))
	if d.mate.hasSealed() || len(d.mate.Record().Layers) != 1 || d.mate.Record().Pending != nil {
		d.Fatalf("%s: mate settled, with %+v", what, d.mate.Record())
	}
	d.equal(d.mate.Device, want, what+": mate after Settle")
	d.wantNonePending()
	d.equalSnapshot(d.snapshot(d.mate), want, what+": mate's next snapshot")
	d.must(d.mate.Close())
}

// newPair returns two volumes that have joined a set.
func newPair(t *testing.T) (w *world, a, b *Volume, members []*Member) {
	w = newWorld(t, 1)
	a, b = w.openNew(nil, blockSize), w.openNew(nil, blockSize)
	t.Cleanup(w.end)
	set := manifest.NewSetID()
	for _, v := range []*Volume{a, b} {
		t.Cleanup(func() { w.must(v.Close()) })
		m, err := v.Join(set)
		w.must(err)
		members = append(members, m)
		w.must(m.Ready(w.ctx))
	}
	return w, a, b, members
}

// writeLater writes a page in the background.
func (w *world) writeLater(v *Volume, seed uint64) (done <-chan error) {
	written := make(chan error, 1)
	go func() {
		_, err := v.WriteAt(w.ctx, noise(pageSize, seed), 0)
		written <- err
	}()
	return written
}

// finishAll ends members, of which none may be committed.
func (w *world) finishAll(members ...*Member) {
	w.Helper()
	for _, m := range members {
		committed, err := m.Finish(w.ctx)
		w.must(err)
		if committed {
			w.Errorf("a snapshot is committed, and its set is not")
		}
	}
}

// Between Hold and Release writes wait, and are not in the snapshot; reads go on.
func TestHeldWritesWaitUntilTheRelease(t *testing.T) {
	t.Parallel()
	w, a, b, members := newPair(t)
	w.write(a, noise(pageSize, 1), 0)
	for _, m := range members {
		w.must(m.Hold())
	}
	written := w.writeLater(a, 2)
	w.equal(a.Device, append(noise(pageSize, 1), make([]byte, blockSize-pageSize)...), "while writers are held")
	for _, m := range members {
		w.must(m.Cut())
	}
	select {
	case err := <-written:
		t.Fatalf("a write did not wait: %v", err)
	default:
	}
	for _, m := range members {
		if _, err := m.Release(); err != nil {
			t.Fatal(err)
		}
	}
	w.must(<-written)
	var outcomes []manifest.Outcome
	for _, m := range members {
		o, err := m.Upload(w.ctx, SnapshotOptions{})
		w.must(err)
		outcomes = append(outcomes, o)
	}
	w.must(w.host.Store.CommitSet(w.ctx, members[0].set, outcomes))
	for _, m := range members {
		if committed, err := m.Finish(w.ctx); !committed || err != nil {
			t.Fatalf("finish: %t, %v", committed, err)
		}
	}
	w.equalSnapshot(outcomes[0].Snapshot, append(noise(pageSize, 1), make([]byte, blockSize-pageSize)...), "cut")
	w.equal(a.Device, append(noise(pageSize, 2), make([]byte, blockSize-pageSize)...), "after the set")
	w.equal(b.Device, make([]byte, blockSize), "the other one")
}

// Writers whose coordinator has died go on by themselves, and the set can never
// be: whether or not they had been cut.
func TestHeldWritersResumeByThemselvesAndTheSetIsNot(t *testing.T) {
	t.Parallel()
	for name, cut := range map[string]bool{"before the cut": false, "after it": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, a, _, members := newPair(t)
			begin := time.Now()
			w.must(members[0].Hold())
			if cut {
				w.must(members[0].Cut())
			}
			w.must(<-w.writeLater(a, 3))
			if took := time.Since(begin); took < holdLimit {
				t.Errorf("a write waited for %v only", took)
			}
			if err := members[0].Cut(); !cut && !errors.Is(err, ErrResumed) {
				t.Errorf("cut of a volume that went on: %v", err)
			}
			if _, err := members[0].Release(); !errors.Is(err, ErrResumed) {
				t.Errorf("release of a volume that went on: %v", err)
			}
			w.finishAll(members...)
			w.equal(a.Device, append(noise(pageSize, 3), make([]byte, blockSize-pageSize)...), "after the set")
		})
	}
}

// Orders that come otherwise than they should are refused, and the volume is as
// before.
func TestMemberRefusesOrdersOutOfOrder(t *testing.T) {
	t.Parallel()
	w, a, _, members := newPair(t)
	m := members[0]
	w.write(a, noise(pageSize, 1), 0)
	refuses := func(what string, do func() error) {
		t.Helper()
		if err := do(); !errors.Is(err, errOrder) {
			t.Errorf("%s: %v", what, err)
		}
	}
	upload := func() error {
		_, err := m.Upload(w.ctx, SnapshotOptions{})
		return err
	}
	refuses("ready twice", func() error { return m.Ready(w.ctx) })
	refuses("cut before hold", m.Cut)
	refuses("upload before cut", upload)
	w.must(m.Hold())
	refuses("hold twice", m.Hold)
	w.must(m.Cut())
	refuses("cut twice", m.Cut)
	_, err := m.Release()
	w.must(err)
	refuses("hold after release", m.Hold)
	w.must(upload())
	refuses("upload twice", upload)
	w.finishAll(members...)
	w.equal(a.Device, append(noise(pageSize, 1), make([]byte, blockSize-pageSize)...), "after the set")
}

// A member that fails, or whose coordinator goes without a word, takes the others
// with it; a volume has at most one snapshot under way.
func TestASetWithoutOutcomeIsAbortedByItsFirstMember(t *testing.T) {
	t.Parallel()
	w, a, _, members := newPair(t)
	w.write(a, noise(pageSize, 1), 0)
	if _, err := a.Join(members[0].set); !errors.Is(err, ErrBusy) {
		t.Errorf("a second join: %v", err)
	}
	if _, err := a.Snapshot(w.ctx, SnapshotOptions{}); !errors.Is(err, ErrBusy) {
		t.Errorf("a snapshot meanwhile: %v", err)
	}
	var outcomes []manifest.Outcome
	for _, step := range []func(*Member) error{(*Member).Hold, (*Member).Cut, func(m *Member) error { _, err := m.Release(); return err }} {
		for _, m := range members {
			w.must(step(m))
		}
	}
	for _, m := range members {
		o, err := m.Upload(w.ctx, SnapshotOptions{})
		w.must(err)
		outcomes = append(outcomes, o)
	}
	w.finishAll(members[0])
	if err := w.host.Store.CommitSet(w.ctx, members[0].set, outcomes); !errors.Is(err, snapshot.ErrAborted) {
		t.Errorf("commit of a set with a member that was given up: %v", err)
	}
	w.finishAll(members[1])
	w.wantNonePending()
	w.equal(a.Device, append(noise(pageSize, 1), make([]byte, blockSize-pageSize)...), "after the set")
}
