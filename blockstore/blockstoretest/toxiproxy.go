package blockstoretest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// toxiproxy is the TCP proxy that makes a network fail.
var toxiproxy = program{
	pkg:      "github.com/Shopify/toxiproxy/v2/cmd/server@v2.5.0",
	variable: "LAZYVOL_TOXIPROXY",
	names:    []string{"toxiproxy-server"},
}

// A Network is the TCP connections between clients and one server, which fail
// on demand. Its methods must be called from one goroutine at a time.
type Network struct {
	Endpoint string // http://127.0.0.1:port, in place of the server's

	api  string // of this proxy
	http *http.Client
}

// A Toxic is something that is wrong with a network, as
// https://github.com/Shopify/toxiproxy#toxics describes it.
type Toxic struct {
	Type       string           `json:"type"`
	Stream     string           `json:"stream"` // upstream: of requests; downstream: of replies
	Attributes map[string]int64 `json:"attributes"`
}

// StartNetwork starts a toxiproxy before the server at an http:// endpoint, and
// stops it at the end of the test. The binary is $LAZYVOL_TOXIPROXY,
// toxiproxy-server in $PATH, or is built once into the user's cache directory.
func StartNetwork(t testing.TB, endpoint string) *Network {
	t.Helper()
	binary := toxiproxy.find(t)
	n := &Network{http: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: startTimeout}}
	var err error
	for range startAttempts {
		if err = n.start(t, binary); err == nil {
			break // else the port was taken meanwhile, perhaps
		}
	}
	if err != nil {
		t.Fatalf("start toxiproxy: %v", err)
	}
	var proxy struct{ Listen string }
	n.call(t, "POST", "/proxies", map[string]any{"name": "server", "listen": "127.0.0.1:0", "upstream": strings.TrimPrefix(endpoint, "http://"), "enabled": true}, &proxy)
	n.Endpoint = "http://" + proxy.Listen
	return n
}

func (n *Network) start(t testing.TB, binary string) error {
	t.Helper()
	api, err := freeEndpoint()
	if err != nil {
		return err
	}
	n.api = api
	output := filepath.Join(t.TempDir(), "toxiproxy.log")
	log, err := os.Create(output)
	if err != nil {
		return err
	}
	defer log.Close() // the process has its own
	_, port, _ := strings.Cut(strings.TrimPrefix(api, "http://"), ":")
	cmd := exec.Command(binary, "-host", "127.0.0.1", "-port", port)
	cmd.Env = append(os.Environ(), "LOG_LEVEL=error")
	cmd.Stdout, cmd.Stderr = log, log
	p, err := startProcess(cmd)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	for {
		_, err := n.request(ctx, "GET", "/version", nil)
		if err == nil {
			t.Cleanup(p.kill)
			return nil
		}
		select {
		case <-p.ended:
			text, _ := os.ReadFile(output)
			return fmt.Errorf("it ended at once: %w\n%s", errors.Join(p.err, err), bytes.TrimSpace(text))
		case <-ctx.Done():
			p.kill()
			return fmt.Errorf("it does not answer: %w", err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Suffer makes something wrong with connections, those that are open and new
// ones, until Heal.
func (n *Network) Suffer(t testing.TB, toxics ...Toxic) {
	t.Helper()
	for _, toxic := range toxics {
		n.call(t, "POST", "/proxies/server/toxics", struct {
			Name string `json:"name"`
			Toxic
		}{rand.Text(), toxic}, nil)
	}
}

// Refuse closes all connections and refuses new ones, until Heal.
func (n *Network) Refuse(t testing.TB) {
	t.Helper()
	n.call(t, "POST", "/proxies/server", map[string]any{"enabled": false}, nil)
}

// Heal ends all that Suffer and Refuse began.
func (n *Network) Heal(t testing.TB) {
	t.Helper()
	n.call(t, "POST", "/reset", nil, nil)
}

// call makes a request of toxiproxy's API, which must succeed.
func (n *Network) call(t testing.TB, method, path string, body, result any) {
	t.Helper()
	answer, err := n.request(context.Background(), method, path, body) // also from Cleanup
	if err == nil && result != nil {
		err = json.Unmarshal(answer, result)
	}
	if err != nil {
		t.Fatalf("toxiproxy: %s %s: %v", method, path, err)
	}
}

func (n *Network) request(ctx context.Context, method, path string, body any) ([]byte, error) {
	var encoded bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&encoded).Encode(body); err != nil {
			return nil, err
		}
	}
	r, err := http.NewRequestWithContext(ctx, method, n.api+path, &encoded)
	if err != nil {
		return nil, err
	}
	reply, err := n.http.Do(r)
	if err != nil {
		return nil, err
	}
	defer reply.Body.Close()
	answer, err := io.ReadAll(reply.Body)
	if err == nil && reply.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %s", reply.Status, answer)
	}
	return answer, err
}
