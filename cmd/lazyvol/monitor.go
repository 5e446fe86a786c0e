package main

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/volume"
)

// A monitor is what a daemon tells about itself: metrics and health.
type monitor struct {
	daemon    *daemon
	families  *families
	registry  *prometheus.Registry
	counts    [ioOps]ioCount
	unsynced  atomic.Bool // the last sync failed
	making    atomic.Int64
	made      atomic.Int64
	freshness *freshness // nil for a snapshot

	probing sync.Mutex // held while the store is asked; taken before mu

	mu       sync.Mutex // guards what follows
	failed   int64      // snapshots
	lastFail error      // of the last snapshot; nil if it was made
	probed   time.Time  // when the store was asked last
	probe    error      // what came of it
}

// newMonitor returns the monitor of a daemon that is about to serve.
func newMonitor(d *daemon) (*monitor, error) {
	m := &monitor{daemon: d, families: newFamilies()}
	if d.volume != nil {
		m.freshness = newFreshness(d.dir, d.log)
	}
	var err error
	m.registry, err = newRegistry(d.id, d.mountpoint, m)
	return m, err
}

// newRegistry returns the metrics of a daemon that serves id: what c collects, and
// what Go and the process tell.
func newRegistry(id, mountpoint string, c prometheus.Collector) (*prometheus.Registry, error) {
	registry := prometheus.NewRegistry()
	labels := prometheus.Labels{"id": id, "mountpoint": labelOf(mountpoint)}
	all := prometheus.WrapRegistererWith(labels, registry)
	for _, c := range []prometheus.Collector{c, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})} {
		if err := all.Register(c); err != nil {
			return nil, err
		}
	}
	return registry, nil
}

// run looks after what has to be noticed when it happens, until ctx ends.
func (m *monitor) run(ctx context.Context) {
	tick := time.NewTicker(freshnessEvery)
	defer tick.Stop()
	for {
		m.look()
		m.askAgain(ctx)
		select {
		case <-ctx.Done():
			m.look()
			return
		case <-tick.C:
		}
	}
}

// look notes whether the volume was written to.
func (m *monitor) look() {
	if m.freshness != nil {
		m.fresh(m.daemon.device.Stats())
	}
}

func (m *monitor) fresh(s volume.Stats) freshTimes {
	return m.freshness.look(m.daemon.volume.Record(), s.DirtyBytes, time.Now().UTC())
}

// snapshotBegins counts a snapshot of the volume that is being made; the caller calls
// ended when it is, or is not to be. One that is refused because another is being made has
// not failed.
func (m *monitor) snapshotBegins() (ended func(error)) {
	m.making.Add(1)
	return func(err error) {
		m.making.Add(-1)
		if errors.Is(err, volume.ErrBusy) {
			return
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		m.lastFail = err
		if err == nil {
			m.made.Add(1)
		} else {
			m.failed++
		}
	}
}

// Describe implements [prometheus.Collector].
func (m *monitor) Describe(ch chan<- *prometheus.Desc) { m.families.describe(ch) }

// Collect implements [prometheus.Collector].
func (m *monitor) Collect(ch chan<- prometheus.Metric) {
	f, d := m.families, m.daemon
	f.collectDaemon(ch, d.app, m.health().Status)
	stats := d.device.Stats()
	ch <- f.gauge(deviceSize, float64(stats.Size))
	ch <- f.gauge(deviceData, float64(stats.TotalBytes))
	ch <- f.gauge(deviceHydrated, float64(stats.HydratedBytes))
	ch <- f.gauge(deviceDirty, float64(stats.DirtyBytes))
	ch <- f.gauge(deviceLost, truth(stats.Lost != nil))
	ch <- f.gauge(deviceProblems, float64(len(stats.Errors)))
	for op := range ioOps {
		c := &m.counts[op]
		ch <- f.counter(deviceOps, float64(c.ops.Load()), op.String())
		ch <- f.counter(deviceOpErrors, float64(c.errors.Load()), op.String())
		if op != ioFlush {
			ch <- f.counter(deviceOpBytes, float64(c.bytes.Load()), op.String())
		}
	}
	f.oneOf(ch, hydrationState, hydrationStates(), d.status().State)
	fetched, failed := d.background()
	ch <- f.counter(hydrationBytes, float64(fetched))
	ch <- f.counter(hydrationErrors, float64(failed))
	f.collectDemand(ch, stats)
	if m.freshness != nil {
		m.collectSnapshots(ch, stats)
	}
	d.app.meter.collect(f, ch)
	if usage, err := d.device.CacheUsage(); err == nil {
		ch <- f.gauge(cacheUsed, float64(usage.Used))
		if usage.Limit > 0 {
			ch <- f.gauge(cacheLimit, float64(usage.Limit))
		}
		ch <- f.counter(cacheEvictions, float64(usage.Evictions))
		ch <- f.counter(cacheEvicted, float64(usage.Evicted))
	}
}

// background counts what was fetched in the background, in stored bytes, and how often
// that failed: by the replay of a trace, and by the hydrator after it.
func (d *daemon) background() (fetched, failed int64) {
	for _, h := range []*hydrate.Hydrator{d.replay, d.hydrator} {
		if h != nil {
			p := h.Progress()
			fetched, failed = fetched+p.FetchedBytes, failed+p.Errors
		}
	}
	return fetched, failed
}

// collectDaemon hands out what each daemon tells of itself.
func (f *families) collectDaemon(ch chan<- prometheus.Metric, a *app, health string) {
	version := thisBuild()
	ch <- f.gauge(buildInfo, 1, version.Version, version.Commit, version.Go)
	ch <- f.gauge(daemonUp, 1)
	f.oneOf(ch, healthOf, healthStatuses(), health)
	for _, level := range loggedLevels() {
		ch <- f.counter(logWritten, float64(a.logged.count(level)), strings.ToLower(level.String()))
	}
}

// collectDemand hands out how reads waited.
func (f *families) collectDemand(ch chan<- prometheus.Metric, stats volume.Stats) {
	ch <- f.counter(demandFetches, float64(stats.DemandFetches))
	ch <- f.counter(fetchedBytes, float64(stats.FetchedBytes))
	ch <- f.counter(demandBlocked, stats.DemandWait.Seconds())
	var bounds []float64
	for _, b := range volume.DemandBounds() {
		bounds = append(bounds, b.Seconds())
	}
	counts := make([]uint64, len(stats.DemandLatency))
	for i, n := range stats.DemandLatency {
		counts[i] = uint64(n)
	}
	ch <- f.histogram(demandWait, bounds, counts, stats.DemandWaitSum.Seconds())
}

func (m *monitor) collectSnapshots(ch chan<- prometheus.Metric, stats volume.Stats) {
	f, times := m.families, m.fresh(stats)
	if !times.DirtySince.IsZero() {
		ch <- f.gauge(dirtySince, unixSeconds(times.DirtySince))
	}
	if !times.Snapshot.IsZero() {
		ch <- f.gauge(snapshotLast, unixSeconds(times.Snapshot))
	}
	ch <- f.gauge(snapshotInProgress, truth(m.making.Load() > 0))
	m.mu.Lock()
	failed := m.failed
	m.mu.Unlock()
	ch <- f.counter(snapshotsMade, float64(m.made.Load()), "ok")
	ch <- f.counter(snapshotsMade, float64(failed), "failed")
}

// hydrationStates are the states that a status may have.
func hydrationStates() (names []string) {
	for _, s := range []hydrate.State{hydrate.Hydrating, hydrate.Paused, hydrate.CacheFull, hydrate.Waiting, hydrate.Done} {
		names = append(names, s.String())
	}
	return names
}
