package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/volume"
)

// statusJSON is a device's status, as status.json and 'status --json' have it.
// Sizes are in bytes.
type statusJSON struct {
	ID            string   `json:"id"`
	Root          string   `json:"root,omitempty"`
	Size          int64    `json:"size"`
	BlockSize     int      `json:"blockSize"`
	State         string   `json:"state"`
	HydratedBytes int64    `json:"hydratedBytes"`
	TotalBytes    int64    `json:"totalBytes"`
	DirtyBytes    int64    `json:"dirtyBytes"`
	DemandFetches int64    `json:"demandFetches"`
	FetchedBytes  int64    `json:"fetchedBytes"`
	Rate          int64    `json:"rate"` // stored bytes a second, in the background
	ETASeconds    *int64   `json:"etaSeconds"`
	Errors        []string `json:"errors"`
	Mountpoint    string   `json:"mountpoint,omitempty"`
	Filesystems   []string `json:"filesystems,omitempty"` // where attach mounted what is in it
	PID           int      `json:"pid,omitempty"`

	Browse *browseStatus `json:"browse,omitempty"` // of a browse only

	// How long reads waited for the store: while at least one did, how many, and how
	// long each.
	DemandWaitSeconds float64     `json:"demandWaitSeconds"`
	DemandWaits       int64       `json:"demandWaits"`
	DemandLatencyMs   percentiles `json:"demandLatencyMs"`
}

// percentiles are taken from buckets, so they are estimates.
type percentiles struct {
	P50 float64 `json:"p50"`
	P99 float64 `json:"p99"`
}

// statusJSON returns the content of status.json.
func (d *daemon) statusJSON() []byte {
	data, err := json.MarshalIndent(d.status(), "", "  ")
	if err != nil {
		return fmt.Appendf(nil, `{"errors":[%q]}`, err)
	}
	return append(data, '\n')
}

func (d *daemon) status() statusJSON {
	p := d.hydrator.Progress()
	replaying := false
	if d.replay != nil {
		if r := d.replay.Progress(); r.State != hydrate.Done {
			p, replaying = r, true
		}
	}
	s := describeDevice(d.id, d.device.Stats())
	s.Mountpoint, s.PID, s.Rate = d.mountpoint, os.Getpid(), p.Rate
	if p.LastError != nil {
		s.Errors = append(s.Errors, p.LastError.Error())
	}
	missing := s.TotalBytes - s.HydratedBytes
	switch {
	case missing <= 0:
		s.State = hydrate.Done.String()
	case d.paused.Load() && !replaying:
		s.State = hydrate.Paused.String()
	case p.State == hydrate.Done: // what is missing was evicted, or could not be kept
		s.State = hydrate.Hydrating.String()
	default:
		s.State = p.State.String()
	}
	if missing <= 0 {
		s.ETASeconds = new(int64)
	} else if eta, ok := p.ETA(missing / int64(max(s.BlockSize, 1))); ok && s.State == hydrate.Hydrating.String() {
		seconds := int64(eta.Seconds())
		s.ETASeconds = &seconds
	}
	return s
}

