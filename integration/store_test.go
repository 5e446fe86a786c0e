package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// A store is where hosts keep their snapshots. When its test ends, every
// snapshot in it must verify.
type store struct {
	url   string
	env   []string // credentials
	files string   // the folder in which its objects are files

	server *blockstoretest.S3Server // nil for a folder
	bucket string
}

// newDirStore makes a store in a folder.
func newDirStore(t testing.TB) *store {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "store")
	return initStore(t, &store{url: "file://" + dir, files: dir})
}

// newS3Store makes a store in a bucket of a server of its own.
func newS3Store(t testing.TB) *store {
	t.Helper()
	server := blockstoretest.StartVersitygw(t)
	bucket := server.NewBucket(t)
	return initStore(t, &store{
		url: server.URL(bucket, "some/prefix"), env: server.Env(), files: filepath.Join(server.Dir, bucket, "some/prefix"),
		server: server, bucket: bucket,
	})
}

func initStore(t testing.TB, s *store) *store {
	t.Helper()
	newHost(t, s).ok("init")
	t.Cleanup(func() {
		if !t.Failed() {
			newHost(t, s).ok("snapshot", "verify", "--all")
		}
	})
	return s
}

// objects returns the sizes of the store's objects below a folder of it.
func (s *store) objects(t testing.TB, folder string) map[string]int64 {
	t.Helper()
	found := make(map[string]int64)
	root := filepath.Join(s.files, folder)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // nothing was put there, or it was removed meanwhile
		}
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		key, err := filepath.Rel(s.files, path)
		found[key] = info.Size()
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// dataBytes returns the size of all that snapshots stored.
func (s *store) dataBytes(t testing.TB) int64 {
	t.Helper()
	total := int64(0)
	for _, size := range s.objects(t, "data") {
		total += size
	}
	return total
}

// edit changes a record of a store in a folder.
func (s *store) edit(t testing.TB, key string, change func(record map[string]any)) {
	t.Helper()
	path := filepath.Join(s.files, key)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var record map[string]any
	if err := json.Unmarshal(data, &record); err != nil {
		t.Fatal(err)
	}
	change(record)
	if data, err = json.Marshal(record); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// A gate stands between hosts and an S3 server: it counts requests, and holds
// those it is told to.
type gate struct {
	mu     sync.Mutex               // guards the fields below
	counts map[string]int           // answered, by method and the object's kind: "GET data"
	closed func(*http.Request) bool // which requests are held; nil: none
	silent func(*http.Request) bool // of which requests the replies are held; nil: none
	held   int                      // requests and replies that wait
	left   int                      // of those that waited, how many clients did not
	opened chan struct{}            // closed by open
}

// newGatedStore makes a store on S3 with a gate before it.
func newGatedStore(t testing.TB) (*store, *gate) {
	t.Helper()
	server := blockstoretest.StartVersitygw(t)
	bucket := server.NewBucket(t)
	target, err := url.Parse(server.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{counts: make(map[string]int), opened: make(chan struct{})}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Host = r.In.Host // it is signed
		},
		ModifyResponse: func(r *http.Response) error {
			if !g.wait(r.Request, func() func(*http.Request) bool { return g.silent }) {
				return errors.New("the client is gone")
			}
			return nil
		},
		Transport: &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true},
		// A command that was interrupted leaves its requests.
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Read now: a client that leaves is only noticed after its body.
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		if g.wait(r, func() func(*http.Request) bool { return g.closed }) {
			g.counted(r, bucket)
			proxy.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(front.Close)
	env := append(server.Env(), "AWS_ENDPOINT_URL="+front.URL, "AWS_ENDPOINT_URL_S3="+front.URL)
	s := initStore(t, &store{
		url: server.URL(bucket, "p"), env: env, files: filepath.Join(server.Dir, bucket, "p"),
		server: server, bucket: bucket,
	})
	t.Cleanup(g.open) // before the store is verified
	return s, g
}

// wait waits while the gate is closed for r, whose request or reply it is; it
// returns false if the client left before.
func (g *gate) wait(r *http.Request, closed func() func(*http.Request) bool) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for match := closed(); match != nil && match(r); match = closed() {
		opened := g.opened
		g.held++
		g.mu.Unlock()
		select {
		case <-opened:
		case <-r.Context().Done():
		}
		g.mu.Lock()
		g.held--
		if r.Context().Err() != nil {
			g.left++
			return false
		}
	}
	return true
}

// counted counts a request that passed.
func (g *gate) counted(r *http.Request, bucket string) {
	kind, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"+bucket+"/p/"), "/")
	g.mu.Lock()
	defer g.mu.Unlock()
	g.counts[r.Method+" "+kind]++
}

// close holds the requests that match from now on.
func (g *gate) close(match func(*http.Request) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = match
}

// closeReplies lets requests that match through from now on, and holds what the
// server says to them.
func (g *gate) closeReplies(match func(*http.Request) bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.silent = match
}

// open lets everything through.
func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed, g.silent = nil, nil
	close(g.opened)
	g.opened = make(chan struct{})
}

// holding returns how many requests wait.
func (g *gate) holding() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.held
}

// waitHolding waits until a request or reply is held.
func (g *gate) waitHolding(t testing.TB) {
	t.Helper()
	waitFor(t, "a request is held", time.Minute, func() bool { return g.holding() > 0 })
}

// waitLeft waits until a client has given up a request that is held, and
// forgets it.
func (g *gate) waitLeft(t testing.TB) {
	t.Helper()
	waitFor(t, "a request is given up", time.Minute, func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.left == 0 {
			return false
		}
		g.left = 0
		return true
	})
}

// count returns how many requests of a kind passed, and forgets them.
func (g *gate) count(kind string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := g.counts[kind]
	delete(g.counts, kind)
	return n
}

// puts matches the uploads of one kind of object.
func puts(kind string) func(*http.Request) bool {
	return func(r *http.Request) bool {
		return r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/"+kind+"/")
	}
}

// gets matches the reads of one kind of object.
func gets(kind string) func(*http.Request) bool {
	return func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/"+kind+"/")
	}
}
