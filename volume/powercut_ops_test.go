package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

// What the actors of an ordeal do. Each returns errViolated if a promise is
// broken, and else why it failed, if it did.

type deed struct {
	name     string
	weight   int
	fn       func(*actor, *subject) error
	harmless bool // it makes no calls that can go wrong
}

func deeds() []deed {
	return []deed{
		{name: "read", weight: 4, fn: (*actor).read},
		{name: "write", weight: 14, fn: (*actor).write},
		{name: "zero", weight: 5, fn: (*actor).zero},
		{name: "sync", weight: 6, fn: (*actor).sync},
		{name: "snapshot", weight: 8, fn: func(a *actor, m *subject) error { return a.snapshotOf(m, a.ctx) }},
		{name: "cancelled snapshot", weight: 2, fn: (*actor).cancelledSnapshot},
		{name: "snapshot aborted by another", weight: 2, fn: (*actor).abortedSnapshot},
		{name: "snapshot beside others", weight: 4, fn: (*actor).busySnapshot},
		{name: "work beside others", weight: 4, fn: (*actor).busyWork},
		{name: "hydration", weight: 2, fn: (*actor).hydration},
		{name: "eviction", weight: 3, fn: (*actor).eviction},
		{name: "new limit", weight: 1, fn: (*actor).newLimit, harmless: true},
		{name: "full disk", weight: 1, fn: (*actor).fullDisk, harmless: true},
		{name: "settle", weight: 2, fn: (*actor).settle},
		{name: "remount", weight: 2, fn: (*actor).remount},
		{name: "resize", weight: 3, fn: (*actor).resize},
		{name: "deletion of a snapshot", weight: 1, fn: (*actor).deletion, harmless: true},
		{name: "another volume", weight: 3, fn: (*actor).anotherVolume},
	}
}

// draw draws what the script does next.
func (a *actor) draw() deed {
	all, total := deeds(), 0
	for _, d := range all {
		total += d.weight
	}
	n := a.pick(total)
	for _, d := range all {
		if n -= d.weight; n < 0 {
			return d
		}
	}
	panic("unreachable")
}

// size draws the size of a blank volume.
func (a *actor) size() int64 {
	return []int64{blockSize*2 + pageSize*3 + 512, blockSize * 3, 512, pageSize + 1024, blockSize + 512}[a.pick(5)]
}

// extent draws a range of a device, never empty.
func (a *actor) extent(size int64) (off, n int64) {
	unit := []int64{1, manifest.SectorSize, pageSize, pageSize, blockSize}[a.pick(5)]
	units := (size + unit - 1) / unit
	first := int64(a.pick(int(units)))
	count := 1 + int64(a.pick(int(min(units-first, 24))))
	off = first * unit
	n = min(count*unit, size-off)
	if a.pick(8) == 0 {
		off = max(0, size-n)
		n = size - off
	}
	return off, n
}

// content draws what is written: something new, and sometimes zeros.
func (a *actor) content(n int64) []byte {
	if a.pick(8) == 0 {
		return make([]byte, n)
	}
	a.mu.Lock()
	a.writes++
	seed := a.writes
	a.mu.Unlock()
	return noise(int(n), seed)
}

func (a *actor) read(m *subject) error {
	off, n := a.extent(m.v.Size())
	return a.verify(m.v.Device, m.disk.data, off, n)
}

// verify reads a range of a device that holds data.
func (a *actor) verify(d *Device, data []byte, off, n int64) error {
	got := make([]byte, n)
	if _, err := d.ReadAt(a.ctx, got, off); err != nil {
		return err
	}
	if i := firstDifference(got, data[off:off+n]); i >= 0 {
		return violated("read %d+%d of %s: wrong at %d", off, n, d.name, off+int64(i))
	}
	return nil
}

func (a *actor) write(m *subject) error {
	off, n := a.extent(m.v.Size())
	return a.put(m, off, n)
}

