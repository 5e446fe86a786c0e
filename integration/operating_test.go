package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// healthOf is what 'health --json' prints.
type healthOf struct {
	Status string
	Served []struct {
		ID, Mountpoint, Status string
		Reasons                []struct{ Check, Status, Message string }
	}
}

// wantHealth asks for the health of target, "" for all, and checks its status and the
// checks that found something.
func (h *host) wantHealth(target, status string, checks ...string) healthOf {
	h.t.Helper()
	args := []string{"health", "--json"}
	if target != "" {
		args = append(args, target)
	}
	r := h.run(args...)
	health := parse[healthOf](h.t, r.stdout)
	code := 1
	if status == "healthy" {
		code = 0
	}
	found := make(map[string]bool)
	for _, s := range health.Served {
		for _, reason := range s.Reasons {
			found[reason.Check] = true
		}
	}
	bad := r.code != code || health.Status != status || len(found) != len(checks)
	for _, c := range checks {
		bad = bad || !found[c]
	}
	if bad {
		h.t.Errorf("%s\nwant %s, for %v", r, status, checks)
	}
	return health
}

// A metric is a line of Prometheus' text format.
func metric(text, name string, labels ...string) (value float64, ok bool) {
	for line := range strings.Lines(text) {
		rest, found := strings.CutPrefix(line, name)
		if !found || rest[0] != '{' && rest[0] != ' ' {
			continue
		}
		for _, l := range labels {
			found = found && strings.Contains(rest, l)
		}
		if found {
			v, err := strconv.ParseFloat(strings.TrimSpace(rest[strings.LastIndexByte(rest, ' '):]), 64)
			return v, err == nil
		}
	}
	return 0, false
}

func wantMetric(t *testing.T, text string, want float64, name string, labels ...string) {
	t.Helper()
	if got, ok := metric(text, name, labels...); !ok || got != want {
		t.Errorf("%s%v is %v (there: %v), want %v", name, labels, got, ok, want)
	}
}

// documentedMetrics are those of the table in docs/operating.md.
func documentedMetrics(t *testing.T) map[string]bool {
	t.Helper()
	page, err := os.ReadFile("../docs/operating.md")
	if err != nil {
		t.Fatal(err)
	}
	names := make(map[string]bool)
	for _, m := range regexp.MustCompile("(?m)^\\| `(lazyvol_\\w+)` \\|").FindAllStringSubmatch(string(page), -1) {
		names[m[1]] = true
	}
	return names
}

