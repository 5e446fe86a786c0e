package integration

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
)

// The daemon's log says of each snapshot for how long its cut stopped writers.
func TestDaemonLogsHowLongACutStoppedWriters(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.ok("volume", "create", "--size", "4MiB")
	m := h.mount(vol)
	for range 2 {
		m.write(randomBytes(1, 4096), mib)
		snap := h.ok("snapshot", "create", vol)
		log, err := os.ReadFile(filepath.Join(h.state, "volumes", vol, "daemon.log"))
		if err != nil {
			t.Fatal(err)
		}
		cut := regexp.MustCompile(`msg="snapshot cut" volume=` + vol + ` snapshot=` + snap + ` stopped_ms=(\S+)\n`).FindSubmatch(log)
		if cut == nil {
			t.Fatalf("no cut of %s in:\n%s", snap, log)
		}
		if ms, err := strconv.ParseFloat(string(cut[1]), 64); err != nil || ms <= 0 {
			t.Errorf("writers were stopped for %s ms", cut[1])
		}
	}
}
