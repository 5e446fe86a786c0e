package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// daemon serves one mount.
type daemon struct {
	app      *app
	store    *snapshot.Store
	id       string // of the snapshot or volume
	dir      string // its folder: log, control socket
	device   *volume.Device
	volume   *volume.Volume // nil for a snapshot
	trace    tracing
	replay   *hydrate.Hydrator // of a trace, before the hydrator runs; nil if there is none
	hydrator *hydrate.Hydrator
	monitor  *monitor
	log      *slog.Logger

	mountpoint string
	shownAs    string // to people: the mountpoint, or the loop device on it
	notify     *notifier
	letGo      func(*slog.Logger) error // undoes, as far as it can, what was done on top of the mount; nil: nothing was
	paused     atomic.Bool
	resumed    chan struct{} // holds a token after a resume
	unsettled  chan struct{} // holds a token while the volume needs settling
	making     sync.RWMutex  // held shared by those who make a snapshot, and for good when the mount has ended

	native    sync.Mutex        // held while the local file is given to loop devices, or taken back; guards what follows
	activity  map[string]string // of the loop devices on the mount, when they were last looked at
	giveAgain time.Time         // when to try to give the file away again
}

// spareProcs is by how much a daemon's GOMAXPROCS exceeds the processors there
// are. A request that comes in while each of them runs Go code, such as the
// decompression of what is hydrated, waits for one to be preempted, which takes up to 10
// ms; with spares the kernel runs it at once. Measured with two processors: reads
// and writes + 10 %, a search beside the replay of its trace 1.15 × the warm one
// instead of 1.28 ×.
const spareProcs = 2

// addSpareProcs gives the runtime the spares, unless the environment says how many
// processors it has.
func addSpareProcs() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + spareProcs)
	}
}

// serve runs the daemon until the mount is gone or ctx ends; ready is called
// when it can be used.
func (d *daemon) serve(ctx context.Context, o fs.Options, ready func() error) (err error) {
	o.Status, o.Log, o.ID = d.statusJSON, d.log, d.id
	if d.monitor, err = newMonitor(d); err != nil {
		return err
	}
	listener, err := listenControl(d.dir)
	if err != nil {
		return err
	}
	server, err := fs.Mount(d.mountpoint, d.monitor.counted(), o)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	// Everything below ends with work, and is waited for before we return.
	work, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	var workers sync.WaitGroup
	control := &http.Server{Handler: d.handler(work, server), ReadHeaderTimeout: 5 * time.Second}
	workers.Go(func() {
		if err := control.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			d.log.Error("the control socket failed", "error", err)
		}
	})
	workers.Go(func() { d.hydrate(work) })
	workers.Go(func() { d.monitor.run(work) })
	if d.volume != nil {
		workers.Go(func() { d.settle(work) })
	}
	gone := make(chan struct{})
	workers.Go(func() {
		server.Wait()
		close(gone)
	})
	if err = ready(); err == nil {
		d.log.Info("mounted", "id", d.id, "mountpoint", d.mountpoint)
		workers.Go(func() { d.notify.keepTelling(work, d.alive, d.statusLine) })
		select {
		case <-gone:
		case <-ctx.Done():
			d.log.Info("unmounting", "why", context.Cause(ctx))
		}
		d.notify.stopping(d.id + " ends; what is in use is served until its last user is done")
		if d.letGo != nil {
			err = d.letGo(d.log)
		}
	}
	stop(errStopping) // ends a snapshot that is being made
	err = errors.Join(err, takeDown(server, gone, d.log))
	err = errors.Join(err, control.Close())
	workers.Wait()
	d.making.Lock() // until the last snapshot was told of
	d.log.Info("unmounted", "id", d.id)
	return err
}

// errStopping is the cause of work that the end of the mount cut short.
var errStopping = errors.New("the volume is being unmounted")

// takeDown takes a mount away. One that is in use goes out of sight at once,
// and is served until its last user closes it.
func takeDown(server *fs.Server, gone <-chan struct{}, log *slog.Logger) error {
	select {
	case <-gone:
		return nil
	default:
	}
	err := server.Unmount()
	if errors.Is(err, fs.ErrBusy) {
		log.Warn("the mount is in use; serving on until its last user is done")
		err = server.UnmountLazy()
	}
	if err != nil {
		return err
	}
	<-gone
	return nil
}

