package blockstore

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// memStore is a Store in memory.
type memStore struct {
	mu      sync.Mutex // guards the fields below
	objects map[string]memObject
	puts    uint64 // successful ones so far: the source of ETags
}

type memObject struct {
	data    []byte // never modified
	etag    string
	written time.Time
}

// NewMem returns an empty store that lives in this process's memory, for tests
// and models: it keeps every promise of Store except durability, and inside a
// [testing/synctest] bubble it ages objects by the bubble's clock.
func NewMem() Store {
	return &memStore{objects: make(map[string]memObject)}
}

func (s *memStore) String() string { return "mem:" }

func (s *memStore) Get(ctx context.Context, key string, limit int64) ([]byte, string, error) {
	o, err := s.lookup(ctx, key)
	if err == nil && int64(len(o.data)) > limit {
		err = fmt.Errorf("%w: %d bytes, limit %d", ErrTooLarge, len(o.data), limit)
	}
	if err != nil {
		return nil, "", opError("get", s, key, err)
	}
	return bytes.Clone(o.data), o.etag, nil
}

func (s *memStore) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	err := checkRange(key, off, p)
	if err != nil || len(p) == 0 {
		return opError("read", s, key, err)
	}
	o, err := s.lookup(ctx, key)
	if err == nil && off+int64(len(p)) > int64(len(o.data)) {
		err = fmt.Errorf("%w: %d bytes at %d of %d", ErrShort, len(p), off, len(o.data))
	}
	if err != nil {
		return opError("read", s, key, err)
	}
	copy(p, o.data[off:])
	return nil
}

func (s *memStore) lookup(ctx context.Context, key string) (memObject, error) {
	if err := CheckKey(key); err != nil {
		return memObject{}, err
	}
	if ctx.Err() != nil {
		return memObject{}, context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	o, ok := s.objects[key]
	if !ok {
		return memObject{}, ErrNotExist
	}
	return o, nil
}

func (s *memStore) Put(ctx context.Context, key string, data []byte, c Condition) (string, error) {
	etag, err := s.put(ctx, key, data, c)
	return etag, opError("put", s, key, err)
}

func (s *memStore) put(ctx context.Context, key string, data []byte, c Condition) (string, error) {
	if err := checkPut(key, data); err != nil {
		return "", err
	}
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	old, exists := s.objects[key]
	if c.Absent() && exists {
		return "", ErrExists
	}
	if etag, ok := c.Match(); ok && (!exists || old.etag != etag) {
		return "", ErrChanged
	}
	s.puts++
	o := memObject{bytes.Clone(data), strconv.FormatUint(s.puts, 16), time.Now()}
	s.objects[key] = o
	return o.etag, nil
}

func (s *memStore) Delete(ctx context.Context, keys ...string) error {
	for _, key := range keys {
		if err := CheckKey(key); err != nil {
			return opError("delete", s, key, err)
		}
	}
	if ctx.Err() != nil {
		return fmt.Errorf("delete in %s: %w", s, context.Cause(ctx))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range keys {
		delete(s.objects, key)
	}
	return nil
}

func (s *memStore) List(ctx context.Context, prefix string, fn func(Info) error) error {
	return s.listAfter(ctx, prefix, "", fn)
}

func (s *memStore) listAfter(ctx context.Context, prefix, after string, fn func(Info) error) error {
	if err := checkPrefix(prefix); err != nil {
		return opError("list", s, prefix, err)
	}
	now := time.Now()
	s.mu.Lock()
	objects := maps.Clone(s.objects) // fn must not run under the lock: it may call the store
	s.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(objects)) {
		if ctx.Err() != nil {
			return opError("list", s, prefix, context.Cause(ctx))
		}
		if !strings.HasPrefix(key, prefix) || key <= after {
			continue
		}
		o := objects[key]
		if err := fn(Info{key, int64(len(o.data)), o.etag, max(0, now.Sub(o.written)), now}); err != nil {
			return err
		}
	}
	return nil
}
