package integration

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// bounded is how long a command may take to find out that its store is of no
// use.
const bounded = time.Minute

func TestReadOnlyCredentialsReadWithAWarning(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	h := newHost(t, s)
	disk := diskBytes(1, 12*mib)
	snap := h.ok("snapshot", "create", h.image(disk))

	reader := newHost(t, s)
	reader.env = s.server.EnvFor(s.server.ReadOnlyUser(t, s.bucket))
	if listed := reader.list(); len(listed) != 1 || listed[0].SnapshotId != snap {
		t.Errorf("list: %+v", listed)
	}
	if info := reader.show(snap); info.State != "completed" {
		t.Errorf("show: %+v", info)
	}
	dir := t.TempDir()
	r := reader.run("mount", snap, dir)
	if r.code != 0 || !strings.Contains(r.stderr, "warning") || !strings.Contains(r.stderr, "not pinned") {
		t.Fatalf("%s\nwant a warning that it is not pinned", r)
	}
	m := reader.mounted(dir)
	m.equals(disk)
	if pins := s.objects(t, "pins"); len(pins) != 0 {
		t.Errorf("pins: %v", pins)
	}
	m.unmount()
	sameBytes(t, "the export", reader.exported(snap), disk)
	reader.ok("snapshot", "verify", snap)

	for what, args := range map[string][]string{
		"image":   {"snapshot", "create", reader.image(disk)},
		"volume":  {"volume", "create", "--snapshot", snap},
		"blank":   {"volume", "create", "--size", "1MiB"},
		"delete":  {"snapshot", "delete", snap},
		"tag":     {"snapshot", "tag", snap, "a=b"},
		"another": {"--store", s.server.URL(s.bucket, "other"), "init"},
	} {
		t.Run(what, func(t *testing.T) { reader.in(t).fails(1, []string{"denied"}, args...) })
	}
	if out := reader.ok("volume", "list"); out != "" {
		t.Errorf("the refused volumes are listed: %q", out)
	}
	if listed := h.list("--all"); len(listed) != 1 {
		t.Errorf("the refusals left %+v", listed)
	}
}

func TestUselessStoresAreNamedInBoundedTime(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	empty := s.server.NewBucket(t)
	for name, c := range map[string]struct {
		env  []string
		url  string
		code int
		want []string
	}{
		"wrong secret":         {s.server.EnvFor(s.server.AccessKey, "wrong"), s.url, 1, []string{"denied"}},
		"unknown access key":   {s.server.EnvFor("nobody", "wrong"), s.url, 1, []string{"denied"}},
		"no credentials":       {append(s.env, "AWS_ACCESS_KEY_ID=", "AWS_SECRET_ACCESS_KEY="), s.url, 1, []string{"credentials"}},
		"unreachable endpoint": {append(s.env, "AWS_ENDPOINT_URL=http://127.0.0.1:1", "AWS_ENDPOINT_URL_S3=http://127.0.0.1:1"), s.url, 1, []string{"127.0.0.1:1", "refused"}},
		"unreachable in URL":   {s.env, s.url + "?endpoint=http://127.0.0.1:1", 1, []string{"127.0.0.1:1", "refused"}},
		"no such bucket":       {s.env, "s3://no-such-bucket-here/p", 3, []string{"no-such-bucket-here"}},
		"bucket without store": {s.env, "s3://" + empty + "/p", 3, []string{"not a lazyvol store", "init"}},
		"folder without store": {nil, "file://" + t.TempDir(), 3, []string{"not a lazyvol store", "init"}},
		"missing folder":       {nil, "file:///no/such/folder", 3, []string{"/no/such/folder"}},
		"no scheme":            {nil, "/just/a/path", 2, []string{"file://"}},
		"unknown scheme":       {nil, "ftp://host/path", 2, []string{"ftp"}},
		"unknown setting":      {s.env, s.url + "?zone=7", 2, []string{"zone"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, &store{url: c.url, env: c.env})
			image := h.image(make([]byte, 512))
			for _, args := range [][]string{
				{"snapshot", "list"}, {"snapshot", "create", image}, {"mount", "snap-00000001000000001", t.TempDir()},
				{"volume", "create", "--size", "1MiB"}, {"gc"}, {"snapshot", "verify", "--all"},
			} {
				start := time.Now()
				h.fails(c.code, c.want, args...)
				if took := time.Since(start); took > bounded {
					t.Errorf("%v took %s", args, took)
				}
				if strings.HasPrefix(name, "unreachable") {
					break // each takes as long as it may
				}
			}
			if out := h.ok("volume", "list"); out != "" {
				t.Errorf("a volume was left: %q", out)
			}
		})
	}
}

