package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A lie is what a host takes for the store, and because of which it breaks a
// rule of the protocol though its code keeps it. Each is as the store below but
// for a method or two.
type lie func(*stage, blockstore.Store) blockstore.Store

func isOf(kind, key string) bool { return strings.HasPrefix(key, manifest.KindPrefix(kind)) }

// unbound is not bound to conditions on the keys of a kind.
type unbound struct {
	blockstore.Store
	kind string
}

func (s unbound) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	if isOf(s.kind, key) {
		c = blockstore.Condition{}
	}
	return s.Store.Put(ctx, key, data, c)
}

// blind does not see tombstones.
type blind struct{ blockstore.Store }

func (s blind) Get(ctx context.Context, key string, limit int64) ([]byte, string, error) {
	if isOf(manifest.KindTombstones, key) {
		return nil, "", blockstore.ErrNotExist
	}
	return s.Store.Get(ctx, key, limit)
}

// hasty looks for a tombstone before it puts a record of some kind, and not
// after.
type hasty struct {
	blockstore.Store
	tombstone, before string

	data []byte
	etag string
	err  error
}

func (s *hasty) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	if isOf(s.before, key) {
		s.data, s.etag, s.err = s.Store.Get(ctx, s.tombstone, manifest.MaxRecordLength)
	}
	return s.Store.Put(ctx, key, data, c)
}

func (s *hasty) Get(ctx context.Context, key string, limit int64) ([]byte, string, error) {
	if key == s.tombstone {
		return s.data, s.etag, s.err
	}
	return s.Store.Get(ctx, key, limit)
}

// confident finds each pin, and makes none that is to be checked.
type confident struct {
	blockstore.Store
	finds bool
}

func (s confident) Get(ctx context.Context, key string, limit int64) ([]byte, string, error) {
	id, holder, err := manifest.ParsePinKey(key)
	if err != nil || !s.finds {
		return s.Store.Get(ctx, key, limit)
	}
	data, err := manifest.EncodeRecord(manifest.Pin{Version: manifest.RecordVersion, Snapshot: id, Holder: holder, Mounted: time.Now()})
	return data, "", err
}

func (s confident) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	return s.Store.Put(ctx, key, bytes.Replace(data, []byte(`"unchecked":true,`), nil, 1), c)
}

// credulous takes an outcome for its own that was there before.
type credulous struct{ blockstore.Store }

func (s credulous) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	etag, err := s.Store.Put(ctx, key, data, c)
	if (isOf(manifest.KindOutcomes, key) || isOf(manifest.KindSets, key)) && errors.Is(err, blockstore.ErrExists) {
		err = nil
	}
	return etag, err
}

// selfish aborts an attempt, and not the set that it is of.
type selfish struct{ blockstore.Store }

func (s selfish) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	if isOf(manifest.KindSets, key) {
		return "", nil
	}
	return s.Store.Put(ctx, key, data, c)
}

// early tells of a set, before it is decided, that it is committed.
type early struct{ blockstore.Store }

func (s early) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	set, err := manifest.DecodeRecord[manifest.SetOutcome](data)
	if err != nil || !isOf(manifest.KindSets, key) {
		return s.Store.Put(ctx, key, data, c)
	}
	for _, m := range set.Members {
		record, err := manifest.EncodeRecord(m)
		if err != nil {
			return "", err
		}
		if _, err := s.Store.Put(ctx, manifest.OutcomeKey(m.Snapshot), record, blockstore.IfAbsent); err != nil {
			return "", err
		}
	}
	return s.Store.Put(ctx, key, data, c)
}

// tardy puts a pin only after the outcome.
type tardy struct {
	blockstore.Store
	key string
	pin []byte
}

func (s *tardy) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	if isOf(manifest.KindPins, key) {
		s.key, s.pin = key, data
		return "", nil
	}
	etag, err := s.Store.Put(ctx, key, data, c)
	if err == nil && isOf(manifest.KindOutcomes, key) {
		_, err = s.Store.Put(ctx, s.key, s.pin, blockstore.Condition{})
	}
	return etag, err
}

// leaving removes a pin before it puts an outcome.
type leaving struct {
	blockstore.Store
	pin string
}

func (s leaving) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	if isOf(manifest.KindOutcomes, key) {
		if err := s.Store.Delete(ctx, s.pin); err != nil {
			return "", err
		}
	}
	return s.Store.Put(ctx, key, data, c)
}

// burying puts a tombstone where it should put an outcome.
type burying struct{ blockstore.Store }

func (s burying) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (string, error) {
	id, err := manifest.ParseSnapshotKey(manifest.KindOutcomes, key)
	if err != nil {
		return s.Store.Put(ctx, key, data, c)
	}
	data, err = manifest.EncodeRecord(manifest.Tombstone{Version: manifest.RecordVersion, Snapshot: id, Deleted: time.Now()})
	if err != nil {
		return "", err
	}
	return s.Store.Put(ctx, manifest.TombstoneKey(id), data, c)
}

// sparing does not make some removals.
type sparing struct {
	blockstore.Store
	spares func(keys []string) bool
}

func (s sparing) Delete(ctx context.Context, keys ...string) error {
	if s.spares(keys) {
		return nil
	}
	return s.Store.Delete(ctx, keys...)
}

// erasing removes a record too when it removes a snapshot's root.
type erasing struct {
	blockstore.Store
	root, record string
}

func (s erasing) Delete(ctx context.Context, keys ...string) error {
	if err := s.Store.Delete(ctx, keys...); err != nil || !slices.Contains(keys, s.root) {
		return err
	}
	return s.Store.Delete(ctx, s.record)
}

