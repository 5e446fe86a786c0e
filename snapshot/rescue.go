package snapshot

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A Loss is a range of a device that cannot be restored, and why: the object that
// would be needed, and what is the matter with it.
type Loss struct {
	Range
	Reason string
}

// IsDamage reports whether an error says that something in the store is damaged
// or missing. That the store cannot be asked is none.
func IsDamage(err error) bool { return isDamage(err) }

// LoadFrom is [Store.Load] of a committed snapshot whose root may have to come
// from elsewhere. The caller sees to the pin.
func (s *Store) LoadFrom(ctx context.Context, id manifest.SnapshotID, from Salvage) (*Image, error) {
	if err := s.checkTombstone(ctx, id); err != nil {
		return nil, err
	}
	img, err := s.committed(ctx, id)
	if isDamage(err) && img.Outcome.State == manifest.StateCommitted {
		if data, ok := from.Root(id, manifest.Hash(img.Outcome.RootHash)); ok {
			if img.key, err = s.Key(ctx, id.Lineage); err == nil {
				err = img.setRoot(id, data)
			}
		}
	}
	if err != nil {
		return nil, err
	}
	return img, nil
}

// Rescue is [Image.Export] of a damaged image: it writes all that can be read from
// the store, or has the right hash in what somebody else has, and returns the
// ranges of the rest, ascending and merged. There w is left as it is. from may be
// nil.
//
// The error is of the store or of w: neither is damage.
func (m *Image) Rescue(ctx context.Context, w io.WriterAt, from Salvage, progress func(done, total int64)) ([]Loss, error) {
	r := &rescue{Image: m, w: w, from: from, progress: progress}
	if err := r.run(ctx); err != nil {
		return nil, fmt.Errorf("export %s: %w", m.ID(), err)
	}
	return merged(r.losses), nil
}

// A rescue is one Rescue.
type rescue struct {
	*Image
	w        io.WriterAt
	from     Salvage
	progress func(done, total int64)

	mu     sync.Mutex // guards the fields below, and the calls of progress
	losses []Loss
	done   int64
}

func (r *rescue) run(ctx context.Context) error {
	reader := &blockstore.BlockReader{Store: r.objects, Lineage: r.ID().Lineage, BlockSize: r.Geometry().BlockSize, Key: r.key}
	buffers := make(freelist[[]byte], readRuns)
	return r.eachRun(ctx, r.pick, func(ctx context.Context, run manifest.Run) error {
		buffer := buffers.get(func() []byte { return make([]byte, reader.BlockSize) })
		defer buffers.put(buffer)
		var failed error
		_ = reader.ReadRun(ctx, run.Refs, func(int) []byte { return buffer }, func(i int, err error) {
			if err = r.block(ctx, run.Blocks[i], run.Refs[i], buffer, err); err != nil && failed == nil {
				failed = fmt.Errorf("block %d: %w", run.Blocks[i], err)
			}
		}) // done was told each error
		return failed
	})
}

// pick takes the blocks out of a leaf, which may have to come from elsewhere.
func (r *rescue) pick(ctx context.Context, l leafRead) ([]int64, []manifest.Ref, error) {
	if l.err == nil {
		blocks, refs := l.blocks()
		return blocks, refs, nil
	}
	if !isDamage(l.err) || ctx.Err() != nil {
		return nil, nil, l.err
	}
	n := r.Geometry().LeafLen(l.ref.Leaf)
	if r.from != nil {
		if data, ok := r.from.Leaf(r.ID().Lineage, l.ref, n); ok {
			leaf, err := manifest.DecodeLeaf(data)
			if err != nil {
				return nil, nil, err
			}
			l.leaf = leaf
			blocks, refs := l.blocks()
			return blocks, refs, nil
		}
	}
	part, _ := manifest.SplitOffset(l.ref.Offset)
	owner := manifest.SnapshotID{Lineage: r.ID().Lineage, Serial: l.ref.Owner}
	r.lose(l.ref.Leaf*manifest.LeafBlocks, int64(n), manifest.LeavesKey(owner, part), l.err)
	return nil, nil, nil
}

// block writes a block that was read, or err says why not.
func (r *rescue) block(ctx context.Context, block int64, ref manifest.Ref, data []byte, err error) error {
	if err != nil {
		if !isDamage(err) || ctx.Err() != nil {
			return err
		}
		if r.from == nil || !r.from.Block(r.ID().Lineage, block, ref.Hash, data) || manifest.Sum(data) != ref.Hash {
			owner := manifest.SnapshotID{Lineage: r.ID().Lineage, Serial: ref.Owner}
			r.lose(block, 1, manifest.PackKey(owner, ref.Pack), err)
			return nil
		}
	}
	g := r.Geometry()
	if _, err := r.w.WriteAt(data[:g.BlockLen(block)], block*int64(g.BlockSize)); err != nil {
		return err
	}
	if r.progress != nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.done += int64(g.BlockSize)
		r.progress(r.done, r.Root.DataBlocks*int64(g.BlockSize))
	}
	return nil
}

func (r *rescue) lose(block, count int64, object string, err error) {
	what := "is damaged"
	if errors.Is(err, blockstore.ErrNotExist) {
		what = "is missing"
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.losses = append(r.losses, Loss{blockRange(r.Geometry(), block, count), object + " " + what})
}

// merged sorts losses, and joins those that follow each other for the same reason.
func merged(losses []Loss) []Loss {
	slices.SortFunc(losses, func(a, b Loss) int { return cmp.Compare(a.Offset, b.Offset) })
	var joined []Loss
	for _, l := range losses {
		if last := len(joined) - 1; last >= 0 && joined[last].Offset+joined[last].Length == l.Offset && joined[last].Reason == l.Reason {
			joined[last].Length += l.Length
			continue
		}
		joined = append(joined, l)
	}
	return joined
}
