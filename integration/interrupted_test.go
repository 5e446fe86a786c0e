package integration

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/lazyvol/lazyvol/blockstore/blockstoretest"
)

// stages are the requests by which a snapshot comes to be, in their order.
var stages = []string{"intents", "packs", "leaves", "root", "pins", "outcomes"}

// putsStage matches the uploads of one stage.
func putsStage(stage string) match {
	if stage == "root" {
		return func(r *http.Request) bool {
			return r.Method == http.MethodPut && strings.HasSuffix(r.URL.Path, "/root")
		}
	}
	return puts(stage)
}

// The network may go at any moment of a volume's snapshot, for longer than
// anybody waits: the snapshot is then there whole, or not at all and never will
// be, and the volume has every change.
func TestNetworkGoneInTheMiddleOfAVolumesSnapshot(t *testing.T) {
	t.Parallel()
	server := blockstoretest.StartVersitygw(t)
	for when, at := range map[string]side{"before": requests, "after": replies} {
		for _, stage := range stages {
			committed := at == replies && stage == "outcomes"
			t.Run(when+" "+stage+" arrive", func(t *testing.T) {
				t.Parallel()
				near, gate := gateBefore(t, server)
				far, network := near.behindNetwork(t)
				h := newHost(t, far)
				disk := diskBytes(1, 6*mib)
				first := h.ok("snapshot", "create", h.image(disk))
				vol := h.ok("volume", "create", "--snapshot", first)
				m := h.mount(vol, "--read-deadline", "1s")
				m.equals(disk) // so that all of it is here
				fill(newRand(2), disk[2*mib:4*mib+100])
				m.write(disk[2*mib:4*mib+100], 2*mib)
				cut := string(disk)

				gate.close(at, putsStage(stage))
				create := h.begin("snapshot", "create", vol)
				gate.waitHolding(t)
				if stage != "intents" { // after it, writes are those of the next snapshot
					copy(disk[3*mib:], "written after the cut")
					m.write(disk[3*mib:3*mib+100], 3*mib)
				}
				network.Refuse(t)
				if at == requests {
					gate.waitLeft(t) // else it may yet arrive
				}
				gate.open()
				create.wait().failed(t, 1, vol)
				m.equals(disk)
				copy(disk, "written while the network is gone")
				m.write(disk[:4096], 0)

				network.Heal(t)
				h.waitSettled()
				listed := h.list()
				if want := map[bool]int{false: 1, true: 2}[committed]; len(listed) != want {
					t.Fatalf("list shows %+v, want %d snapshots", listed, want)
				}
				if committed {
					sameBytes(t, "the snapshot", h.exported(listed[1].SnapshotId), []byte(cut))
				}
				m.equals(disk)
				next := h.ok("snapshot", "create", vol)
				sameBytes(t, "the next snapshot", newHost(t, near).exported(next), disk)
				h.takeAllAway(m, vol)
			})
		}
	}
}

// The network may go at any moment of an image's snapshot, too. If it comes back
// within the command's patience nobody notices; if not, the command fails, what
// it began is shown as pending at most, and deleting that leaves nothing.
func TestNetworkGoneInTheMiddleOfAnImagesSnapshot(t *testing.T) {
	t.Parallel()
	server := blockstoretest.StartVersitygw(t)
	disk := diskBytes(1, 3*mib)
	type attempt struct {
		name    string
		short   bool // comes back in time
		begun   bool // an intent is there
		done    bool // the outcome is there
		near    *store
		h       *host
		network *blockstoretest.Network
		create  *running
		end     result
	}
	var attempts []*attempt
	for when, at := range map[string]side{"before": requests, "after": replies} {
		for n, stage := range append([]string{"lineages"}, stages...) {
			if stage == "pins" {
				continue // an image has none
			}
			for length, short := range map[string]bool{"short": true, "long": false} {
				near, gate := gateBefore(t, server)
				far, network := near.behindNetwork(t)
				a := &attempt{
					name: length + ", " + when + " " + stage + " arrive", short: short, near: near, network: network, h: newHost(t, far),
					begun: n > 1 || n == 1 && at == replies, done: stage == "outcomes" && at == replies,
				}
				image := a.h.image(disk)
				gate.close(at, putsStage(stage))
				a.create = a.h.begin("snapshot", "create", image)
				gate.waitHolding(t)
				network.Refuse(t)
				if at == requests {
					gate.waitLeft(t) // else it may yet arrive
				}
				gate.open()
				attempts = append(attempts, a)
			}
		}
	}
	var all sync.WaitGroup
	for _, a := range attempts {
		all.Go(func() { a.end = a.create.wait() })
		if a.short {
			a.network.Heal(t)
		}
	}
	all.Wait()
	for _, a := range attempts {
		a.network.Heal(t)
		h := newHost(t, a.near)
		listed := h.list()
		if a.short {
			if a.end.code != 0 {
				t.Errorf("%s: %s", a.name, a.end)
			} else {
				sameBytes(t, a.name, h.exported(strings.TrimSpace(a.end.stdout)), disk)
			}
			continue
		}
		switch {
		case a.end.code != 1 || a.end.stdout != "" || !strings.Contains(a.end.stderr, "unavailable"):
			t.Errorf("%s: %s\nwant exit 1", a.name, a.end)
		case a.done && (len(listed) != 1 || listed[0].State != "completed"):
			t.Errorf("%s: list shows %+v, want what is committed", a.name, listed)
		case !a.done && a.begun && (len(listed) != 1 || listed[0].State != "pending"):
			t.Errorf("%s: list shows %+v, want what is pending", a.name, listed)
		case !a.begun && len(listed) != 0:
			t.Errorf("%s: list shows %+v", a.name, listed)
		}
		if a.done {
			sameBytes(t, a.name, h.exported(listed[0].SnapshotId), disk)
		}
		for _, info := range listed {
			h.ok("snapshot", "delete", info.SnapshotId)
		}
		h.leftNothing()
	}
}