// settle finishes what interrupted snapshots left, those of former daemons and
// those that fail here, as soon as the store can be asked.
func (d *daemon) settle(ctx context.Context) {
	const pause = 5 * time.Second
	retry := (<-chan time.Time)(nil)
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.unsettled:
		case <-retry:
		}
		retry = nil
		err := d.volume.Settle(ctx)
		if err != nil && ctx.Err() == nil && !errors.Is(err, snapshot.ErrNotFound) {
			d.log.Warn("could not settle an interrupted snapshot yet", "error", err)
			retry = time.After(pause)
		}
	}
}

// hydrate fetches everything in the background, and again what was evicted after
// that. Of several daemons that share a base one does it, and the next takes over
// when that one ends.
func (d *daemon) hydrate(ctx context.Context) {
	const pause = 2 * time.Second
	if d.replay != nil && d.replay.Run(ctx) != nil {
		return // ctx has ended
	}
	for {
		lock, err := io.Closer(nil), error(vfs.ErrLocked)
		if !d.paused.Load() { // who pauses must not keep the others from hydrating
			lock, err = d.device.LockHydrator()
		}
		switch {
		case err == nil:
			err = d.hydrator.Run(ctx)
			err = errors.Join(err, lock.Close())
			if err != nil {
				if ctx.Err() == nil {
					d.log.Error("the hydrator failed", "error", err)
					d.noteInitialized(err)
				}
				return
			}
			d.noteInitialized(nil)
			d.moveLoops(ctx)
			d.awaitEviction(ctx, pause)
			continue
		case !errors.Is(err, vfs.ErrLocked):
			d.log.Error("the hydrator failed", "error", err)
			d.noteInitialized(err)
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-d.resumed:
		case <-time.After(pause):
			d.device.Recount()
		}
	}
}

// awaitEviction returns when the device, all of which was cached, may lack something
// again: blocks were evicted, whoever did, or it has another root. A look costs a few
// system calls, and there is one in each pause.
func (d *daemon) awaitEviction(ctx context.Context, pause time.Duration) {
	root, most := d.device.Cached()
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.resumed:
			return
		case <-time.After(pause):
		}
		d.moveLoops(ctx) // those attached, or no longer mounted, since
		now, bytes := d.device.Cached()
		if now != root || bytes < most {
			d.device.Recount()
			return
		}
		most = bytes
	}
}

// source is a device as the hydrator sees it.
type source struct{ *volume.Device }

func (s source) Warm(ctx context.Context, run manifest.Run) error {
	return hydrateError(s.Device.Warm(ctx, run.Blocks))
}

func (s source) Plan(ctx context.Context, leaf int64) ([]manifest.Run, int64, error) {
	runs, next, err := s.Device.Plan(ctx, leaf)
	if err == io.EOF { // itself: the end
		return runs, next, err
	}
	return runs, next, hydrateError(err)
}

func (s source) PlanBlocks(ctx context.Context, blocks []int64) ([]manifest.Run, error) {
	runs, err := s.Device.PlanBlocks(ctx, blocks)
	return runs, hydrateError(err)
}

// hydrateError says what of an error the hydrator waits out.
func hydrateError(err error) error {
	switch {
	case errors.Is(err, volume.ErrFull):
		return fmt.Errorf("%w: %w", hydrate.ErrFull, err)
	case isAny(err, blockstore.ErrUnavailable, blockstore.ErrDenied, blockstore.ErrNoStore):
		return fmt.Errorf("%w: %w", hydrate.ErrUnavailable, err)
	}
	return err
}

// handler answers requests on the control socket of the mount that server serves.
// work ends with it.
func (d *daemon) handler(work context.Context, server *fs.Server) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(d.statusJSON()) // the client is gone if this fails
	})
	mux.HandleFunc("GET /health", d.monitor.serveHealth)
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.monitor.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /map", func(w http.ResponseWriter, r *http.Request) { d.serveMap(work, w, r) })
	mux.HandleFunc("POST /pause", func(w http.ResponseWriter, _ *http.Request) { d.pause(true) })
	mux.HandleFunc("POST /resume", func(w http.ResponseWriter, _ *http.Request) { d.pause(false) })
	mux.HandleFunc("POST /attach", d.serveAttach)
	mux.HandleFunc("POST /resize", func(w http.ResponseWriter, r *http.Request) { d.serveResize(server, w, r) })
	mux.HandleFunc("POST /set", func(w http.ResponseWriter, r *http.Request) { d.serveSet(work, w, r) })
	mux.HandleFunc("POST /snapshot", func(w http.ResponseWriter, r *http.Request) { d.serveSnapshot(work, w, r) })
	return mux
}

