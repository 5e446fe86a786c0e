package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"
)

// Metrics that several rows have.
const (
	ms         = "ms"
	requests   = "requests"
	roundTrips = "round trips"
	rtt        = "round trip ms"
	p50        = "p50 ms"
	p99        = "p99 ms"
	iops       = "IOPS"
	rate       = "MB/s"
	storedRate = "stored MB/s"
	seconds    = "s"
	cores      = "cores of the daemon"
	allCores   = "cores of daemon, server and proxy"
)

// everyCore is how many cores are busy when all are: a tenth goes by on
// switching between processes.
var everyCore = 0.9 * float64(runtime.NumCPU())

// The references that are no systems.
const (
	bareName    = "bare GET"
	ceilingName = "parallel GETs"
)

func coldRows() []row {
	return []row{
		{"first-byte-snapshot", "mount to first byte, cold: mount SNAP", firstByteOfSnapshot, []bar{
			{text: "≤ 4 round trips + 50 ms", unit: ms, got: of(lazyvolName, ms), fixed: 50, less: true, factor: 1, plus: 4, plusRef: of(bareName, rtt)},
			{text: "≤ 4 round trips", unit: roundTrips, got: of(lazyvolName, roundTrips), fixed: 4, less: true, factor: 1},
		}},
		{"first-byte", "mount to first byte, cold: volume create + mount", firstByte, []bar{
			{text: "≤ 6 round trips + 100 ms", unit: ms, got: of(lazyvolName, ms), fixed: 100, less: true, factor: 1, plus: 6, plusRef: of(bareName, rtt)},
			{text: "≤ 6 round trips", unit: roundTrips, got: of(lazyvolName, roundTrips), fixed: 6, less: true, factor: 1},
		}},
		{"cold-random", "cold random 4 KiB", coldRandom, []bar{
			{text: "p50 ≤ 1.15 × one ranged GET", unit: ms, got: of(lazyvolName, p50), refs: []key{of(bareName, p50)}, less: true, factor: 1.15},
			{text: "p99 ≤ 1.5 × one ranged GET", unit: ms, got: of(lazyvolName, p99), refs: []key{of(bareName, p99)}, less: true, factor: 1.5},
			{text: "one request per block touched", unit: requests, got: of(lazyvolName, requests), fixed: 1, less: true, factor: 1},
		}},
		{"cold-sequential-direct", "cold sequential through the mount, O_DIRECT", coldSequentialDirect, sequentialBars()},
		{"hydration", "full hydration", hydration, []bar{
			{text: "≥ 2 × rclone's full read", unit: rate, got: of(lazyvolName, "image MB/s"), refs: []key{{"cold-sequential", rcloneName, rate}}, factor: 2},
			{
				text: "≥ 80 % of the parallel GETs, or both cores busy", unit: rate, got: of(lazyvolName, storedRate), refs: []key{of(ceilingName, storedRate)}, factor: 0.8,
				or: of(lazyvolName, allCores), orLeast: everyCore, orText: "cores busy",
			},
		}},
		{"demand-latency", "demand latency while hydrating", demandLatency, []bar{
			{text: "p50 ≤ 1.5 × that without", unit: ms, got: of(lazyvolName, p50), refs: []key{of(quietName, p50)}, less: true, factor: 1.5},
			{text: "p99 ≤ 3 × that without", unit: ms, got: of(lazyvolName, p99), refs: []key{of(quietName, p99)}, less: true, factor: 3},
		}},
	}
}

func sequentialBars() []bar {
	return []bar{
		{text: "≥ 2 × rclone", unit: rate, got: of(lazyvolName, rate), refs: []key{{"cold-sequential", rcloneName, rate}}, factor: 2},
		{
			text: "≥ 80 % of the parallel GETs, or one core busy", unit: rate, got: of(lazyvolName, storedRate), refs: []key{of(ceilingName, storedRate)}, factor: 0.8,
			or: of(lazyvolName, cores), orLeast: 0.95, orText: "cores busy",
		},
	}
}

// reads is how many random pages are read.
func (b *bench) reads() int {
	if b.quick {
		return 40
	}
	return 200
}

// milliseconds turns durations into samples.
func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func (r *turn) recordRoundTrip(ctx context.Context) error {
	d, err := r.roundTrip(ctx)
	if err == nil {
		r.record(bareName, rtt, milliseconds(d))
	}
	return err
}

