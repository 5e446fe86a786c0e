package integration

import "testing"

// A volume is of one store: in another one its pins would not be found, and its
// snapshots would have no parent.
func TestVolumeIsRefusedInAnotherStore(t *testing.T) {
	t.Parallel()
	s := newDirStore(t)
	h := newHost(t, s)
	disk := randomBytes(1, 2*mib)
	vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
	own := h.store
	h.store = newDirStore(t)
	for _, args := range [][]string{{"mount", vol, t.TempDir()}, {"snapshot", "create", vol}, {"hydrate", "--wait", vol}, {"volume", "delete", vol}} {
		h.fails(4, []string{vol, "another store"}, args...)
	}
	h.store = own
	m := h.mount(vol)
	m.equals(disk)
}