// stale lists some kinds when another is to be listed first, and shows that when
// their turn comes.
type stale struct {
	blockstore.Store
	when  string
	kinds []string
	shown map[string][]blockstore.Info
}

func (s *stale) List(ctx context.Context, prefix string, fn func(blockstore.Info) error) error {
	kind, lineage, _ := strings.Cut(prefix, "/")
	if kind == s.when {
		s.shown = make(map[string][]blockstore.Info)
		for _, kind := range s.kinds {
			infos, err := collect(ctx, s.Store, manifest.KindPrefix(kind)+lineage)
			if err != nil {
				return err
			}
			s.shown[kind] = infos
		}
	}
	infos, isStale := s.shown[kind]
	if !isStale {
		return s.Store.List(ctx, prefix, fn)
	}
	return show(infos, fn)
}

func collect(ctx context.Context, s blockstore.Store, prefix string) (infos []blockstore.Info, err error) {
	err = s.List(ctx, prefix, func(info blockstore.Info) error {
		infos = append(infos, info)
		return nil
	})
	return infos, err
}

func show(infos []blockstore.Info, fn func(blockstore.Info) error) error {
	for _, info := range infos {
		if err := fn(info); err != nil {
			return err
		}
	}
	return nil
}

// impatient ends the listing of a kind before its last page.
type impatient struct {
	blockstore.Store
	kind string
}

func (s impatient) List(ctx context.Context, prefix string, fn func(blockstore.Info) error) error {
	infos, err := collect(ctx, s.Store, prefix)
	if err == nil && isOf(s.kind, prefix) && len(infos) > 0 {
		infos = infos[:len(infos)-1]
	}
	if err != nil {
		return err
	}
	return show(infos, fn)
}

// complacent takes a snapshot whose footer is gone for one that refers to
// nothing. As its listings stay as they were before, all else is as it was.
type complacent struct {
	blockstore.Store
	shown map[string][]blockstore.Info

	mu   sync.Mutex
	gone map[string]bool // guarded by mu; what has vanished, as keys name it
}

func (s *complacent) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	err := s.Store.ReadRange(ctx, key, off, p)
	if errors.Is(err, blockstore.ErrNotExist) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.gone[strings.Split(key, "/")[1]] = true
	}
	return err
}

func (s *complacent) List(ctx context.Context, prefix string, fn func(blockstore.Info) error) error {
	infos, again := s.shown[prefix]
	if !again {
		var err error
		if infos, err = collect(ctx, s.Store, prefix); err != nil {
			return err
		}
		s.shown[prefix] = infos
	}
	s.mu.Lock()
	infos = slices.DeleteFunc(slices.Clone(infos), func(info blockstore.Info) bool {
		return s.gone[strings.Split(info.Key, "/")[1]]
	})
	s.mu.Unlock()
	return show(infos, fn)
}

// presuming takes every attempt without an outcome for aborted.
type presuming struct{ blockstore.Store }

func (s presuming) List(ctx context.Context, prefix string, fn func(blockstore.Info) error) error {
	if isOf(manifest.KindOutcomes, prefix) { // each intent has one
		prefix = strings.Replace(prefix, manifest.KindOutcomes, manifest.KindIntents, 1)
		return s.Store.List(ctx, prefix, func(info blockstore.Info) error {
			info.Key = strings.Replace(info.Key, manifest.KindIntents, manifest.KindOutcomes, 1)
			return fn(info)
		})
	}
	return s.Store.List(ctx, prefix, fn)
}

func (s presuming) Get(ctx context.Context, key string, limit int64) ([]byte, string, error) {
	data, etag, err := s.Store.Get(ctx, key, limit)
	id, keyErr := manifest.ParseSnapshotKey(manifest.KindOutcomes, key)
	if keyErr == nil && errors.Is(err, blockstore.ErrNotExist) {
		data, err = manifest.EncodeRecord(manifest.Outcome{
			Version: manifest.RecordVersion, Snapshot: id, State: manifest.StateAborted, End: time.Now(),
		})
	}
	return data, etag, err
}

// orphaning shows attempts without their parents.
type orphaning struct{ blockstore.Store }

func (s orphaning) Get(ctx context.Context, key string, limit int64) ([]byte, string, error) {
	data, etag, err := s.Store.Get(ctx, key, limit)
	if err != nil || !isOf(manifest.KindIntents, key) {
		return data, etag, err
	}
	intent, err := manifest.DecodeRecord[manifest.Intent](data)
	if err == nil {
		intent.Parent = nil
		data, err = manifest.EncodeRecord(intent)
	}
	return data, etag, err
}

// unswept finds the root of every snapshot.
type unswept struct{ blockstore.Store }

func (s unswept) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	if strings.HasSuffix(key, "/root") {
		return nil
	}
	return s.Store.ReadRange(ctx, key, off, p)
}

// remembering knows packs as they were, and does not look up again in them
// where a block lies.
type remembering struct {
	blockstore.Store
	mu    sync.Mutex
	packs map[string][]byte // guarded by mu
}

func (s *remembering) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	if _, err := manifest.ParsePackKey(key); err != nil || off > 0 {
		return s.Store.ReadRange(ctx, key, off, p)
	}
	s.mu.Lock()
	pack := s.packs[key]
	s.mu.Unlock()
	if pack == nil {
		var err error
		if pack, _, err = s.Store.Get(ctx, key, blockstore.MaxPackSize); err != nil {
			return err
		}
		s.mu.Lock()
		s.packs[key] = pack
		s.mu.Unlock()
	}
	copy(p, pack)
	return nil
}