// put writes something new to a range.
func (a *actor) put(m *subject, off, n int64) error {
	p := a.content(n)
	a.note("  %d+%d", off, n)
	a.writing.Add(1)
	_, err := m.v.WriteAt(a.ctx, p, off)
	a.writing.Add(-1)
	return a.wrote(m, p, off, err)
}

func (a *actor) zero(m *subject) error {
	off, n := a.extent(m.v.Size())
	return a.discard(m, off, n)
}

func (a *actor) discard(m *subject, off, n int64) error {
	a.note("  %d+%d", off, n)
	a.writing.Add(1)
	err := m.v.Zero(a.ctx, off, n)
	a.writing.Add(-1)
	return a.wrote(m, make([]byte, n), off, err)
}

// wrote notes what became of a write.
func (a *actor) wrote(m *subject, p []byte, off int64, err error) error {
	switch {
	case err == nil:
		m.disk.write(off, p)
		return nil
	case a.crash.Stopped():
		m.disk.interrupted(off, p)
		return err
	}
	first, end := sectorsOf(off, int64(len(p)))
	got := make([]byte, (end-first)*manifest.SectorSize)
	// What failed the write could fail this too.
	a.store.Heal()
	a.crash.ClearFault()
	if _, readErr := m.v.ReadAt(a.ctx, got, first*manifest.SectorSize); readErr != nil {
		if a.crash.Stopped() {
			m.disk.interrupted(off, p)
			return errors.Join(err, readErr)
		}
		return violated("read after a failed write: %v", readErr)
	}
	if failure := m.disk.failedWrite(off, p, got); failure != nil {
		return violated("%v", failure)
	}
	return err
}

func (a *actor) sync(m *subject) error {
	err := m.v.Sync(a.ctx)
	if err != nil {
		return err
	}
	a.noticeLosses()
	m.disk.synced()
	if m.attempt != nil {
		m.attempt.synced()
	}
	return nil
}

// synced notes that what was written before the cut is durable.
func (a *attempt) synced() {
	for at, f := range a.before {
		if !f.lost {
			delete(a.before, at)
		}
	}
}

// snapshotOf makes a snapshot, and writes to the volume meanwhile.
func (a *actor) snapshotOf(m *subject, ctx context.Context) error {
	return a.takeSnapshot(m, ctx, nil)
}

// takeSnapshot makes a snapshot of a volume. during is called after the cut.
func (a *actor) takeSnapshot(m *subject, ctx context.Context, during func(at *attempt) error) error {
	data := bytes.Clone(m.disk.data)
	var inside error
	outcome, err := m.v.Snapshot(ctx, SnapshotOptions{Cut: func(at *snapshot.Attempt) {
		m.attempt = &attempt{image: image{id: at.ID(), data: data}, before: m.disk.cut()}
		for range a.pick(3) {
			if inside == nil {
				inside = a.another().small(m)
			}
		}
		if during != nil && inside == nil {
			inside = during(m.attempt)
		}
	}})
	if errors.Is(inside, errViolated) {
		return inside
	}
	if a.crash.Stopped() {
		return errors.Join(err, inside) // what became of it is seen later
	}
	a.noticeLosses()
	at := m.attempt
	m.attempt = nil
	if err == nil && (at == nil || outcome.Snapshot != at.id) {
		return violated("committed %s, which was not begun", outcome.Snapshot)
	}
	if at == nil {
		return errors.Join(err, inside)
	}
	committed := a.outcome(at)
	m.disk.join(at.before, committed)
	if err == nil && !committed {
		return violated("%s was reported as committed, and is not", at.id)
	}
	if committed {
		a.count("snapshots committed")
	}
	a.store.Heal()
	a.crash.ClearFault()
	if a.crash.Stopped() {
		return err
	}
	aiming := a.tap.hold()
	defer a.tap.aim(aiming)
	if failure := a.verify(m.v.Device, m.disk.data, 0, m.v.Size()); failure != nil && !a.crash.Stopped() {
		return violated("after a snapshot (%v): %v", err, failure)
	}
	return errors.Join(err, inside)
}

