package integration

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// A weather is a network, and what it lets through.
type weather struct {
	toxics  []blockstoretest.Toxic
	refuses bool // every connection
	reads   bool // blocks come, in time
	slowly  bool // blocks come, but not in time
	writes  bool // snapshots may be made
	again   bool // to a mount it is like another one: only commands go out in it
}

// toxic returns what is wrong with one direction. Pairs of name and value are
// its attributes.
func toxic(kind, stream string, attributes ...any) blockstoretest.Toxic {
	x := blockstoretest.Toxic{Type: kind, Stream: stream, Attributes: make(map[string]int64)}
	for i := 0; i+1 < len(attributes); i += 2 {
		x.Attributes[attributes[i].(string)] = int64(attributes[i+1].(int))
	}
	return x
}

// weathers are what a network does to connections, those that are open and
// those that come.
var weathers = map[string]weather{
	"connections are refused": {refuses: true},
	"connections are reset":   {toxics: []blockstoretest.Toxic{toxic("reset_peer", "downstream")}},
	// Accepted, and never answered.
	"nothing arrives":    {toxics: []blockstoretest.Toxic{toxic("timeout", "upstream")}, again: true},
	"nothing comes back": {toxics: []blockstoretest.Toxic{toxic("timeout", "downstream")}},
	// Half open: either end takes the other for alive.
	"nothing goes either way": {toxics: []blockstoretest.Toxic{toxic("timeout", "upstream"), toxic("timeout", "downstream")}},
	// A block of 512 KiB never comes whole.
	"every reply ends early": {toxics: []blockstoretest.Toxic{toxic("limit_data", "downstream", "bytes", 128*kib)}, writes: true},
	"bodies trickle":         {toxics: []blockstoretest.Toxic{toxic("bandwidth", "downstream", "rate", 16)}, slowly: true, writes: true},
	"it is slow and far away": {toxics: []blockstoretest.Toxic{
		toxic("latency", "downstream", "latency", 20, "jitter", 20), toxic("slicer", "downstream", "average_size", 16*kib, "size_variation", 8*kib, "delay", 10),
		toxic("bandwidth", "upstream", "rate", 8*kib), toxic("bandwidth", "downstream", "rate", 8*kib),
	}, reads: true, writes: true},
}

// begin makes the weather.
func (w weather) begin(t testing.TB, n *blockstoretest.Network) {
	t.Helper()
	if w.refuses {
		n.Refuse(t)
	}
	n.Suffer(t, w.toxics...)
}

// Whatever the network does, a mounted volume reads what is cached, takes writes
// of whole pages and makes them durable; reads of what is not here bring the
// right bytes or fail in time; a snapshot fails and keeps the changes. When the
// network is well again everything goes on by itself.
func TestMountedVolumeInAnyWeather(t *testing.T) {
	t.Parallel()
	const deadline = 2 * time.Second
	for name, w := range weathers {
		if w.again {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			near, _ := newGatedStore(t)
			far, network := near.behindNetwork(t)
			h := newHost(t, far)
			disk := randomBytes(1, 16*mib)
			original := string(disk)
			first := h.ok("snapshot", "create", h.image(disk))
			vol := h.ok("volume", "create", "--snapshot", first)
			m := h.mount(vol, "--no-hydrate", "--read-ahead=0", "--read-deadline", deadline.String())
			m.read(0, 4*mib)
			change := func(off, n int) {
				t.Helper()
				fill(newRand(uint64(off)), disk[off:off+n])
				start := time.Now()
				m.write(disk[off:off+n], int64(off))
				// Nothing that waits for the store is back so soon.
				if took := time.Since(start); took >= deadline {
					t.Errorf("a write of whole pages took %s", took)
				}
			}
			change(8*mib, mib)
			hydrating := newHost(t, far).mount(first, "--no-hydrate", "--read-ahead=0", "--read-deadline", deadline.String())

			w.begin(t, network)
			hydrating.h.ok("hydrate", "--resume", hydrating.dir)
			snapshot := h.begin("snapshot", "create", vol)
			change(10*mib, 64*kib)
			sameBytes(t, "what is cached", m.read(0, 4*mib), disk[:4*mib])
			start := time.Now()
			failed := m.readsRightOrFails(disk, 24)
			took := time.Since(start)
			if w.reads && failed > 0 {
				t.Errorf("%d reads failed", failed)
			}
			if !w.reads && failed == 0 {
				t.Error("all reads succeeded: is there no trouble?")
			}
			// Through the page cache the kernel asks twice, and pages one by one.
			if took > 20*deadline {
				t.Errorf("the reads took %s", took)
			}
			if !w.reads {
				start := time.Now()
				_, err := m.open(os.O_RDONLY|oDirect).ReadAt(aligned(4096), 14*mib)
				if took := time.Since(start); !errors.Is(err, syscall.EIO) || took > 5*deadline {
					t.Errorf("a cold read: %v after %s, want EIO after %s", err, took, deadline)
				}
				if len(m.status().Errors) == 0 {
					t.Error("status.json tells nothing of it")
				}
			}
			if !w.reads && !w.slowly {
				hydrating.waitState("waiting-for-store", time.Minute)
			}
			change(11*mib, 64*kib)
			if err := m.open(os.O_RDWR).Sync(); err != nil {
				t.Errorf("sync: %v", err)
			}
			r := snapshot.wait()
			switch {
			case r.code == 0 && !w.writes, r.code != 0 && w.reads && w.writes:
				t.Errorf("%s", r)
			case r.code != 0:
				r.failed(t, 1, vol)
			}

			network.Heal(t)
			m.equals(disk)
			waitFor(t, "the errors are over", time.Minute, func() bool { return len(m.status().Errors) == 0 })
			h.waitSettled()
			sameBytes(t, "the next snapshot", newHost(t, near).exported(h.ok("snapshot", "create", vol)), disk)
			hydrating.waitState("hydrated", 2*time.Minute)
			hydrating.equals([]byte(original))
			if errs := hydrating.status().Errors; len(errs) != 0 {
				t.Errorf("after it is hydrated: %q", errs)
			}
			hydrating.unmount()
			for _, info := range h.list() {
				if info.State != "completed" {
					t.Errorf("list shows %+v", info)
				}
			}
			h.takeAllAway(m, vol)
		})
	}
}