func (d *daemon) pause(paused bool) {
	d.paused.Store(paused)
	if paused {
		if d.replay != nil {
			d.replay.Pause()
		}
		d.hydrator.Pause()
		return
	}
	if d.replay != nil {
		d.replay.Resume()
	}
	d.hydrator.Resume()
	select {
	case d.resumed <- struct{}{}:
	default:
	}
}

// snapshotRequest asks a daemon for a snapshot of its volume.
type snapshotRequest struct {
	Description string            `json:"description,omitempty"`
	Tags        map[string]string `json:"tags,omitempty"`
	Detach      bool              `json:"detach,omitempty"` // go on when the client goes
}

// snapshotEvent is one line of the answer. The last has Done or Error.
type snapshotEvent struct {
	Snapshot   string `json:"snapshot,omitempty"`
	DoneBytes  int64  `json:"doneBytes,omitempty"` // of the upload, and of how many
	TotalBytes int64  `json:"totalBytes,omitempty"`
	Sealed     bool   `json:"sealed,omitempty"` // the moment of the snapshot has passed
	Cut        bool   `json:"cut,omitempty"`    // it is pending, and has its id; daemons of before Sealed say only this
	Done       bool   `json:"done,omitempty"`
	report
}

// beginMaking reads what to make a snapshot for, and holds up the end of the mount
// until the caller gives d.making back; after an error it need not.
func (d *daemon) beginMaking(w http.ResponseWriter, r *http.Request, req any) error {
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20)).Decode(req); err != nil {
		return usageError{err}
	}
	if d.volume == nil {
		return refusal{fmt.Errorf("%s is a snapshot, not a volume", d.id)}
	}
	if !d.making.TryRLock() {
		return errStopping
	}
	return nil
}

// serveSnapshot makes a snapshot and streams how far it is. Unless detached, a
// client that goes away aborts it.
func (d *daemon) serveSnapshot(work context.Context, w http.ResponseWriter, r *http.Request) {
	var req snapshotRequest
	if err := d.beginMaking(w, r, &req); err != nil {
		writeError(w, err)
		return
	}
	defer d.making.RUnlock()
	ctx, cancel := context.WithCancelCause(work)
	defer cancel(nil)
	if !req.Detach {
		defer context.AfterFunc(r.Context(), func() { cancel(errInterrupted) })()
	}
	events := make(chan snapshotEvent, 16)
	var making sync.WaitGroup
	making.Go(func() {
		defer close(events)
		d.makeSnapshot(ctx, req, events)
	})
	defer making.Wait()
	w.Header().Set("Content-Type", "application/x-ndjson")
	encoder, flusher := json.NewEncoder(w), http.NewResponseController(w)
	for e := range events {
		if err := encoder.Encode(e); err == nil {
			_ = flusher.Flush() // the next line fails too if the client is gone
		}
	}
}

// makeSnapshot makes a snapshot and reports on it. It never waits for a slow
// client but with the events that tell what has happened, of which there are three.
func (d *daemon) makeSnapshot(ctx context.Context, req snapshotRequest, events chan<- snapshotEvent) {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	watch, stop := context.WithCancel(ctx)
	var watching sync.WaitGroup
	var id manifest.SnapshotID
	var made *snapshot.Attempt
	start := time.Now()
	ended := d.monitor.snapshotBegins()
	outcome, err := d.volume.Snapshot(ctx, volume.SnapshotOptions{
		Description: req.Description, Tags: req.Tags,
		Sealed: func() { events <- snapshotEvent{Sealed: true} },
		Cut: func(attempt *snapshot.Attempt) {
			id, made = attempt.ID(), attempt
			events <- snapshotEvent{Snapshot: attempt.ID().String(), Cut: true}
			watching.Go(func() {
				for {
					select {
					case <-watch.Done():
						return
					case <-tick.C:
					}
					select {
					case events <- uploaded(attempt):
					default:
					}
				}
			})
		},
	})
	stop()
	watching.Wait()
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && errors.Is(err, context.Canceled) {
			err = fmt.Errorf("%w: %w", cause, err)
		}
	}
	ended(err)
	d.app.snapshotEnded(d.store, id, manifest.VolumeID(d.id), start, err)
	if err != nil {
		d.log.Error("snapshot failed", "error", err)
		select {
		case d.unsettled <- struct{}{}:
		default:
		}
		events <- snapshotEvent{report: failure(err)}
		return
	}
	last := uploaded(made)
	last.Snapshot, last.Done = outcome.Snapshot.String(), true
	events <- last
}

// uploaded tells how far an attempt is.
func uploaded(attempt *snapshot.Attempt) (e snapshotEvent) {
	e.DoneBytes, e.TotalBytes = attempt.Progress()
	return e
}
