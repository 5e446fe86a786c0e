package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// The hosts that scenarios are cast with. Each runs real code, and what it
// counts on is in its told and keeps.

// excuse returns an error as it is if a fault may have caused it, and else as a
// broken promise.
func (h *host) excuse(promise, err error) error {
	if err == nil || errors.Is(err, errBroken) {
		return err
	}
	if h.faults > 0 && (errors.Is(err, blockstore.ErrUnavailable) || errors.Is(err, errCrashed)) {
		return err
	}
	return fmt.Errorf("%w: %w", promise, err)
}

// newHost returns a host that does act with the store.
func newHost(name string, act func(context.Context, *host, *snapshot.Store) error) *host {
	return &host{
		name:  name,
		act:   func(ctx context.Context, h *host) error { return act(ctx, h, snapshot.New(h.view())) },
		told:  make(map[manifest.SnapshotID]string),
		keeps: make(map[manifest.SnapshotID]string),
	}
}

// A volume makes snapshots of itself in the order of package volume. Its fields
// are what that has on disk, and outlive a crash.
type volume struct {
	*stage
	holder  snapshot.Holder
	root    *manifest.Root        // nil: lost
	next    []manifest.SnapshotID // ids of the attempts to come
	pending bool                  // the first of them
	unpin   []manifest.SnapshotID // former roots

	set manifest.SetID // of which the attempts are; "": none

	attempts  int  // still to be begun
	returned  bool // it was forgotten with its pin, and is opened again
	forgotten bool // it is, at any time
}

// volume returns a host with a volume that was restored from a snapshot, and of
// which it makes others.
func (st *stage) volume(holder string, root uint64, next ...uint64) *host {
	return newHost(holder, st.restored(holder, root, next...).act)
}

// returned returns one whose pin is gone. If that means that its root is lost,
// the snapshot that it makes has the second id.
func (st *stage) returned(holder string, root uint64, next, second uint64) *host {
	v := st.restored(holder, root, next, second)
	v.attempts, v.returned = 1, true
	return newHost(holder, v.act)
}

// forgotten returns one whose pin may be removed at any time.
func (st *stage) forgotten(holder string, root uint64, next, second uint64) *host {
	v := st.restored(holder, root, next, second)
	v.attempts, v.forgotten = 1, true
	return newHost(holder, v.act)
}

func (st *stage) restored(holder string, root uint64, next ...uint64) *volume {
	return &volume{
		stage: st, holder: snapshot.Holder{ID: holder}, root: st.roots[st.id(root)],
		next: st.will(root, next...), attempts: len(next),
	}
}

func (v *volume) act(ctx context.Context, h *host, s *snapshot.Store) (err error) {
	v.keep(h, !v.returned)
	if v.returned {
		err = v.settle(ctx, h, s)
		if errors.Is(err, blockstore.ErrUnavailable) {
			err = v.settle(ctx, h, s)
		}
	}
	for ; err == nil && v.attempts > 0; v.attempts-- {
		err = v.snapshot(ctx, h, s)
	}
	for h.restart() {
		err = v.settle(ctx, h, snapshot.New(h.view()))
	}
	return err
}

// keep notes whether the volume counts on its root.
func (v *volume) keep(h *host, counts bool) {
	clear(h.keeps)
	if counts && !v.forgotten && v.root != nil {
		h.keeps[v.root.Snapshot] = v.holder.ID
	}
}

func (v *volume) snapshot(ctx context.Context, h *host, s *snapshot.Store) error {
	v.pending = true
	plan, source := v.attempt(s, v.next[0], v.root)
	plan.Holder = v.holder
	attempt, err := s.Begin(ctx, plan)
	if err == nil {
		err = attempt.Upload(ctx, source)
	}
	if err == nil {
		var outcome manifest.Outcome
		if outcome, err = attempt.Commit(ctx); err == nil {
			return v.moveTo(ctx, h, s, outcome)
		}
	}
	if errors.Is(err, snapshot.ErrAborted) || h.faults > 0 {
		return v.settle(ctx, h, s)
	}
	gone := errors.Is(err, snapshot.ErrParentGone) || errors.Is(err, blockstore.ErrNotExist)
	if !gone || !v.forgotten && !v.returned || v.root == nil {
		return h.excuse(errFailed, err)
	}
	// The pin is gone: the root is lost, and the snapshot must be a full one.
	if err := v.settle(ctx, h, s); err != nil {
		return err
	}
	v.root = nil
	v.keep(h, false)
	return v.snapshot(ctx, h, s)
}

// settle is what a volume does when it is opened, or has failed.
func (v *volume) settle(ctx context.Context, h *host, s *snapshot.Store) error {
	if v.pending {
		id := v.next[0]
		committed, outcome, err := s.ResolveMember(ctx, v.set, id, nonceOf(id), "interrupted")
		if err != nil {
			return h.excuse(errFailed, err)
		}
		if committed {
			return v.moveTo(ctx, h, s, outcome)
		}
		h.told[id] = manifest.StateAborted
		if err := s.Discard(ctx, id, v.holder); err != nil {
			return h.excuse(errFailed, err)
		}
		v.next, v.pending = v.next[1:], false
	}
	if err := v.leave(ctx, h, s); err != nil || v.root == nil {
		return err
	}
	err := s.KeepPinned(ctx, v.root.Snapshot, v.holder)
	if errors.Is(err, snapshot.ErrNotFound) && (v.returned || v.forgotten) {
		v.root, err = nil, nil
	}
	if err != nil {
		return h.excuse(errFailed, err)
	}
	v.keep(h, true)
	return v.read(ctx, h, s)
}

