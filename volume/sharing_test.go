package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/lazyvol/lazyvol/manifest"
)

// A sharer is a process with a volume of a base that another process shares. It
// reads, writes, hydrates, snapshots and reopens, and compares every byte.
type sharer struct {
	*world
	id   manifest.VolumeID
	v    *Volume
	data []byte
	rng  *rand.Rand
}

func (s *sharer) run(steps int) error {
	for range steps {
		if err := s.step(); err != nil {
			return fmt.Errorf("%s: %w", s.id, err)
		}
	}
	return nil
}

func (s *sharer) step() error {
	off := s.rng.Int64N(int64(len(s.data)))
	n := min(int64(len(s.data))-off, 1+s.rng.Int64N(3*blockSize))
	switch s.rng.IntN(24) {
	case 0, 1:
		p := noise(int(n), s.rng.Uint64())
		_, err := s.v.WriteAt(s.ctx, p, off)
		copy(s.data[off:], p)
		return err
	case 2:
		err := s.v.Zero(s.ctx, off, n)
		clear(s.data[off:][:n])
		return err
	case 3:
		_, err := s.v.Snapshot(s.ctx, SnapshotOptions{})
		return err
	case 4, 5:
		for block := off / blockSize; block < int64(len(s.data)/blockSize); block++ {
			if err := s.v.Warm(s.ctx, []int64{block}); err != nil {
				if errors.Is(err, ErrFull) {
					return nil
				}
				return err
			}
		}
		return nil
	case 6:
		s.host.Budget.reclaim(s.host.Budget.rounds.Load(), 1+s.rng.Int64N(16*blockSize), shared)
		return nil
	case 7:
		if err := s.v.Close(); err != nil {
			return err
		}
		v, err := s.host.OpenVolume(s.id)
		if err != nil {
			return err
		}
		s.v = v
		return nil
	}
	p := make([]byte, n)
	if _, err := s.v.ReadAt(s.ctx, p, off); err != nil {
		return err
	}
	if i := firstDifference(p, s.data[off:][:n]); i >= 0 {
		return fmt.Errorf("wrong at %d (block %d)", off+int64(i), (off+int64(i))/blockSize)
	}
	return nil
}

// TestProcessesEvictAndHydrateUnderEachOthersFeet: with flocks of a real filesystem,
// and with those of the twin. Whatever is evicted, hydrated, diverges and is
// snapshotted by either, no read ever shows a wrong byte.
func TestProcessesEvictAndHydrateUnderEachOthersFeet(t *testing.T) {
	for name, begin := range map[string]func(seed uint64) *world{
		"flock": func(uint64) *world { return newRealWorld(t) },
		"twin":  func(seed uint64) *world { return newWorld(t, seed) },
	} {
		for seed := range uint64(4) {
			t.Run(fmt.Sprintf("%s/%d", name, seed), func(t *testing.T) {
				w := begin(seed)
				w.tester = t
				w.ctx = t.Context()
				id, data := w.source(24, 1)
				limit := []int64{8 * blockSize, 16 * blockSize, 30 * blockSize, noLimit}[seed]
				sharers := make([]*sharer, 2)
				for i := range sharers {
					p := w.process()
					p.setLimit(limit)
					v := p.openNew(&id, 0)
					sharers[i] = &sharer{
						world: p, id: v.record.ID, v: v, data: bytes.Clone(data),
						rng: rand.New(rand.NewPCG(seed, uint64(i))),
					}
				}
				var running sync.WaitGroup
				for _, s := range sharers {
					running.Go(func() {
						if err := s.run(max(60, 300/thinning)); err != nil {
							t.Error(err)
						}
					})
				}
				running.Wait()
				for _, s := range sharers {
					w.equal(s.v.Device, s.data, "in the end")
					w.equalSnapshot(w.snapshot(s.v), s.data, "the last snapshot")
				}
				for _, s := range sharers {
					s.setLimit(noLimit)
					w.must(s.hydrate(s.v.Device))
					w.equal(s.v.Device, s.data, "hydrated")
					w.must(s.v.Close())
					s.end()
				}
				if w.crash != nil {
					w.end()
				}
			})
		}
	}
}

// TestHydratedMeansReadable: what the census counts after eviction and hydration of
// two processes can be read with the store down.
func TestHydratedMeansReadable(t *testing.T) {
	w := newRealWorld(t)
	id, data := w.source(16, 1)
	other := w.process()
	defer other.end()
	d, o := w.mountAs("mnt-1", id), other.mountAs("mnt-2", id)
	ctx, stop := context.WithCancel(w.ctx)
	var running sync.WaitGroup
	running.Go(func() {
		for ctx.Err() == nil {
			other.host.Budget.reclaim(other.host.Budget.rounds.Load(), 3*blockSize, shared)
		}
	})
	for range 20 {
		if err := w.hydrate(d); err != nil {
			t.Errorf("hydrate: %v", err)
		}
		w.equal(d, data, "while it is evicted")
	}
	stop()
	running.Wait()
	w.equal(d, data, "in peace")
	w.must(w.hydrate(d))
	d.Recount()
	if s := d.Stats(); s.HydratedBytes != s.TotalBytes {
		t.Errorf("%d of %d bytes are hydrated", s.HydratedBytes, s.TotalBytes)
	}
	w.store.Reset()
	w.equal(o, data, "the other process")
	if n := w.packGets(); n != 0 {
		t.Errorf("%d requests for what is hydrated", n)
	}
	w.must(d.Close())
	w.must(o.Close())
}
