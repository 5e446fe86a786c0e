package snapshot_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A ledger is the store under a schedule, and an account of what is in it.
type ledger struct {
	objects blockstore.Store
	seed    maphash.Seed // of all digests
	page    int          // keys that a listing gets with one call
	eager   bool         // calls that commute with all others need no decision

	written map[string]version
	digest  uint64 // of all versions
	broken  error  // by a call, which is a promise of its own
}

// A version tells what an object holds from all that it ever held.
type version struct {
	number uint64 // how often the key was written
	digest uint64 // of the data; 0: it was removed
}

// newLedger returns a store that holds objects.
func newLedger(seed maphash.Seed, objects map[string][]byte) (*ledger, error) {
	l := &ledger{objects: blockstore.NewMem(), seed: seed, page: 1, written: make(map[string]version)}
	for key, data := range objects {
		if _, err := l.put(key, data, blockstore.IfAbsent); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// immutable reports whether objects of a key's kind are written once and stay
// for ever, so that to read one commutes with everything.
func immutable(key string) bool {
	kind, _, _ := strings.Cut(key, "/")
	return slices.Contains([]string{
		manifest.StoreKey(), manifest.KindLineages, manifest.KindIntents, manifest.KindOutcomes, manifest.KindTombstones, manifest.KindSets,
	}, kind)
}

// unused reports whether there is no object of a key's kind in any schedule: the
// clock stands still, so that nobody's heart beats.
func unused(key string) bool {
	kind, _, _ := strings.Cut(key, "/")
	return kind == manifest.KindProgress
}

// put writes an object.
func (l *ledger) put(key string, data []byte, c blockstore.Condition) (etag string, err error) {
	etag, err = l.objects.Put(context.Background(), key, data, c)
	if err != nil {
		return "", err
	}
	old := l.written[key]
	switch {
	case unused(key):
		l.broken = fmt.Errorf("%w: %s was written, and thought unused", errBroken, key)
	case l.eager && immutable(key) && old.digest != 0:
		l.broken = fmt.Errorf("%w: %s was written twice", errBroken, key)
	case strings.HasPrefix(key, manifest.KindPrefix(manifest.KindData)) && !c.Absent() && old.digest == 0:
		l.broken = fmt.Errorf("%w: %s, which a rewrite brought back", errLeft, key)
	}
	l.note(key, version{old.number + 1, maphash.Bytes(l.seed, data)})
	return etag, nil
}

// remove removes an object.
func (l *ledger) remove(key string) error {
	if l.eager && immutable(key) {
		l.broken = fmt.Errorf("%w: %s was removed", errBroken, key)
	}
	l.note(key, version{number: l.written[key].number})
	return l.objects.Delete(context.Background(), key)
}

func (l *ledger) note(key string, v version) {
	type entry struct {
		key string
		version
	}
	if old := l.written[key]; old.digest != 0 {
		l.digest ^= maphash.Comparable(l.seed, entry{key, old})
	}
	if v.digest != 0 {
		l.digest ^= maphash.Comparable(l.seed, entry{key, v})
	}
	l.written[key] = v
}

// versionOf returns a digest of what there is under a key.
func (l *ledger) versionOf(key string) uint64 { return maphash.Comparable(l.seed, l.written[key]) }

// errPage ends a listing at the end of a page.
var errPage = errors.New("the page is full")

// list returns the next page of a listing, and whether there are more.
func (l *ledger) list(prefix, last string) (page []blockstore.Info, more bool, err error) {
	err = l.objects.List(context.Background(), prefix, func(info blockstore.Info) error {
		if info.Key <= last {
			return nil
		}
		if len(page) == l.page {
			return errPage
		}
		page = append(page, info)
		return nil
	})
	if errors.Is(err, errPage) {
		return page, true, nil
	}
	return page, false, err
}

// wait makes a call when the schedule lets it, or not at all if ctx ends first.
func (h *host) wait(ctx context.Context, c call) error {
	c.host, c.reply = h, make(chan error, 1)
	c.local = c.local && h.eager
	c.name = strings.ReplaceAll(c.name, "snap-", "")
	h.mu.Lock()
	if h.down {
		h.mu.Unlock()
		return errCrashed
	}
	h.waiting = append(h.waiting, &c)
	h.mu.Unlock()
	select {
	case err := <-c.reply:
		return err
	case <-ctx.Done():
	}
	if h.withdraw(&c) {
		return context.Cause(ctx)
	}
	return <-c.reply
}

// String implements blockstore.Store.
func (h *host) String() string { return h.name }

// Get implements blockstore.Store.
func (h *host) Get(ctx context.Context, key string, limit int64) (data []byte, etag string, err error) {
	err = h.wait(ctx, call{
		name:  "get " + key,
		local: immutable(key) && h.written[key].digest != 0,
		make: func() (_ uint64, err error) {
			data, etag, err = h.objects.Get(context.Background(), key, limit)
			return h.versionOf(key), err
		},
	})
	return data, etag, err
}

// ReadRange implements blockstore.Store.
func (h *host) ReadRange(ctx context.Context, key string, off int64, p []byte) error {
	return h.wait(ctx, call{
		name: fmt.Sprintf("read %s at %d", key, off),
		make: func() (uint64, error) {
			return h.versionOf(key), h.objects.ReadRange(context.Background(), key, off, p)
		},
	})
}

// Put implements blockstore.Store.
func (h *host) Put(ctx context.Context, key string, data []byte, c blockstore.Condition) (etag string, err error) {
	data = bytes.Clone(data) // it may be made late
	err = h.wait(ctx, call{
		name: "put " + key, writes: true,
		make: func() (_ uint64, err error) {
			etag, err = h.put(key, data, c)
			return h.versionOf(key), err
		},
	})
	return etag, err
}

// Delete implements blockstore.Store. Nothing promises that it is atomic.
func (h *host) Delete(ctx context.Context, keys ...string) error {
	for _, key := range keys {
		err := h.wait(ctx, call{
			name: "delete " + key, writes: true, local: unused(key),
			make: func() (uint64, error) { return 0, h.remove(key) },
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// List implements blockstore.Store. Each page shows the store as it is by then.
func (h *host) List(ctx context.Context, prefix string, fn func(blockstore.Info) error) error {
	for last, more := "", true; more; {
		var page []blockstore.Info
		err := h.wait(ctx, call{
			name: "list " + prefix + " after " + last, local: unused(prefix) || prefix == manifest.StoreKey(), // for the time
			make: func() (told uint64, err error) {
				page, more, err = h.list(prefix, last)
				for _, info := range page {
					told = maphash.Comparable(h.seed, [3]any{told, info.Key, h.versionOf(info.Key)})
				}
				return told, err
			},
		})
		if err != nil {
			return err
		}
		for _, info := range page {
			if err := fn(info); err != nil {
				return err
			}
			last = info.Key
		}
	}
	return nil
}
