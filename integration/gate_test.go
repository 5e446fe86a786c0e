package integration

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// match chooses requests.
type match func(*http.Request) bool

// side is one of a gate's two.
type side int

const (
	requests side = iota
	replies
)

// A gate stands between hosts and an S3 server: it counts requests, and holds
// those it is told to.
type gate struct {
	mu     sync.Mutex     // guards the fields below
	counts map[string]int // answered, by method and the object's kind: "GET data"
	closed [2]match       // which requests, and the replies to which, are held; nil: none
	held   int            // requests and replies that wait
	last   string         // the last of them
	left   int            // of those that waited, how many clients did not
	opened chan struct{}  // closed by open
	wrong  []affliction   // what befalls requests; the first that matches does
	asked  []time.Time    // when requests came, but for those that are held
}

// An affliction is a trouble and the requests that it befalls.
type affliction struct {
	match
	trouble
}

// newGatedStore makes a store on S3 with a gate before it.
func newGatedStore(t testing.TB) (*store, *gate) {
	t.Helper()
	return gateBefore(t, blockstoretest.StartVersitygw(t))
}

// behindNetwork returns the same store as it is reached through a network of its
// own.
func (s *store) behindNetwork(t testing.TB) (*store, *blockstoretest.Network) {
	t.Helper()
	n := blockstoretest.StartNetwork(t, s.endpoint)
	far := *s
	far.endpoint, far.env = n.Endpoint, atEndpoint(s.env, n.Endpoint)
	return &far, n
}

// gateBefore makes a store in a new bucket of a server, with a gate before it.
func gateBefore(t testing.TB, server *blockstoretest.S3Server) (*store, *gate) {
	t.Helper()
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
			if !g.wait(replies, r.Request) {
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
		if !g.wait(requests, r) {
			return
		}
		if befall := g.troubleOf(r); befall != nil {
			befall(&exchange{w: w, r: r, server: proxy, body: body, file: filepath.Join(server.Dir, r.URL.Path)})
			return
		}
		g.counted(r, bucket)
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(front.Close)
	s := initStore(t, &store{
		url: server.URL(bucket, "p"), env: atEndpoint(server.Env(), front.URL), files: filepath.Join(server.Dir, bucket, "p"),
		server: server, bucket: bucket, endpoint: front.URL,
	})
	t.Cleanup(func() { // before the store is verified
		g.open()
		g.relieve()
	})
	return s, g
}

// atEndpoint returns an environment with another endpoint of S3.
func atEndpoint(env []string, url string) []string {
	return append(slices.Clone(env), "AWS_ENDPOINT_URL="+url, "AWS_ENDPOINT_URL_S3="+url)
}

// afflict makes a trouble befall requests from now on, until relieve.
func (g *gate) afflict(which match, befall trouble) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.wrong = append(g.wrong, affliction{which, befall})
}

// relieve ends what afflict began.
func (g *gate) relieve() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.wrong = nil
}

// troubleOf counts a request, and returns what befalls it.
func (g *gate) troubleOf(r *http.Request) trouble {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.asked = append(g.asked, time.Now())
	for _, a := range g.wrong {
		if a.match(r) {
			return a.trouble
		}
	}
	return nil
}

// askedFor returns when requests came since it was called last.
func (g *gate) askedFor() []time.Time {
	g.mu.Lock()
	defer g.mu.Unlock()
	when := g.asked
	g.asked = nil
	return when
}

// wait waits while one side of the gate is closed for r; it returns false if the
// client left before.
func (g *gate) wait(at side, r *http.Request) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.closed[at] != nil && g.closed[at](r) {
		opened := g.opened
		g.held++
		g.last = r.Method + " " + r.URL.Path
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

// close holds what matches from now on: requests before they reach the server,
// or what the server replies.
func (g *gate) close(at side, held match) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed[at] = held
}

// open lets everything through.
func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = [2]match{}
	close(g.opened)
	g.opened = make(chan struct{})
}

// holding returns how many requests wait.
func (g *gate) holding() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.held
}

// heldRequest names the request that was held last.
func (g *gate) heldRequest() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.last
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
func puts(kind string) match {
	return func(r *http.Request) bool {
		return r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/"+kind+"/")
	}
}

// gets matches the reads of one kind of object.
func gets(kind string) match {
	return func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/"+kind+"/")
	}
}
