package integration

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// retryBurst is how many requests one process may try again at once, whatever
// number of them fail (blockstore.RetryPolicy).
const retryBurst = 64

// A store may fail each request once, in any of these ways, and nobody notices:
// no command fails, no byte is wrong, nothing is left behind, and nothing is
// asked more often than it must.
func TestEveryRequestMayFailOnce(t *testing.T) {
	t.Parallel()
	server := blockstoretest.StartVersitygw(t)
	s, gate := gateBefore(t, server)
	gate.askedFor()
	liveThroughAll(t, s)
	undisturbed := len(gate.askedFor()) // requests that it takes without trouble
	for name, c := range map[string]struct {
		which match
		trouble
	}{
		"it is throttled":                         {all, says(503, "SlowDown")},
		"it is throttled, and told until when":    {all, says(503, "SlowDown", "Retry-After", "1")},
		"it is one of too many":                   {all, says(429, "TooManyRequests")},
		"the server fails":                        {all, says(500, "InternalError")},
		"a proxy finds no server":                 {all, says(502, "")},
		"the server waited too long for its body": {method("PUT"), says(400, "RequestTimeout")},
		"another write is under way":              {conditional, says(409, "ConditionalRequestConflict")},
		"it never arrives":                        {all, unheard},
		"it is done and its reply is lost":        {redrawn(all), replyLost},
		"it is done twice":                        {all, sentTwice},
		"the reply breaks off":                    {method("GET"), bodyCut},
		"the reply is reset":                      {method("GET"), bodyReset},
		"the reply goes on behind its end":        {method("GET"), bodyLong},
		"the listing ends in its middle":          {listings, bodyShort},
		"none of what it names is removed":        {method("POST"), deletesNothing},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, gate := gateBefore(t, server)
			gate.afflict(first(1, c.which), c.trouble)
			gate.askedFor()
			liveThroughAll(t, s)
			if n := len(gate.askedFor()); n > 2*undisturbed+retryBurst {
				t.Errorf("%d requests, and %d without trouble", n, undisturbed)
			}
		})
	}
}

// liveThroughAll does everything that a disk goes through, on two hosts.
func liveThroughAll(t *testing.T, s *store) {
	t.Helper()
	a, b := newHost(t, s), newHost(t, s)
	a.ok("init")
	disk := diskBytes(1, 5*mib+512)
	image := a.image(disk)
	first := a.ok("snapshot", "create", image)
	fill(newRand(2), disk[mib:2*mib])
	second := a.ok("snapshot", "create", "--parent", first, writeImage(t, image, disk))

	vol := b.ok("volume", "create", "--snapshot", second)
	m := b.mount(vol, "--no-hydrate")
	sameBytes(t, "a cold read", m.read(3*mib, 100), disk[3*mib:3*mib+100])
	m.write(disk[:mib], 2*mib) // whole blocks
	copy(disk[2*mib:], disk[:mib])
	m.write([]byte("a part of a page"), 4*mib+700)
	copy(disk[4*mib+700:], "a part of a page")
	third := b.ok("snapshot", "create", vol)
	m.equals(disk)
	b.ok("hydrate", "--wait", vol)
	m.equals(disk)
	if errs := m.status().Errors; len(errs) != 0 {
		t.Errorf("status.json tells of %q", errs)
	}

	over := a.mount(third)
	over.waitState("hydrated", time.Minute)
	over.equals(disk)
	over.unmount()
	sameBytes(t, "the export", a.exported(third), disk)
	a.ok("snapshot", "tag", first, "tagged=yes")
	a.ok("snapshot", "diff", first, third)
	a.ok("snapshot", "delete", first)
	a.ok("snapshot", "verify", "--all")
	var listed []string
	for _, info := range a.list() {
		listed = append(listed, info.SnapshotId+" "+info.State)
	}
	slices.Sort(listed)
	if want := []string{second + " completed", third + " completed"}; !slices.Equal(listed, slices.Sorted(slices.Values(want))) {
		t.Errorf("list shows %q, want %q", listed, want)
	}

	m.unmount()
	b.ok("volume", "delete", vol)
	a.ok("snapshot", "delete", second, third)
	a.ok("gc")
	s.isEmpty(t)
}

