package integration

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// hostCount is how many hosts share the store; the last of them is lost at the
// end, state directory and all.
const hostCount = 5

// hostsTime is how long the hosts work, besides the checks at the end.
func hostsTime() time.Duration {
	if stressed() {
		return 15 * time.Minute
	}
	return 50 * time.Second
}

// Hosts that commit, restore, delete, mount and collect at once, and are killed
// at it, never lose a byte of a snapshot that nobody deleted. When all is released
// and deleted, nothing but records is left.
func TestManyHostsShareAStore(t *testing.T) {
	t.Parallel()
	seed := modelSeed(t, 8)
	s, gate := newGatedStore(t)
	g := newRegistry(t)
	gate.record(t, g.start)
	gate.disturb(seed)
	first := newHost(t, s)
	for i := range 2 { // one lineage for all, and another
		disk := diskBytes(seed+uint64(i), 6*mib+3*512)
		g.publish(first.ok("snapshot", "create", first.image(disk)), disk)
	}

	end := time.Now().Add(hostsTime())
	var working sync.WaitGroup
	for n := range hostCount {
		working.Go(func() {
			t.Run(fmt.Sprintf("host %d", n), func(sub *testing.T) {
				a := newActor(sub, s, g, n, seed)
				for time.Now().Before(end) && !t.Failed() {
					a.step()
				}
				a.finish(n == hostCount-1)
			})
		})
	}
	working.Wait()
	gate.relieve()
	if !t.Failed() {
		checkRegistry(t, s, g)
	}
}

// checkRegistry checks that the store holds what the registry says, deletes
// all of it, and checks that nothing stays.
func checkRegistry(t *testing.T, s *store, g *registry) {
	h := newHost(t, s)
	// Attempts whose maker was killed, and deletions that were.
	for _, info := range h.list() {
		if info.State == "pending" || g.ended[info.SnapshotId] > 0 {
			g.end(info.SnapshotId)
			h.ok("snapshot", "delete", info.SnapshotId)
		}
	}
	var listed []string
	for _, info := range h.list() {
		listed = append(listed, info.SnapshotId)
	}
	slices.Sort(listed)
	if want := slices.Sorted(maps.Keys(g.live)); !slices.Equal(listed, want) {
		t.Fatalf("the store lists\n%s\nwant\n%s", strings.Join(listed, "\n"), strings.Join(want, "\n"))
	}
	h.ok("snapshot", "verify", "--all")
	for snap, want := range g.live {
		sameBytes(t, "at the end, "+snap, h.exported(snap), want)
	}

	shown := pinsShown(t, h.ok("gc"))
	for _, holder := range g.lost {
		if shown[holder].snapshot == "" {
			t.Errorf("gc does not show the pin of %s: %v", holder, shown)
		}
		h.ok("volume", "forget", holder)
	}
	for holder, pin := range pinsShown(t, h.ok("gc")) {
		// The one leak that is known: docs/consistency.md.
		if !g.cut[pin.snapshot] || !strings.HasPrefix(holder, "vol-") {
			t.Errorf("nobody holds the pin of %s on %s, and nobody was killed at it", holder, pin.snapshot)
		}
		t.Logf("the pin of %s arrived after its maker was killed and its volume deleted", holder)
		h.ok("volume", "forget", holder)
	}
	t.Logf("%d snapshots were made, %d of them are live, %d were deleted while somebody used them; %d things done",
		len(g.live)+len(g.ended), len(g.live), g.clash, len(g.log))
	for snap := range g.live {
		h.ok("snapshot", "delete", snap)
	}
	h.ok("gc")
	s.holdsOnlyRecords(t)
}

// holdsOnlyRecords checks that nothing is left in a store but events and the records that
// stay for ever.
func (s *store) holdsOnlyRecords(t testing.TB) {
	t.Helper()
	for key, size := range s.objects(t, "") {
		switch kind, _, _ := strings.Cut(key, "/"); kind {
		case "store.json", "lineages", "intents", "outcomes", "tombstones", "events":
		default:
			t.Errorf("left in the store: %s (%d bytes)", key, size)
		}
	}
}

// disturb makes the network one in which requests are late, above all those
// whose order matters, or arrive though who sent them was killed meanwhile; some
// arrive twice, or are done without the sender hearing of it.
func (g *gate) disturb(seed uint64) {
	r := newRand(seed)
	oneIn := func(n int) bool { return r.IntN(n) == 0 } // the gate asks for one request at a time
	late := func(by time.Duration) trouble {
		return func(e *exchange) {
			e.r = e.r.WithContext(context.WithoutCancel(e.r.Context()))
			time.Sleep(rand.N(by))
			e.answer(e.pass())
		}
	}
	g.afflict(func(r *http.Request) bool {
		listing := r.URL.Query().Get("prefix")
		return strings.Contains(listing, "/pins/") && oneIn(2) || strings.Contains(listing, "/tombstones/") && oneIn(4)
	}, late(200*time.Millisecond))
	g.afflict(func(r *http.Request) bool {
		kind := func(kind string) bool { return strings.Contains(r.URL.Path, "/"+kind+"/") }
		return r.Method == http.MethodPut && (kind("pins") || kind("packs") || kind("leaves")) && oneIn(4)
	}, late(400*time.Millisecond))
	g.afflict(func(*http.Request) bool { return oneIn(40) }, late(100*time.Millisecond))
	g.afflict(func(*http.Request) bool { return oneIn(60) }, sentTwice)
	g.afflict(func(*http.Request) bool { return oneIn(200) }, replyLost)
}