func TestMetricsTellWhatHappened(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := randomBytes(1, 8*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	vol := h.ok("volume", "create", "--snapshot", snap)
	m := h.mount(vol, "--cache-size=1GiB", "--no-hydrate", "--read-ahead=0")
	m.read(0, 2*mib)
	started := time.Now()
	m.write(make([]byte, 64*kib), 4*mib)
	f := m.open(os.O_RDWR)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	h.mount(snap, "--no-hydrate")
	id := `id="` + vol + `"`
	var text string
	waitFor(t, "what is hydrated has been counted", 20*time.Second, func() bool {
		text = h.ok("metrics")
		v, _ := metric(text, "lazyvol_device_hydrated_bytes", id)
		return v > 0
	})
	wantMetric(t, text, 64*kib, "lazyvol_device_dirty_bytes", id)
	wantMetric(t, text, 64*kib, "lazyvol_device_operation_bytes_total", id, `operation="write"`)
	wantMetric(t, text, 1, "lazyvol_daemon_up", id, `mountpoint="`+m.dir+`"`)
	wantMetric(t, text, 1, "lazyvol_daemon_up", `id="`+snap+`"`)
	wantMetric(t, text, 1, "lazyvol_hydration_state", id, `state="paused"`)
	wantMetric(t, text, 1<<30, "lazyvol_cache_limit_bytes", id)
	wantMetric(t, text, 1, "lazyvol_health_status", id, `status="healthy"`)
	wantMetric(t, text, 0, "lazyvol_device_operation_errors_total", id, `operation="read"`)
	for _, name := range []string{"lazyvol_demand_fetches_total", "lazyvol_fetched_bytes_total", "lazyvol_store_received_bytes_total", "lazyvol_cache_used_bytes"} {
		if v, _ := metric(text, name, id); v <= 0 {
			t.Errorf("%s is %v", name, v)
		}
	}
	if v, _ := metric(text, "lazyvol_device_operations_total", id, `operation="flush"`); v < 1 {
		t.Errorf("%v flushes", v)
	}
	if strings.Contains(text, "\ngo_") || strings.Contains(text, "\nprocess_") {
		t.Error("the textfile collector is told what node_exporter has itself")
	}
	since, ok := metric(text, "lazyvol_dirty_since_timestamp_seconds", id)
	if at := time.UnixMilli(int64(since * 1000)); !ok || at.Before(started.Add(-time.Second)) || at.After(time.Now()) {
		t.Errorf("dirty since %v (there: %v), written at %v", at, ok, started)
	}

	m.closeFiles()
	m.kill()
	text = h.ok("metrics")
	wantMetric(t, text, 0, "lazyvol_daemon_up", id, `mountpoint="`+m.dir+`"`)
	if all := h.wantHealth("", "failed", "daemon"); len(all.Served) != 2 || !strings.Contains(fmt.Sprint(all), "it has died") {
		t.Errorf("a dead daemon is not told of: %+v", all)
	}
	h.wantHealth(vol, "failed", "daemon")
	m = m.again(vol, "--cache-size=1GiB")
	text = h.ok("metrics")
	wantMetric(t, text, since, "lazyvol_dirty_since_timestamp_seconds", id)
	h.ok("snapshot", "create", vol)
	text = h.ok("metrics")
	wantMetric(t, text, 0, "lazyvol_device_dirty_bytes", id)
	wantMetric(t, text, 1, "lazyvol_snapshots_total", id, `result="ok"`)
	if _, ok := metric(text, "lazyvol_dirty_since_timestamp_seconds", id); ok {
		t.Error("nothing is dirty, since some time")
	}
	if last, _ := metric(text, "lazyvol_snapshot_last_timestamp_seconds", id); last < since || last > float64(time.Now().Unix()+1) {
		t.Errorf("the last snapshot was at %v", last)
	}

	m.write([]byte("dirty again"), 0)
	exported, documented := make(map[string]bool), documentedMetrics(t)
	for _, line := range strings.Split(h.ok("metrics"), "\n") {
		if fields := strings.Fields(line); len(fields) > 3 && fields[1] == "TYPE" {
			exported[fields[2]] = true
		}
	}
	for name := range exported {
		if !documented[name] {
			t.Errorf("%s is not in docs/operating.md", name)
		}
	}
	for name := range documented {
		if !exported[name] {
			t.Errorf("%s is documented, and not exported", name)
		}
	}
}

// A daemon of a snapshot that was killed leaves its folder for a while. It is not told of
// any more once the snapshot is mounted there again, and no series is there twice: of a
// file that has one twice, node_exporter takes nothing.
func TestARemountEndsWhatIsToldOfTheKilled(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	m := h.mount(snap)
	m.kill()
	h.wantHealth("", "failed", "daemon")
	m = m.again(snap)
	if all := h.wantHealth("", "healthy"); len(all.Served) != 1 {
		t.Errorf("%+v", all)
	}
	text := h.ok("metrics")
	wantMetric(t, text, 1, "lazyvol_daemon_up", `mountpoint="`+m.dir+`"`)
	if n := strings.Count(text, "\nlazyvol_daemon_up{"); n != 1 {
		t.Errorf("told of %d daemons:\n%s", n, text)
	}
}

// Several daemons of a snapshot may serve out of sight what was mounted on one directory, one
// after the other. Metrics tell of the last one, as their labels are the same; health of all.
func TestNoSeriesIsThereTwice(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	var files []*os.File
	m := h.mount(snap)
	for i := range 2 {
		if i > 0 {
			m = h.mountOn(m.dir, snap)
		}
		f, err := os.Open(filepath.Join(m.dir, "volume.img"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close() // nothing was written
		files = append(files, f)
		m.terminate()
	}
	if all := h.wantHealth("", "degraded", "mount"); len(all.Served) != 2 {
		t.Errorf("%+v", all)
	}
	text := h.ok("metrics")
	seen := make(map[string]bool)
	for line := range strings.Lines(text) {
		series, _, _ := strings.Cut(line, "} ")
		if !strings.HasPrefix(line, "#") && seen[series] {
			t.Errorf("twice: %s", line)
		}
		seen[series] = true
	}
	wantMetric(t, text, 1, "lazyvol_daemon_up", `mountpoint="`+m.dir+`"`)
	for _, f := range files {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	waitFor(t, "both daemons end", 20*time.Second, func() bool { return h.ok("metrics") == "" })
}

// exporter is a running 'metrics --listen'.
type exporter struct {
	t       *testing.T
	running *running
	client  *http.Client
}

func (h *host) exporter(t *testing.T) exporter {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "metrics.sock")
	e := exporter{t: t, running: h.begin("metrics", "--listen", "unix://"+socket)}
	e.client = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	waitFor(t, "metrics are served", 20*time.Second, func() bool {
		conn, err := net.Dial("unix", socket) // it is there before anybody listens on it
		if err != nil {
			return false
		}
		return conn.Close() == nil
	})
	return e
}

// controlClient asks the daemon whose folder dir is: the path of a socket is limited, and
// that of the folder is not.
func controlClient(t *testing.T, dir string) *http.Client {
	t.Helper()
	folder, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { folder.Close() })
	socket := fmt.Sprintf("/proc/self/fd/%d/control", folder.Fd())
	return &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
}

func (e exporter) get(path string) (status int, body string) {
	e.t.Helper()
	resp, err := e.client.Get("http://localhost" + path)
	if err != nil {
		e.t.Errorf("%s: %v", path, err)
		return 0, ""
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		e.t.Errorf("%s: %v", path, err)
	}
	return resp.StatusCode, string(data)
}

// A daemon that hangs is told of, and neither a command nor the others hang with it.
func TestAHungDaemonHangsNobody(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	hung, other := h.mount(snap), h.mount(h.ok("volume", "create", "--snapshot", snap))
	e := h.exporter(t)
	if status, body := e.get("/metrics"); status != http.StatusOK || !strings.Contains(body, "\ngo_goroutines{") || !strings.Contains(body, "\nprocess_resident_memory_bytes{") {
		t.Errorf("%d: %s", status, body)
	}
	if status, body := e.get("/health"); status != http.StatusOK || parse[healthOf](t, body).Status != "healthy" {
		t.Errorf("%d: %s", status, body)
	}
	asked := controlClient(t, glob(t, filepath.Join(h.state, "mounts", "mount-*"))[0])
	asked.Timeout = 1500 * time.Millisecond // a slow machine's daemon is none that has stopped
	hung.stop(true)
	defer hung.stop(false)
	waitFor(t, "the daemon has stopped", 20*time.Second, func() bool {
		resp, err := asked.Get("http://daemon/status")
		if err == nil {
			resp.Body.Close()
		}
		return err != nil
	})
	const bound = 30 * time.Second // 7 are promised, to a machine that is not five times slower
	begin := time.Now()
	var asking sync.WaitGroup
	asking.Go(func() {
		text := h.ok("metrics")
		wantMetric(t, text, 0, "lazyvol_daemon_up", `mountpoint="`+hung.dir+`"`)
		wantMetric(t, text, 1, "lazyvol_daemon_up", `mountpoint="`+other.dir+`"`)
	})
	asking.Go(func() { h.wantHealth("", "failed", "daemon", "mount") })
	for _, args := range [][]string{{"status", hung.dir}, {"unmount", hung.dir}} {
		asking.Go(func() { h.fails(1, []string{"hangs"}, args...) })
	}
	asking.Go(func() {
		if status, body := e.get("/metrics"); status != http.StatusOK || !strings.Contains(body, `lazyvol_daemon_up{id="`+snap+`",mountpoint="`+hung.dir+`"} 0`) {
			t.Errorf("%d: %.2000s", status, body)
		}
	})
	for range 2 {
		asking.Go(func() {
			if status, body := e.get("/health"); status != http.StatusServiceUnavailable || parse[healthOf](t, body).Status != "failed" {
				t.Errorf("%d: %s", status, body)
			}
		})
	}
	asking.Wait()
	if took := time.Since(begin); took > bound {
		t.Errorf("it took %s", took)
	}
	hung.stop(false)
	waitFor(t, "all is well again", 20*time.Second, func() bool { return h.run("health").code == 0 })
	if status, _ := e.get("/health"); status != http.StatusOK {
		t.Errorf("the exporter does not see it: %d", status)
	}
	e.running.signal(syscall.SIGTERM)
	if r := e.running.wait(); r.code != 0 && r.code != 130 {
		t.Error(r)
	}
}

// A store that is away degrades what it serves: reads of what is here and writes go on,
// so nobody is to be restarted for it.
func TestAStoreThatIsAwayIsTold(t *testing.T) {
	t.Parallel()
	for name, outage := range map[string]func(*testing.T, *store) (over func()){
		"refused": func(t *testing.T, s *store) func() { s.server.Stop(); return func() { s.server.Start(t) } },
		"silent":  func(t *testing.T, s *store) func() { s.server.Freeze(t); return func() { s.server.Thaw(t) } },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newS3Store(t)
			h := newHost(t, s)
			vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(randomBytes(1, 2*mib))))
			m := h.mount(vol, "--no-hydrate", "--read-ahead=0", "--read-deadline=1s")
			h.wantHealth(m.dir, "healthy")
			over := outage(t, s)
			if _, err := m.open(os.O_RDONLY).ReadAt(make([]byte, 4*kib), mib); err == nil {
				t.Error("a cold read succeeded")
			}
			health := h.wantHealth(vol, "degraded", "store", "blocks")
			if len(health.Served) != 1 || health.Served[0].ID != vol || health.Served[0].Mountpoint != m.dir {
				t.Errorf("%+v", health)
			}
			over()
			m.read(mib, 4*kib)
			h.wantHealth(vol, "healthy")
		})
	}
}

