package integration

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// farAway is how long the store of these tests takes to answer: requests that
// do not wait for each other overlap, on a slow machine as well.
const farAway = 500 * time.Millisecond

// A journey is a request to a store that is far away, and its reply.
type journey struct {
	what       string
	begin, end time.Time
	depth      int // of the longest chain that ends with it
}

// journeys are the requests that a far store was asked.
type journeys struct {
	mu  sync.Mutex // guards all
	all []*journey // those that were answered, by when they were
}

// farStore makes every request to a store take its time, and notes it.
func farStore(g *gate) *journeys {
	j := &journeys{}
	g.afflict(all, func(e *exchange) {
		trip := &journey{what: e.r.Method + " " + e.r.URL.Path, begin: time.Now()}
		r := e.pass()
		time.Sleep(farAway - time.Since(trip.begin))
		j.note(trip)
		e.answer(r)
	})
	return j
}

func (j *journeys) note(trip *journey) {
	j.mu.Lock()
	defer j.mu.Unlock()
	trip.end, trip.depth = time.Now(), 1
	for _, before := range j.all {
		if !before.end.After(trip.begin) {
			trip.depth = max(trip.depth, before.depth+1)
		}
	}
	j.all = append(j.all, trip)
}

// inSequence returns how many requests, at most, were begun each after the one
// before had ended, and what they all were.
func (j *journeys) inSequence() (n int, list string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	var lines strings.Builder
	slices.SortFunc(j.all, func(a, b *journey) int { return a.begin.Compare(b.begin) })
	for _, trip := range j.all {
		n = max(n, trip.depth)
		fmt.Fprintf(&lines, "%d %s\n", trip.depth, trip.what)
	}
	return n, lines.String()
}

// From the command to the first byte of what lies in the store, few requests
// wait for another one's reply: what does not depend on each other is asked at
// once.
func TestFirstByteIsFewRoundTripsAway(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		volume bool
		most   int
	}{
		{"mount SNAP", false, 4},          // pin; tombstone; leaf; block
		{"volume create, mount", true, 6}, // store.json; pin; tombstone; event; store.json, pin and leaf; block
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s, gate := newGatedStore(t)
			disk := randomBytes(1, 4*mib)
			h := newHost(t, s)
			target := h.ok("snapshot", "create", h.image(disk))
			h = newHost(t, s)
			asked := farStore(gate)
			if c.volume {
				target = h.ok("volume", "create", "--snapshot", target)
			}
			m := h.mount(target, "--no-hydrate")
			if !bytes.Equal(m.read(0, 4096), disk[:4096]) {
				t.Error("the first page is wrong")
			}
			gate.relieve()
			if n, list := asked.inSequence(); n > c.most {
				t.Errorf("%d requests in sequence, want %d at most:\n%s", n, c.most, list)
			}
		})
	}
}

// A snapshot of a volume takes as few round trips as its order of steps allows:
// what the parent has where is known on this host.
func TestSnapshotOfAVolumeTakesFewRoundTrips(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	disk := randomBytes(1, 4*mib)
	h := newHost(t, s)
	vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
	m := h.mount(vol)
	m.waitState("hydrated", time.Minute)
	m.write(randomBytes(2, 4096), mib)
	asked := farStore(gate)
	h.ok("snapshot", "create", vol)
	gate.relieve()
	// Intent; tombstone; pack and section; leaf; root; pin; outcome; old pin.
	const most = 8
	if n, list := asked.inSequence(); n > most {
		t.Errorf("%d requests in sequence, want %d at most:\n%s", n, most, list)
	}
}
