package snapshot

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A Grant is what of the store somebody must be able to read who opens, reads
// and copies a snapshot, and nothing else.
type Grant struct {
	// Keys are the objects: an exact key, or, ending in *, all keys that begin
	// so. Either is exact: every object that it fits is needed.
	Keys []string

	// Owners are the same data by its owners, as far as they can be told: more
	// than is needed.
	Owners []string

	// Absent are the keys that may have no object, which must be told from one
	// that may not be read.
	Absent []string

	// Beside is what Keys shows besides the snapshot's own blocks, in stored
	// bytes: what else there is in packs of which it needs a part. Packs are
	// how many these are, and Foreign what Owners shows besides.
	Beside, Foreign int64
	Packs           int
}

// Grant returns what a completed snapshot needs.
func (s *Store) Grant(ctx context.Context, id manifest.SnapshotID) (*Grant, error) {
	g, err := s.grant(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("find what %s needs: %w", id, err)
	}
	return g, nil
}

func (s *Store) grant(ctx context.Context, id manifest.SnapshotID) (*Grant, error) {
	img, err := s.Open(ctx, id, Holder{})
	if err != nil {
		return nil, err
	}
	g := &Grant{
		Keys: []string{
			manifest.StoreKey(), manifest.LineageKey(id.Lineage), manifest.IntentKey(id), manifest.OutcomeKey(id),
			manifest.TombstoneKey(id), manifest.MetaKey(id), manifest.TraceKey(id, "*"),
		},
		Absent: []string{manifest.OutcomeKey(id), manifest.TombstoneKey(id), manifest.MetaKey(id), manifest.TraceKey(id, "")},
	}
	if set := img.Outcome.Set; set != "" {
		_, err := s.ownOutcome(ctx, id)
		if errors.Is(err, blockstore.ErrNotExist) {
			g.Keys, err = append(g.Keys, manifest.SetOutcomeKey(set)), nil
		}
		if err != nil {
			return nil, err
		}
	}
	g.Owners = slices.Clone(g.Keys)
	needed, err := neededData(ctx, img)
	if err != nil {
		return nil, err
	}
	for _, owner := range slices.Sorted(maps.Keys(needed)) {
		if err := g.addOwner(ctx, s, manifest.SnapshotID{Lineage: id.Lineage, Serial: owner}, needed[owner]); err != nil {
			return nil, err
		}
	}
	return g, nil
}

// neededObjects are those of one owner that an image refers to, and of each pack
// what it needs of it, in bytes.
type neededObjects map[string]int64

// neededData returns what an image refers to, by owner.
func neededData(ctx context.Context, img *Image) (map[uint64]neededObjects, error) {
	id := func(serial uint64) manifest.SnapshotID {
		return manifest.SnapshotID{Lineage: img.ID().Lineage, Serial: serial}
	}
	needed := map[uint64]neededObjects{img.ID().Serial: {manifest.RootKey(img.ID()): 0}}
	add := func(owner uint64, key string, bytes int64) {
		if needed[owner] == nil {
			needed[owner] = make(neededObjects)
		}
		needed[owner][key] += bytes
	}
	for _, part := range img.Root.LeavesParts() {
		add(part.Owner, manifest.LeavesKey(id(part.Owner), part.Part), 0)
	}
	live := &liveness{packs: make(map[packID]*livePack)}
	err := img.eachSection(ctx, img.Root.Sections, func(_ context.Context, section *manifest.Section) error {
		live.add(section)
		return nil
	})
	for p, pack := range live.packs {
		add(p.owner, manifest.PackKey(id(p.owner), p.number), pack.size(img.key))
	}
	return needed, err
}

// addOwner adds what is needed of one owner. What that has uploaded it has
// uploaded for good: no object is ever added to it, so that a prefix that fits
// only what is needed stays exact.
func (g *Grant) addOwner(ctx context.Context, s *Store, owner manifest.SnapshotID, needed neededObjects) error {
	var there []string
	found := 0
	err := s.objects.List(ctx, manifest.DataPrefix(owner), func(o blockstore.Info) error {
		there = append(there, o.Key)
		bytes, need := needed[o.Key]
		if !need {
			g.Foreign += o.Size
			return nil
		}
		found++
		if _, err := manifest.ParsePackKey(o.Key); err == nil && o.Size > bytes {
			g.Packs++
			g.Beside += o.Size - bytes
			g.Foreign += o.Size - bytes
		}
		return nil
	})
	if err != nil {
		return err
	}
	if found < len(needed) {
		return fmt.Errorf("%s lacks some of its data; see 'lazyvol snapshot verify'", owner)
	}
	g.Keys = append(g.Keys, cover(there, func(key string) bool { _, ok := needed[key]; return ok })...)
	g.Owners = append(g.Owners, manifest.DataPrefix(owner)+"*")
	return nil
}

// cover returns the fewest patterns, keys or prefixes with a * behind, that fit
// all wanted ones of some keys, which are in order, and none of the others.
func cover(keys []string, wanted func(string) bool) []string {
	switch {
	case !slices.ContainsFunc(keys, wanted):
		return nil
	case len(keys) == 1:
		return keys
	}
	// What all share: keys are in order.
	first, last := keys[0], keys[len(keys)-1]
	n := 0
	for n < min(len(first), len(last)) && first[n] == last[n] {
		n++
	}
	if !slices.ContainsFunc(keys, func(key string) bool { return !wanted(key) }) {
		return []string{first[:n] + "*"}
	}
	// Those go together that share one byte more. No key is the begin of another
	// one: see blockstore.CheckKey; and those that are numbered are as long as
	// each other.
	var patterns []string
	for len(keys) > 0 {
		next := keys[0][:min(n+1, len(keys[0]))]
		end := 1
		for end < len(keys) && len(next) > n && strings.HasPrefix(keys[end], next) {
			end++
		}
		patterns = append(patterns, cover(keys[:end], wanted)...)
		keys = keys[end:]
	}
	return patterns
}
