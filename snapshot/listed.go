package snapshot

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A RecordCache keeps what List has read for the next one, under names that say
// what the content is: nothing that is found there can be out of date. It may
// lose anything at any time. What it returns of a damaged entry, if at all, is
// not what was put there only in ways that it cannot know of: it checks.
type RecordCache interface {
	// Load returns all that is kept of the store with that id.
	Load(store string) map[string][]byte

	// Save keeps records, and of the same store nothing else.
	Save(store string, records map[string][]byte)
}

// CacheRecords gives List, before s is used, a cache of records.
func (s *Store) CacheRecords(c RecordCache) { s.records = c }

// listedKinds are the kinds of records that List reads, and how each is decoded.
// Tombstones are not among them: they are their keys, and always asked for.
var listedKinds = map[string]func([]byte) ([]byte, error){
	manifest.KindIntents:  decodable[manifest.Intent],
	manifest.KindOutcomes: withoutRoot,
	manifest.KindMeta:     decodable[manifest.Meta],
	manifest.KindLineages: decodable[manifest.LineageRecord],
	manifest.KindSets:     decodable[manifest.SetOutcome],
}

// decodable returns a record as it is, if it is one.
func decodable[T any](data []byte) ([]byte, error) {
	_, err := manifest.DecodeRecord[T](data)
	return data, err
}

// withoutRoot returns an outcome without the root in it, by far the largest part,
// which describes nothing.
func withoutRoot(data []byte) ([]byte, error) {
	outcome, err := manifest.DecodeRecord[manifest.Outcome](data)
	if err != nil || len(outcome.Root) == 0 {
		return data, err
	}
	outcome.Root = nil
	return manifest.EncodeRecord(outcome)
}

// listedStore is an object store whose listing of some kinds was read: what was
// not listed is not there, and what is cached under the ETag listed is not asked
// for. So it shows each record of these kinds as it was listed, or newer.
type listedStore struct {
	blockstore.Store
	etags  map[string]string // by key
	cached map[string][]byte // by cacheName; not modified

	mu      sync.Mutex        // guards the fields below
	used    map[string][]byte // what to keep, by cacheName
	fetched bool              // something of it was not cached
}

// cacheName names the content of an object.
func cacheName(key, etag string) string { return key + " " + etag }

// listRecords lists the kinds of listedKinds.
func (s *Store) listRecords(ctx context.Context) (*listedStore, error) {
	l := &listedStore{Store: s.objects, etags: make(map[string]string), used: make(map[string][]byte)}
	var mu sync.Mutex // guards l.etags
	g, gctx := newGroup(ctx)
	for kind := range listedKinds {
		g.Go(func() error {
			return s.objects.List(gctx, manifest.KindPrefix(kind), func(info blockstore.Info) error {
				mu.Lock()
				defer mu.Unlock()
				l.etags[info.Key] = info.ETag
				return nil
			})
		})
	}
	g.Go(func() error {
		if s.records == nil {
			return nil
		}
		id, err := s.ID(gctx)
		if err == nil {
			l.cached = s.records.Load(id)
		}
		return err
	})
	return l, g.Wait()
}

// keep hands what was read to the cache, unless that has it all and no more.
func (l *listedStore) keep(ctx context.Context, s *Store) error {
	if s.records == nil || !l.fetched && len(l.used) == len(l.cached) {
		return nil
	}
	id, err := s.ID(ctx)
	if err == nil {
		s.records.Save(id, l.used)
	}
	return err
}

// Get is that of blockstore.Store. Of an outcome it returns what describes the
// snapshot: not the root.
func (l *listedStore) Get(ctx context.Context, key string, limit int64) ([]byte, string, error) {
	kind, _, _ := strings.Cut(key, "/")
	decode, listed := listedKinds[kind]
	if !listed {
		return l.Store.Get(ctx, key, limit)
	}
	etag, ok := l.etags[key]
	if !ok {
		return nil, "", fmt.Errorf("%w: %s was not listed", blockstore.ErrNotExist, key)
	}
	if data, ok := l.cached[cacheName(key, etag)]; ok {
		if data, err := decode(data); err == nil {
			l.use(key, etag, data, false)
			return data, etag, nil
		}
	}
	data, etag, err := l.Store.Get(ctx, key, limit)
	if err != nil {
		return nil, "", err
	}
	decoded, err := decode(data)
	if err != nil {
		return data, etag, nil // for the caller to find out
	}
	if etag != "" {
		l.use(key, etag, decoded, true)
	}
	return decoded, etag, nil
}

func (l *listedStore) use(key, etag string, data []byte, fetched bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.used[cacheName(key, etag)] = data
	l.fetched = l.fetched || fetched
}
