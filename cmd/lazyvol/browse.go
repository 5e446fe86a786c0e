package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/crypt"
	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// defaultOpenImages is how many images of a browse are open at once at most. Each takes
// about ten files, and some memory.
const defaultOpenImages = 32

// browseFlags are the flags of a browse.
type browseFlags struct {
	foreground bool
	openImages int
	reading    mountFlags // of these, those of registerReading
}

func (f *browseFlags) check() error {
	if f.openImages < 1 {
		return usageError{errors.New("--open-images must be at least 1")}
	}
	return f.reading.check()
}

func (f *browseFlags) args() []string {
	return append(f.reading.readingArgs(), fmt.Sprintf("--open-images=%d", f.openImages))
}

func (a *app) browseCommand() *cobra.Command {
	var f browseFlags
	c := &cobra.Command{
		Use: "browse DIR", Short: "Show all snapshots of the store as read-only images in a directory", Args: args(cobra.ExactArgs(1)),
		Long: `Shows every completed snapshot of the store as a read-only image below DIR:

    by-id/SNAP.img                     the images
    by-time/TIME_SNAP.img              links to them, which sort by when they were made (UTC)
    by-tag/KEY/VALUE/TIME_SNAP.img
    by-volume/VOL/TIME_SNAP.img
    status.json

Listing reads only the store's records. An image is opened when it is read first,
and then only what is read of it is fetched, and kept in the state directory like
that of mounts. New snapshots appear, and deleted ones vanish, when a folder is
listed, within some seconds; one that is being read stays readable to its end.

In the names of tags, bytes as in URLs (%2F) stand for what a file name cannot
have; '%empty' is an empty value, and what is too long ends with '%~' and a hash.

Returns when the tree is there; a daemon serves it until 'lazyvol unmount',
SIGTERM or umount. A mountpoint that a killed daemon left dead is recovered.`,
		Example: `  lazyvol browse /mnt/snapshots
  lazyvol browse --cache-size 2GiB ~/snapshots
  lazyvol unmount /mnt/snapshots`,
		RunE: func(c *cobra.Command, args []string) error {
			if err := f.check(); err != nil {
				return err
			}
			dir, err := filepath.Abs(args[0])
			if err != nil {
				return err
			}
			if f.foreground {
				a.flushOwn()
				return a.browseHere(c.Context(), dir, &f)
			}
			command := append(append(a.globalArgs(), "browse", "--foreground"), f.args()...)
			_, err = a.spawn(c.Context(), append(command, "--", dir))
			return err
		},
	}
	f.reading.registerReading(c.Flags())
	c.Flags().IntVar(&f.openImages, "open-images", defaultOpenImages, "have at most `N` images open at a time: the one that was used least recently is closed, and if all are in use no other can be opened (EMFILE)")
	c.Flags().BoolVar(&f.foreground, "foreground", false, "stay, and log to stderr, for supervisors")
	return c
}

// browseHere shows the tree and serves it in this process.
func (a *app) browseHere(ctx context.Context, dir string, f *browseFlags) error {
	log, ready, err := a.becomeDaemon(dir)
	if err != nil {
		return err
	}
	return ready.failed(a.browse(ctx, dir, f, log, ready))
}

func (a *app) browse(ctx context.Context, dir string, f *browseFlags, log *slog.Logger, ready *readiness) (err error) {
	store, err := a.openRemote(ctx, "", min(f.reading.readDeadline, commandPatience))
	if err != nil {
		return err
	}
	a.sweepSessions(ctx, store.Store)
	s := &session{Store: store.String(), Mountpoint: dir, PID: os.Getpid(), store: store.Store}
	if err := s.record(volume.SessionsDir(a.state)); err != nil {
		return fmt.Errorf("begin a session: %w", err)
	}
	defer func() { err = errors.Join(err, s.close()) }()
	host, err := a.mountHost(store, &f.reading, log)
	if err != nil {
		return err
	}
	b := &browser{app: a, host: host, session: s, log: log}
	b.shelf = newShelf(ctx)
	b.shelf.open, b.shelf.most, b.shelf.patience, b.shelf.log = b.open, f.openImages, f.reading.readDeadline, log
	defer b.shelf.closeAll()
	list := func(ctx context.Context) ([]snapshot.Description, error) { return store.List(ctx, false) }
	if b.tree, err = newBrowseTree(ctx, list, b.shelf, log); err != nil {
		return err
	}
	defer b.tree.close()
	b.shelf.gone = b.tree.expire
	o := fs.Options{AllowOther: f.reading.allowOther, UID: f.reading.uid, GID: f.reading.gid, ReadDeadline: f.reading.readDeadline}
	return b.serve(ctx, o, func() error {
		if ready.background() {
			if err := a.logFile.open(s.dir); err != nil {
				return err
			}
		}
		return ready.ready(dir)
	})
}

// browser serves one tree of snapshots.
type browser struct {
	app     *app
	host    *volume.Host
	session *session
	tree    *browseTree
	shelf   *shelf
	log     *slog.Logger
}

// serve runs the daemon until the mount is gone, as [daemon.serve] does.
func (b *browser) serve(ctx context.Context, o fs.Options, ready func() error) error {
	o.Status, o.Log, o.ID = b.statusJSON, b.log, browseID
	monitor, err := newBrowseMonitor(b)
	if err != nil {
		return err
	}
	listener, err := listenControl(b.session.dir)
	if err != nil {
		return err
	}
	dir := b.session.Mountpoint
	server, err := fs.MountTree(dir, b.tree, o)
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	var workers sync.WaitGroup
	control := &http.Server{Handler: b.handler(monitor), ReadHeaderTimeout: 5 * time.Second}
	workers.Go(func() {
		if err := control.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			b.log.Error("the control socket failed", "error", err)
		}
	})
	gone := make(chan struct{})
	workers.Go(func() {
		server.Wait()
		close(gone)
	})
	if err = ready(); err == nil {
		b.log.Info("browsing", "store", b.session.Store, "mountpoint", dir)
		select {
		case <-gone:
		case <-ctx.Done():
			b.log.Info("unmounting", "why", context.Cause(ctx))
		}
	}
	err = errors.Join(err, takeDown(server, gone, b.log))
	err = errors.Join(err, control.Close())
	workers.Wait()
	b.log.Info("unmounted")
	return err
}

