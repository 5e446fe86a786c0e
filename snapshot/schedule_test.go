package snapshot_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"testing/synctest"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
)

// A schedule runs hosts on one store, one store call after the other, and has
// somebody decide which is next. It lives in a synctest bubble: once every
// goroutine there is blocked, each host has ended or has calls that wait to be
// made. So the same decisions make the same run.
type schedule struct {
	*ledger
	hosts   []*host
	network *host // whose calls are those that hosts have given up, still under way
	last    *host // whose call was made last
	stopped bool  // before its end

	mu      sync.Mutex // guards waiting, and down of the hosts
	waiting []*call

	log []string // of the decisions
}

// A host is an actor of a schedule, and the store as it sees it: one that waits
// for the schedule with each call.
type host struct {
	*schedule
	name string
	act  func(context.Context, *host) error

	lie func(blockstore.Store) blockstore.Store // what act takes for the store; nil: the host itself

	told  map[manifest.SnapshotID]string // the verdicts it was given
	keeps map[manifest.SnapshotID]string // what it counts on, and the holder of its pin on it

	down   bool   // it crashed, and its code is still to unwind
	faults int    // that befell it
	heard  uint64 // digest of all that the store ever told it
	ended  bool   // act has returned
	err    error  // of act
}

// view returns the store as the host is to see it.
func (h *host) view() blockstore.Store {
	if h.lie == nil {
		return h
	}
	return h.lie(h)
}

// A call waits to be made.
type call struct {
	host   *host
	name   string
	writes bool
	local  bool // commutes with whatever another host may call
	make   func() (told uint64, _ error)
	reply  chan error
}

// A fault is what befalls a call.
type fault string

const (
	none      fault = ""
	fails     fault = "fails"
	lost      fault = "is made and loses its reply"
	late      fault = "fails and is made later"
	twice     fault = "is made and is made again later"
	crashes   fault = "crashes its host"
	lateCrash fault = "crashes its host and is made later"
)

// errCrashed is what the code of a host that crashed hears instead of the
// store, so that it unwinds without any effect.
var errCrashed = errors.New("the host crashed")

// faults returns what can befall a call, beginning with nothing. To lose a read
// is the same as to fail it, and a host that dies before a read might as well
// die before its next write.
func (c *call) faults() []fault {
	switch {
	case c.host == c.host.network:
		return []fault{none}
	case c.writes:
		return []fault{none, fails, lost, late, twice, crashes, lateCrash}
	}
	return []fault{none, fails}
}

// An option is one way to go on.
type option struct {
	call  *call
	fault fault
	cost  cost
}

func (o option) String() string {
	return strings.TrimSpace(fmt.Sprintf("%s: %s %s", o.call.host.name, o.call.name, o.fault))
}

// A cost is how far a schedule is from one in which each host, once it is its
// turn, runs to its end without a fault.
type cost struct{ switches, faults int }

func (c cost) plus(d cost) cost     { return cost{c.switches + d.switches, c.faults + d.faults} }
func (c cost) within(max cost) bool { return c.switches <= max.switches && c.faults <= max.faults }

// start starts hosts in a schedule of their own.
func start(ctx context.Context, l *ledger, hosts []*host) *schedule {
	s := &schedule{ledger: l, hosts: hosts}
	s.network = &host{schedule: s, name: "network"}
	for _, h := range hosts {
		h.schedule = s
		go func() {
			h.err = h.act(ctx, h)
			h.ended = true
		}()
	}
	return s
}

// run makes calls until every host has ended, or decide returns a negative
// number: else the option that is next. The first one costs nothing, which is
// to go on with the host that was last.
func (s *schedule) run(decide func(point int, options []option) int) {
	for point := 0; ; point++ {
		s.settle()
		options := s.options()
		if len(options) == 0 {
			return
		}
		i := decide(point, options)
		if i < 0 {
			s.stop()
			return
		}
		s.log = append(s.log, fmt.Sprintf("%d.%d %v", point, i, options[i]))
		s.last = options[i].call.host
		s.answer(options[i].call, options[i].fault)
	}
}