func describeDevice(id string, stats volume.Stats) statusJSON {
	s := statusJSON{
		ID: id, Root: stats.Root, Size: stats.Size, BlockSize: stats.BlockSize,
		HydratedBytes: stats.HydratedBytes, TotalBytes: stats.TotalBytes, DirtyBytes: stats.DirtyBytes,
		DemandFetches: stats.DemandFetches, FetchedBytes: stats.FetchedBytes, Errors: []string{},
		DemandWaitSeconds: stats.DemandWait.Seconds(), DemandWaits: stats.DemandWaits,
		DemandLatencyMs: percentiles{milliseconds(stats.DemandLatency.Quantile(0.5)), milliseconds(stats.DemandLatency.Quantile(0.99))},
	}
	if stats.Lost != nil {
		s.Errors = append(s.Errors, stats.Lost.Error())
	}
	for _, p := range stats.Errors {
		s.Errors = append(s.Errors, p.Time.Format(time.RFC3339)+" "+p.Message)
	}
	return s
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func (a *app) statusCommand() *cobra.Command {
	var asJSON, watch bool
	interval := defaultInterval
	c := &cobra.Command{
		Use: "status [VOL|DIR]", Short: "Show how far mounts and volumes are", Args: args(cobra.MaximumNArgs(1)),
		Long: `Shows how far a volume or mount is hydrated, and what was written since the last
snapshot and so exists on this host only; without argument, that of all.

With --watch it is one screen that is drawn anew each second, or each --interval: q
or Ctrl-C ends it, with exit code 0. Where there is no terminal, or one that can only
print (TERM=dumb), each sample is printed as lines of text; with --json as one line
of JSON. A daemon that does not answer is shown as such, and holds up nobody.
Colours are left out if NO_COLOR is set.`,
		Example: `  lazyvol status
  lazyvol status --watch vol-0123456789abcdef0
  lazyvol status --watch --interval 5s --json`,
		RunE: func(c *cobra.Command, args []string) error {
			if watch {
				if interval < leastInterval {
					return usageError{fmt.Errorf("--interval %v: it must be %v at least", interval, leastInterval)}
				}
				return a.watch(c.Context(), strings.Join(args, ""), interval, asJSON)
			}
			if a.givenHere(c, "interval") {
				return combinationError{errors.New("--interval goes with --watch")}
			}
			return a.printStatus(c.Context(), a.stdout, args, asJSON)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.Flags().BoolVarP(&watch, "watch", "w", false, "go on showing it, on one screen")
	c.Flags().DurationVar(&interval, "interval", interval, "how often --watch looks")
	return c
}

func (a *app) printStatus(ctx context.Context, w io.Writer, args []string, asJSON bool) error {
	if len(args) == 1 {
		s, err := a.statusOf(ctx, args[0])
		if err != nil {
			return err
		}
		s = a.withFilesystems(s)
		if asJSON {
			return printJSON(w, s)
		}
		return statusTable(w, []statusJSON{s})
	}
	all, failed, err := a.statusOfAll(ctx)
	if err != nil {
		return err
	}
	for _, err := range failed {
		a.warning("%v", err)
	}
	if asJSON {
		return printJSON(w, struct{ Volumes []statusJSON }{all})
	}
	if len(all)+len(failed) == 0 {
		a.note("no volume in %s, and nothing mounted", a.state)
	}
	return statusTable(w, all)
}

// place returns where people find it: the filesystems in it, else its mountpoint.
func (s *statusJSON) place() string {
	if len(s.Filesystems) > 0 {
		return strings.Join(s.Filesystems, ", ")
	}
	return s.Mountpoint
}

func statusTable(w io.Writer, all []statusJSON) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	if len(all) > 0 {
		fmt.Fprintln(t, "ID\tSTATE\tHYDRATED\tDIRTY\tRATE\tETA\tSIZE\tROOT\tMOUNTPOINT")
	}
	unsaved := false
	for _, s := range all {
		eta, rate, root := "-", "-", "-"
		if s.ETASeconds != nil && *s.ETASeconds > 0 {
			eta = (time.Duration(*s.ETASeconds) * time.Second).String()
		}
		if s.State == hydrate.Hydrating.String() {
			rate = size(s.Rate) + "/s"
		}
		if s.Root != "" {
			root = s.Root
		}
		unsaved = unsaved || s.DirtyBytes > 0
		fmt.Fprintf(t, "%s\t%s\t%s of %s\t%s\t%s\t%s\t%s\t%s\t%s\n", oneLine(s.ID), oneLine(s.State), size(s.HydratedBytes), size(s.TotalBytes),
			size(s.DirtyBytes), rate, eta, size(s.Size), oneLine(root), cmp.Or(oneLine(s.place()), "-"))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, s := range all {
		for _, e := range s.Errors {
			fmt.Fprintf(w, "%s: %s\n", oneLine(s.ID), oneLine(e))
		}
	}
	if unsaved {
		fmt.Fprintln(w, dirtyWarning)
	}
	return nil
}

// statusOf returns the status of a volume, or of what is mounted on a
// directory.
func (a *app) statusOf(ctx context.Context, target string) (statusJSON, error) {
	if !strings.HasPrefix(target, "vol-") {
		return statusOfMount(ctx, target)
	}
	id, err := manifest.ParseVolumeID(target)
	if err != nil {
		return statusJSON{}, usageError{err}
	}
	if _, err := volume.ReadRecord(vfs.OS(), a.state, id); err != nil {
		return statusJSON{}, err
	}
	dir := volume.Dir(a.state, id)
	s, err := askStatus(ctx, dir)
	if !errors.Is(err, errNoDaemon) {
		return s, err
	}
	if s, err = a.statusUnmounted(ctx, id); errors.Is(err, volume.ErrInUse) {
		if now, ask := askStatus(ctx, dir); ask == nil { // a daemon has come meanwhile
			return now, nil
		}
	}
	return s, err
}

// statusUnmounted looks into a volume that is not mounted.
func (a *app) statusUnmounted(ctx context.Context, id manifest.VolumeID) (statusJSON, error) {
	record, err := volume.ReadRecord(vfs.OS(), a.state, id)
	if err != nil {
		return statusJSON{}, err
	}
	store, err := a.openRemote(ctx, record.StoreURL, commandPatience)
	if err != nil {
		return statusJSON{}, err
	}
	host, err := a.host(store, commandPatience, a.log())
	if err != nil {
		return statusJSON{}, err
	}
	defer host.Leaves.Close()
	v, err := a.openFree(ctx, host, id)
	if err != nil {
		return statusJSON{}, err
	}
	s := describeDevice(string(id), v.Stats())
	s.State = hydrate.Paused.String()
	if s.HydratedBytes == s.TotalBytes {
		s.State = hydrate.Done.String()
	}
	return s, v.Close()
}

const (
	maxStatus      = 1 << 20 // bytes
	statusPatience = 10 * time.Second
)

// statusOfMount reads the status.json of a mountpoint.
func statusOfMount(ctx context.Context, dir string) (statusJSON, error) {
	s, err := answer(ctx, statusPatience, func() (statusJSON, error) { return readStatus(dir) })
	if errors.Is(err, errNoAnswer) {
		err = fmt.Errorf("read the status in %s: %w within %v: whoever serves that mount hangs", dir, err, statusPatience)
	}
	return s, err
}

func readStatus(dir string) (statusJSON, error) {
	var s statusJSON
	f, err := os.Open(filepath.Join(dir, fs.StatusName))
	if isAny(err, unix.ENOENT, unix.ENOTDIR) {
		return s, codedError{fmt.Sprintf("%s is neither a volume nor a mountpoint of lazyvol: %v", dir, err), exitNotFound}
	}
	if err == nil {
		defer f.Close() // nothing was written
		err = json.NewDecoder(io.LimitReader(f, maxStatus)).Decode(&s)
	}
	if err != nil {
		return s, fmt.Errorf("read the status in %s: %w", dir, err)
	}
	return s, nil
}

// askStatus asks the daemon of a volume or session for its status. errNoDaemon,
// errNoAnswer.
func askStatus(ctx context.Context, dir string) (statusJSON, error) {
	hangs := fmt.Errorf("ask the daemon of %s: %w within %v: it hangs", filepath.Base(dir), errNoAnswer, statusPatience)
	ctx, cancel := context.WithTimeoutCause(ctx, statusPatience, hangs)
	defer cancel()
	s, err := readControlStatus(ctx, dir)
	var answered remoteError
	if err != nil && ctx.Err() == nil && !errors.Is(err, errNoDaemon) && !errors.As(err, &answered) { // perhaps it ended meanwhile
		s, err = readControlStatus(ctx, dir)
	}
	if err != nil && context.Cause(ctx) == hangs {
		err = hangs
	}
	return s, err
}

func readControlStatus(ctx context.Context, dir string) (statusJSON, error) {
	var s statusJSON
	body, err := dialControl(dir).call(ctx, "GET", "/status", nil)
	if err != nil {
		return s, err
	}
	defer body.Close()
	if err := json.NewDecoder(io.LimitReader(body, maxStatus)).Decode(&s); err != nil {
		return s, fmt.Errorf("read the daemon's status: %w", err)
	}
	return s, nil
}

// statusOfAll returns the status of every volume, then of every mounted
// snapshot, and why those that are left out have none.
func (a *app) statusOfAll(ctx context.Context) (all []statusJSON, failed []error, err error) {
	const patience = 15 * time.Second // more than any of them has
	sampler := a.newSampler(a.subjects)
	ctx, cancel := context.WithCancel(ctx)
	defer sampler.close()
	defer cancel()
	s, err := sampler.sample(ctx, patience)
	if err != nil {
		return nil, nil, err
	}
	all = []statusJSON{}
	for _, r := range s.rows {
		all = append(all, r.statusJSON)
	}
	return all, s.failed, nil
}