// Commands end within their patience, say what is wrong, and leave nothing
// behind that anybody would have to look after.
func TestCommandsEndWhateverTheNetworkDoes(t *testing.T) {
	t.Parallel()
	// 30 seconds of patience, 15 for the last request, and what the machine
	// takes.
	const patience = 100 * time.Second
	near, _ := newGatedStore(t)
	disk := diskBytes(1, 4*mib)
	h := newHost(t, near)
	image := h.image(disk)
	snap := h.ok("snapshot", "create", image)
	before := near.objects(t, ".")

	type attempt struct {
		*running
		weather string
		*host
		begun time.Time
		took  time.Duration
		end   result
	}
	var attempts []*attempt
	for name, w := range weathers {
		if w.reads || w.writes {
			continue // records pass, so that commands get somewhere
		}
		far, network := near.behindNetwork(t)
		for _, args := range [][]string{
			{"snapshot", "create", image}, {"snapshot", "create", "--parent", snap, image}, {"snapshot", "list"},
			{"snapshot", "show", snap}, {"snapshot", "export", snap, "out.img"}, {"snapshot", "verify", snap},
			{"snapshot", "delete", snap}, {"snapshot", "tag", snap, "a=b"}, {"volume", "create", "--snapshot", snap},
			{"mount", snap, t.TempDir()}, {"gc"},
		} {
			if w.refuses || args[0] != "snapshot" || args[1] == "create" { // the others are much alike
				attempts = append(attempts, &attempt{weather: name, host: newHost(t, far), running: &running{}})
				attempts[len(attempts)-1].end.args = args
			}
		}
		w.begin(t, network)
	}
	var all sync.WaitGroup
	for _, a := range attempts {
		a.begun = time.Now()
		a.running = a.host.begin(a.end.args...)
		all.Go(func() {
			a.end = a.running.wait()
			a.took = time.Since(a.begun)
		})
	}
	all.Wait()
	for _, a := range attempts {
		if a.took > patience {
			t.Errorf("%s: after %s: %s", a.weather, a.took, a.end)
		}
		if a.end.code != 1 || a.end.stdout != "" || !strings.Contains(a.end.stderr, "lazyvol: ") || !strings.Contains(a.end.stderr, "unavailable") {
			t.Errorf("%s: %s\nwant exit 1, and that the store is unavailable", a.weather, a.end)
		}
		if left := glob(t, filepath.Join(a.host.dir, "*out.img*")); len(left) != 0 {
			t.Errorf("%s: %s\nleft %v", a.weather, a.end, left)
		}
		// What is made and cannot be undone without the store, its next
		// commands undo.
		a.host.store, a.host.env = near, near.env
		for vol := range strings.FieldsSeq(a.host.ok("volume", "list")) {
			if strings.HasPrefix(vol, "vol-") {
				a.host.ok("volume", "delete", vol)
			}
		}
		a.host.ok("gc")
	}
	sameBytes(t, "the export", h.exported(snap), disk)
	if listed := h.list(); len(listed) != 1 || listed[0].SnapshotId != snap || len(listed[0].Tags) != 0 {
		t.Errorf("list shows %+v", listed)
	}
	for key := range near.objects(t, ".") {
		// A lineage without snapshots, and an attempt that is over, are for ever; an
		// event of what failed is to stay for a while.
		if _, ok := before[key]; !ok && !strings.HasPrefix(key, "events/") && !strings.HasPrefix(key, "lineages/") && !strings.HasPrefix(key, "outcomes/") && !strings.HasPrefix(key, "intents/") {
			t.Errorf("left in the store: %s", key)
		}
	}
	image2 := writeImage(t, image, diskBytes(2, 4*mib))
	sameBytes(t, "the next snapshot", h.exported(h.ok("snapshot", "create", "--parent", snap, image2)), diskBytes(2, 4*mib))
}
