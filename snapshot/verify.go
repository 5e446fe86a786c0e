package snapshot

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A Report is what verifying a snapshot came to.
type Report struct {
	Blocks   int64 // found good, now or before by the same Verifier; holes are none
	Bytes    int64 // stored ones of the blocks found good now
	Problems int64
}

// Verify checks all of a committed snapshot: its records, its root, every
// leaf, the footer against the leaves, and every block's bytes by their hash.
// onProblem, if set, is told each thing that is damaged or missing, one at a
// time. The error says that the verification could not be finished, or that
// there was nothing to verify: ErrNotFound (also if the snapshot is deleted
// meanwhile), ErrPending, ErrAborted.
func (s *Store) Verify(ctx context.Context, id manifest.SnapshotID, onProblem func(error)) (Report, error) {
	return NewVerifier(s).Verify(ctx, id, onProblem)
}

// A Verifier verifies snapshots and reads the blocks that several of them share
// once. It remembers 4 bytes a block. It may be used concurrently.
type Verifier struct {
	store *Store

	mu   sync.Mutex // guards good
	good map[ownedPack][]fingerprint
}

// NewVerifier returns a Verifier that has seen nothing yet.
func NewVerifier(s *Store) *Verifier {
	return &Verifier{store: s, good: make(map[ownedPack][]fingerprint)}
}

// ownedPack names a pack of any lineage.
type ownedPack struct {
	owner  manifest.SnapshotID
	number uint32
}

// A fingerprint is the beginning of the hash that a slot's bytes were found to
// have; zero: none yet. An index that claims another hash for the same slot
// goes unnoticed with a chance of 2⁻³².
type fingerprint uint32

func fingerprintOf(h manifest.Hash) fingerprint {
	return max(1, fingerprint(binary.LittleEndian.Uint32(h[:])))
}

func (v *Verifier) isGood(lineage manifest.LineageID, ref manifest.Ref) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	slots := v.good[ownedPack{manifest.SnapshotID{Lineage: lineage, Serial: ref.Owner}, ref.Pack}]
	return int(ref.Slot) < len(slots) && slots[ref.Slot] == fingerprintOf(ref.Hash)
}

func (v *Verifier) setGood(lineage manifest.LineageID, ref manifest.Ref) {
	v.mu.Lock()
	defer v.mu.Unlock()
	id := ownedPack{manifest.SnapshotID{Lineage: lineage, Serial: ref.Owner}, ref.Pack}
	slots := v.good[id]
	if missing := int(ref.Slot) + 1 - len(slots); missing > 0 {
		slots = append(slots, make([]fingerprint, missing)...)
	}
	slots[ref.Slot] = fingerprintOf(ref.Hash)
	v.good[id] = slots
}

// Verify is [Store.Verify]. Blocks that this Verifier has found to be good
// before are not read again.
func (v *Verifier) Verify(ctx context.Context, id manifest.SnapshotID, onProblem func(error)) (Report, error) {
	c := &check{store: v.store, verifier: v, id: id, onProblem: onProblem}
	if err := c.run(ctx); err != nil {
		return c.report, fmt.Errorf("verify %s: %w", id, err)
	}
	return c.report, nil
}

// A check is one verification of one snapshot.
type check struct {
	store     *Store
	verifier  *Verifier
	id        manifest.SnapshotID
	outcome   manifest.Outcome
	onProblem func(error)

	mu     sync.Mutex // guards report, and the calls of onProblem
	report Report
}

func (c *check) run(ctx context.Context) error {
	if err := c.store.checkTombstone(ctx, c.id); err != nil {
		return err
	}
	outcome, root, err := c.store.committed(ctx, c.id)
	if errors.Is(err, manifest.ErrVersion) {
		return err
	}
	if err != nil {
		return c.problem(ctx, err)
	}
	c.outcome = outcome
	if err := c.records(ctx); err != nil {
		return err
	}
	if err := c.objects(ctx); err != nil {
		return err
	}
	index := &indexCheck{check: c, image: &Image{Outcome: outcome, Root: root, objects: c.store.objects}, referred: make(slotSet)}
	if err := index.blocks(ctx); err != nil {
		return err
	}
	return index.footer(ctx)
}

