package snapshot

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// ErrName: a trace cannot bear this name.
var ErrName = errors.New("invalid name")

// CheckTraceName reports what is wrong with a trace's name; ErrName.
func CheckTraceName(name string) error {
	if !manifest.ValidName(name) {
		return fmt.Errorf("%w of a trace: %q; a name is 1 to 64 lower-case letters, digits and dashes", ErrName, name)
	}
	return nil
}

// SaveTrace stores a trace with a snapshot, in place of an earlier one of that
// name. It goes with the snapshot.
func (s *Store) SaveTrace(ctx context.Context, id manifest.SnapshotID, name string, trace manifest.Trace) error {
	err := CheckTraceName(name)
	var data []byte
	if err == nil {
		data, err = trace.Encode()
	}
	var key *crypt.Key
	if err == nil {
		key, err = s.Key(ctx, id.Lineage)
	}
	if err == nil {
		data = key.SealObject(traceName(id, name), data)
		_, err = s.objects.Put(ctx, manifest.TraceKey(id, name), data, blockstore.Condition{})
	}
	if err != nil {
		return fmt.Errorf("save trace %q of %s: %w", name, id, err)
	}
	return nil
}

// Trace returns a snapshot's trace of that name; ErrNotFound.
func (s *Store) Trace(ctx context.Context, id manifest.SnapshotID, name string) (manifest.Trace, error) {
	trace, err := s.trace(ctx, id, name)
	if err != nil {
		return nil, fmt.Errorf("load trace %q of %s: %w", name, id, err)
	}
	return trace, nil
}

func (s *Store) trace(ctx context.Context, id manifest.SnapshotID, name string) (manifest.Trace, error) {
	if err := CheckTraceName(name); err != nil {
		return nil, err
	}
	data, _, err := s.objects.Get(ctx, manifest.TraceKey(id, name), manifest.MaxTraceLength+crypt.ObjectOverhead)
	if errors.Is(err, blockstore.ErrNotExist) {
		return nil, fmt.Errorf("%w (record one with 'lazyvol mount --record-trace %s')", ErrNotFound, name)
	}
	if err != nil {
		return nil, err
	}
	key, err := s.Key(ctx, id.Lineage)
	if err != nil {
		return nil, err
	}
	if data, err = key.OpenObject(traceName(id, name), data); err != nil {
		return nil, fmt.Errorf("%w: %w", manifest.ErrCorrupt, err)
	}
	return manifest.DecodeTrace(data)
}

// LastTraced returns the snapshot of a lineage that has the trace of that name which was
// stored last; ErrNotFound. It lists the traces of the lineage. The blocks of one
// snapshot's trace have the same numbers in all others.
func (s *Store) LastTraced(ctx context.Context, lineage manifest.LineageID, name string) (last manifest.SnapshotID, err error) {
	age := time.Duration(math.MaxInt64)
	err = s.objects.List(ctx, manifest.LineagePrefix(manifest.KindTraces, lineage), func(info blockstore.Info) error {
		if id, is, err := manifest.ParseTraceKey(info.Key); err == nil && is == name && info.Age < age {
			last, age = id, info.Age
		}
		return nil
	})
	if err == nil && last.IsZero() {
		err = ErrNotFound
	}
	if err != nil {
		return last, fmt.Errorf("look for a trace %q in lineage %s: %w", name, lineage, err)
	}
	return last, nil
}

// tracesOf returns the keys of all traces of these snapshots of a lineage.
func (s *Store) tracesOf(ctx context.Context, lineage manifest.LineageID, ids []manifest.SnapshotID) (keys []string, err error) {
	wanted := make(map[manifest.SnapshotID]bool, len(ids))
	for _, id := range ids {
		wanted[id] = true
	}
	err = s.objects.List(ctx, manifest.LineagePrefix(manifest.KindTraces, lineage), func(info blockstore.Info) error {
		if id, _, err := manifest.ParseTraceKey(info.Key); err == nil && wanted[id] {
			keys = append(keys, info.Key)
		}
		return nil
	})
	return keys, err
}