func (r *turn) recordTraffic(t traffic) {
	r.record(lazyvolName, requests, float64(len(t.requests)))
	r.record(lazyvolName, roundTrips, float64(t.roundTrips()))
	r.note(t.String())
}

// firstPage reads one page that is not a hole.
func (r *turn) firstPage(path string) (err error) {
	f, err := openPager(path, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.close(&err)
	pages := r.stored.pages(7)
	_, err = f.read(pages[len(pages)-1])
	return err
}

func firstByteOfSnapshot(ctx context.Context, r *turn) error {
	if err := r.recordRoundTrip(ctx); err != nil {
		return err
	}
	h, err := r.farHost()
	if err != nil {
		return err
	}
	passed, begin := r.server.tap.watch(), time.Now()
	m, err := r.mount(ctx, h, r.snap, "--no-hydrate")
	if err != nil {
		return err
	}
	if err := r.firstPage(m.image); err != nil {
		return err
	}
	r.record(lazyvolName, ms, milliseconds(time.Since(begin)))
	r.recordTraffic(passed.traffic())
	return nil
}

// firstByte starts each system, whose program the page cache has but nothing
// else, and reads a page.
func firstByte(ctx context.Context, r *turn) error {
	if err := r.recordRoundTrip(ctx); err != nil {
		return err
	}
	for _, s := range r.systems {
		if !lazy(s) {
			continue
		}
		passed, begin := r.server.tap.watch(), time.Now()
		m, err := r.cold(ctx, s)
		if err == nil {
			err = r.firstPage(m.path)
		}
		if err != nil {
			r.recordFailure(s, err)
			continue
		}
		r.record(s.name(), ms, milliseconds(time.Since(begin)-m.copying))
		if s.name() == lazyvolName {
			r.recordTraffic(passed.traffic())
		}
		m.stop()
	}
	return nil
}

// coldRandom reads pages of different blocks, and fetches the same blocks with
// a bare client, in turns.
func coldRandom(ctx context.Context, r *turn) error {
	pages := r.stored.pages(8)
	pages = pages[:min(r.reads(), len(pages))]
	for _, s := range r.systems {
		if !lazy(s) {
			continue
		}
		r.recordFailure(s, r.coldRandomOf(ctx, s, pages))
	}
	return nil
}

func (r *turn) coldRandomOf(ctx context.Context, s system, pages []int64) error {
	m, err := r.cold(ctx, s)
	if err != nil {
		return err
	}
	defer m.stop()
	if m.mount != nil {
		return r.coldRandomBesideBare(ctx, m, pages)
	}
	return r.coldPages(ctx, m, pages)
}

func (r *turn) coldPages(ctx context.Context, m member, pages []int64) (err error) {
	f, err := openPager(m.path, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.close(&err)
	var took []float64
	for _, page := range pages {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		d, err := f.read(page)
		if err != nil {
			return err
		}
		took = append(took, milliseconds(d))
	}
	r.recordLatencies(m.system.name(), took)
	return nil
}

func (r *turn) recordLatencies(system string, took []float64) {
	r.record(system, p50, percentile(took, 50))
	r.record(system, p99, percentile(took, 99))
}

func (r *turn) coldRandomBesideBare(ctx context.Context, m member, pages []int64) (err error) {
	f, err := openPager(m.path, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.close(&err)
	client := r.bare(1)
	defer client.close()
	var took, bare []float64
	fetched := 0
	for _, page := range pages {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		passed := r.server.tap.watch()
		d, err := f.read(page)
		if err != nil {
			return err
		}
		t := passed.traffic()
		fetched += len(t.of("GET", "/packs/").requests)
		if len(t.of("GET", "/leaves/").requests) == 0 { // the bar leaves out reads that load one
			took = append(took, milliseconds(d))
		}
		if d, err = client.getBlock(ctx, r.stored, r.stored.block(page)); err != nil {
			return err
		}
		bare = append(bare, milliseconds(d))
	}
	r.recordLatencies(lazyvolName, took)
	r.recordLatencies(bareName, bare)
	r.record(lazyvolName, requests, float64(fetched)/float64(len(pages)))
	return nil
}

// coldSequentialDirect reads all of lazyvol's file past the page cache.
func coldSequentialDirect(ctx context.Context, r *turn) error {
	if err := r.recordCeiling(ctx); err != nil {
		return err
	}
	for _, s := range r.systems {
		if s.name() != lazyvolName {
			continue // only their buffered reads are compared
		}
		m, err := r.cold(ctx, s)
		if err != nil {
			return err
		}
		return r.sequential(ctx, m, syscall.O_DIRECT)
	}
	return nil
}

func (r *turn) recordCeiling(ctx context.Context) error {
	best, err := r.ceiling(ctx)
	if err == nil {
		r.record(ceilingName, storedRate, best)
	}
	return err
}

// sequential reads all of a system's file once.
func (r *turn) sequential(ctx context.Context, m member, flags int) error {
	passed := r.server.tap.watch()
	meter, err := r.startMeter(m.pid())
	if err != nil {
		return err
	}
	n, took, err := readThrough(ctx, m.path, flags, r.image.size)
	if err != nil {
		return err
	}
	r.record(m.system.name(), rate, mbs(n, took))
	if m.mount == nil {
		return nil
	}
	seen := passed.traffic().of("GET", "/packs/")
	r.record(lazyvolName, storedRate, mbs(seen.received(), took))
	r.record(lazyvolName, requests, float64(len(seen.requests)))
	r.record(lazyvolName, "requests in flight", float64(seen.peak))
	return r.recordCores(meter)
}

func (r *turn) recordCores(m meter) error {
	own, all, err := m.stop()
	if err == nil {
		r.record(lazyvolName, cores, own)
		r.record(lazyvolName, allCores, all)
	}
	return err
}

// hydration waits until everything is fetched.
func hydration(ctx context.Context, r *turn) error {
	if err := r.recordCeiling(ctx); err != nil {
		return err
	}
	passed, begin := r.server.tap.watch(), time.Now()
	m, err := r.volume(ctx)
	if err != nil {
		return err
	}
	meter, err := r.startMeter(m.pid)
	if err != nil {
		return err
	}
	if _, err := m.host.run(ctx, "hydrate", "--wait", m.id); err != nil {
		return err
	}
	took := time.Since(begin)
	r.record(lazyvolName, seconds, took.Seconds())
	r.record(lazyvolName, "image MB/s", mbs(r.image.size, took))
	r.record(lazyvolName, rate, mbs(r.stored.dataBytes(), took))
	r.record(lazyvolName, storedRate, mbs(passed.traffic().of("GET", "/packs/").received(), took))
	return r.recordCores(meter)
}

// quietName is lazyvol without a hydrator.
const quietName = "lazyvol, not hydrating"

// demandLatency reads pages that are missing, without and with the hydrator
// at work. What the hydrator has brought already says nothing about demand: only
// reads that waited for the store count, which takes half a round trip at least.
func demandLatency(ctx context.Context, r *turn) error {
	waited := milliseconds(r.latency) / 2
	quiet, err := r.readsWhile(ctx, waited, "--no-hydrate")
	if err != nil {
		return err
	}
	r.recordLatencies(quietName, quiet)
	var took []float64
	const most = 8 // mounts; the image is hydrated in seconds
	for n := 0; n < most && len(took) < r.reads(); n++ {
		more, err := r.readsWhile(ctx, waited)
		if err != nil {
			return err
		}
		took = append(took, more...)
	}
	if len(took) < r.reads()/4 {
		return fmt.Errorf("only %d reads waited for the store while it was hydrated", len(took))
	}
	r.record(lazyvolName, "reads", float64(len(took)))
	r.recordLatencies(lazyvolName, took)
	return nil
}

// readsWhile mounts a volume, reads pages until it is hydrated or there are
// enough, and returns how long those took that waited.
func (r *turn) readsWhile(ctx context.Context, waited float64, flags ...string) (took []float64, err error) {
	m, err := r.volume(ctx, flags...)
	if err != nil {
		return nil, err
	}
	defer m.stop()
	f, err := openPager(m.image, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.close(&err)
	pages := r.stored.pages(9)
	for i, page := range pages {
		if ctx.Err() != nil || len(took) == r.reads() {
			return took, ctx.Err()
		}
		d, err := f.read(page)
		if err != nil {
			return nil, err
		}
		if d := milliseconds(d); d >= waited && i > 0 { // the first loads a leaf
			took = append(took, d)
		}
	}
	return took, nil
}
