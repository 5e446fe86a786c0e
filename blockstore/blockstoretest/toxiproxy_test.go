package blockstoretest_test

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"syscall"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

func TestNetworkSuffersUntilItHeals(t *testing.T) {
	t.Parallel()
	const body = "what the server says"
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, body) }))
	defer server.Close()
	n := blockstoretest.StartNetwork(t, server.URL)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: time.Minute}
	get := func() (string, error) {
		reply, err := client.Get(n.Endpoint)
		if err != nil {
			return "", err
		}
		defer reply.Body.Close()
		data, err := io.ReadAll(reply.Body)
		return string(data), err
	}
	works := func(when string) {
		t.Helper()
		if got, err := get(); got != body || err != nil {
			t.Errorf("%s: %q, %v", when, got, err)
		}
	}
	works("at first")

	n.Refuse(t)
	if _, err := get(); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("refused: %v", err)
	}
	n.Heal(t)
	works("after it was refused")

	n.Suffer(t, blockstoretest.Toxic{Type: "reset_peer", Stream: "downstream"})
	if _, err := get(); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("reset: %v", err)
	}
	n.Heal(t)
	works("after it was reset")

	n.Suffer(t, blockstoretest.Toxic{Type: "limit_data", Stream: "downstream", Attributes: map[string]int64{"bytes": 140}})
	if got, err := get(); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut: %q, %v", got, err)
	}
	n.Heal(t)
	works("after it was cut")
}