// What a configuration, the environment and a command line say together is what the
// daemon does, and goes on doing when they say something else.
func TestADaemonIsConfiguredOnce(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(randomBytes(1, mib))))
	config := filepath.Join(h.dir, "config.toml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("log-format = \"json\"\nlog-level = \"debug\"\n[mount]\nno-hydrate = true\nread-ahead = 0\n")
	h.env = append(h.env, "LAZYVOL_CONFIG="+config)
	m := h.mount(vol)
	if s := m.status(); s.State != "paused" {
		t.Errorf("a file's no-hydrate: %+v", s)
	}
	m.unmount()
	log, err := os.ReadFile(filepath.Join(h.state, "volumes", vol, "daemon.log"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(log)) {
		var record struct{ Level, Msg, Time string }
		if err := json.Unmarshal([]byte(line), &record); err != nil || record.Level == "" || record.Msg == "" || record.Time == "" {
			t.Errorf("%v: %s", err, line)
		}
	}
	m = m.again(vol, "--no-hydrate=false") // the file's must not come back in the daemon
	m.waitState("hydrated", 20*time.Second)
	m.unmount()
	h.env = append(h.env, "LAZYVOL_MOUNT_NO_HYDRATE=false")
	m = m.again(vol)
	m.waitState("hydrated", 20*time.Second)
	if log := h.ok("config", "show"); !strings.Contains(log, "no-hydrate = false  # LAZYVOL_MOUNT_NO_HYDRATE") {
		t.Error(log)
	}
	m.unmount()

	write("[mount]\nno-hydrat = true\n")
	h.fails(2, []string{config + ":2", `"mount.no-hydrat"`, "did you mean no-hydrate?"}, "mount", vol, m.dir)
	h.fails(2, []string{config + ":2"}, "status")
	if err := os.Chmod(config, 0o666); err != nil {
		t.Fatal(err)
	}
	h.fails(2, []string{"everybody may write it"}, "status")
	h.ok("--config=", "status")
	if out := h.ok("version"); out == "" {
		t.Error("no version")
	}
	if isMountpoint(t, m.dir) {
		t.Error("a refused mount is there")
	}
}

// A daemon's metrics are a small answer on its own socket.
func TestEachDaemonTellsItsMetrics(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	vol := h.ok("volume", "create", "--snapshot", snap)
	h.mount(vol)
	e := exporter{t: t, client: controlClient(t, filepath.Join(h.state, "volumes", vol))}
	status, text := e.get("/metrics")
	if series := strings.Count(text, "\n"); status != http.StatusOK || series > 500 {
		t.Errorf("%d: %d lines", status, series)
	}
	wantMetric(t, text, 1, "lazyvol_daemon_up", `id="`+vol+`"`)
	if status, body := e.get("/health"); status != http.StatusOK || !strings.Contains(body, `"status":"healthy"`) {
		t.Errorf("%d: %s", status, body)
	}
}
