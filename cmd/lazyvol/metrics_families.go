package main

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// A family is one kind of metric. docs/operating.md has the same table.
type family struct {
	name   string
	kind   string // counter, gauge or histogram
	help   string
	labels []string // beside id and mountpoint, which all have
}

// The metrics of a daemon, by name.
const (
	buildInfo  = "lazyvol_build_info"
	daemonUp   = "lazyvol_daemon_up"
	healthOf   = "lazyvol_health_status"
	logWritten = "lazyvol_log_messages_total"

	deviceSize     = "lazyvol_device_size_bytes"
	deviceData     = "lazyvol_device_data_bytes"
	deviceHydrated = "lazyvol_device_hydrated_bytes"
	deviceDirty    = "lazyvol_device_dirty_bytes"
	deviceLost     = "lazyvol_device_lost"
	deviceProblems = "lazyvol_device_problems"
	deviceOps      = "lazyvol_device_operations_total"
	deviceOpBytes  = "lazyvol_device_operation_bytes_total"
	deviceOpErrors = "lazyvol_device_operation_errors_total"

	hydrationState  = "lazyvol_hydration_state"
	hydrationBytes  = "lazyvol_hydration_fetched_bytes_total"
	hydrationErrors = "lazyvol_hydration_errors_total"

	demandFetches = "lazyvol_demand_fetches_total"
	demandBlocked = "lazyvol_demand_blocked_seconds_total"
	demandWait    = "lazyvol_demand_wait_seconds"
	fetchedBytes  = "lazyvol_fetched_bytes_total"

	dirtySince         = "lazyvol_dirty_since_timestamp_seconds"
	snapshotLast       = "lazyvol_snapshot_last_timestamp_seconds"
	snapshotInProgress = "lazyvol_snapshot_in_progress"
	snapshotsMade      = "lazyvol_snapshots_total"

	storeRequests       = "lazyvol_store_requests_total"
	storeRequestSeconds = "lazyvol_store_request_duration_seconds"
	storeRetries        = "lazyvol_store_retries_total"
	storeSent           = "lazyvol_store_sent_bytes_total"
	storeReceived       = "lazyvol_store_received_bytes_total"
	storeAnswered       = "lazyvol_store_last_answer_timestamp_seconds"

	cacheUsed      = "lazyvol_cache_used_bytes"
	cacheLimit     = "lazyvol_cache_limit_bytes"
	cacheEvictions = "lazyvol_cache_evictions_total"
	cacheEvicted   = "lazyvol_cache_evicted_bytes_total"
)

// The types of metrics.
const (
	counter   = "counter"
	gauge     = "gauge"
	histogram = "histogram"
)