// settle waits until every host waits or has ended, and puts their calls in
// order. Those that commute with all others need no decision.
func (s *schedule) settle() {
	for {
		synctest.Wait()
		slices.SortFunc(s.waiting, func(a, b *call) int {
			return cmp.Or(cmp.Compare(s.turn(a.host), s.turn(b.host)), strings.Compare(a.name, b.name))
		})
		i := slices.IndexFunc(s.waiting, func(c *call) bool { return c.local })
		if i < 0 {
			return
		}
		s.answer(s.waiting[i], none)
	}
}

// turn orders the hosts: the one that was last, the others, the network.
func (s *schedule) turn(h *host) int {
	switch h {
	case s.network:
		return len(s.hosts) + 1
	case s.last:
		return 0
	}
	return slices.Index(s.hosts, h) + 1
}

// options lists the ways to go on.
func (s *schedule) options() []option {
	var options []option
	for i, c := range s.waiting {
		// Which host is next is free to choose when the last one has ended.
		free := i == 0 || c.host != s.waiting[i-1].host && c.host != s.network && s.waiting[0].host != s.last
		for _, f := range c.faults() {
			o := option{call: c, fault: f}
			if !free {
				o.cost.switches = 1
			}
			if f != none {
				o.cost.faults = 1
			}
			options = append(options, o)
		}
	}
	return options
}

// answer makes a call, or what its fault makes of it.
func (s *schedule) answer(c *call, f fault) {
	s.withdraw(c)
	var told uint64
	err := fmt.Errorf("%s (failed by a test): %w", c.name, blockstore.ErrUnavailable)
	switch f {
	case none, twice:
		told, err = c.make()
	case lost:
		_, _ = c.make() // nobody hears
	}
	if f == late || f == twice || f == lateCrash {
		s.waiting = append(s.waiting, &call{host: s.network, name: c.name, writes: true, make: c.make})
	}
	if c.host == s.network {
		return
	}
	if f != none {
		c.host.faults++
	}
	if f == crashes || f == lateCrash {
		err = errCrashed
		s.crash(c.host)
	}
	c.host.hear(c.name, told, err)
	c.reply <- err
}

// hear adds to what the host knows.
func (h *host) hear(call string, told uint64, err error) {
	type fact struct {
		heard uint64
		call  string
		told  uint64
		err   string
	}
	f := fact{heard: h.heard, call: call, told: told}
	if err != nil {
		f.err = err.Error()
	}
	h.heard = maphash.Comparable(h.seed, f)
}

// crash ends a host: its calls are not made, nor any that its code goes on to
// make until it restarts.
func (s *schedule) crash(h *host) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h.down = true
	s.waiting = slices.DeleteFunc(s.waiting, func(c *call) bool {
		if c.host == h {
			c.reply <- errCrashed
		}
		return c.host == h
	})
}

// restart reports whether the host has crashed, and brings it up again.
func (h *host) restart() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.down || h.stopped {
		return false
	}
	h.down = false
	return true
}

// stop ends a schedule before its end.
func (s *schedule) stop() {
	s.stopped = true
	for _, h := range s.hosts {
		s.crash(h)
	}
	synctest.Wait()
}

// withdraw takes back a call, and reports whether it was still waiting.
func (s *schedule) withdraw(c *call) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.Index(s.waiting, c)
	if i < 0 {
		return false
	}
	s.waiting = slices.Delete(s.waiting, i, i+1)
	return true
}

// state is a digest of all that decides how the schedule can go on: the store,
// what each host knows, and what is under way.
func (s *schedule) state() uint64 {
	type knows struct {
		heard  uint64
		faults int
		down   bool
	}
	d := maphash.Comparable(s.seed, [2]any{s.digest, slices.Index(s.hosts, s.last)})
	for _, h := range s.hosts {
		d = maphash.Comparable(s.seed, [2]any{d, knows{h.heard, h.faults, h.down}})
	}
	for _, c := range s.waiting {
		if c.host == s.network {
			d = maphash.Comparable(s.seed, [2]any{d, c.name})
		}
	}
	return d
}
