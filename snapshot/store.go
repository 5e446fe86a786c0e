package snapshot

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/manifest"
)

// The verdicts of the protocol, wrapped; test for them with [errors.Is].
var (
	// ErrNotFound: no such snapshot, or it was deleted.
	ErrNotFound = errors.New("snapshot not found")

	// ErrPending: the snapshot is still being made.
	ErrPending = errors.New("snapshot is pending")

	// ErrAborted: the snapshot was given up before it was complete.
	ErrAborted = errors.New("snapshot was aborted")

	// ErrParentGone: the parent of an attempt was deleted; begin again without it.
	ErrParentGone = errors.New("parent snapshot was deleted")

	// ErrPinLeft: what failed may have left a pin, which its holder has to remove.
	ErrPinLeft = errors.New("a pin may be left")

	// ErrUnrelated: two snapshots do not share a lineage.
	ErrUnrelated = errors.New("snapshots are not of the same lineage")

	// ErrLocked: a lock keeps the snapshot from being deleted, or itself from being
	// undone.
	ErrLocked = errors.New("snapshot is locked")

	// ErrNotLocked: no lock is in force.
	ErrNotLocked = errors.New("snapshot is not locked")

	// ErrLock: no lock can be as it was asked for.
	ErrLock = errors.New("invalid lock")

	// ErrRetention: no deleted snapshot can be kept for as long as was asked for.
	ErrRetention = errors.New("invalid retention")

	// ErrInBin is the ErrNotFound of a snapshot in the recycle bin.
	ErrInBin = fmt.Errorf("%w: it is in the recycle bin", ErrNotFound)

	// ErrNotInBin: the snapshot is not in the recycle bin.
	ErrNotInBin = errors.New("snapshot is not in the recycle bin")

	// ErrNotPermitted: the snapshot may not be shared like this.
	ErrNotPermitted = errors.New("sharing is not permitted")

	// ErrNotStore: the object store holds no lazyvol store.
	ErrNotStore = errors.New("not a lazyvol store")
)

// isDamage reports whether an error says that what is in the store is not what
// was written, or not all of it: asking again will not help. Every other error
// is no verdict.
func isDamage(err error) bool {
	for _, damage := range []error{
		blockstore.ErrNotExist, blockstore.ErrShort, blockstore.ErrTooLarge, manifest.ErrCorrupt, manifest.ErrVersion,
	} {
		if errors.Is(err, damage) {
			return true
		}
	}
	return false
}

// recordLimit bounds a JSON record, in bytes. The largest is an outcome with a
// small root in it.
const recordLimit = 1 << 20

// parallel is how many small requests one operation keeps in flight.
const parallel = 32

// A Store is a lazyvol store in an object store. Its methods may be called
// concurrently.
type Store struct {
	objects blockstore.Store
	keys    Keys   // nil: none
	owner   string // recorded in the snapshots begun here; "": none
	records RecordCache
	freed   func(bytes int64) // told by Reclaim; nil: nobody is

	mu       sync.Mutex // guards the fields below
	id       string     // "" until store.json was read
	lineages map[manifest.LineageID]manifest.LineageRecord
	dataKeys map[manifest.LineageID]*crypt.Key // of encrypted lineages, unwrapped
}

// New returns the lazyvol store in objects without asking it anything; ID
// tells whether there is one. The object store does the retrying: an error it
// reports is final here.
func New(objects blockstore.Store) *Store {
	return &Store{
		objects: objects, lineages: make(map[manifest.LineageID]manifest.LineageRecord),
		dataKeys: make(map[manifest.LineageID]*crypt.Key),
	}
}

// Init makes the store if there is none yet. It is idempotent, and safe when
// several hosts do it at once.
func Init(ctx context.Context, objects blockstore.Store) (*Store, error) {
	s := New(objects)
	if _, err := s.ID(ctx); !errors.Is(err, ErrNotStore) {
		return s, err
	}
	record := manifest.StoreRecord{Version: manifest.RecordVersion, ID: manifest.NewNonce()}
	err := s.putOnce(ctx, manifest.StoreKey(), record)
	if err != nil && !errors.Is(err, blockstore.ErrExists) {
		return nil, fmt.Errorf("make store %s: %w", objects, err)
	}
	_, err = s.ID(ctx)
	return s, err
}

// SetOwner names, before s is used, the owner of the snapshots that are begun
// through it: see [manifest.CheckOwner].
func (s *Store) SetOwner(owner string) { s.owner = owner }

// Objects returns the object store that holds this store.
func (s *Store) Objects() blockstore.Store { return s.objects }

// String returns the store's URL.
func (s *Store) String() string { return s.objects.String() }

