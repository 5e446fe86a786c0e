package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

const (
	// scrapesAtOnce bounds how many are served at the same time.
	scrapesAtOnce = 4

	// scrapeTimeout bounds one answer, in which each daemon is asked for its metrics or
	// health; those that do not answer are so many at a time.
	scrapeTimeout = 30 * time.Second

	// legacyNames are metric names as Prometheus always had them.
	legacyNames = model.LegacyValidation
)

func (a *app) metricsCommand() *cobra.Command {
	var listen string
	c := &cobra.Command{
		Use: "metrics", Short: "Print metrics for Prometheus, or serve them", Args: args(cobra.NoArgs),
		Long: `Prints once what all daemons of the state directory tell about themselves, in
Prometheus' text format: for node_exporter's textfile collector, without what the Go
runtime and the process tell, which node_exporter has of itself.

With --listen it serves that, with all, as /metrics, and as /health what 'lazyvol
health' tells (503 if something has failed), until it is told to end. It listens on
loopback addresses and unix sockets only: it asks nobody who he is. A daemon
that does not answer within 3 seconds has lazyvol_daemon_up 0, and nothing else.`,
		Example: `  lazyvol metrics
  lazyvol metrics --listen 127.0.0.1:9464
  lazyvol metrics --listen unix:///run/lazyvol-metrics.sock`,
		RunE: func(c *cobra.Command, _ []string) error {
			if listen != "" {
				return a.serveMetrics(c.Context(), listen)
			}
			families, err := a.gather(c.Context(), a.log())
			if err != nil {
				return err
			}
			var out bytes.Buffer
			for _, f := range families {
				if !strings.HasPrefix(f.GetName(), "lazyvol_") {
					continue
				}
				if _, err := expfmt.MetricFamilyToText(&out, f); err != nil {
					return err
				}
			}
			_, err = a.stdout.Write(out.Bytes())
			return err
		},
	}
	c.Flags().StringVar(&listen, "listen", "", "serve on this loopback `address`: 127.0.0.1:9464, [::1]:9464 or unix:///path")
	return c
}

// gather asks all daemons for their metrics.
func (a *app) gather(ctx context.Context, log *slog.Logger) ([]*dto.MetricFamily, error) {
	all, err := a.fleet()
	if err != nil {
		return nil, err
	}
	told := each(all, func(s served) map[string]*dto.MetricFamily {
		if !s.inSight && slices.ContainsFunc(all, s.isBehind) {
			return nil // its labels are the other's, and a collector refuses to have them twice
		}
		families, err := s.metrics(ctx)
		switch {
		case errors.Is(err, errNoDaemon) && !s.inSight:
			return nil // it is not mounted
		case err != nil:
			log.Warn("a daemon does not tell its metrics", "id", s.id, "mountpoint", s.mountpoint, "error", err)
			return s.down()
		}
		return families
	})
	// Of several that are out of sight on one directory the last one mounted is told.
	labelled := make(map[[2]string]bool, len(all))
	for i, s := range all {
		labels := [2]string{s.id, labelOf(s.mountpoint)}
		if labelled[labels] {
			told[i] = nil
		}
		labelled[labels] = labelled[labels] || told[i] != nil
	}
	return merge(told), nil
}

// labelOf is a mountpoint as a label, which is UTF-8.
func labelOf(mountpoint string) string { return strings.ToValidUTF8(mountpoint, "\uFFFD") }

// metrics asks the daemon for its metrics.
func (s served) metrics(ctx context.Context) (map[string]*dto.MetricFamily, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, metricsPatience, fmt.Errorf("no answer within %s", metricsPatience))
	defer cancel()
	data, err := s.get(ctx, "/metrics")
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	parser := expfmt.NewTextParser(legacyNames)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("understand the daemon's metrics: %w", err)
	}
	return families, nil
}

// down is what there is of a daemon that does not answer.
func (s served) down() map[string]*dto.MetricFamily {
	name, help, kind, zero := daemonUp, helpOf(daemonUp), dto.MetricType_GAUGE, 0.0
	id, mountpoint := "id", "mountpoint"
	dir := labelOf(s.mountpoint)
	return map[string]*dto.MetricFamily{name: {
		Name: &name, Help: &help, Type: &kind,
		Metric: []*dto.Metric{{
			Label: []*dto.LabelPair{{Name: &id, Value: &s.id}, {Name: &mountpoint, Value: &dir}},
			Gauge: &dto.Gauge{Value: &zero},
		}},
	}}
}

func helpOf(name string) string {
	for _, f := range allFamilies() {
		if f.name == name {
			return f.help
		}
	}
	return ""
}