// small does something small to a volume.
func (a *actor) small(m *subject) error {
	switch a.pick(9) {
	case 8:
		return a.resize(m)
	case 0:
		return a.sync(m)
	case 1:
		return a.zero(m)
	case 2:
		return a.read(m)
	}
	return a.write(m)
}

func (a *actor) cancelledSnapshot(m *subject) error {
	ctx, cancel := context.WithCancel(a.ctx)
	defer cancel()
	err := a.takeSnapshot(m, ctx, func(*attempt) error {
		cancel()
		return nil
	})
	if errors.Is(err, context.Canceled) {
		a.count("snapshots cancelled")
		return nil
	}
	return err
}

// abortedSnapshot makes a snapshot that somebody else aborts.
func (a *actor) abortedSnapshot(m *subject) error {
	err := a.takeSnapshot(m, a.ctx, func(at *attempt) error {
		return storeIn(a.mem).Delete(a.ctx, at.id)
	})
	if err == nil {
		return violated("a snapshot was committed that had been aborted")
	}
	if errors.Is(err, snapshot.ErrAborted) {
		a.count("snapshots aborted by another")
		return nil
	}
	return err
}

// busySnapshot makes a snapshot while others work.
func (a *actor) busySnapshot(m *subject) error {
	return a.together(func() error {
		if a.pick(2) == 0 { // so that there is much to fetch
			if err := a.evictAll(m); err != nil {
				return err
			}
		}
		return a.takeSnapshot(m, a.ctx, func(*attempt) error {
			w := a.another()
			for range 4 {
				if err := w.small(m); err != nil {
					return err
				}
				w.pause()
			}
			return nil
		})
	}, a.others(m)...)
}

// busyWork writes while others work.
func (a *actor) busyWork(m *subject) error {
	return a.together(func() error {
		for range 6 {
			if err := a.small(m); err != nil {
				return err
			}
			a.pause()
		}
		return nil
	}, a.others(m)...)
}

// others draws actors that leave alone what m holds.
func (a *actor) others(m *subject) []func() error {
	var all []func() error
	if a.lonely {
		return nil
	}
	if a.pick(3) > 0 {
		w := a.another()
		all = append(all, func() error { return w.hydration(m) })
	}
	if a.pick(3) > 0 {
		w := a.another()
		all = append(all, func() error {
			for range 4 {
				if err := w.eviction(m); err != nil {
					return err
				}
				w.pause()
			}
			return nil
		})
	}
	if a.pick(3) > 0 {
		w := a.another()
		all = append(all, func() error { return w.visit(m) })
	}
	if a.pick(3) > 0 {
		w := a.another()
		all = append(all, func() error { // which promises no more than the script's own syncs do
			var err error
			for range 3 {
				err = errors.Join(err, m.v.Sync(a.ctx))
				w.pause()
			}
			return err
		})
	}
	if a.pick(2) == 0 {
		w := a.another()
		all = append(all, func() error { // looks away, as m changes, but what it fetches is kept
			var err error
			for range 4 {
				off, n := w.extent(m.v.Size())
				_, readErr := m.v.ReadAt(a.ctx, make([]byte, n), off)
				err = errors.Join(err, readErr)
				w.pause()
			}
			return err
		})
	}
	if len(a.volumes) > 1 && a.pick(2) == 0 {
		w, other := a.another(), a.volumes[(slices.Index(a.volumes, m)+1)%len(a.volumes)]
		all = append(all, func() error {
			for range 3 {
				if err := w.read(other); err != nil {
					return err
				}
				w.pause()
			}
			return w.hydration(other)
		})
	}
	return all
}

// pause waits for the actor's turn. Who gets a mutex that was let go, its holder once
// more or who waited for it, depends on how long that was: so nobody goes on at once.
func (a *actor) pause() { a.tap.turns.enter("pause", "", int64(a.rng.Uint64()>>1)) }

// hydration fetches what a volume lacks, as the hydrator does.
func (a *actor) hydration(m *subject) error { return a.hydrated(m.v.Device) }