// problem reports damage and returns nil, or else returns the error, which is
// no verdict.
func (c *check) problem(ctx context.Context, err error) error {
	if err == nil || !isDamage(err) || ctx.Err() != nil {
		return err
	}
	// What a reclaim removes after a delete is no damage.
	if err := c.store.checkTombstone(ctx, c.id); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Problems++
	if c.onProblem != nil {
		c.onProblem(err)
	}
	return nil
}

// damaged reports damage that no store call found.
func (c *check) damaged(ctx context.Context, format string, args ...any) error {
	return c.problem(ctx, fmt.Errorf("%w: "+format, append([]any{manifest.ErrCorrupt}, args...)...))
}

// records checks the records besides the outcome.
func (c *check) records(ctx context.Context) error {
	intent, err := c.store.intent(ctx, c.id)
	if err == nil && (intent.Nonce != c.outcome.Nonce || intent.Size != c.outcome.Size || intent.BlockSize != c.outcome.BlockSize) {
		err = fmt.Errorf("%w: the intent and the outcome are of different attempts", manifest.ErrCorrupt)
	}
	if err := c.problem(ctx, err); err != nil {
		return err
	}
	lineage, err := c.store.Lineage(ctx, c.id.Lineage)
	switch {
	case errors.Is(err, manifest.ErrVersion):
		return err
	case errors.Is(err, ErrNotFound):
		err = fmt.Errorf("%w: %w", manifest.ErrCorrupt, err)
	case err == nil && lineage.BlockSize != c.outcome.BlockSize:
		err = fmt.Errorf("%w: the lineage has blocks of %d bytes, the snapshot of %d", manifest.ErrCorrupt, lineage.BlockSize, c.outcome.BlockSize)
	}
	if err := c.problem(ctx, err); err != nil {
		return err
	}
	_, err = c.store.changedTags(ctx, c.id)
	return c.problem(ctx, err)
}

// objects checks what the snapshot uploaded against what its outcome says of
// it. As long as it is not deleted nobody removes or rewrites any of it.
func (c *check) objects(ctx context.Context) error {
	var packs, parts, size int64
	var hasRoot bool
	var strange []string
	err := c.store.objects.List(ctx, manifest.DataPrefix(c.id), func(o blockstore.Info) error {
		_, notPack := manifest.ParsePackKey(o.Key)
		_, notPart := manifest.ParseLeavesKey(o.Key)
		switch {
		case notPack == nil:
			packs++
		case notPart == nil:
			parts += o.Size
		case o.Key == manifest.RootKey(c.id):
			hasRoot = true
		default:
			strange = append(strange, o.Key)
			return nil
		}
		size += o.Size
		return nil
	})
	if err != nil {
		return err
	}
	for _, key := range strange {
		if err := c.damaged(ctx, "object %s is none of lazyvol's", key); err != nil {
			return err
		}
	}
	if packs != c.outcome.Packs || parts != c.outcome.LeavesLength || size != c.outcome.StoredBytes {
		err := c.damaged(ctx, "%d packs, %d bytes of leaves and %d bytes in all are in the store, instead of %d, %d and %d",
			packs, parts, size, c.outcome.Packs, c.outcome.LeavesLength, c.outcome.StoredBytes)
		if err != nil {
			return err
		}
	}
	if !hasRoot {
		return c.damaged(ctx, "the root object is missing")
	}
	return c.rootObject(ctx)
}

// rootObject checks the root object, also when the outcome holds a copy.
func (c *check) rootObject(ctx context.Context) error {
	data, _, err := c.store.objects.Get(ctx, manifest.RootKey(c.id), manifest.MaxRootLength)
	if err == nil && manifest.HexHash(manifest.Sum(data)) != c.outcome.RootHash {
		err = fmt.Errorf("%w: the root object does not have the hash in the outcome", manifest.ErrCorrupt)
	}
	return c.problem(ctx, err)
}