// handler answers requests on the control socket.
func (b *browser) handler(m *browseMonitor) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(b.statusJSON()) // the client is gone if this fails
	})
	mux.HandleFunc("GET /health", m.serveHealth)
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		writeError(w, refusal{fmt.Errorf("%s shows snapshots ('lazyvol browse'); only what is read of them is fetched", b.session.Mountpoint)})
	})
	return mux
}

// open opens a snapshot, pinned under a session of its own, as one of n. The more are
// open, the less is read ahead in it: of many sequential readers each would else take
// as much memory as one may.
func (b *browser) open(ctx context.Context, id manifest.SnapshotID, n int) (openedImage, error) {
	s, img, err := b.app.beginSession(ctx, b.session.store, id, "")
	if err != nil {
		return nil, openingError(err)
	}
	host := *b.host
	host.ReadAhead /= int64(n)
	device, err := host.OpenSnapshot(ctx, img)
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandPatience)
		defer cancel()
		return nil, errors.Join(err, s.end(ctx, img.Pinned))
	}
	device.LoadFirstLeaf()
	return &openSnapshot{device, s, img.Pinned}, nil
}

// openingError says what an error means to who opens an image.
func openingError(err error) error {
	switch {
	case isAny(err, snapshot.ErrNotFound, snapshot.ErrAborted, snapshot.ErrPending):
		return fmt.Errorf("%w: %w", fs.ErrGone, err)
	case isAny(err, crypt.ErrWrongKey, crypt.ErrKeyNotFound, crypt.ErrKeyDisabled, crypt.ErrKeyDenied, crypt.ErrKeyURI, snapshot.ErrShredded, blockstore.ErrDenied):
		return fmt.Errorf("%w: %w", fs.ErrDenied, err)
	case isAny(err, unix.EMFILE, unix.ENFILE): // by the limits of this process or the host
		return fmt.Errorf("%w: %w", fs.ErrTooMany, err)
	}
	return err
}

// openSnapshot is the [openedImage] of a snapshot.
type openSnapshot struct {
	*volume.Device
	session *session
	pinned  bool
}

func (o *openSnapshot) Unpin(ctx context.Context) error { return o.session.end(ctx, o.pinned) }

// What a browse shows as its id and, while the store answers, its state.
const (
	browseID    = "browse"
	browseState = "browsing"
)

// shows returns the id of what a session's mount shows.
func (s *session) shows() string {
	if s.Snapshot.IsZero() {
		return browseID
	}
	return s.Snapshot.String()
}

// browseStatus is what the status of a browse has besides. Its sizes, hydrated bytes
// and errors are of the images that are open; what was fetched and waited for, of all
// since it began, added up.
type browseStatus struct {
	Snapshots int             `json:"snapshots"` // that are shown
	Listed    time.Time       `json:"listed"`    // when they were listed
	Images    []browsedStatus `json:"images"`    // that are open
}

// browsedStatus is that of an image that is open.
type browsedStatus struct {
	ID            string `json:"id"`
	Handles       int    `json:"handles"`
	Size          int64  `json:"size"`
	HydratedBytes int64  `json:"hydratedBytes"`
	TotalBytes    int64  `json:"totalBytes"`
	DemandFetches int64  `json:"demandFetches"`
	FetchedBytes  int64  `json:"fetchedBytes"`
}

// statusJSON returns the content of status.json.
func (b *browser) statusJSON() []byte {
	data, err := json.MarshalIndent(b.status(), "", "  ")
	if err != nil {
		return fmt.Appendf(nil, `{"errors":[%q]}`, err)
	}
	return append(data, '\n')
}

// mostProblems is how many problems of a store a browse names: a status has a bound.
const mostProblems = 16

// problemsOf takes an error apart that may join many.
func problemsOf(err error) []string {
	if err == nil {
		return nil
	}
	problems := strings.Split(err.Error(), "\n")
	if more := len(problems) - mostProblems; more > 0 {
		problems = append(problems[:mostProblems], fmt.Sprintf("and %d more", more))
	}
	return problems
}

func (b *browser) status() statusJSON {
	open, total := b.shelf.status()
	s := describeDevice(browseID, total)
	s.State, s.Mountpoint, s.PID = browseState, b.session.Mountpoint, os.Getpid()
	s.Browse = &browseStatus{Images: []browsedStatus{}}
	var problem error
	s.Browse.Snapshots, s.Browse.Listed, problem = b.tree.status()
	if b.tree.waiting() {
		s.State = hydrate.Waiting.String()
	}
	s.Errors = append(s.Errors, problemsOf(problem)...)
	for _, i := range open {
		d := describeDevice(i.id.String(), i.stats)
		s.Size += d.Size
		s.HydratedBytes += d.HydratedBytes
		s.TotalBytes += d.TotalBytes
		s.Errors = append(s.Errors, d.Errors...)
		s.Browse.Images = append(s.Browse.Images, browsedStatus{
			ID: d.ID, Handles: i.users, Size: d.Size, HydratedBytes: d.HydratedBytes, TotalBytes: d.TotalBytes,
			DemandFetches: d.DemandFetches, FetchedBytes: d.FetchedBytes,
		})
	}
	return s
}
