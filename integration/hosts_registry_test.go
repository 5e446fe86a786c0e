package integration

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"
)

// A registry is what the hosts of a test know together: what each snapshot
// holds, which ones somebody has begun to delete, and what was done.
type registry struct {
	start time.Time

	mu    sync.Mutex // guards the fields below
	live  map[string][]byte
	used  map[string]int  // by how many just now
	ended map[string]int  // how many have begun to delete it, and some were killed at it
	clash int             // how many deletions began while somebody used the snapshot
	lost  []string        // volumes whose host is gone, and which pin something
	cut   map[string]bool // snapshots named by commands that were killed
	log   []string
}

// newRegistry returns an empty registry, whose log is shown if the test fails.
func newRegistry(t testing.TB) *registry {
	g := &registry{start: time.Now(), live: make(map[string][]byte), used: make(map[string]int), ended: make(map[string]int), cut: make(map[string]bool)}
	t.Cleanup(func() {
		if t.Failed() {
			for _, line := range g.log {
				t.Log(line)
			}
		}
	})
	return g
}

// did logs what a host did, or is about to do.
func (g *registry) did(who, format string, args ...any) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.log = append(g.log, fmt.Sprintf("%8.3f %s: %s", time.Since(g.start).Seconds(), who, fmt.Sprintf(format, args...)))
}

// publish tells everybody what a new snapshot holds. Somebody may have found
// and deleted it already.
func (g *registry) publish(snap string, content []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.ended[snap] == 0 {
		g.live[snap] = content
	}
}

// pick draws a snapshot that nobody has begun to delete.
func (g *registry) pick(r *rand.Rand) (snap string, content []byte, ok bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.live) == 0 {
		return "", nil, false
	}
	snaps := slices.Sorted(maps.Keys(g.live))
	snap = snaps[r.IntN(len(snaps))]
	return snap, g.live[snap], true
}

// use notes that somebody restores, reads or builds on a snapshot, until the
// returned function is called.
func (g *registry) use(snap string) (done func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.used[snap]++
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.used[snap]--
	}
}

// pickVictim draws a snapshot to be deleted: most of the time one that somebody
// is just using.
func (g *registry) pickVictim(r *rand.Rand) (snap string, ok bool) {
	g.mu.Lock()
	victims := slices.Sorted(maps.Keys(g.live))
	if used := slices.DeleteFunc(slices.Clone(victims), func(snap string) bool { return g.used[snap] == 0 }); len(used) > 0 && r.IntN(4) > 0 {
		victims = used
	}
	g.mu.Unlock()
	if len(victims) == 0 {
		return "", false
	}
	return victims[r.IntN(len(victims))], true
}

// known returns how many snapshots nobody has begun to delete.
func (g *registry) known() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.live)
}

// end is called before a snapshot is deleted.
func (g *registry) end(snap string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.ended[snap]++
	if g.used[snap] > 0 {
		g.clash++
	}
	delete(g.live, snap)
}

// enders returns how many have begun to delete a snapshot.
func (g *registry) enders(snap string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.ended[snap]
}

var snapshotIDs = regexp.MustCompile(`snap-[0-9a-f]{17}`)

// excuses reports whether a command may have been refused because somebody
// deleted one of snaps, or a snapshot that it names in its refusal.
func (g *registry) excuses(r result, snaps ...string) bool {
	const notFound = 3
	if r.code != notFound {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.ContainsFunc(append(snaps, snapshotIDs.FindAllString(r.stderr, -1)...), func(snap string) bool { return g.ended[snap] > 0 })
}

// lose notes volumes whose host is gone.
func (g *registry) lose(volumes ...string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.lost = append(g.lost, volumes...)
}

// cutShort notes the snapshots that a command named which was killed. Its last
// request may outlive it, and pin one of them after all.
func (g *registry) cutShort(args []string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, arg := range args {
		if snapshotIDs.MatchString(arg) {
			g.cut[arg] = true
		}
	}
}
