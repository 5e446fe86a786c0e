package volume

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"math"
	"path/filepath"
	"sync"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// ErrRootMoved: a snapshot was made of a volume while its map was drawn.
var ErrRootMoved = errors.New("a snapshot of the volume was made meanwhile")

// An Extent is a range of a device, in bytes, of which the same holds throughout.
type Extent struct {
	Offset, Length int64

	// Owner is the snapshot that uploaded what the root has here, also where that was
	// written since; zero: the root has a hole.
	Owner manifest.SnapshotID

	// Cached says that this host has a copy of what the root has here. Only its marks
	// were looked at, so that a read may still miss.
	Cached bool

	// Dirty is what was done since the last snapshot: Absent is nothing, Data written,
	// Zero discarded or zeroed.
	Dirty cache.PageState
}

const (
	// mapLeaves is how many leaves a map reads ahead, in as many requests at once: a
	// quarter of those that reads may have.
	mapLeaves = 16

	// mapBatch bounds how many extents are gathered before any is handed on, so that
	// nothing is held meanwhile that a snapshot waits for: some 200 KiB.
	mapBatch = 4096
)

// Map calls begin with the device's root, zero if it has none, and geometry, and then fn
// for its extents, ascending, each byte in one, adjoining ones different. It reads all
// leaves of the root, from the store if this host lacks them. Both functions may be
// slow: nobody waits for them. Their error ends the map.
//
// While the device is in use each extent is as it was at some moment during the call,
// all with the root that the device had when it began, else ErrRootMoved. A device
// that grows is mapped as large as it was.
func (d *Device) Map(ctx context.Context, begin func(root manifest.SnapshotID, g manifest.Geometry) error, fn func(Extent) error) error {
	v := d.view.acquire()
	image := v.image
	v.release()
	m := mapping{
		geometry: d.geometry.Get(), image: image, fn: fn,
		leaf: func(ctx context.Context, ref manifest.LeafRef) (*manifest.Leaf, error) {
			return d.leaf(ctx, image, ref)
		},
		look: func(look func(*view)) error {
			now := d.view.acquire()
			defer now.release()
			if now.image != image {
				return ErrRootMoved
			}
			look(now)
			return nil
		},
	}
	var base, own sweep
	if d.base != nil {
		base.begin(d.base.Present())
		defer base.end()
	}
	if d.writes != nil {
		own.begin(d.writes.clean.Present())
		defer own.end()
	}
	m.cached = func(block int64) (bool, error) {
		if layer, _ := d.place(block); d.base != nil && layer == d.base.Clean {
			return base.has(block)
		}
		return own.has(block)
	}
	var root manifest.SnapshotID
	if image != nil {
		root = image.ID()
	}
	err := begin(root, m.geometry)
	if err == nil {
		err = m.draw(ctx)
	}
	if err != nil {
		return fmt.Errorf("map %s: %w", d.name, err)
	}
	return nil
}

// MapSnapshot calls fn as [Device.Map] does, for a snapshot, with what this host's base
// has of it. It makes no base, and does not count as a use of the one there is. The caller has
// pinned the snapshot.
func (h *Host) MapSnapshot(ctx context.Context, img *snapshot.Image, fn func(Extent) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("map %s: %w", img.ID(), err)
		}
	}()
	only := newView(nil, nil, img)
	m := mapping{
		geometry: img.Geometry(), image: img, fn: fn,
		leaf:   img.FetchLeaf,
		look:   func(look func(*view)) error { look(only); return nil },
		cached: func(int64) (bool, error) { return false, nil },
	}
	storeID, err := h.Store.ID(ctx)
	if err != nil {
		return err
	}
	b, err := h.peekBase(storeID, img)
	if err != nil {
		return err
	}
	if b != nil {
		defer func() { err = errors.Join(err, b.Close()) }()
		var base sweep
		base.begin(b.Present())
		defer base.end()
		m.cached = base.has
		m.leaf = func(ctx context.Context, ref manifest.LeafRef) (*manifest.Leaf, error) {
			if leaf, ok := b.leaves.Load(ref); ok {
				return leaf, nil
			}
			return img.FetchLeaf(ctx, ref)
		}
	}
	return m.draw(ctx)
}

// peekBase opens the base of a snapshot as it is; nil if this host has none, or it is
// just being removed.
func (h *Host) peekBase(storeID string, img *snapshot.Image) (_ *base, err error) {
	g := img.Geometry()
	b := &base{dir: h.baseDir(storeID, img.ID()), id: img.ID(), size: g.Size}
	b.lock, err = h.FS.Lock(filepath.Join(b.dir, lockName), false)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, vfs.ErrLocked):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("look into the base: %w", err)
	}
	if _, err := cache.CleanGeometry(h.FS, b.dir); errors.Is(err, fs.ErrNotExist) { // being made
		return nil, b.lock.Close()
	}
	b.Clean, err = cache.OpenClean(h.FS, b.dir, g, basePages(img.Key(), img.ID()))
	if err == nil {
		b.leaves, err = cache.OpenIndexFile(h.FS, indexPath(b.dir), g, img.Key())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("look into the base: %w", err), b.Close())
	}
	return b, nil
}

// A mapping is a map being drawn.
type mapping struct {
	geometry manifest.Geometry
	image    *snapshot.Image // the root; nil: none
	fn       func(Extent) error

	leaf   func(context.Context, manifest.LeafRef) (*manifest.Leaf, error)
	cached func(block int64) (bool, error) // is asked in ascending order
	look   func(func(*view)) error         // calls it with what the device is now, for a moment

	open  Extent // the last one, that may go on; Length 0: none
	batch []Extent
}

