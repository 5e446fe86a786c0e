package integration

import (
	"os"
	"testing"
)

// What --memory says is what a daemon takes at most, also while it makes a
// snapshot of more than that.
func TestDaemonNeedsNoMoreMemoryThanItIsGiven(t *testing.T) {
	t.Parallel()
	const least, size = 96 * mib, 256 * mib
	h := newHost(t, nil)
	h.fails(2, []string{"--memory", "96 MiB"}, "--memory", "95MiB", "volume", "create", "--size", "1MiB")
	vol := h.ok("volume", "create", "--size", "256MiB")
	m := h.mount(vol, "--memory=96MiB")
	part := make([]byte, 8*mib)
	for off := int64(0); off < size; off += int64(len(part)) {
		fill(newRand(uint64(off)), part)
		m.write(part, off)
	}
	h.ok("snapshot", "create", vol)
	peak := peakMemory(t, m.pid)
	t.Logf("the daemon took %d MiB", peak/mib)
	if peak > least+least/10 && os.Getenv("LAZYVOL_RACE") == "" { // the detector takes more than that itself
		t.Errorf("the daemon took %d MiB of memory", peak/mib)
	}
}