func (a *actor) hydrated(d *Device) error {
	err := a.hydrate(d)
	if errors.Is(err, ErrFull) && (a.limit != noLimit || a.tight || a.disturbed()) {
		return nil
	}
	if err == nil {
		a.count("hydrations")
	}
	return err
}

// visit mounts the base of a volume, or some other snapshot, read-only beside
// it, as another process of the host, reads, hydrates and evicts.
func (a *actor) visit(m *subject) error {
	i := a.baseOf(m)
	if i == nil {
		return nil
	}
	a.mu.Lock()
	a.mounts++
	holder := snapshot.Holder{ID: fmt.Sprintf("mnt-%d", a.mounts), Host: "host"}
	a.mu.Unlock()
	leaves, err := cache.NewLeaves(1 << 20)
	if err != nil {
		return err
	}
	defer leaves.Close()
	// It has the same Budget: who waits for another process's evictions sleeps, maybe
	// with a lock held, and in a bubble no time passes while others wait for that.
	other := *a.host
	other.Leaves, other.Store = leaves, storeIn(a.store)
	img, err := other.Store.Open(a.ctx, i.id, holder)
	if errors.Is(err, snapshot.ErrNotFound) {
		return nil // deleted meanwhile
	}
	if err != nil {
		return err
	}
	d, err := other.OpenSnapshot(a.ctx, img)
	if err != nil {
		return errors.Join(err, other.Store.Unpin(a.ctx, i.id, holder.ID))
	}
	a.count("visits")
	for range 5 {
		switch a.pick(4) {
		case 0:
			err = a.hydrated(d)
		case 1:
			err = a.evictFrom(d.base.EvictRange, d)
		default:
			off, n := a.extent(d.Size())
			err = a.verify(d, i.data, off, n)
		}
		if err != nil {
			break
		}
		a.pause()
	}
	return errors.Join(err, d.Close(), other.Store.Unpin(a.ctx, i.id, holder.ID))
}

// baseOf returns the image of a volume's base, or else any.
func (a *actor) baseOf(m *subject) *image {
	a.mu.Lock()
	defer a.mu.Unlock()
	if m.v.base != nil {
		for _, i := range a.images {
			if i.id == m.v.base.id {
				return i
			}
		}
	}
	if len(a.images) == 0 {
		return nil
	}
	return a.images[a.pick(len(a.images))]
}

// eviction removes clean blocks.
func (a *actor) eviction(m *subject) error {
	if m.v.base != nil && a.pick(2) == 0 {
		return a.evictFrom(m.v.base.EvictRange, m.v.Device)
	}
	return a.evictFrom(m.v.writes.clean.EvictRange, m.v.Device)
}

// evictAll removes all clean blocks of a volume and its base.
func (a *actor) evictAll(m *subject) error {
	err := m.v.writes.clean.EvictRange(0, m.v.geometry.Blocks())
	if err == nil && m.v.base != nil {
		err = m.v.base.EvictRange(0, manifest.Geometry{Size: m.v.base.size, BlockSize: blockSize}.Blocks())
	}
	return err
}

func (a *actor) evictFrom(evict func(first, count int64) error, d *Device) error {
	blocks := d.geometry.Blocks()
	if d.base != nil {
		blocks = min(blocks, manifest.Geometry{Size: d.base.size, BlockSize: blockSize}.Blocks())
	}
	first := int64(a.pick(int(blocks)))
	a.count("evictions")
	return evict(first, 1+int64(a.pick(int(blocks-first))))
}

// resize makes a volume larger, or leaves it as it is.
func (a *actor) resize(m *subject) error {
	unit := []int64{manifest.SectorSize, pageSize, blockSize}[a.pick(3)]
	size := m.v.Size() + unit*int64(a.pick(4))
	if size > largest {
		return nil
	}
	return a.resizeTo(m, size)
}

func (a *actor) resizeTo(m *subject, size int64) error {
	a.note("  to %d", size)
	a.count("resizes")
	m.tried = append(m.tried, size)
	err := m.v.Resize(size)
	switch {
	case errors.Is(err, ErrShrink) && size >= m.v.Size() && len(m.tried) > 1:
		return nil // a larger one that failed is on record
	case err == nil:
		m.tried = nil
		m.disk.grow(size)
	case a.crash.Stopped():
		return err
	}
	if got := m.v.Size(); got != int64(len(m.disk.data)) {
		return violated("%d bytes after a resize (%v), want %d", got, err, len(m.disk.data))
	}
	return err
}

