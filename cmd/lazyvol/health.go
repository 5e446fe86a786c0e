package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/internal/vfs"
)

// What a health is, from good to bad. docs/operating.md says exactly when.
const (
	healthy  = "healthy"
	degraded = "degraded" // it serves, and somebody should look after it
	broken   = "failed"   // reads or writes fail, or something was lost
)

func healthStatuses() []string { return []string{healthy, degraded, broken} }

// healthJSON is the health of one volume or mounted snapshot.
type healthJSON struct {
	ID         string   `json:"id"`
	Mountpoint string   `json:"mountpoint,omitempty"`
	PID        int      `json:"pid,omitempty"`
	Status     string   `json:"status"`
	Reasons    []reason `json:"reasons"`
}

// A reason is a check that found something.
type reason struct {
	Check   string `json:"check"`
	Status  string `json:"status"`
	Message string `json:"message"`
}

func (h *healthJSON) add(check, status, format string, args ...any) {
	h.Reasons = append(h.Reasons, reason{check, status, fmt.Sprintf(format, args...)})
	h.Status = worse(h.Status, status)
}

// worse returns the worse of two statuses.
func worse(a, b string) string {
	rank := map[string]int{healthy: 0, degraded: 1, broken: 2}
	if rank[b] > rank[a] {
		return b
	}
	return a
}

const (
	// storePatience is for how long a store may fail to answer before that is told:
	// shorter outages are everyday.
	storePatience = time.Minute

	// A store of which nothing was asked for storeQuiet, or that did not answer, is
	// asked when somebody wants to know, for at most probeTimeout, and no more often than
	// each probeEvery if it answers, and else each probePause.
	storeQuiet   = time.Minute
	probeTimeout = 5 * time.Second
	probeEvery   = 30 * time.Second
	probePause   = time.Second

	// A filesystem is nearly full with less than this share free, and full with less
	// than leastSpace bytes: a snapshot then has no room for its record either.
	spareShare = 50
	leastSpace = 16 << 20
)

// health judges without waiting for anything.
func (m *monitor) health() healthJSON {
	d := m.daemon
	s := d.status()
	h := healthJSON{ID: d.id, Mountpoint: d.mountpoint, PID: s.PID, Status: healthy, Reasons: []reason{}}
	stats := d.device.Stats()
	if stats.Lost != nil {
		h.add("snapshot", broken, "%v", stats.Lost)
	}
	if m.unsynced.Load() {
		h.add("sync", broken, "the last fsync failed: what was written since the one before may be lost")
	}
	if n := len(stats.Errors); n > 0 {
		h.add("blocks", degraded, "%s", stats.Errors[n-1].Message)
	}
	if s.State == hydrate.CacheFull.String() {
		h.add("cache", degraded, "%v", d.device.Full())
	}
	if p := d.hydrator.Progress(); p.LastError != nil && p.State != hydrate.Waiting {
		h.add("hydration", degraded, "%v", p.LastError)
	}
	m.judgeStore(&h)
	if d.volume != nil {
		m.judgeVolume(&h)
	}
	return h
}

func (m *monitor) judgeStore(h *healthJSON) {
	answered, failing, refused := m.daemon.app.meter.contact()
	m.mu.Lock()
	probed, probe := m.probed, m.probe
	m.mu.Unlock()
	switch {
	case refused:
		h.add("store", degraded, "it denies access")
	case probe != nil && probed.After(answered):
		h.add("store", degraded, "%v", probe)
	case !failing.IsZero() && time.Since(failing) >= storePatience:
		h.add("store", degraded, "no answer since %s", failing.UTC().Format(time.RFC3339))
	}
}

func (m *monitor) judgeVolume(h *healthJSON) {
	d := m.daemon
	m.mu.Lock()
	lastFail := m.lastFail
	m.mu.Unlock()
	if lastFail != nil {
		h.add("snapshots", degraded, "the last one failed: %v", lastFail)
	}
	if m.making.Load() == 0 && d.volume.Record().Pending != nil {
		h.add("snapshots", degraded, "an interrupted one waits for the store to settle it")
	}
	switch total, free, err := vfs.OS().Space(d.app.state); {
	case err != nil:
		h.add("space", degraded, "%v", err)
	case free < leastSpace:
		h.add("space", broken, "%s has %s free: writes fail", d.app.state, size(free))
	case free < total/spareShare:
		h.add("space", degraded, "%s has %s of %s free", d.app.state, size(free), size(total))
	}
}

// checked is health after asking the store, unless that has answered of late and
// nothing else is wrong either.
func (m *monitor) checked(ctx context.Context) healthJSON {
	h := m.health()
	answered, failing, _ := m.daemon.app.meter.contact()
	if h.Status == healthy && failing.IsZero() && time.Since(answered) < storeQuiet {
		return h
	}
	m.ask(ctx)
	return m.health()
}

// askAgain asks a store in trouble once each storeQuiet. If all is cached nobody else
// does, and metrics would tell of what is long over.
func (m *monitor) askAgain(ctx context.Context) {
	_, failing, _ := m.daemon.app.meter.contact()
	m.mu.Lock()
	troubled := !failing.IsZero() || m.probe != nil
	recent := time.Since(m.probed) < storeQuiet
	m.mu.Unlock()
	if troubled && !recent {
		m.ask(ctx)
	}
}

// ask asks the store, unless somebody did just now.
func (m *monitor) ask(ctx context.Context) {
	m.probing.Lock()
	defer m.probing.Unlock()
	m.mu.Lock()
	pause := probeEvery
	if m.probe != nil {
		pause = probePause
	}
	asked := time.Since(m.probed) < pause
	m.mu.Unlock()
	if asked {
		return
	}
	asking, cancel := context.WithTimeoutCause(ctx, probeTimeout, fmt.Errorf("no answer within %s", probeTimeout))
	defer cancel()
	err := m.daemon.store.Ping(asking)
	if ctx.Err() != nil {
		return // who asked has gone
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.probed, m.probe = time.Now(), err
}

// serveHealth answers with 200 as long as the volume is served, and else with 503: a
// supervisor that restarts a daemon because its store is away helps nobody.
func (m *monitor) serveHealth(w http.ResponseWriter, r *http.Request) {
	h := m.checked(r.Context())
	writeHealth(w, h.Status, h)
}

func writeHealth(w http.ResponseWriter, status string, v any) {
	w.Header().Set("Content-Type", "application/json")
	if cmp.Or(status, broken) == broken {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_ = json.NewEncoder(w).Encode(v) // the client is gone if this fails
}
