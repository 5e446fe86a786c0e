package blockstore

import (
	"context"
	"fmt"
)

// limitStore is a Store whose calls take turns.
type limitStore struct {
	Store
	slots chan struct{} // holds one element per call under way
}

// Limit returns s with at most n calls under way at once, n at least 1; further
// ones wait their turn, or until their context is done. A List gives its turn
// back while its function runs, which may therefore call the store.
//
// Put it under Retry, so that nothing holds a turn while waiting to try again.
func Limit(s Store, n int) Store {
	return &limitStore{s, make(chan struct{}, max(n, 1))}
}

func (s *limitStore) acquire(ctx context.Context) error {
	select {
	case s.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for a turn at %s: %w", s, context.Cause(ctx))
	}
}

func (s *limitStore) release() { <-s.slots }

func (s *limitStore) Get(ctx context.Context, key string, limit int64) ([]byte, string, error) {
	if err := s.acquire(ctx); err != nil {
		return nil, "", err
	}
	defer s.release()
	return s.Store.Get(ctx, key, limit)
}

func (s *limitStore) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	return s.Store.ReadRange(ctx, key, off, p)
}

func (s *limitStore) Put(ctx context.Context, key string, data []byte, c Condition) (string, error) {
	if err := s.acquire(ctx); err != nil {
		return "", err
	}
	defer s.release()
	return s.Store.Put(ctx, key, data, c)
}

func (s *limitStore) Delete(ctx context.Context, keys ...string) error {
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	return s.Store.Delete(ctx, keys...)
}

func (s *limitStore) List(ctx context.Context, prefix string, fn func(Info) error) error {
	return s.listAfter(ctx, prefix, "", fn)
}

func (s *limitStore) listAfter(ctx context.Context, prefix, after string, fn func(Info) error) error {
	if err := s.acquire(ctx); err != nil {
		return err
	}
	held := true
	defer func() {
		if held {
			s.release()
		}
	}()
	return listAfter(ctx, s.Store, prefix, after, func(info Info) error {
		s.release()
		held = false
		if err := fn(info); err != nil {
			return err
		}
		if err := s.acquire(ctx); err != nil {
			return err
		}
		held = true
		return nil
	})
}