// allFamilies returns every family that lazyvol exports of its own.
func allFamilies() []family {
	return []family{
		{buildInfo, gauge, "1, labelled with what was built.", []string{"version", "commit", "goversion"}},
		{daemonUp, gauge, "1 if the daemon answered, else 0: then there is nothing else of it.", nil},
		{healthOf, gauge, "1 for the status that holds (healthy, degraded or failed), 0 for the others.", []string{"status"}},
		{logWritten, counter, "Messages logged, those held back as repetitions too, by level (warn or error).", []string{"level"}},

		{deviceSize, gauge, "Size of the device.", nil},
		{deviceData, gauge, "Bytes of the snapshot below that are not holes: hydrated when all are on this host.", nil},
		{deviceHydrated, gauge, "Bytes of these that are on this host.", nil},
		{deviceDirty, gauge, "Bytes written or discarded since the last snapshot, on this host only.", nil},
		{deviceLost, gauge, "1 if the snapshot below cannot be trusted any more: cold reads fail until a snapshot is made.", nil},
		{deviceProblems, gauge, "Problems with blocks that are not over, 8 at most.", nil},
		{deviceOps, counter, "Requests of the kernel, by operation (read, write, discard or flush).", []string{"operation"}},
		{deviceOpBytes, counter, "Bytes that these read, wrote or discarded.", []string{"operation"}},
		{deviceOpErrors, counter, "Those of these that failed.", []string{"operation"}},

		{hydrationState, gauge, "1 for the state that holds (hydrating, paused, cache-full, waiting-for-store or hydrated), 0 for the others.", []string{"state"}},
		{hydrationBytes, counter, "Stored bytes fetched in the background.", nil},
		{hydrationErrors, counter, "Fetches in the background that failed.", nil},

		{demandFetches, counter, "Requests to the store that reads caused.", nil},
		{demandBlocked, counter, "Seconds in which at least one read waited for the store.", nil},
		{demandWait, histogram, "How long each read that had to wait for the store did.", nil},
		{fetchedBytes, counter, "Stored bytes asked of the store, by reads and in the background.", nil},

		{dirtySince, gauge, "When the oldest write that is in no snapshot was made, within 15 seconds; absent if there is none.", nil},
		{snapshotLast, gauge, "The moment of the last snapshot of the volume; absent if there is none.", nil},
		{snapshotInProgress, gauge, "1 while a snapshot of the volume is being made.", nil},
		{snapshotsMade, counter, "Snapshots of the volume that ended, by result (ok or failed).", []string{"result"}},

		{storeRequests, counter, "Requests to the store, each attempt, by operation (get, read, put, delete or list) and result (ok, throttled, unavailable, denied, canceled or error).", []string{"operation", "result"}},
		{storeRequestSeconds, histogram, "How long these took.", []string{"operation"}},
		{storeRetries, counter, "Those of these that repeated one that had failed.", nil},
		{storeSent, counter, "Bytes of objects sent.", nil},
		{storeReceived, counter, "Bytes of objects received.", nil},
		{storeAnswered, gauge, "When the store last answered; absent before.", nil},

		{cacheUsed, gauge, "Bytes on this host that the store has too, of all volumes and mounts of the state directory.", nil},
		{cacheLimit, gauge, "What --cache-size allows of them; absent without it.", nil},
		{cacheEvictions, counter, "How often this daemon made room.", nil},
		{cacheEvicted, counter, "Bytes that this freed.", nil},
	}
}

// families makes metrics.
type families struct{ descs map[string]*prometheus.Desc }

func newFamilies() *families {
	f := &families{make(map[string]*prometheus.Desc)}
	for _, family := range allFamilies() {
		f.descs[family.name] = prometheus.NewDesc(family.name, family.help, family.labels, nil)
	}
	return f
}

func (f *families) describe(ch chan<- *prometheus.Desc) {
	for _, desc := range f.descs {
		ch <- desc
	}
}

func (f *families) gauge(name string, v float64, labels ...string) prometheus.Metric {
	return prometheus.MustNewConstMetric(f.descs[name], prometheus.GaugeValue, v, labels...)
}

func (f *families) counter(name string, v float64, labels ...string) prometheus.Metric {
	return prometheus.MustNewConstMetric(f.descs[name], prometheus.CounterValue, v, labels...)
}

// histogram makes one of counts by bucket: those at most its bound, in seconds, and
// more than the one before; the last is of those beyond all bounds.
func (f *families) histogram(name string, bounds []float64, counts []uint64, sum float64, labels ...string) prometheus.Metric {
	cumulative, total := make(map[float64]uint64, len(bounds)), uint64(0)
	for i, n := range counts {
		total += n
		if i < len(bounds) {
			cumulative[bounds[i]] = total
		}
	}
	return prometheus.MustNewConstHistogram(f.descs[name], total, sum, cumulative, labels...)
}

// oneOf makes the gauges of a state that is one of several.
func (f *families) oneOf(ch chan<- prometheus.Metric, name string, all []string, holds string) {
	for _, s := range all {
		v := 0.0
		if s == holds {
			v = 1
		}
		ch <- f.gauge(name, v, s)
	}
}

// unixSeconds is a moment as metrics have it.
func unixSeconds(t time.Time) float64 { return float64(t.UnixNano()) / float64(time.Second) }

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