// The network may go for good at any moment of any other command: it fails in
// bounded time, does no harm, and can be done again.
func TestNetworkGoneInTheMiddleOfACommand(t *testing.T) {
	t.Parallel()
	server := blockstoretest.StartVersitygw(t)
	disk := diskBytes(1, 3*mib)
	changed := diskBytes(2, 3*mib)
	deletes := method(http.MethodPost)
	type attempt struct {
		name        string
		near        *store
		h           *host
		network     *blockstoretest.Network
		first, next string
		args        []string
		command     *running
		end         result
	}
	var attempts []*attempt
	for _, c := range []struct {
		args []string // SNAP stands for the parent of two snapshots
		held match
	}{
		{[]string{"volume", "create", "--snapshot", "SNAP"}, puts("pins")},
		{[]string{"volume", "create", "--snapshot", "SNAP"}, gets("outcomes")},
		{[]string{"mount", "SNAP", "DIR"}, puts("pins")},
		{[]string{"snapshot", "export", "SNAP", "out.img"}, gets("packs")},
		{[]string{"snapshot", "delete", "SNAP"}, puts("tombstones")},
		{[]string{"snapshot", "delete", "SNAP"}, listings},
		{[]string{"snapshot", "delete", "SNAP"}, puts("packs")}, // rewritten
		{[]string{"snapshot", "delete", "SNAP"}, deletes},
		{[]string{"gc"}, listings},
	} {
		for when, at := range map[string]side{"before": requests, "after": replies} {
			near, gate := gateBefore(t, server)
			far, network := near.behindNetwork(t)
			a := &attempt{near: near, network: network, h: newHost(t, far)}
			image := a.h.image(disk)
			a.first = a.h.ok("snapshot", "create", image)
			a.next = a.h.ok("snapshot", "create", "--parent", a.first, writeImage(t, image, slices.Concat(disk[:mib], changed[mib:])))
			for _, arg := range c.args {
				a.args = append(a.args, strings.NewReplacer("SNAP", a.first, "DIR", t.TempDir()).Replace(arg))
			}
			gate.close(at, c.held)
			a.command = a.h.begin(a.args...)
			gate.waitHolding(t)
			a.name = when + " it is done: " + gate.heldRequest()
			network.Refuse(t)
			if at == requests {
				gate.waitLeft(t)
			}
			gate.open()
			attempts = append(attempts, a)
		}
	}
	var all sync.WaitGroup
	for _, a := range attempts {
		all.Go(func() { a.end = a.command.wait() })
	}
	all.Wait()
	for _, a := range attempts {
		a.network.Heal(t)
		deleting := slices.Contains(a.args, "delete")
		if a.end.code != 1 || !strings.Contains(a.end.stderr, "unavailable") || a.end.stdout != "" && !deleting {
			t.Errorf("%s: %s\nwant exit 1, and that the store is unavailable", a.name, a.end)
		}
		h := newHost(t, a.near)
		sameBytes(t, a.name, h.exported(a.next), slices.Concat(disk[:mib], changed[mib:]))
		if !deleting {
			sameBytes(t, a.name, h.exported(a.first), disk)
		}
		again := a.h.run(a.args...)
		if again.code != 0 && !(deleting && again.code == 3) {
			t.Errorf("%s: again: %s", a.name, again)
		}
		if a.args[0] == "mount" && again.code == 0 {
			m := a.h.mounted(a.args[2])
			m.equals(disk)
			m.unmount()
		}
		for vol := range strings.FieldsSeq(a.h.ok("volume", "list")) {
			if strings.HasPrefix(vol, "vol-") {
				a.h.ok("volume", "delete", vol)
			}
		}
		a.h.ok("gc") // and what its own commands left
		h.ok("snapshot", "verify", "--all")
		for _, snap := range []string{a.first, a.next} {
			if r := h.run("snapshot", "delete", snap); r.code != 0 && r.code != 3 {
				t.Errorf("%s: %s", a.name, r)
			}
		}
		h.ok("gc")
		a.near.isEmpty(t)
	}
}