// draw draws the map of the whole device, leaf by leaf, and of what lies between.
func (m *mapping) draw(ctx context.Context) error {
	off, end := int64(0), m.geometry.Size
	span := int64(m.geometry.BlockSize) * manifest.LeafBlocks
	if m.image != nil {
		refs := m.image.Root.Leaves
		for i, read := range leavesAhead(ctx, refs, m.leaf) {
			first := min(refs[i].Leaf*span, end) // within the device, as no volume shrinks
			if err := m.drawRange(ctx, nil, off, first); err != nil {
				return err
			}
			if read.err != nil { // what a former root alone refers to may be gone
				return cmp.Or(m.look(func(*view) {}), read.err)
			}
			off = first + min(span, end-first)
			if err := m.drawRange(ctx, read.leaf, first, off); err != nil {
				return err
			}
		}
	}
	if err := m.drawRange(ctx, nil, off, end); err != nil {
		return err
	}
	if m.open.Length == 0 {
		return nil
	}
	return m.fn(m.open)
}

// drawRange draws [off, end), in which a leaf lies; nil is all holes.
func (m *mapping) drawRange(ctx context.Context, leaf *manifest.Leaf, off, end int64) error {
	for off < end {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		var failed error
		m.batch = m.batch[:0]
		err := m.look(func(v *view) { off, failed = m.gather(v, leaf, off, end) })
		if err := errors.Join(err, failed); err != nil {
			return err
		}
		for _, e := range m.batch {
			if err := m.add(e); err != nil {
				return err
			}
		}
	}
	return nil
}

// gather adds to the batch what a view has in [off, end), as far as the batch goes,
// and returns how far that is.
func (m *mapping) gather(v *view, leaf *manifest.Leaf, off, end int64) (int64, error) {
	blockSize := int64(m.geometry.BlockSize)
	for off < end && len(m.batch) < mapBatch {
		page := off / manifest.PageSize
		state, _, n := v.run(page, pagesOf(end)-page)
		until := min((page+n)*manifest.PageSize, end)
		if leaf == nil {
			m.batch = append(m.batch, Extent{Offset: off, Length: until - off, Dirty: state})
			off = until
			continue
		}
		for off < until && len(m.batch) < mapBatch {
			block := off / blockSize
			e := Extent{Offset: off, Length: min((block+1)*blockSize, until) - off, Dirty: state}
			if ref := refAt(leaf, int(block%manifest.LeafBlocks)); !ref.IsHole() {
				e.Owner = manifest.SnapshotID{Lineage: m.image.ID().Lineage, Serial: ref.Owner}
				var err error
				if e.Cached, err = m.cached(block); err != nil {
					return off, err
				}
			}
			m.batch = append(m.batch, e)
			off += e.Length
		}
	}
	return off, nil
}

// refAt returns a leaf's ref, a hole beyond its end: a leaf of a root from before the
// volume grew may be short.
func refAt(l *manifest.Leaf, i int) manifest.Ref {
	if i >= l.Len() {
		return manifest.Ref{}
	}
	return l.Ref(i)
}

// add hands extents on after merging those that adjoin and are alike.
func (m *mapping) add(e Extent) error {
	if o := &m.open; o.Length > 0 && o.Owner == e.Owner && o.Cached == e.Cached && o.Dirty == e.Dirty {
		o.Length += e.Length
		return nil
	}
	last := m.open
	m.open = e
	if last.Length == 0 {
		return nil
	}
	return m.fn(last)
}

// A leafRead is a leaf being read. leaf and err are set before done is closed.
type leafRead struct {
	done chan struct{}
	leaf *manifest.Leaf
	err  error
}

// leavesAhead yields the leaves that refs name, in order, of which a few are read at
// once. The error of one that could not be read comes in its place.
func leavesAhead(ctx context.Context, refs []manifest.LeafRef, read func(context.Context, manifest.LeafRef) (*manifest.Leaf, error)) iter.Seq2[int, *leafRead] {
	return func(yield func(int, *leafRead) bool) {
		ctx, cancel := context.WithCancel(ctx)
		var reading sync.WaitGroup
		defer reading.Wait()
		defer cancel()
		var queue []*leafRead
		for i := range refs {
			for len(queue) < mapLeaves && i+len(queue) < len(refs) {
				r, ref := &leafRead{done: make(chan struct{})}, refs[i+len(queue)]
				queue = append(queue, r)
				reading.Go(func() {
					defer close(r.done)
					r.leaf, r.err = read(ctx, ref)
				})
			}
			first := queue[0]
			queue = queue[1:]
			<-first.done
			if !yield(i, first) {
				return
			}
		}
	}
}

// A sweep looks numbers up in an ascending sequence, in ascending order. The zero
// sweep has none.
type sweep struct {
	pull func() (int64, error, bool)
	stop func()
	at   int64 // the last that was pulled; math.MaxInt64 at the end
	err  error
}

func (s *sweep) begin(seq iter.Seq2[int64, error]) {
	s.pull, s.stop = iter.Pull2(seq)
	s.at = -1
}

func (s *sweep) end() { s.stop() }

func (s *sweep) has(n int64) (bool, error) {
	for s.pull != nil && s.at < n && s.err == nil {
		var ok bool
		if s.at, s.err, ok = s.pull(); !ok {
			s.at = math.MaxInt64
		}
	}
	return s.pull != nil && s.at == n, s.err
}