// merge puts the metrics of several daemons together, by name. Daemons of another
// version may explain one in other words; the first has it. What is of another type
// than the first's is left out.
func merge(daemons []map[string]*dto.MetricFamily) []*dto.MetricFamily {
	merged := make(map[string]*dto.MetricFamily)
	for _, families := range daemons {
		for _, name := range sortedKeys(families) {
			f, m := families[name], merged[name]
			switch {
			case m == nil:
				merged[name] = f
			case m.GetType() == f.GetType():
				m.Metric = append(m.Metric, f.Metric...)
			}
		}
	}
	var all []*dto.MetricFamily
	for _, name := range sortedKeys(merged) {
		all = append(all, merged[name])
	}
	return all
}

// serveMetrics serves metrics and health until ctx ends.
func (a *app) serveMetrics(ctx context.Context, at string) error {
	listener, err := listenLocal(ctx, at)
	if err != nil {
		return err
	}
	log := a.logger(a.stderr, a.minimum(slog.LevelInfo))
	gatherer := prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) { return a.gather(ctx, log) })
	prober := newProber()
	slots := make(chan struct{}, scrapesAtOnce)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(gatherer, promhttp.HandlerOpts{
		MaxRequestsInFlight: scrapesAtOnce, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}))
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, r *http.Request) {
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			http.Error(w, "too many at once", http.StatusServiceUnavailable)
			return
		}
		all, err := a.fleet()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		fleet := a.fleetHealth(r.Context(), all, prober)
		writeHealth(w, fleet.Status, fleet)
	})
	server := &http.Server{
		Handler: inOnePiece(mux), ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 5 * time.Second, WriteTimeout: scrapeTimeout, MaxHeaderBytes: 1 << 14,
		ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
	log.Info("serving metrics", "address", listener.Addr().String())
	stop := context.AfterFunc(ctx, func() { _ = server.Close() }) // Serve then says so
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}

// inOnePiece sends an answer when it is complete: a client that does not take its own
// holds no slot of those who are served at once.
func inOnePiece(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a := wholeAnswer{header: w.Header(), status: http.StatusOK}
		next.ServeHTTP(&a, r)
		w.WriteHeader(a.status)
		_, _ = w.Write(a.body.Bytes()) // the client is gone if this fails
	})
}

// A wholeAnswer is an [http.ResponseWriter] that keeps what is written.
type wholeAnswer struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (a *wholeAnswer) Header() http.Header         { return a.header }
func (a *wholeAnswer) WriteHeader(status int)      { a.status = status }
func (a *wholeAnswer) Write(p []byte) (int, error) { return a.body.Write(p) }

// listenLocal listens on a loopback address or a unix socket.
func listenLocal(ctx context.Context, at string) (net.Listener, error) {
	if u, err := url.Parse(at); err == nil && u.Scheme == "unix" {
		if u.Host != "" || !filepath.IsAbs(u.Path) || u.RawQuery != "" {
			return nil, usageError{fmt.Errorf("--listen %s: a socket is unix:// and an absolute path, as unix:///run/lazyvol-metrics.sock", at)}
		}
		return listenSocket(u.Path)
	}
	host, port, err := net.SplitHostPort(at)
	if err != nil {
		return nil, usageError{fmt.Errorf("--listen %s: it is no address like 127.0.0.1:9464 or unix:///path", at)}
	}
	var ips []net.IP
	if ip := net.ParseIP(host); ip != nil {
		ips = []net.IP{ip}
	} else if host != "" {
		if ips, err = net.DefaultResolver.LookupIP(ctx, "ip", host); err != nil {
			return nil, usageError{fmt.Errorf("--listen %s: %w", at, err)}
		}
	}
	if len(ips) == 0 || slices.ContainsFunc(ips, func(ip net.IP) bool { return !ip.IsLoopback() }) {
		return nil, usageError{fmt.Errorf("--listen %s: only loopback addresses, such as 127.0.0.1:%s, and unix sockets are served: metrics tell what this host has to whoever asks. To scrape from elsewhere put a proxy with TLS and a password before it", at, port)}
	}
	l, err := net.Listen("tcp", net.JoinHostPort(ips[0].String(), port))
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w", err)
	}
	return l, nil
}

// listenSocket listens on a socket for this user and group, in place of one that
// nobody serves.
func listenSocket(path string) (net.Listener, error) {
	if st, err := os.Lstat(path); err == nil {
		if st.Mode().Type() != os.ModeSocket {
			return nil, refusal{fmt.Errorf("%s is there, and no socket", path)}
		}
		conn, err := net.DialTimeout("unix", path, time.Second)
		if err == nil {
			err = conn.Close()
		}
		if !errors.Is(err, unix.ECONNREFUSED) {
			return nil, refusal{errors.Join(fmt.Errorf("%s is served by another process", path), err)}
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("serve metrics: %w", err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w", err)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return nil, errors.Join(fmt.Errorf("serve metrics: %w", err), l.Close())
	}
	return l, nil
}
