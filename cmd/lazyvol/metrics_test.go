package main

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"go.yaml.in/yaml/v3"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/snapshot"
)

// The table of docs/operating.md is what is exported, word for word.
func TestTheMetricsAreThoseOfTheirTable(t *testing.T) {
	page, err := os.ReadFile("../../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented []family
	for _, m := range regexp.MustCompile("(?m)^\\| `(lazyvol_\\w+)` \\| (\\w+) \\| ([^|]*) \\| ([^|]*) \\|$").FindAllStringSubmatch(string(page), -1) {
		f := family{name: m[1], kind: m[2], help: m[4]}
		for _, l := range regexp.MustCompile("`(\\w+)`").FindAllStringSubmatch(m[3], -1) {
			f.labels = append(f.labels, l[1])
		}
		documented = append(documented, f)
	}
	if diff := cmp.Diff(allFamilies(), documented, cmp.AllowUnexported(family{})); diff != "" {
		t.Errorf("exported (-) and documented (+) differ:\n%s", diff)
	}
}

// Alerts are of metrics and labels that there are.
func TestAlertsAreOfMetricsThatThereAre(t *testing.T) {
	data, err := os.ReadFile("../../packaging/prometheus/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr         string
				For                 time.Duration
				Labels, Annotations map[string]string
			}
		}
	}
	decoder := yaml.NewDecoder(strings.NewReader(string(data)))
	decoder.KnownFields(true)
	if err := decoder.Decode(&file); err != nil {
		t.Fatal(err)
	}
	values := map[string][]string{"status": healthStatuses(), "result": {"ok", "failed"}, "state": hydrationStates()}
	for _, r := range blockstore.Results() {
		values["result"] = append(values["result"], string(r))
	}
	rules := 0
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			rules++
			names := regexp.MustCompile(`(lazyvol_\w+)(?:\{(\w+)(=|!~)"([^"]*)"\})?`).FindAllStringSubmatch(r.Expr, -1)
			if len(names) == 0 || r.Alert == "" || r.Annotations["summary"] == "" || r.Labels["severity"] == "" {
				t.Errorf("%q is no whole rule: %+v", r.Alert, r)
			}
			for _, n := range names {
				i := slices.IndexFunc(allFamilies(), func(f family) bool { return f.name == n[1] })
				if i < 0 || n[2] != "" && !slices.Contains(allFamilies()[i].labels, n[2]) {
					t.Errorf("%s: there is no %s", r.Alert, n[0])
				}
				for v := range strings.SplitSeq(n[4], "|") {
					if n[2] != "" && !slices.Contains(values[n[2]], v) {
						t.Errorf("%s: %s is never %q", r.Alert, n[2], v)
					}
				}
			}
		}
	}
	if rules < 8 {
		t.Errorf("%d rules", rules)
	}
}

// gathered is what a collector of some metrics exports, as text.
func gathered(t *testing.T, collect func(ch chan<- prometheus.Metric)) string {
	t.Helper()
	registry := prometheus.NewRegistry()
	if err := registry.Register(collectFunc(collect)); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	return spelled(t, families)
}

func spelled(t *testing.T, families []*dto.MetricFamily) string {
	t.Helper()
	var out strings.Builder
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&out, f); err != nil {
			t.Fatal(err)
		}
	}
	return out.String()
}

type collectFunc func(ch chan<- prometheus.Metric)

func (collectFunc) Describe(chan<- *prometheus.Desc)      {}
func (f collectFunc) Collect(ch chan<- prometheus.Metric) { f(ch) }

// Names, units and types are as Prometheus' own linter wants them.
func TestMetricsAreNamedByConvention(t *testing.T) {
	f := newFamilies()
	text := gathered(t, func(ch chan<- prometheus.Metric) {
		for _, family := range allFamilies() {
			labels := make([]string, len(family.labels))
			switch family.kind {
			case counter:
				ch <- f.counter(family.name, 1, labels...)
			case gauge:
				ch <- f.gauge(family.name, 1, labels...)
			case histogram:
				ch <- f.histogram(family.name, []float64{1}, []uint64{1, 2}, 3, labels...)
			default:
				t.Errorf("%s is a %q", family.name, family.kind)
			}
		}
	})
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("%v: %v", err, problems)
	}
}