// ID returns the store's own id, reading it on the first call. It is
// ErrNotStore when the object store holds no lazyvol store, and
// manifest.ErrVersion when a newer lazyvol made it.
func (s *Store) ID(ctx context.Context) (string, error) {
	s.mu.Lock()
	id := s.id
	s.mu.Unlock()
	if id != "" {
		return id, nil
	}
	record, _, err := getRecord[manifest.StoreRecord](ctx, s.objects, manifest.StoreKey())
	if errors.Is(err, blockstore.ErrNotExist) {
		return "", fmt.Errorf("%w: %s (make one with 'lazyvol init')", ErrNotStore, s.objects)
	}
	if err != nil {
		return "", fmt.Errorf("open store %s: %w", s.objects, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.id = record.ID
	return s.id, nil
}

// CreateLineage draws a new lineage and records it. blockSize is in bytes. keyURI names
// the key under which it is encrypted; "" is none.
func (s *Store) CreateLineage(ctx context.Context, blockSize int, keyURI string) (manifest.LineageRecord, error) {
	const draws = 8 // of 2³² ids; a store holds far fewer lineages
	for range draws {
		record, err := s.recordLineage(ctx, manifest.LineageRecord{ID: manifest.NewLineageID(), BlockSize: blockSize}, keyURI)
		if errors.Is(err, blockstore.ErrExists) {
			continue // taken, or ours with its reply lost: an unused lineage harms nobody
		}
		if err != nil {
			return record, fmt.Errorf("create lineage: %w", err)
		}
		s.Recall(record)
		return record, nil
	}
	return manifest.LineageRecord{}, fmt.Errorf("create lineage: %d ids drawn and all taken", draws)
}

// recordLineage records a lineage under its id, encrypted under a key that is made for
// it unless keyURI is "". ErrExists: the id is taken.
func (s *Store) recordLineage(ctx context.Context, record manifest.LineageRecord, keyURI string) (manifest.LineageRecord, error) {
	record.Version, record.Created = manifest.RecordVersion, now()
	var key *crypt.Key
	if keyURI != "" {
		var err error
		if record.Encryption, key, err = s.encrypt(ctx, keyURI, record.ID); err != nil {
			return record, err
		}
	}
	if err := s.putOnce(ctx, manifest.LineageKey(record.ID), record); err != nil {
		return record, err
	}
	if key != nil {
		s.keepKey(record.ID, key)
	}
	return record, nil
}

// Lineage returns a lineage's record. Records do not change, but for their key when that
// is shredded, so each is read once.
func (s *Store) Lineage(ctx context.Context, id manifest.LineageID) (manifest.LineageRecord, error) {
	s.mu.Lock()
	record, ok := s.lineages[id]
	s.mu.Unlock()
	if ok {
		return record, nil
	}
	record, _, err := getRecord[manifest.LineageRecord](ctx, s.objects, manifest.LineageKey(id))
	if errors.Is(err, blockstore.ErrNotExist) {
		return record, fmt.Errorf("%w: the store has no lineage %s", ErrNotFound, id)
	}
	if err == nil && record.ID != id { // to whose id its key is bound
		err = fmt.Errorf("its record is that of %s: %w", record.ID, manifest.ErrCorrupt)
	}
	if err != nil {
		return record, fmt.Errorf("read lineage %s: %w", id, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if known, ok := s.lineages[id]; ok {
		return known, nil // it was recalled meanwhile
	}
	s.lineages[id] = record
	return record, nil
}

// putOnce writes a record under a key that must be free: ErrExists otherwise.
func (s *Store) putOnce(ctx context.Context, key string, record any) error {
	data, err := manifest.EncodeRecord(record)
	if err != nil {
		return err
	}
	_, err = s.objects.Put(ctx, key, data, blockstore.IfAbsent)
	return err
}

// put writes a record that its owner may overwrite.
func (s *Store) put(ctx context.Context, key string, record any) error {
	data, err := manifest.EncodeRecord(record)
	if err != nil {
		return err
	}
	_, err = s.objects.Put(ctx, key, data, blockstore.Condition{})
	return err
}

// exists reports whether an object is there. An error is not absence.
func (s *Store) exists(ctx context.Context, key string) (bool, error) {
	_, _, err := s.objects.Get(ctx, key, recordLimit)
	if errors.Is(err, blockstore.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// getRecord reads and decodes a record and returns its ETag.
func getRecord[T any](ctx context.Context, objects blockstore.Store, key string) (record T, etag string, err error) {
	data, etag, err := objects.Get(ctx, key, recordLimit)
	if err != nil {
		return record, "", err
	}
	record, err = manifest.DecodeRecord[T](data)
	if err != nil {
		return record, "", fmt.Errorf("read %s: %w", key, err)
	}
	return record, etag, nil
}