// moveTo makes a committed snapshot the root.
func (v *volume) moveTo(ctx context.Context, h *host, s *snapshot.Store, o manifest.Outcome) error {
	h.told[o.Snapshot] = manifest.StateCommitted
	img, err := s.Load(ctx, o)
	if err != nil {
		return h.excuse(errFailed, err)
	}
	if err := v.read(ctx, h, s); err != nil { // reads that were under way
		return err
	}
	if v.root != nil {
		v.unpin = append(v.unpin, v.root.Snapshot)
	}
	v.root, v.next, v.pending = img.Root, v.next[1:], false
	v.keep(h, true)
	if err := v.leave(ctx, h, s); err != nil {
		return err
	}
	return v.read(ctx, h, s)
}

// leave removes the pins on former roots.
func (v *volume) leave(ctx context.Context, h *host, s *snapshot.Store) error {
	for len(v.unpin) > 0 {
		if err := s.Unpin(ctx, v.unpin[0], v.holder.ID); err != nil {
			return h.excuse(errFailed, err)
		}
		v.unpin = v.unpin[1:]
	}
	return nil
}

// read reads all of the root, which the volume's pin keeps.
func (v *volume) read(ctx context.Context, h *host, s *snapshot.Store) error {
	if v.root == nil {
		return nil
	}
	err := v.holds(ctx, imageOf(s, v.root))
	if v.forgotten && (errors.Is(err, blockstore.ErrNotExist) || errors.Is(err, manifest.ErrCorrupt)) {
		return nil // loud, as it should be
	}
	return h.excuse(errLost, err)
}

// importer returns a host that makes a snapshot of an image, without a pin.
func (st *stage) importer(serial, parent uint64) *host {
	id := st.will(parent, serial)[0]
	return newHost("importer", func(ctx context.Context, h *host, s *snapshot.Store) error {
		plan, source := st.attempt(s, id, st.roots[st.id(parent)])
		_, err := s.Create(ctx, plan, source, nil)
		switch {
		case err == nil:
			h.told[id] = manifest.StateCommitted
			return nil
		case errors.Is(err, snapshot.ErrParentGone), errors.Is(err, snapshot.ErrAborted), errors.Is(err, blockstore.ErrNotExist):
			// Somebody deleted the parent before, or aborted the attempt: since
			// then nothing keeps the parent.
			h.told[id] = manifest.StateAborted
			return nil
		}
		return h.excuse(errFailed, err)
	})
}

// mounter returns a host that mounts a snapshot, reads it and unmounts it. If
// it crashes its pin stays.
func (st *stage) mounter(serial uint64) *host {
	return newHost("mounter", func(ctx context.Context, h *host, s *snapshot.Store) error {
		id, me := st.id(serial), "mount-1"
		img, err := s.Open(ctx, id, snapshot.Holder{ID: me})
		switch {
		case errors.Is(err, snapshot.ErrNotFound) && h.written[manifest.PinKey(id, me)].digest != 0 && h.faults == 0:
			return fmt.Errorf("%w: a pin on %s, which was not found", errLeft, id)
		case errors.Is(err, snapshot.ErrNotFound):
			return nil
		case err != nil:
			return h.excuse(errFailed, err)
		}
		if err := st.holds(ctx, img); err != nil {
			return h.excuse(errLost, err)
		}
		return h.excuse(errFailed, s.Unpin(ctx, id, me))
	})
}

// deleted is what a Delete tells.
const deleted = "deleted"

// deleter returns a host that deletes a snapshot and reclaims. First it forgets
// some holders.
func (st *stage) deleter(serial uint64, forgets ...string) *host {
	return newHost(fmt.Sprint("deleter of ", serial), func(ctx context.Context, h *host, s *snapshot.Store) error {
		for _, holder := range forgets {
			if _, err := s.Forget(ctx, holder); err != nil {
				return h.excuse(errFailed, err)
			}
		}
		err := s.Delete(ctx, st.id(serial))
		if err == nil {
			h.told[st.id(serial)] = deleted
		} else if !errors.Is(err, snapshot.ErrNotFound) && !errors.Is(err, snapshot.ErrLocked) {
			return h.excuse(errFailed, err)
		}
		return st.reclaim(ctx, h, s)
	})
}

// reclaimer returns a host that reclaims.
func (st *stage) reclaimer() *host { return newHost("reclaimer", st.reclaim) }

func (st *stage) reclaim(ctx context.Context, h *host, s *snapshot.Store) error {
	for _, lineage := range st.lineages() {
		if _, err := s.Reclaim(ctx, lineage); err != nil {
			return h.excuse(errFailed, err)
		}
	}
	return nil
}

// reaper returns a host that reclaims, and takes the owner of every attempt for
// lost.
func (st *stage) reaper() *host {
	return newHost("reaper", func(ctx context.Context, h *host, s *snapshot.Store) error {
		return st.reclaim(ctx, h, snapshot.New(later{s.Objects()}))
	})
}

// later is a store in which a day has passed since anything was written.
type later struct{ blockstore.Store }

func (s later) List(ctx context.Context, prefix string, fn func(blockstore.Info) error) error {
	return s.Store.List(ctx, prefix, func(info blockstore.Info) error {
		info.Age += 24 * time.Hour
		return fn(info)
	})
}
