package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// The hosts that make a set: volumes, and a coordinator that hears from them.
// What they say to each other they say at once, and who crashes hangs up: so it
// follows from what the store has told each.

// testSet is the set that they make.
const testSet = manifest.SetID("set-0123456789abcdef0")

// A gathering is a set that is being made.
type gathering struct {
	prepared []chan manifest.Outcome // of each volume; closed without any: it failed
	ended    chan struct{}           // closed when the coordinator has done what it can
}

// together returns the hosts of volumes that make a set, and of its coordinator,
// last.
func (st *stage) together(volumes ...*volume) []*host {
	g := &gathering{ended: make(chan struct{})}
	var hosts []*host
	var ids []manifest.SnapshotID
	for _, v := range volumes {
		prepared := make(chan manifest.Outcome, 1)
		g.prepared = append(g.prepared, prepared)
		ids = append(ids, v.next[0])
		v.set = testSet
		hosts = append(hosts, newHost(v.holder.ID, func(ctx context.Context, h *host, s *snapshot.Store) error {
			v.keep(h, true)
			err := v.join(ctx, h, s, prepared, g.ended)
			for h.restart() {
				err = v.settle(ctx, h, snapshot.New(h.view()))
			}
			return err
		}))
	}
	return append(hosts, newHost("coordinator", func(ctx context.Context, h *host, s *snapshot.Store) error {
		defer close(g.ended)
		return g.coordinate(ctx, h, s, ids)
	}))
}

// join makes the volume's part of a set, and does what the store then says.
func (v *volume) join(ctx context.Context, h *host, s *snapshot.Store, prepared chan<- manifest.Outcome, ended <-chan struct{}) error {
	hangUp := sync.OnceFunc(func() { close(prepared) })
	defer hangUp()
	outcome, err := v.prepare(ctx, h, s)
	switch {
	case err == nil:
		prepared <- outcome
		<-ended
	case h.faults == 0 && !(v.forgotten && errors.Is(err, blockstore.ErrNotExist)): // its root is lost
		return h.excuse(errFailed, err)
	}
	hangUp()
	return v.settle(ctx, h, s)
}

func (v *volume) prepare(ctx context.Context, h *host, s *snapshot.Store) (manifest.Outcome, error) {
	v.pending = true
	plan, source := v.attempt(s, v.next[0], v.root)
	plan.Holder, plan.Set = v.holder, v.set
	attempt, err := s.Begin(ctx, plan)
	if err == nil {
		err = attempt.Upload(ctx, source)
	}
	if err == nil {
		return attempt.Prepare(ctx)
	}
	if !errors.Is(err, snapshot.ErrParentGone) || !v.forgotten || v.root == nil || h.faults > 0 {
		return manifest.Outcome{}, err
	}
	// The pin is gone: the root is lost, and a full one takes its place in the set.
	h.told[v.next[0]] = manifest.StateAborted
	v.root, v.next = nil, v.next[1:]
	v.keep(h, false)
	return v.prepare(ctx, h, s)
}

// coordinate commits the set when all is prepared, and aborts it when a volume
// has hung up.
func (g *gathering) coordinate(ctx context.Context, h *host, s *snapshot.Store, ids []manifest.SnapshotID) error {
	var members []manifest.Outcome
	for _, prepared := range g.prepared {
		if o, ok := <-prepared; ok {
			members = append(members, o)
		}
	}
	err := fmt.Errorf("only %d of %d are prepared", len(members), len(ids))
	committed := false
	if len(members) == len(ids) {
		err = s.CommitSet(ctx, testSet, members)
		committed = err == nil
	}
	if err != nil && !errors.Is(err, snapshot.ErrAborted) {
		if committed, err = s.AbortSet(ctx, testSet, err.Error()); err != nil {
			return h.excuse(errFailed, err)
		}
	}
	for _, o := range members {
		h.told[o.Snapshot] = manifest.StateAborted
		if committed {
			h.told[o.Snapshot] = manifest.StateCommitted
		}
	}
	if !committed {
		return nil
	}
	return h.excuse(errFailed, s.RecordMembers(ctx, members))
}

// aloof returns a volume that may be forgotten at any time.
func (v *volume) aloof() *volume {
	v.forgotten = true
	return v
}

// checkSets checks that of each set all is committed that its outcome lists, and
// nothing else; and takes the outcomes of members from it that have none of
// their own.
func (a *aftermath) checkSets(ctx context.Context) error {
	for id, intent := range a.intents {
		if intent.Set == "" {
			continue
		}
		var set manifest.SetOutcome
		data, _, err := a.objects.Get(ctx, manifest.SetOutcomeKey(intent.Set), manifest.MaxRecordLength)
		if err == nil {
			set, err = manifest.DecodeRecord[manifest.SetOutcome](data)
		}
		if err != nil && !errors.Is(err, blockstore.ErrNotExist) {
			return err
		}
		said, listed := set.Member(id, intent.Nonce)
		own, recorded := a.outcomes[id]
		switch {
		case recorded && (own.State == manifest.StateCommitted) != listed:
			return fmt.Errorf("%w: of the set, which is %q, %s is %s", errHalf, set.State, id, own.State)
		case !recorded && listed:
			a.outcomes[id] = said
		case !recorded && set.State != "":
			a.outcomes[id] = manifest.Outcome{Snapshot: id, State: manifest.StateAborted}
		}
	}
	return nil
}
