package main

import (
	"net/http"
	"os"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// browseMonitor is what a browse tells about itself: metrics and health.
type browseMonitor struct {
	browser  *browser
	families *families
	registry *prometheus.Registry
}

func newBrowseMonitor(b *browser) (*browseMonitor, error) {
	m := &browseMonitor{browser: b, families: newFamilies()}
	var err error
	m.registry, err = newRegistry(browseID, b.session.Mountpoint, m)
	return m, err
}

// health judges without waiting for anything.
func (m *browseMonitor) health() healthJSON {
	b := m.browser
	h := healthJSON{ID: browseID, Mountpoint: b.session.Mountpoint, PID: os.Getpid(), Status: healthy, Reasons: []reason{}}
	_, _, problem := b.tree.status()
	if _, _, refused := b.app.meter.contact(); refused {
		h.add("store", degraded, "it denies access")
	} else if problem != nil {
		h.add("store", degraded, "%s", strings.Join(problemsOf(problem), "; "))
	}
	open, _ := b.shelf.status()
	for _, i := range open {
		if n := len(i.stats.Errors); n > 0 {
			h.add("blocks", degraded, "%s: %s", i.id, i.stats.Errors[n-1].Message)
		}
	}
	return h
}

func (m *browseMonitor) serveHealth(w http.ResponseWriter, r *http.Request) {
	m.browser.tree.ask(r.Context())
	h := m.health()
	writeHealth(w, h.Status, h)
}

// Describe implements [prometheus.Collector].
func (m *browseMonitor) Describe(ch chan<- *prometheus.Desc) { m.families.describe(ch) }

// Collect implements [prometheus.Collector].
func (m *browseMonitor) Collect(ch chan<- prometheus.Metric) {
	b := m.browser
	b.tree.askAgain()
	m.families.collectDaemon(ch, b.app, m.health().Status)
	_, total := b.shelf.status()
	m.families.collectDemand(ch, total)
	b.app.meter.collect(m.families, ch)
}
