package main

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// A bareClient gets ranges of objects as fast as Go's HTTP client can: what
// lazyvol cannot do better than.
type bareClient struct {
	http http.Client
	base string // of the store's objects
}

// bare returns a client that sees the latency.
func (b *bench) bare(parallel int) *bareClient {
	return &bareClient{
		http: http.Client{
			Transport: &http.Transport{MaxIdleConnsPerHost: parallel, MaxConnsPerHost: parallel, DisableCompression: true},
			Timeout:   time.Minute,
		},
		base: b.server.far + "/" + storeBucket + "/" + storePrefix + "/",
	}
}

func (c *bareClient) close() { c.http.CloseIdleConnections() }

// get reads a range of an object and returns how long that took.
func (c *bareClient) get(ctx context.Context, key string, off, length int64) (time.Duration, error) {
	begin := time.Now()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+key, nil)
	if err != nil {
		return 0, err
	}
	r.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+length-1))
	response, err := c.http.Do(r)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	n, err := io.Copy(io.Discard, response.Body)
	if err == nil && (n != length || response.StatusCode != http.StatusPartialContent) {
		err = fmt.Errorf("GET %s: %s with %d bytes of %d", key, response.Status, n, length)
	}
	return time.Since(begin), err
}

// getBlock reads what is stored of a block.
func (c *bareClient) getBlock(ctx context.Context, s *stored, block int64) (time.Duration, error) {
	ref := s.refs[block]
	return c.get(ctx, s.object(block), int64(ref.Offset), int64(ref.Length))
}

// roundTrip returns how long the smallest GET takes.
func (b *bench) roundTrip(ctx context.Context) (time.Duration, error) {
	c := b.bare(1)
	defer c.close()
	var samples []float64
	for range 20 {
		d, err := c.get(ctx, b.stored.packs[0].key, 0, 1)
		if err != nil {
			return 0, err
		}
		samples = append(samples, d.Seconds())
	}
	return time.Duration(percentile(samples, 50) * float64(time.Second)), nil
}

// ceilings are the ways to get everything that ceiling tries: the best differs
// from machine to machine.
var ceilings = []struct {
	chunk    int64
	parallel int
}{{512 << 10, 32}, {mib, 32}, {4 * mib, 16}, {16 * mib, 8}}

// ceiling returns how many stored bytes a second this machine can get of the
// image at all, in MB/s.
func (b *bench) ceiling(ctx context.Context) (best float64, err error) {
	for _, way := range ceilings {
		rate, err := b.getAll(ctx, way.chunk, way.parallel)
		if err != nil {
			return 0, err
		}
		best = max(best, rate)
	}
	return best, nil
}

// getAll gets all packs in ranges, and returns the rate in MB/s.
func (b *bench) getAll(ctx context.Context, chunk int64, parallel int) (float64, error) {
	type piece struct {
		key         string
		off, length int64
	}
	var pieces []piece
	total := int64(0)
	for _, p := range b.stored.packs {
		total += p.length
		for off := int64(0); off < p.length; off += chunk {
			pieces = append(pieces, piece{p.key, off, min(chunk, p.length-off)})
		}
	}
	c := b.bare(parallel)
	defer c.close()
	begin := time.Now()
	err := inParallel(parallel, len(pieces), func(i int) error {
		_, err := c.get(ctx, pieces[i].key, pieces[i].off, pieces[i].length)
		return err
	})
	return mbs(total, time.Since(begin)), err
}

// inParallel calls fn for 0 to n-1 from several goroutines, and returns the
// first error, after which it stops.
func inParallel(goroutines, n int, fn func(i int) error) error {
	var next atomic.Int64
	var failed error
	var once sync.Once
	var all sync.WaitGroup
	for range goroutines {
		all.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				if err := fn(int(i)); err != nil {
					once.Do(func() { failed = err })
					next.Store(int64(n))
				}
			}
		})
	}
	all.Wait()
	return failed
}

// mbs is a rate in 10⁶ bytes a second.
func mbs(n int64, d time.Duration) float64 { return float64(n) / 1e6 / d.Seconds() }
