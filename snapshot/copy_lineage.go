package snapshot

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// lineage returns the lineage of the destination for copies of snapshots of a
// lineage under the key asked for: the first whose record says so, in a sequence of ids
// that follow from the origin, or a new one at the first of them that is free. So it is
// found with one request or two, and several copies that begin at once agree on it.
func (c *Copy) lineage(ctx context.Context, origin manifest.LineageOrigin) (manifest.LineageID, error) {
	id, err := c.findLineage(ctx, origin)
	if err != nil {
		return 0, fmt.Errorf("find a lineage for the copy: %w", err)
	}
	return id, nil
}

func (c *Copy) findLineage(ctx context.Context, origin manifest.LineageOrigin) (manifest.LineageID, error) {
	const draws = 64 // one for each key, and of 2³² ids
	uri, err := c.keyURI(ctx)
	if err != nil {
		return 0, err
	}
	key := c.canonicalKey(uri)
	for n := range uint32(draws) {
		id := copyLineageID(origin, n)
		record, err := c.To.Lineage(ctx, id)
		if errors.Is(err, ErrNotFound) {
			record = manifest.LineageRecord{ID: id, BlockSize: c.Image.Geometry().BlockSize, CopyOf: &origin}
			record, err = c.To.recordLineage(ctx, record, uri)
			if errors.Is(err, blockstore.ErrExists) {
				record, err = c.To.Lineage(ctx, id)
			}
		}
		if err != nil {
			return 0, err
		}
		if record.CopyOf == nil || *record.CopyOf != origin || record.BlockSize != c.Image.Geometry().BlockSize {
			continue
		}
		if same, err := key(ctx, record); same || err != nil {
			return id, err
		}
	}
	return 0, fmt.Errorf("%d ids tried and all taken", draws)
}

// keyURI names the key of the copy. Nothing that is encrypted is decrypted.
func (c *Copy) keyURI(ctx context.Context) (string, error) {
	if c.KeyURI != "" {
		return c.KeyURI, nil
	}
	source, err := c.From.Lineage(ctx, c.Image.ID().Lineage)
	if err != nil || source.Encryption == nil {
		return "", err
	}
	return source.Encryption.KeyURI, nil
}

// canonicalKey returns what tells whether a lineage is encrypted under a key. The key
// may have several names, of which only the store of keys knows the one on record.
func (c *Copy) canonicalKey(uri string) func(context.Context, manifest.LineageRecord) (bool, error) {
	canonical := ""
	return func(ctx context.Context, record manifest.LineageRecord) (bool, error) {
		e := record.Encryption
		switch {
		case e == nil || uri == "":
			return e == nil && uri == "", nil
		case e.Shredded:
			return false, nil
		case e.KeyURI == uri:
			return true, nil
		}
		if canonical == "" {
			made, _, err := c.To.encrypt(ctx, uri, record.ID)
			if err != nil {
				return false, err
			}
			canonical = made.KeyURI
		}
		return e.KeyURI == canonical, nil
	}
}

// copyLineageID returns the n-th id that a lineage with copies may have.
func copyLineageID(origin manifest.LineageOrigin, n uint32) manifest.LineageID {
	hash := sha256.Sum256(fmt.Appendf(nil, "copy of lineage %s in store %s: %d", origin.Lineage, origin.Store, n))
	return manifest.LineageID(max(1, binary.LittleEndian.Uint32(hash[:])))
}
