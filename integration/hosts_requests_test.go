package integration

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// A requestLog is what a gate saw: every request that changes the store, and
// every listing, with the host that it came from.
type requestLog struct {
	start time.Time
	mu    sync.Mutex // guards lines
	lines []string
}

// appID makes the requests of an actor's host tell it from the others.
func appID(name string) string { return "AWS_SDK_UA_APP_ID=" + strings.ReplaceAll(name, " ", "-") }

var (
	appIDs      = regexp.MustCompile(`app/(\S+)`)
	deletedKeys = regexp.MustCompile(`<Key>([^<]*)</Key>`)
)

// record logs the requests that reach a gate, for the test to show if it fails.
func (g *gate) record(t testing.TB, start time.Time) {
	l := &requestLog{start: start}
	g.close(requests, func(r *http.Request) bool {
		l.see(r)
		return false
	})
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, line := range l.lines {
			t.Log(line)
		}
	})
}

func (l *requestLog) see(r *http.Request) {
	what := r.Method + " " + strings.TrimPrefix(r.URL.Path, "/")
	switch {
	case r.Method == http.MethodPost && r.URL.Query().Has("delete"):
		body, err := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		var keys []string
		for _, key := range deletedKeys.FindAllSubmatch(body, -1) {
			keys = append(keys, string(key[1]))
		}
		what = "DELETE " + strings.Join(keys, " ")
		if err != nil {
			what += ": " + err.Error()
		}
	case r.Method == http.MethodGet && r.URL.Query().Has("list-type"):
		what = "LIST " + r.URL.Query().Get("prefix")
	case r.Method == http.MethodGet || r.Method == http.MethodHead:
		return
	}
	who := "?"
	if id := appIDs.FindStringSubmatch(r.UserAgent()); id != nil {
		who = id[1]
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf("%8.3f %s from port %s: %s", time.Since(l.start).Seconds(), who, r.RemoteAddr[strings.LastIndexByte(r.RemoteAddr, ':')+1:], what))
}
