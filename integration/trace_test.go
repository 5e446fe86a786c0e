package integration

import (
	"math/rand/v2"
	"net/http"
	"testing"
	"time"
)

// The blocks that the reads of these tests touch, in their order.
func touched(blocks int) []int {
	order := rand.New(rand.NewPCG(1, 2)).Perm(blocks)
	return order[:blocks/4]
}

func (m *mount) touch(blocks []int) {
	m.h.t.Helper()
	for _, b := range blocks {
		m.read(int64(b)*512*kib, 4*kib)
	}
}

// traced makes a snapshot of so many blocks, with a trace named boot of those in
// order.
func (h *host) traced(blocks int) (disk []byte, snap string, order []int) {
	h.t.Helper()
	disk, order = randomBytes(1, blocks*512*kib), touched(blocks)
	snap = h.ok("snapshot", "create", h.image(disk))
	m := h.mount(snap, "--no-hydrate", "--record-trace", "boot")
	m.touch(order)
	m.unmount()
	return disk, snap, order
}

func TestTraceLetsAnotherHostReadWithoutWaiting(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	disk, snap, order := newHost(t, s).traced(128)
	for _, what := range []string{"snapshot", "volume"} {
		h := newHost(t, s)
		target := snap
		if what == "volume" {
			target = h.ok("volume", "create", "--snapshot", snap)
		}
		m := h.mount(target, "--no-hydrate", "--trace", "boot")
		want := int64(len(order)) * 512 * kib
		waitFor(t, "the trace is fetched", 20*time.Second, func() bool { return m.status().HydratedBytes >= want })
		waitFor(t, "nothing goes on", 10*time.Second, func() bool { return m.status().State == "paused" })
		if st := m.status(); st.HydratedBytes != want || st.DemandFetches != 0 {
			t.Errorf("%s: %+v, want %d bytes and no demand", what, st, want)
		}
		gate.close(requests, gets("packs"))
		m.touch(order) // asks the store for nothing
		gate.open()
		m.equals(disk)
		m.unmount()
	}
}

// A machine's disk is snapshotted night after night; what an earlier one of its
// lineage was traced to read serves those after it.
func TestTraceServesItsWholeLineage(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	h := newHost(t, s)
	_, snap, order := h.traced(64)
	vol := h.ok("volume", "create", "--snapshot", snap)
	for i := range 2 {
		m := h.mount(vol, "--no-hydrate")
		m.write(randomBytes(uint64(i), 4*kib), int64(i)*mib)
		m.unmount()
		snap = h.ok("snapshot", "create", vol)
	}
	h.ok("snapshot", "create", h.image(randomBytes(2, mib))) // another lineage
	other := newHost(t, s)
	for _, target := range []string{snap, other.ok("volume", "create", "--snapshot", snap)} {
		m := other.mount(target, "--no-hydrate", "--trace", "boot")
		waitFor(t, "the trace is fetched", 20*time.Second, func() bool { return m.status().HydratedBytes >= int64(len(order))*512*kib })
		m.touch(order)
		if st := m.status(); st.DemandFetches != 0 {
			t.Errorf("%s: %+v", target, st)
		}
		m.unmount()
	}
}

func TestTraceComesBeforeHydration(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	h := newHost(t, s)
	const blocks = 256
	disk := randomBytes(1, blocks*512*kib)
	snap := h.ok("snapshot", "create", h.image(disk))
	last := []int{blocks - 1, blocks - 2, blocks - 3}
	m := h.mount(snap, "--no-hydrate", "--record-trace", "end")
	m.touch(last)
	m.unmount()
	other := newHost(t, s)
	m = other.mount(snap, "--trace", "end", "--hydrate-rate", "1MiB")
	waitFor(t, "the trace is fetched", 20*time.Second, func() bool { return m.status().HydratedBytes >= int64(len(last))*512*kib })
	m.touch(last)
	if st := m.status(); st.DemandFetches != 0 {
		t.Errorf("%+v", st)
	}
	other.ok("hydrate", "--pause", m.dir)
	m.equals(disk)
}

func TestTraceThatIsNotThereIsNamed(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	blank := h.ok("volume", "create", "--size", "1MiB")
	h.fails(3, []string{"boot"}, "mount", "--trace", "boot", snap, t.TempDir())
	h.fails(2, []string{"lower-case"}, "mount", "--trace", "Not/A/Name", snap, t.TempDir())
	h.fails(2, []string{"lower-case"}, "mount", "--record-trace", "..", snap, t.TempDir())
	h.fails(4, []string{"blank"}, "mount", "--record-trace", "boot", blank, t.TempDir())
	h.ok("snapshot", "delete", snap) // nothing has it pinned
}

// TestTraceIsFetchedAfterAnOutage also if the store went away before anything of
// it was planned.
func TestTraceIsFetchedAfterAnOutage(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	_, snap, order := newHost(t, s).traced(64)
	h := newHost(t, s)
	gate.afflict(func(r *http.Request) bool { return ranged(r) && !gets("packs")(r) }, says(503, "ServiceUnavailable"))
	m := h.mount(snap, "--no-hydrate", "--read-deadline", "1s", "--trace", "boot")
	waitFor(t, "the trace waits for the store", 20*time.Second, func() bool { return m.status().State == "waiting-for-store" })
	gate.relieve()
	want := int64(len(order)) * 512 * kib
	waitFor(t, "the trace is fetched", 40*time.Second, func() bool { return m.status().HydratedBytes >= want })
	if st := m.status(); st.DemandFetches != 0 {
		t.Errorf("%+v", st)
	}
	m.touch(order)
	m.unmount()
}