func TestHistogramsAreCumulative(t *testing.T) {
	text := gathered(t, func(ch chan<- prometheus.Metric) {
		ch <- newFamilies().histogram(demandWait, []float64{0.5, 1}, []uint64{3, 4, 5}, 42)
	})
	for _, want := range []string{`_bucket{le="0.5"} 3`, `_bucket{le="1"} 7`, `_bucket{le="+Inf"} 12`, "_sum 42", "_count 12"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}

func TestStoreRequestsAreMetered(t *testing.T) {
	m := newStoreMeter()
	answered, failing, refused := m.contact()
	if !answered.IsZero() || !failing.IsZero() || refused {
		t.Error("a store of which nothing was asked is judged")
	}
	m.seen(blockstore.Request{Operation: blockstore.OpRead, Result: blockstore.ResultOK, Took: 15 * time.Millisecond, Received: 100})
	m.seen(blockstore.Request{Operation: blockstore.OpPut, Result: blockstore.ResultThrottled, Took: 2 * time.Minute, Sent: 7})
	m.retried()
	text := gathered(t, func(ch chan<- prometheus.Metric) { m.collect(newFamilies(), ch) })
	for _, want := range []string{
		`requests_total{operation="read",result="ok"} 1`, `requests_total{operation="put",result="throttled"} 1`, `requests_total{operation="put",result="ok"} 0`,
		`bucket{operation="read",le="0.01"} 0`, `bucket{operation="read",le="0.02"} 1`, `bucket{operation="put",le="60"} 0`, `bucket{operation="put",le="+Inf"} 1`,
		"retries_total 1\n", "sent_bytes_total 7\n", "received_bytes_total 100\n", storeAnswered,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	answered, failing, _ = m.contact()
	if answered.IsZero() || failing.IsZero() {
		t.Errorf("answered %v, failing since %v", answered, failing)
	}
	m.seen(blockstore.Request{Operation: blockstore.OpGet, Result: blockstore.ResultUnavailable})
	if _, again, _ := m.contact(); again != failing {
		t.Error("an outage began anew with its second request")
	}
	m.seen(blockstore.Request{Operation: blockstore.OpGet, Result: blockstore.ResultCanceled})
	m.seen(blockstore.Request{Operation: blockstore.OpGet, Result: blockstore.ResultDenied})
	if _, again, refused := m.contact(); again != failing || !refused {
		t.Errorf("denied: %v, %v", again, refused)
	}
	m.seen(blockstore.Request{Operation: blockstore.OpGet, Result: blockstore.ResultOK})
	if _, failing, refused = m.contact(); !failing.IsZero() || refused {
		t.Errorf("it has answered, and is failing since %v, refused: %v", failing, refused)
	}
}

// A store is told to be away after a minute, or if it does not answer when asked; and
// what denies access at once.
func TestAStoreIsJudgedByItsAnswers(t *testing.T) {
	minute := time.Now().Add(-storePatience - time.Second)
	for name, c := range map[string]struct {
		prepare func(m *monitor)
		want    string
	}{
		"nothing asked":     {func(*monitor) {}, healthy},
		"away for a moment": {func(m *monitor) { m.daemon.app.meter.failing = time.Now() }, healthy},
		"away for a minute": {func(m *monitor) { m.daemon.app.meter.failing = minute }, degraded},
		"denied":            {func(m *monitor) { m.daemon.app.meter.refused = true }, degraded},
		"silent when asked": {func(m *monitor) { m.probed, m.probe = time.Now(), errors.New("silent") }, degraded},
		"silent, answered since": {func(m *monitor) {
			m.probed, m.probe, m.daemon.app.meter.answered = minute, errors.New("silent"), time.Now()
		}, healthy},
		"answered, silent since ": {func(m *monitor) {
			m.probed, m.probe, m.daemon.app.meter.answered = time.Now(), errors.New("silent"), minute
		}, degraded},
	} {
		m := &monitor{daemon: &daemon{app: &app{meter: newStoreMeter()}}}
		c.prepare(m)
		h := healthJSON{Status: healthy}
		m.judgeStore(&h)
		if h.Status != c.want || (c.want != healthy) != (len(h.Reasons) == 1) {
			t.Errorf("%s: %+v, want %s", name, h, c.want)
		}
	}
	if worse(degraded, healthy) != degraded || worse(degraded, broken) != broken || worse(healthy, degraded) != degraded {
		t.Error("the worst does not win")
	}
}

// A store that failed once, and of which nothing was asked since, is found to be back;
// one that is well is left alone.
func TestAStoreIsNotInTroubleForEver(t *testing.T) {
	meter, requests := newStoreMeter(), 0
	store, err := snapshot.Init(t.Context(), blockstore.Observe(blockstore.NewMem(), func(r blockstore.Request) {
		requests++
		meter.seen(r)
	}))
	if err != nil {
		t.Fatal(err)
	}
	m := &monitor{daemon: &daemon{app: &app{meter: meter}, store: store}}
	expect := func(when, status string, asked int) {
		t.Helper()
		requests = 0
		m.askAgain(t.Context())
		h := healthJSON{Status: healthy}
		if m.judgeStore(&h); h.Status != status || requests != asked {
			t.Errorf("%s: %+v after %d requests; want %s, %d", when, h, requests, status, asked)
		}
	}
	expect("well", healthy, 0)
	meter.seen(blockstore.Request{Operation: blockstore.OpPut, Result: blockstore.ResultDenied})
	expect("denied once", healthy, 1)
	m.probe = errors.New("silent")
	m.probed = time.Now().Add(time.Second)
	expect("silent when asked just now", degraded, 0)
	m.probed = time.Now().Add(-storeQuiet)
	meter.answered = m.probed.Add(-time.Second)
	expect("silent when asked long ago", healthy, 1)
	expect("well again", healthy, 0)
}

// Daemons of different versions are told together, whatever each says a metric means.
func TestDaemonsOfDifferentVersionsAreMerged(t *testing.T) {
	parse := func(text string) map[string]*dto.MetricFamily {
		t.Helper()
		parser := expfmt.NewTextParser(legacyNames)
		families, err := parser.TextToMetricFamilies(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		return families
	}
	merged := spelled(t, merge([]map[string]*dto.MetricFamily{
		parse("# HELP x_bytes A size.\n# TYPE x_bytes gauge\nx_bytes{id=\"1\"} 1\n"),
		nil,
		parse("# HELP x_bytes The size.\n# TYPE x_bytes gauge\nx_bytes{id=\"2\"} 2\n# TYPE new_total counter\nnew_total{id=\"2\"} 5\n"),
		parse("# TYPE x_bytes counter\nx_bytes{id=\"3\"} 3\n"),
		served{id: "4", mountpoint: "/mnt/\xff"}.down(),
	}))
	want := "# HELP lazyvol_daemon_up " + helpOf(daemonUp) + `
# TYPE lazyvol_daemon_up gauge
lazyvol_daemon_up{id="4",mountpoint="/mnt/` + "\uFFFD" + `"} 0
# TYPE new_total counter
new_total{id="2"} 5
# HELP x_bytes A size.
# TYPE x_bytes gauge
x_bytes{id="1"} 1
x_bytes{id="2"} 2
`
	if diff := cmp.Diff(want, merged); diff != "" {
		t.Error(diff)
	}
}

// Metrics are for this host: an address that others can reach is refused, with its
// reason.
func TestOnlyThisHostIsServed(t *testing.T) {
	for _, at := range []string{"0.0.0.0:9464", ":9464", "[::]:9464", "192.0.2.1:9464", "9464", "http://127.0.0.1:9464", "unix:relative", "unix://host/path", "127.0.0.1"} {
		l, err := listenLocal(t.Context(), at)
		if err == nil {
			l.Close()
		}
		if exitCode(err) != exitUsage {
			t.Errorf("%s: %v, want a usage error", at, err)
		}
	}
	if _, err := listenLocal(t.Context(), "0.0.0.0:9464"); err == nil || !strings.Contains(err.Error(), "only loopback addresses") || !strings.Contains(err.Error(), "127.0.0.1:9464") {
		t.Errorf("it does not say why, and what to do: %v", err)
	}
	for _, at := range []string{"127.0.0.1:0", "[::1]:0", "127.8.9.1:0"} {
		l, err := listenLocal(t.Context(), at)
		if err != nil {
			if strings.HasPrefix(at, "[") && !errors.Is(err, errUsage) { // a host without IPv6
				continue
			}
			t.Errorf("%s: %v", at, err)
			continue
		}
		if ip := l.Addr().(*net.TCPAddr).IP; !ip.IsLoopback() {
			t.Errorf("%s became %s", at, ip)
		}
		l.Close()
	}
}

func TestASocketIsTakenOverFromTheDeadOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "metrics.sock")
	first, err := listenLocal(t.Context(), "unix://"+path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if _, err := listenLocal(t.Context(), "unix://"+path); exitCode(err) != exitRefused {
		t.Errorf("the socket of a living process: %v", err)
	}
	first.(*net.UnixListener).SetUnlinkOnClose(false) // as if it was killed
	first.Close()
	second, err := listenLocal(t.Context(), "unix://"+path)
	if err != nil {
		t.Fatal(err)
	}
	second.Close()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listenLocal(t.Context(), "unix://"+path); exitCode(err) != exitRefused {
		t.Errorf("a file that is no socket: %v", err)
	}
}

// A thousand daemons are asked, no more than so many at a time, and told in order.
func TestManyDaemonsAreAskedInTurns(t *testing.T) {
	all := make([]served, 1000)
	for i := range all {
		all[i].id = fmt.Sprint(i)
	}
	now := make(chan struct{}, askedAtOnce)
	answers := each(all, func(s served) string {
		select {
		case now <- struct{}{}:
			defer func() { <-now }()
		default:
			t.Error("more than so many at once")
		}
		return s.id
	})
	for i, a := range answers {
		if a != fmt.Sprint(i) {
			t.Fatalf("answer %d is %s", i, a)
		}
	}
}

func TestNothingMountedIsHealthyAndHasNoMetrics(t *testing.T) {
	clearEnvironment(t)
	t.Setenv("LAZYVOL_STATE", t.TempDir())
	if out := ok(t, "metrics"); out != "" {
		t.Errorf("metrics of nothing: %s", out)
	}
	if out := ok(t, "health"); out != "" {
		t.Errorf("health of nothing: %s", out)
	}
	for _, unknown := range []string{"vol-0123456789abcdef0", "snap-1a2b3c4d567890abc", t.TempDir()} {
		if code, _, stderr := try(t, "health", unknown); code != exitNotFound {
			t.Errorf("%s: exit %d: %s", unknown, code, stderr)
		}
	}
	a := &app{state: t.TempDir()}
	if all, err := a.fleet(); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
}

// A client that does not take its answer holds up nobody who waits for a slot: the handler
// that has it is done when the answer is sent.
func TestAnswersAreSentWhenTheirSlotIsFree(t *testing.T) {
	slot := make(chan struct{}, 1)
	client := &watchedAnswer{ResponseRecorder: httptest.NewRecorder(), watch: func() {
		select {
		case slot <- struct{}{}:
			<-slot
		default:
			t.Error("an answer is sent while its handler runs")
		}
	}}
	inOnePiece(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		slot <- struct{}{}
		defer func() { <-slot }()
		w.Header().Set("Content-Type", "text/x")
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprint(w, "a")
		fmt.Fprint(w, "b")
	})).ServeHTTP(client, httptest.NewRequest(http.MethodGet, "/", nil))
	if got := client.Result(); got.StatusCode != http.StatusServiceUnavailable || got.Header.Get("Content-Type") != "text/x" || client.Body.String() != "ab" {
		t.Errorf("%d %v %q", got.StatusCode, got.Header, client.Body)
	}
}

type watchedAnswer struct {
	*httptest.ResponseRecorder
	watch func()
}

func (w *watchedAnswer) Write(p []byte) (int, error) {
	w.watch()
	return w.ResponseRecorder.Write(p)
}