// A store that says wrong things makes reads and commands fail, and no more: no
// wrong byte is shown or kept, no command does harm, and once it is right again
// everything goes on.
func TestWrongAnswersAreNeverBelieved(t *testing.T) {
	t.Parallel()
	server := blockstoretest.StartVersitygw(t)
	for name, c := range map[string]struct {
		which match
		trouble
	}{
		"a bit is flipped":                 {objects, bitFlipped},
		"half of it is missing":            {objects, bodyShort},
		"they are other bytes":             {ranged, rangeWrong},
		"it is the whole object":           {ranged, rangeIgnored},
		"the object is gone":               {gets("data"), says(404, "NoSuchKey")},
		"the bucket is gone":               {all, says(404, "NoSuchBucket")},
		"something without a name is gone": {all, says(404, "")},
		"the credentials have expired":     {all, says(403, "ExpiredToken")},
		"the method is unknown":            {all, says(501, "NotImplemented")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, gate := gateBefore(t, server)
			h := newHost(t, s)
			disk := diskBytes(1, 8*mib)
			image, out := h.image(disk), filepath.Join(h.dir, "out.img")
			first := h.ok("snapshot", "create", image)
			vol := h.ok("volume", "create", "--snapshot", first)
			m := h.mount(vol, "--no-hydrate", "--read-deadline", "3s")
			hydrating := newHost(t, s).mount(first, "--hydrate-rate", "1MiB", "--read-deadline", "3s")
			changed := disk[5*mib : 5*mib+600*kib]
			fill(newRand(2), changed)
			m.write(changed, 5*mib)

			gate.afflict(some(3, 2, c.which), c.trouble) // the answers are right half of the time
			m.readsRightOrFails(disk, 40)
			page := disk[2*mib : 2*mib+4*kib]
			fill(newRand(4), page)
			m.write(page, 2*mib)
			for _, args := range [][]string{
				{"snapshot", "create", vol}, {"snapshot", "create", image}, {"snapshot", "create", "--parent", first, image},
				{"volume", "create", "--snapshot", first}, {"gc"}, {"snapshot", "list"}, {"snapshot", "show", first},
				{"snapshot", "export", first, out}, {"snapshot", "verify", "--all"},
			} {
				switch r := h.run(args...); {
				case r.code == 0:
				case r.code != 1 && r.code != 3, !strings.Contains(r.stderr, "lazyvol: "):
					t.Errorf("%s\nwant exit 0, or 1 or 3 and a message", r)
				}
			}
			m.readsRightOrFails(disk, 40)
			if exported, err := os.ReadFile(out); err == nil {
				sameBytes(t, "the export", exported, diskBytes(1, 8*mib))
			}

			gate.relieve()
			m.equals(disk)
			if errs := m.status().Errors; len(errs) != 0 {
				t.Errorf("once all is read: %q", errs)
			}
			hydrating.waitState("hydrated", time.Minute)
			hydrating.equals(diskBytes(1, 8*mib))
			if errs := hydrating.status().Errors; len(errs) != 0 {
				t.Errorf("once it is hydrated: %q", errs)
			}
			h.waitSettled()
			sameBytes(t, "the next snapshot", newHost(t, s).exported(h.ok("snapshot", "create", vol)), disk)
			h.ok("gc")
			h.ok("snapshot", "verify", "--all")
			sameBytes(t, "the first snapshot", h.exported(first), diskBytes(1, 8*mib))
		})
	}
}

// readsRightOrFails reads at random, all at the same time, through and around the
// page cache: each read must fail, or bring what disk has.
func (m *mount) readsRightOrFails(disk []byte, reads int) (failed int) {
	m.h.t.Helper()
	type outcome struct {
		off int64
		p   []byte
		err error
	}
	outcomes := make(chan outcome, reads)
	f, direct := m.open(os.O_RDONLY), m.open(os.O_RDONLY|oDirect)
	r := newRand(uint64(len(disk)))
	for i := range reads {
		off := r.Int64N(int64(len(disk))-64*kib) &^ 4095
		go func() {
			p, from := aligned(64*kib), f
			if i%2 == 0 {
				from = direct
			}
			_, err := from.ReadAt(p, off)
			outcomes <- outcome{off, p, err}
		}()
	}
	for range reads {
		o := <-outcomes
		if o.err == nil {
			sameBytes(m.h.t, fmt.Sprintf("a read at %d", o.off), o.p, disk[o.off:o.off+int64(len(o.p))])
			continue
		}
		if !isEIO(o.err) {
			m.h.t.Errorf("a read at %d: %v, want EIO", o.off, o.err)
		}
		failed++
	}
	return failed
}

// A store that fails every request is asked again, by a daemon with a hundred
// readers too, no more often than its budget allows.
func TestRetriesHaveABudget(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		trouble
		readers     int
		burst, rate int // how many requests may follow the first ones: at once, and more a second
	}{
		// Without a budget each reader would ask seven times or so.
		"it throttles": {says(http.StatusServiceUnavailable, "SlowDown"), 96, retryBurst, 32},
		"it hangs up":  {unheard, 96, retryBurst, 32},
		// Without pauses it would ask as often as the budget lets it.
		"it throttles one reader": {says(http.StatusServiceUnavailable, "SlowDown"), 1, 0, 8},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, gate := newGatedStore(t)
			h := newHost(t, s)
			const deadline = 4 * time.Second
			disk := randomBytes(1, 2*c.readers*512*kib) // each has a block of its own, and none next to it
			snap := h.ok("snapshot", "create", h.image(disk))
			m := h.mount(snap, "--no-hydrate", "--read-deadline", deadline.String())
			f := m.open(os.O_RDONLY | oDirect)
			readDirect(t, f, 0, 4096) // for the leaf
			gate.afflict(all, c.trouble)
			gate.askedFor()
			start := time.Now()
			failed := make(chan error, c.readers)
			for i := range c.readers {
				go func() {
					_, err := f.ReadAt(aligned(4096), int64(2*i+1)*512*kib)
					failed <- err
				}()
			}
			for range c.readers {
				if err := <-failed; !isEIO(err) {
					t.Errorf("a read: %v, want EIO", err)
				}
			}
			took := time.Since(start)
			came := gate.askedFor()
			if n, most := len(came), c.readers+c.burst+c.rate*int(took.Seconds()+1); n < c.readers || n > most {
				t.Errorf("%d requests in %s, want %d to %d", n, took, c.readers, most)
			}
			if last := came[len(came)-1].Sub(start); last < took/4 { // pauses grow to seconds
				t.Errorf("nobody asked again after %s of %s", last, took)
			}
			gate.relieve()
			m.equals(disk)
			if errs := m.status().Errors; len(errs) != 0 {
				t.Errorf("afterwards: %q", errs)
			}
		})
	}
}