func TestNewerFormatsAreRefusedByVersion(t *testing.T) {
	t.Parallel()
	newer := func(record map[string]any) { record["version"] = 77 }
	t.Run("store", func(t *testing.T) {
		t.Parallel()
		h := newHost(t, nil)
		h.ok("init")
		s := h.own
		s.damaged()
		s.edit(t, "store.json", newer)
		for _, args := range [][]string{{"init"}, {"snapshot", "list"}, {"volume", "create", "--size", "1MiB"}} {
			h.fails(1, []string{"77"}, args...)
		}
	})
	t.Run("snapshot", func(t *testing.T) {
		t.Parallel()
		h := newHost(t, nil)
		snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
		s := h.own
		s.damaged()
		s.edit(t, filepath.Join("outcomes", snap), newer)
		for _, args := range [][]string{{"mount", snap, t.TempDir()}, {"snapshot", "show", snap}, {"snapshot", "verify", snap}, {"snapshot", "list"}} {
			h.fails(1, []string{"77", snap}, args...)
		}
		data := s.dataBytes(t)
		h.run("gc")
		if s.dataBytes(t) != data {
			t.Error("gc removed data of a snapshot that it cannot read")
		}
	})
	t.Run("lineage", func(t *testing.T) {
		t.Parallel()
		h := newHost(t, nil)
		snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
		s := h.own
		s.damaged()
		for key := range s.objects(t, "lineages") {
			s.edit(t, key, newer)
		}
		h.fails(1, []string{"77"}, "mount", snap, t.TempDir())
	})
}

func TestInitIsIdempotent(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	h := newHost(t, s)
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	before, err := os.ReadFile(filepath.Join(s.files, "store.json"))
	if err != nil {
		t.Fatal(err)
	}
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() {
			if r := newHost(t, s).run("init"); r.code != 0 {
				t.Errorf("%s", r)
			}
		})
	}
	both.Wait()
	after, err := os.ReadFile(filepath.Join(s.files, "store.json"))
	if err != nil {
		t.Fatal(err)
	}
	sameBytes(t, "store.json", after, before)
	h.ok("snapshot", "show", snap)
	if left := s.objects(t, "probe"); len(left) != 0 {
		t.Errorf("the probe left %v", left)
	}
}

func TestInitRefusesAStoreThatIgnoresConditions(t *testing.T) {
	t.Parallel()
	careless := &carelessS3{objects: make(map[string][]byte)}
	server := httptest.NewServer(careless)
	t.Cleanup(server.Close)
	h := newHost(t, &store{url: "s3://bucket/p?endpoint=" + server.URL})
	h.env = []string{"AWS_ACCESS_KEY_ID=a", "AWS_SECRET_ACCESS_KEY=b", "AWS_REGION=us-east-1"}
	h.fails(1, []string{"If-None-Match"}, "init")
	careless.mu.Lock()
	defer careless.mu.Unlock()
	if len(careless.objects) != 0 {
		t.Errorf("the refused store holds %d objects", len(careless.objects))
	}
}

// carelessS3 is a server that takes every put, whatever its conditions.
type carelessS3 struct {
	mu      sync.Mutex // guards objects
	objects map[string][]byte
}

func (s *carelessS3) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w.Header().Set("ETag", `"always the same"`)
	switch r.Method {
	case http.MethodPut:
		s.objects[r.URL.Path] = nil
	case http.MethodDelete:
		delete(s.objects, r.URL.Path)
		w.WriteHeader(http.StatusNoContent)
	case http.MethodPost: // ?delete
		clear(s.objects)
		w.Header().Set("Content-Type", "application/xml")
		_, _ = w.Write([]byte(`<DeleteResult></DeleteResult>`)) // the client is gone if this fails
	default:
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(http.StatusNotFound)
		_, _ = w.Write([]byte(`<Error><Code>NoSuchKey</Code></Error>`))
	}
}
