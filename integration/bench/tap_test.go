package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// newTap starts a tap before a server of the test's.
func newTap(t *testing.T, handler http.HandlerFunc) *tap {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	tapped, err := startTap(strings.TrimPrefix(server.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tapped.stop)
	return tapped
}

// exchange sends a request and returns the response's body.
func exchange(t *testing.T, method, url string, body io.Reader, header ...string) string {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	client := http.Client{Transport: &http.Transport{ExpectContinueTimeout: time.Minute, DisableCompression: true}}
	defer client.CloseIdleConnections()
	response, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	got, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(got)
}

func TestTapPassesEveryKindOfMessageAndCountsIt(t *testing.T) {
	big := strings.Repeat("0123456789abcdef", 1<<17) // 2 MiB: beyond every buffer
	tapped := newTap(t, func(w http.ResponseWriter, r *http.Request) {
		switch body, err := io.ReadAll(r.Body); {
		case err != nil:
			t.Error(err)
		case r.Method == http.MethodPut:
			fmt.Fprintf(w, "%d", len(body))
		case r.URL.Path == "/chunked":
			for piece := range slices.Chunk([]byte(big), 100_000) {
				_, _ = w.Write(piece)
				_ = http.NewResponseController(w).Flush()
			}
		case r.URL.Path == "/nothing":
			w.WriteHeader(http.StatusNoContent)
		default:
			w.Header().Set("Content-Length", fmt.Sprint(len(big)))
			_, _ = io.WriteString(w, big)
		}
	})
	passed := tapped.watch()
	tests := []struct {
		method, path, body, want string
		header                   []string
		sent, received           int64
	}{
		{method: "GET", path: "/length", want: big, received: int64(len(big))},
		{method: "GET", path: "/chunked", want: big, received: int64(len(big))},
		{method: "HEAD", path: "/length"},
		{method: "GET", path: "/nothing"},
		{method: "PUT", path: "/put", body: big, want: fmt.Sprint(len(big)), sent: int64(len(big)), received: 7},
		{method: "PUT", path: "/asked", body: "body", want: "4", header: []string{"Expect", "100-continue"}, sent: 4, received: 1},
	}
	for _, test := range tests {
		if got := exchange(t, test.method, tapped.url()+test.path, strings.NewReader(test.body), test.header...); got != test.want {
			t.Errorf("%s %s: %d bytes came back, want %d", test.method, test.path, len(got), len(test.want))
		}
	}
	tapped.stop()
	seen := passed.traffic().requests
	if len(seen) != len(tests) {
		t.Fatalf("%d requests were counted, want %d", len(seen), len(tests))
	}
	for i, test := range tests {
		got := seen[i]
		if got.method != test.method || got.path != test.path || got.sent != test.sent || got.received != test.received {
			t.Errorf("%s %s was counted as %+v", test.method, test.path, got)
		}
	}
}

func TestTapKnowsWhatIsInFlight(t *testing.T) {
	const clients = 5
	var arrived sync.WaitGroup
	arrived.Add(clients)
	tapped := newTap(t, func(http.ResponseWriter, *http.Request) {
		arrived.Done()
		arrived.Wait()
	})
	passed := tapped.watch()
	var all sync.WaitGroup
	for range clients {
		all.Go(func() { exchange(t, "GET", tapped.url(), nil) })
	}
	all.Wait()
	if got := passed.traffic().peak; got != clients {
		t.Errorf("at most %d requests were in flight, want %d", got, clients)
	}
	tapped.stop() // a request ends, for the tap, a moment after the client has the response
	if tapped.busy() {
		t.Errorf("%d are in flight at the end", tapped.inFlight)
	}
}

func TestRoundTripsAreTheLongestChain(t *testing.T) {
	begin := time.Now()
	at := func(ms int) time.Time { return begin.Add(time.Duration(ms) * time.Millisecond) }
	seen := traffic{requests: []request{
		{begin: at(0), end: at(20)}, {begin: at(1), end: at(30)}, // at once
		{begin: at(21), end: at(40)},                  // after the first
		{begin: at(35), end: at(50)},                  // after the second
		{begin: at(41)}, {begin: at(60), end: at(70)}, // after the third; it never ends
	}}
	if got := seen.roundTrips(); got != 3 {
		t.Errorf("%d round trips, want 3:\n%s", got, seen)
	}
}