// newLimit changes how many clean bytes the host may have: none, some blocks, or
// any number.
func (a *actor) newLimit(*subject) error {
	limit := int64(noLimit)
	if blocks := a.pick(8); blocks < 5 {
		limit = 1 + int64(blocks)*blockSize
	}
	a.setLimit(limit)
	return nil
}

// fullDisk lets only a little more fit on the disk, or makes room again.
func (a *actor) fullDisk(*subject) error {
	if a.tight {
		a.makeRoom()
		return nil
	}
	a.tight = true
	a.crash.SetCapacity(a.crash.Used() + int64(a.pick(100))*pageSize)
	return nil
}

func (a *actor) settle(m *subject) error {
	sealed := m.v.hasSealed()
	err := m.v.Settle(a.ctx)
	if err != nil || a.crash.Stopped() {
		return err
	}
	if m.v.hasSealed() || len(m.v.Record().Layers) != 1 {
		return violated("settled, with layers %v", m.v.Record().Layers)
	}
	if sealed {
		a.count("sealed layers settled")
	}
	return a.verify(m.v.Device, m.disk.data, 0, m.v.Size())
}

// remount closes a volume and opens it again.
func (a *actor) remount(m *subject) error {
	err := m.v.Close()
	a.noticeLosses()
	if a.crash.Stopped() {
		return err
	}
	if err == nil {
		m.disk.synced()
	}
	openErr := a.reopen(m)
	if openErr != nil && a.disturbed() && !a.crash.Stopped() {
		a.count("opens that failed")
		a.crash.ClearFault()
		a.tap.aim(false)
		openErr = a.reopen(m)
	}
	switch {
	case a.crash.Stopped():
		return errors.Join(openErr, err)
	case openErr != nil:
		return violated("open after close (%v): %v", err, openErr)
	}
	if err != nil {
		m.hurt = true // opened once more, and compared
		return err
	}
	return a.verify(m.v.Device, m.disk.data, 0, m.v.Size())
}

// deletion deletes a snapshot and reclaims its lineage, as another host.
func (a *actor) deletion(*subject) error {
	if len(a.images) == 0 {
		return nil
	}
	n := a.pick(len(a.images))
	i := a.images[n]
	a.images = slices.Delete(a.images, n, n+1)
	a.note("  %s", i.id)
	a.world.remove(i.id)
	a.count("snapshots deleted")
	return nil
}

const maxSubjects = 2

// anotherVolume makes a volume of a snapshot, rather of one that another volume
// was made of too, and deletes the oldest if there are too many.
func (a *actor) anotherVolume(m *subject) error {
	i := a.baseOf(m)
	if i == nil {
		return nil
	}
	size := int64(0)
	if a.pick(3) == 0 {
		size = int64(len(i.data)) + 512*int64(1+a.pick(300))
	}
	id, err := a.host.Create(a.ctx, &i.id, size, blockSize, "")
	if err != nil {
		return err
	}
	v, err := a.host.OpenVolume(id)
	if err != nil {
		return err
	}
	a.lived = append(a.lived, v.Device)
	made := a.adopt(id, v, i.data)
	a.note("  %s of %s", id, i.id)
	a.count("volumes made of a snapshot")
	if len(a.volumes) > 1 && a.volumes[0].v.base != nil && v.base != nil && a.volumes[0].v.base.id == v.base.id {
		a.count("volumes that share a base")
	}
	if len(a.volumes) > maxSubjects {
		old := a.volumes[0]
		a.volumes = a.volumes[1:]
		if err := errors.Join(old.v.Close(), a.host.Delete(a.ctx, old.id)); err != nil {
			return err
		}
	}
	return a.verify(made.v.Device, made.disk.data, 0, v.Size())
}
