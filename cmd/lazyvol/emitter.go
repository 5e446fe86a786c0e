package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
)

const (
	// maxPendingEvents bounds those that wait for the store, and those that wait
	// for the command: more than a command of people emits at once.
	maxPendingEvents = 1024

	// For so long at most an event goes on trying to reach the store, and the
	// process waits for it before it exits.
	eventPatience     = 30 * time.Second
	eventExitPatience = 5 * time.Second

	// How often and for how long the command of --on-event is run for one event;
	// the pause before it is tried again doubles. The process waits so long for
	// all of them before it exits.
	hookTries        = 4
	hookTimeout      = 10 * time.Second
	hookPause        = 250 * time.Millisecond
	hookExitPatience = 15 * time.Second
)

// onEventEnv names the command that is handed events. The command does not
// inherit it: what it does to a store is no news to itself.
const onEventEnv = "LAZYVOL_ON_EVENT"

// inEventEnv tells the command that it is one: a configuration file's --on-event is not
// for it either.
const inEventEnv = "LAZYVOL_IN_EVENT"

// An emitter carries what happened to the store and to the command of --on-event,
// in the background and each by itself: no job waits for either, nor fails by it.
// The zero emitter is ready to use.
type emitter struct {
	mu       sync.Mutex // guards the fields below
	outlets  []*outlet
	finished bool
}

// An emission is an event on its way.
type emission struct {
	store *snapshot.Store
	event snapshot.Event
}

// event tells that a job on a store ended. It returns at once. What cannot be
// told is logged.
func (a *app) event(store *snapshot.Store, e snapshot.Event) {
	e.Detail.Host = hostname()
	a.events.mu.Lock()
	defer a.events.mu.Unlock()
	if a.events.finished {
		return // of a job that nobody waited for
	}
	if a.events.outlets == nil {
		log := a.log()
		a.events.outlets = []*outlet{newOutlet("the store", eventExitPatience, log, func(ctx context.Context, e emission) error {
			return storeEvent(ctx, e, log)
		})}
		if a.onEvent != "" {
			h := hook{command: a.onEvent, timeout: hookTimeout, pause: hookPause, log: log}
			a.events.outlets = append(a.events.outlets, newOutlet("the command of --on-event", hookExitPatience, log, h.deliver))
		}
	}
	for _, o := range a.events.outlets {
		o.offer(emission{store, e})
	}
}

// snapshotEnded is event for a snapshot: of a volume, or an image (""). The id is
// zero if none was drawn.
func (a *app) snapshotEnded(store *snapshot.Store, id manifest.SnapshotID, of manifest.VolumeID, start time.Time, err error) {
	if err == nil || !id.IsZero() || failedJob(err) {
		a.event(store, store.SnapshotCreated(id, of, start, err))
	}
}

// failedJob reports whether an error is the end of a job, and so an event: not if
// it refuses to begin.
func failedJob(err error) bool {
	code := exitCode(err)
	return code == exitFailed || code == exitInterrupted
}

// finish gives events that are on their way a bounded time to arrive. None is
// emitted after.
func (e *emitter) finish() {
	e.mu.Lock()
	e.finished = true
	outlets := e.outlets
	e.mu.Unlock()
	var closing sync.WaitGroup
	for _, o := range outlets {
		closing.Go(o.close)
	}
	closing.Wait()
}

// An outlet delivers events to one place, one after the other.
type outlet struct {
	to       string
	patience time.Duration // of close
	log      *slog.Logger
	deliver  func(context.Context, emission) error
	queue    chan emission
	stop     context.CancelFunc
	done     chan struct{}
}

func newOutlet(to string, patience time.Duration, log *slog.Logger, deliver func(context.Context, emission) error) *outlet {
	ctx, stop := context.WithCancel(context.Background())
	o := &outlet{to, patience, log, deliver, make(chan emission, maxPendingEvents), stop, make(chan struct{})}
	go o.run(ctx)
	return o
}

func (o *outlet) offer(e emission) {
	select {
	case o.queue <- e:
	default:
		o.dropped(e, errors.New("too many wait already"))
	}
}

func (o *outlet) run(ctx context.Context) {
	defer close(o.done)
	for e := range o.queue {
		if ctx.Err() != nil {
			o.dropped(e, errExiting)
			continue
		}
		if err := o.deliver(ctx, e); err != nil {
			o.dropped(e, err)
		}
	}
}

// errExiting: the process ends before an event could be delivered.
var errExiting = errors.New("the process ends")

func (o *outlet) dropped(e emission, why error) {
	o.log.Warn("an event did not reach "+o.to, "event", e.event.Detail.Event, "of", strings.Join(e.event.Resources, " "), "error", why)
}

// close ends the outlet when all is delivered, or patience has run out.
func (o *outlet) close() {
	close(o.queue)
	impatient := time.AfterFunc(o.patience, o.stop)
	<-o.done
	impatient.Stop()
	o.stop()
}

// storeEvent puts an event into its store. A store that may only be read has no
// events of its readers.
func storeEvent(ctx context.Context, e emission, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, eventPatience)
	defer cancel()
	err := e.store.AppendEvent(ctx, e.event)
	if errors.Is(err, blockstore.ErrDenied) {
		log.Debug("these credentials may not write events", "error", err)
		return nil
	}
	return err
}

// A hook is a command that is handed events.
type hook struct {
	command string // of the shell
	timeout time.Duration
	pause   time.Duration
	log     *slog.Logger
}

// deliver runs the command until it succeeds, a few times at most.
func (h hook) deliver(ctx context.Context, e emission) error {
	data, err := json.Marshal(e.event)
	if err != nil {
		return err
	}
	pause := h.pause
	for try := 1; ; try++ {
		if err = h.run(ctx, append(data, '\n')); err == nil || ctx.Err() != nil {
			return err
		}
		if try == hookTries {
			return fmt.Errorf("tried %d times: %w", try, err)
		}
		h.log.Debug("the command of --on-event failed, and is tried again", "error", err)
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
		}
		pause *= 2
	}
}

// run runs the command once, with an event for its stdin. It is killed with what
// it has started when it takes too long.
func (h hook) run(ctx context.Context, event []byte) error {
	ctx, cancel := context.WithTimeout(ctx, h.timeout)
	defer cancel()
	var output tail
	c := exec.CommandContext(ctx, "sh", "-c", h.command)
	c.Stdin, c.Stdout, c.Stderr = bytes.NewReader(event), &output, &output
	c.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, onEventEnv+"=") }), inEventEnv+"=1")
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
	c.WaitDelay = time.Second // for what it left in the background with its output open
	err := c.Run()
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("it was ended after %v: %w", h.timeout, err)
	}
	return fmt.Errorf("%w: %s", err, bytes.TrimSpace(output.bytes))
}

// A tail keeps the end of what is written to it.
type tail struct{ bytes []byte }

// maxTail bounds what is kept.
const maxTail = 1 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.bytes = append(t.bytes, p[max(0, len(p)-maxTail):]...)
	t.bytes = t.bytes[max(0, len(t.bytes)-maxTail):]
	return len(p), nil
}