// Uploads may arrive twice, the second time when all that they were for is over
// and gone: they bring nothing back that the next gc leaves, and no snapshot.
func TestUploadsThatArriveAgainBringNothingBack(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	var late lateArrivals
	gate.afflict(method(http.MethodPut), late.befall)
	h := newHost(t, s)
	disk := diskBytes(1, 4*mib)
	first := h.ok("snapshot", "create", h.image(disk))
	vol := h.ok("volume", "create", "--snapshot", first)
	m := h.mount(vol)
	m.write(disk[:mib], 2*mib)
	second := h.ok("snapshot", "create", vol)
	m.unmount()
	h.ok("snapshot", "tag", second, "a=b")
	over := h.mount(second, "--no-hydrate")
	over.equals(h.exported(second))
	over.unmount()
	h.ok("volume", "delete", vol)
	h.ok("snapshot", "delete", first, second)
	h.ok("gc")
	s.isEmpty(t)

	gate.relieve()
	if n := late.arrive(); n < 12 {
		t.Errorf("only %d uploads came again", n)
	}
	h.stayDeleted(first, second)
	// Nor does a pin that comes back keep anything for ever: gc shows it, and
	// what it was for is gone, so it may be forgotten.
	holders := make(map[string]bool)
	for line := range strings.Lines(h.ok("gc")) {
		holders[strings.Fields(line)[1]] = true
	}
	for holder := range holders {
		h.ok("volume", "forget", holder)
	}
	h.ok("gc")
	s.isEmpty(t)
}

// stayDeleted checks that deleted snapshots are gone for everyone.
func (h *host) stayDeleted(snaps ...string) {
	h.t.Helper()
	if found := h.list(); len(found) != 0 {
		h.t.Errorf("list shows %+v", found)
	}
	for _, snap := range snaps {
		h.fails(3, []string{snap}, "snapshot", "show", snap)
	}
}

// lateArrivals are requests that are done at once, and once more later.
type lateArrivals struct {
	mu  sync.Mutex // guards all
	all []*exchange
}

func (l *lateArrivals) befall(e *exchange) {
	e.answer(e.pass())
	again := *e
	again.r = e.r.Clone(context.Background())
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, &again)
}

// arrive lets all arrive again, and returns how many there were.
func (l *lateArrivals) arrive() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range l.all {
		e.pass()
	}
	return len(l.all)
}

// What reclaim reads of the store may be old by the time it acts: others make,
// pin, inherit from and delete snapshots meanwhile, and nothing of theirs is lost.
func TestReclaimActsRightlyOnOldListings(t *testing.T) {
	t.Parallel()
	server := blockstoretest.StartVersitygw(t)
	for _, kind := range []string{"tombstones", "pins", "intents", "outcomes", "data"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			s, gate := gateBefore(t, server)
			a, b := newHost(t, s), newHost(t, s)
			disk := diskBytes(1, 4*mib)
			first := a.ok("snapshot", "create", a.image(disk))
			fill(newRand(2), disk[mib:2*mib])
			second := a.ok("snapshot", "create", "--parent", first, a.image(disk))

			var once atomic.Bool
			gate.close(replies, func(r *http.Request) bool {
				return listings(r) && strings.Contains(r.URL.Query().Get("prefix"), "/"+kind+"/") && !once.Swap(true)
			})
			reclaim := a.begin("snapshot", "delete", first)
			gate.waitHolding(t)
			vol := b.ok("volume", "create", "--snapshot", second)
			m := b.mount(vol, "--no-hydrate")
			fill(newRand(3), disk[2*mib:3*mib])
			m.write(disk[2*mib:3*mib], 2*mib)
			third := b.ok("snapshot", "create", vol)
			b.ok("snapshot", "delete", second)
			gate.open()
			if r := reclaim.wait(); r.code != 0 {
				t.Errorf("%s", r)
			}
			m.equals(disk)
			sameBytes(t, "the third", a.exported(third), disk)
			a.ok("snapshot", "verify", "--all")
			m.unmount()
			b.ok("volume", "delete", vol)
			a.ok("snapshot", "delete", third)
			a.ok("gc")
			s.isEmpty(t)
		})
	}
}
