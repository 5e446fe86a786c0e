package integration

import (
	"net/http"
	"strings"
	"testing"
)

// lists matches the listings of one kind of object.
func lists(kind string) match {
	return func(r *http.Request) bool {
		return r.Method == http.MethodGet && strings.Contains(r.URL.Query().Get("prefix"), "/"+kind+"/")
	}
}

// direct returns a host that uses a gated store without its gate.
func direct(t testing.TB, s *store) *host {
	t.Helper()
	past := *s
	past.env = s.server.Env()
	return newHost(t, &past)
}

// pending returns the one snapshot that is being made.
func (h *host) pending() string {
	h.t.Helper()
	for _, info := range h.list() {
		if info.State == "pending" {
			return info.SnapshotId
		}
	}
	h.t.Fatal("nothing is pending")
	return ""
}

// A command that was held up, while somebody took it for lost and aborted its
// snapshot, is told so; what it goes on to upload comes too late, and is removed.
func TestSnapshotAbortedMeanwhileIsNotCommitted(t *testing.T) {
	t.Parallel()
	for _, source := range []string{"image", "volume"} {
		for _, kind := range []string{"packs", "outcomes"} {
			t.Run(source+", before its "+kind, func(t *testing.T) {
				t.Parallel()
				s, gate := newGatedStore(t)
				h, other := newHost(t, s), direct(t, s)
				disk := diskBytes(1, 9*mib+512)
				create := []string{"snapshot", "create", h.image(disk)}
				var m *mount
				if source == "volume" {
					vol := h.ok("volume", "create", "--snapshot", h.ok(create...))
					m = h.mount(vol)
					fill(newRand(2), disk[mib:6*mib])
					m.write(disk[mib:6*mib], mib)
					create[2] = vol
				}
				gate.close(requests, puts(kind))
				late := h.begin(create...)
				gate.waitHolding(t)
				pending := other.pending()
				other.ok("snapshot", "delete", pending)
				other.ok("gc")
				gate.open()
				late.wait().failed(t, 3, "aborted")
				other.fails(3, []string{pending}, "mount", pending, t.TempDir())
				other.ok("gc")
				for key := range s.objects(t, "data") {
					if strings.Contains(key, pending) {
						t.Errorf("%s of the aborted snapshot is left", key)
					}
				}
				if m != nil {
					m.equals(disk)
				}
				sameBytes(t, "the next snapshot", other.exported(h.ok(create...)), disk)
			})
		}
	}
}

// A snapshot that is uploaded and committed while a reclaim is between any two
// of its listings keeps all that it inherited.
func TestSnapshotCommittedDuringAReclaimStaysWhole(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"tombstones", "pins", "intents", "outcomes", "data"} {
		t.Run("after it listed "+kind, func(t *testing.T) {
			t.Parallel()
			s, gate := newGatedStore(t)
			h, other := newHost(t, s), direct(t, s)
			disk := randomBytes(1, 12*mib)
			first := other.ok("snapshot", "create", other.image(disk))
			fill(newRand(2), disk[:4*mib])
			second := other.ok("snapshot", "create", "--parent", first, other.image(disk))
			vol := other.ok("volume", "create", "--snapshot", second)
			m := other.mount(vol, "--no-hydrate")
			fill(newRand(3), disk[3*mib:6*mib])
			m.write(disk[3*mib:6*mib], 3*mib)
			other.ok("snapshot", "delete", second) // whose pin keeps it

			gate.close(replies, lists(kind))
			reclaim := h.begin("snapshot", "delete", first)
			gate.waitHolding(t)
			child := other.ok("snapshot", "create", vol) // and the pin goes
			gate.open()
			if r := reclaim.wait(); r.code != 0 {
				t.Fatal(r)
			}
			h.ok("gc")
			sameBytes(t, "the snapshot", h.exported(child), disk)
			m.equals(disk)
			m.unmount()
			other.ok("volume", "delete", vol)
			other.ok("snapshot", "delete", child)
			other.ok("gc")
			s.isEmpty(t)
		})
	}
}
