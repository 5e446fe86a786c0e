package snapshot

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// Keys are the keys that wrap the data keys of lineages, by their URIs.
type Keys interface {
	// Generate draws a data key and wraps it, bound to a lineage. canonical is
	// the URI by which it can be unwrapped from now on.
	Generate(ctx context.Context, uri, lineage string) (plain, wrapped []byte, canonical string, err error)
	Unwrap(ctx context.Context, uri string, wrapped []byte, lineage string) ([]byte, error)
}

var (
	// ErrNoKey: the data key of a lineage cannot be had, or not now.
	ErrNoKey = errors.New("it is encrypted, and its key cannot be had")

	// ErrShredded: the data key of a lineage was destroyed, and with it all that it
	// sealed. It is an ErrNoKey.
	ErrShredded = fmt.Errorf("%w: it was shredded", ErrNoKey)
)

// UseKeys gives the store what unwraps data keys. Without it encrypted lineages cannot
// be read. To be called before any other method.
func (s *Store) UseKeys(k Keys) { s.keys = k }

// Key returns the data key of a lineage; nil if that is not encrypted. It is unwrapped
// once, and then kept: whatever the store says later, a lineage of which we have the key
// is encrypted under it. Its error is that of [Keys], or ErrShredded.
func (s *Store) Key(ctx context.Context, id manifest.LineageID) (*crypt.Key, error) {
	if key := s.keptKey(id); key != nil {
		return key, nil
	}
	record, err := s.Lineage(ctx, id)
	if err != nil {
		return nil, err
	}
	return s.keyOf(ctx, record)
}

// Recall has the store take a lineage's record from who has kept it, instead of reading
// it. A volume does: no store can get its blocks in clear by denying that the lineage
// is encrypted, and it needs no store to get at its key.
func (s *Store) Recall(record manifest.LineageRecord) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if read, ok := s.lineages[record.ID]; ok && !sameKey(read.Encryption, record.Encryption) {
		delete(s.dataKeys, record.ID) // what the store said
	}
	s.lineages[record.ID] = record
}

func sameKey(a, b *manifest.Encryption) bool {
	return (a == nil) == (b == nil) && (a == nil || bytes.Equal(a.WrappedKey, b.WrappedKey))
}

// keyOf is Key of a lineage whose record is at hand.
func (s *Store) keyOf(ctx context.Context, record manifest.LineageRecord) (*crypt.Key, error) {
	if record.Encryption == nil {
		return nil, nil
	}
	if key := s.keptKey(record.ID); key != nil {
		return key, nil
	}
	if record.Encryption.Shredded {
		return nil, fmt.Errorf("lineage %s: %w", record.ID, ErrShredded)
	}
	key, err := unwrap(ctx, s.keys, record.ID, record.Encryption)
	if err != nil {
		return nil, err
	}
	s.keepKey(record.ID, key)
	return key, nil
}

// keptKey returns a key that was unwrapped before, or nil.
func (s *Store) keptKey(id manifest.LineageID) *crypt.Key {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dataKeys[id]
}

func (s *Store) keepKey(id manifest.LineageID, key *crypt.Key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dataKeys[id] = key
}

func unwrap(ctx context.Context, keys Keys, lineage manifest.LineageID, e *manifest.Encryption) (*crypt.Key, error) {
	if keys == nil {
		return nil, fmt.Errorf("lineage %s: %w", lineage, ErrNoKey)
	}
	plain, err := keys.Unwrap(ctx, e.KeyURI, e.WrappedKey, lineage.String())
	if errors.Is(err, crypt.ErrKeyURI) { // nobody asked for it: it is the record's
		err = fmt.Errorf("%w: %w", manifest.ErrCorrupt, err)
	}
	if err != nil {
		return nil, fmt.Errorf("lineage %s: %w: %s: %w", lineage, ErrNoKey, e.KeyURI, err)
	}
	defer clear(plain)
	return crypt.NewKey(plain)
}

// encrypt makes a data key for a new lineage. It is that lineage's once it is recorded.
func (s *Store) encrypt(ctx context.Context, uri string, lineage manifest.LineageID) (*manifest.Encryption, *crypt.Key, error) {
	if s.keys == nil {
		return nil, nil, errors.New("encrypt a lineage: there are no keys")
	}
	plain, wrapped, canonical, err := s.keys.Generate(ctx, uri, lineage.String())
	if err != nil {
		return nil, nil, fmt.Errorf("make a data key under %s: %w", uri, err)
	}
	defer clear(plain)
	key, err := crypt.NewKey(plain)
	if err != nil {
		return nil, nil, err
	}
	return &manifest.Encryption{KeyURI: canonical, WrappedKey: wrapped}, key, nil
}

// What sealed objects are bound to.
func rootName(id manifest.SnapshotID) string   { return "root of " + id.String() }
func leavesName(id manifest.SnapshotID) string { return "leaves of " + id.String() }
func traceName(id manifest.SnapshotID, name string) string {
	return "trace " + name + " of " + id.String()
}

// openIndex opens a leaf or a section out of its home's leaves stream and checks its hash.
func openIndex(key *crypt.Key, home manifest.SnapshotID, sealed []byte, hash manifest.Hash) ([]byte, error) {
	data, err := key.OpenObject(leavesName(home), sealed)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", manifest.ErrCorrupt, err)
	}
	if manifest.Sum(data) != hash {
		return nil, fmt.Errorf("wrong SHA-256: %w", manifest.ErrCorrupt)
	}
	return data, nil
}
