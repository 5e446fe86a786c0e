package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/lazyvol/lazyvol/cache"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

func (a *app) snapshotMapCommand() *cobra.Command {
	var output string
	c := &cobra.Command{
		Use: "map SNAP|VOL", Short: "Draw which snapshot owns each part of a device, and what is cached", Args: args(cobra.ExactArgs(1)),
		Long: `Draws a picture of a snapshot or a volume: where it has holes, which snapshot uploaded
each part, what of that this host has cached, and, of a volume, what was written or
discarded since the last snapshot and so exists on this host only.

It is an SVG with a legend, for a browser: in FILE, or on stdout unless that is a terminal.
On a terminal, or with --text, it is a small map in letters: each snapshot has one, a
capital where it is cached. --json prints every range instead, in bytes: owner (none: a
hole), cached, and dirty ("data" or "zero").

The whole index is read: 56 KiB for each 512 MiB of the device that has data. What this
host has of it is not asked of the store.`,
		Example: `  lazyvol snapshot map -o map.svg vol-0123456789abcdef0
  lazyvol snapshot map --text snap-1a2b3c4d567890abc`,
		RunE: func(c *cobra.Command, args []string) error {
			asJSON, asText := a.chosen(c, "json", "output", "text"), a.chosen(c, "text", "output", "json")
			if asJSON && asText || output != "" && (asJSON || asText) {
				return combinationError{errors.New("-o, --text and --json exclude each other")}
			}
			d, err := a.newMapDrawing(c.Context(), args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return d.printJSON(c.Context(), a.stdout)
			}
			if asText || output == "" && a.showsTerminal() {
				g, err := d.grid(c.Context(), textCells)
				if err != nil {
					return err
				}
				return drawTextMap(a.stdout, g, a.showsColours())
			}
			g, err := d.grid(c.Context(), mapCells)
			if err != nil {
				return err
			}
			if output != "" && output != "-" {
				return os.WriteFile(output, drawSVG(g), 0o644)
			}
			_, err = a.stdout.Write(drawSVG(g))
			return err
		},
	}
	c.Flags().StringVarP(&output, "output", "o", "", "write the picture into `FILE` (-: stdout)")
	c.Flags().Bool("text", false, "draw it in letters (default on a terminal)")
	c.Flags().Bool("json", false, "print every range as JSON")
	return c
}

// mapHead is what a map is of. Sizes are in bytes.
type mapHead struct {
	ID        string `json:"id"`
	Root      string `json:"root,omitempty"` // the snapshot that it reads through; "": a volume without
	Size      int64  `json:"size"`
	BlockSize int    `json:"blockSize"`
}

// mapRange is a range of a device in one state, in bytes.
type mapRange struct {
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	Owner  string `json:"owner,omitempty"` // the snapshot that uploaded what the root has here; "": a hole
	Cached bool   `json:"cached,omitempty"`
	Dirty  string `json:"dirty,omitempty"` // dirtyData or dirtyZero since the last snapshot
}

const (
	dirtyData = "data"
	dirtyZero = "zero"
)

func newMapRange(e volume.Extent) mapRange {
	r := mapRange{Offset: e.Offset, Length: e.Length, Cached: e.Cached}
	if !e.Owner.IsZero() {
		r.Owner = e.Owner.String()
	}
	switch e.Dirty {
	case cache.Data:
		r.Dirty = dirtyData
	case cache.Zero:
		r.Dirty = dirtyZero
	}
	return r
}

// A mapSink takes a map: its head, and then its ranges, ascending, each byte in one.
type mapSink struct {
	begin func(mapHead) error
	add   func(mapRange) error
}

// A mapDrawing draws maps of one snapshot or volume.
type mapDrawing struct {
	*app
	target string
	store  remote
	run    func(context.Context, mapSink) error
}

// newMapDrawing finds out what to draw a map of.
func (a *app) newMapDrawing(ctx context.Context, target string) (*mapDrawing, error) {
	d := &mapDrawing{app: a, target: target}
	switch {
	case strings.HasPrefix(target, "snap-"):
		id, err := parseSnapshot(target)
		if err != nil {
			return nil, err
		}
		if d.store, err = a.openRemote(ctx, "", commandPatience); err != nil {
			return nil, err
		}
		d.run = func(ctx context.Context, to mapSink) error { return d.ofSnapshot(ctx, id, to) }
	case strings.HasPrefix(target, "vol-"):
		id, err := manifest.ParseVolumeID(target)
		if err != nil {
			return nil, usageError{err}
		}
		record, err := volume.ReadRecord(vfs.OS(), a.state, id)
		if err != nil {
			return nil, err
		}
		if d.store, err = a.openRemote(ctx, record.StoreURL, commandPatience); err != nil {
			return nil, err
		}
		d.run = func(ctx context.Context, to mapSink) error {
			err := d.ofMounted(ctx, id, to)
			if errors.Is(err, errNoDaemon) {
				err = d.ofUnmounted(ctx, id, to)
			}
			return err
		}
	default:
		return nil, usageError{fmt.Errorf("%q is neither a snapshot (snap-…) nor a volume (vol-…)", target)}
	}
	return d, nil
}

func (d *mapDrawing) ofSnapshot(ctx context.Context, id manifest.SnapshotID, to mapSink) (err error) {
	host, err := d.host(d.store, commandPatience, d.log())
	if err != nil {
		return err
	}
	defer host.Leaves.Close()
	s, img, err := d.beginSession(ctx, d.store.Store, id, "")
	if err != nil {
		return err
	}
	defer d.endSession(ctx, s, img)
	g := img.Geometry()
	if err := to.begin(mapHead{ID: id.String(), Root: id.String(), Size: g.Size, BlockSize: g.BlockSize}); err != nil {
		return err
	}
	return host.MapSnapshot(ctx, img, func(e volume.Extent) error { return to.add(newMapRange(e)) })
}

// ofUnmounted looks into a volume that no daemon serves.
func (d *mapDrawing) ofUnmounted(ctx context.Context, id manifest.VolumeID, to mapSink) error {
	host, err := d.host(d.store, commandPatience, d.log())
	if err != nil {
		return err
	}
	defer host.Leaves.Close()
	v, err := d.openFree(ctx, host, id)
	if err != nil {
		return err
	}
	return errors.Join(mapDevice(ctx, string(id), v.Device, to), v.Close())
}

// mapDevice draws the map of an open device.
func mapDevice(ctx context.Context, id string, device *volume.Device, to mapSink) error {
	err := device.Map(ctx, func(root manifest.SnapshotID, g manifest.Geometry) error {
		h := mapHead{ID: id, Size: g.Size, BlockSize: g.BlockSize}
		if !root.IsZero() {
			h.Root = root.String()
		}
		return to.begin(h)
	}, func(e volume.Extent) error { return to.add(newMapRange(e)) })
	if errors.Is(err, volume.ErrRootMoved) {
		err = refusal{fmt.Errorf("%w; try again", err)}
	}
	return err
}

// mapEvent is one line of a daemon's answer. The first has Head, and the last Done or
// Error.
type mapEvent struct {
	Head   *mapHead   `json:"head,omitempty"`
	Ranges []mapRange `json:"ranges,omitempty"`
	Done   bool       `json:"done,omitempty"`
	report
}

// mapEventRanges is how many ranges a line has at most: fewer than 128 KiB.
const mapEventRanges = 1024

// serveMap streams a map of the daemon's device until that is done, the client goes or
// work ends.
func (d *daemon) serveMap(work context.Context, w http.ResponseWriter, r *http.Request) {
	if !d.making.TryRLock() { // the device stays open as long as we hold it
		writeError(w, errStopping)
		return
	}
	defer d.making.RUnlock()
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	defer context.AfterFunc(work, func() { cancel(context.Cause(work)) })()
	w.Header().Set("Content-Type", "application/x-ndjson")
	out := bufio.NewWriter(w)
	encoder := json.NewEncoder(out)
	ranges := make([]mapRange, 0, mapEventRanges)
	flush := func() error {
		if len(ranges) == 0 {
			return nil
		}
		err := encoder.Encode(mapEvent{Ranges: ranges})
		ranges = ranges[:0]
		return err
	}
	err := mapDevice(ctx, d.id, d.device, mapSink{
		begin: func(h mapHead) error { return encoder.Encode(mapEvent{Head: &h}) },
		add: func(r mapRange) error {
			if ranges = append(ranges, r); len(ranges) < mapEventRanges {
				return nil
			}
			return flush()
		},
	})
	err = errors.Join(err, flush())
	last := mapEvent{Done: err == nil}
	if err != nil {
		last.report = failure(err)
	}
	if err := errors.Join(encoder.Encode(last), out.Flush()); err != nil {
		d.log.Debug("a map's client is gone", "error", err)
	}
}

// ofMounted asks the daemon that serves a volume; errNoDaemon if none does.
func (d *mapDrawing) ofMounted(ctx context.Context, id manifest.VolumeID, to mapSink) error {
	dir := volume.Dir(d.state, id)
	if _, err := askStatus(ctx, dir); err != nil { // else one that hangs would be waited for
		return err
	}
	body, err := dialControl(dir).call(ctx, "GET", "/map", nil)
	if err != nil {
		return err
	}
	defer body.Close()
	err = readMap(body, to)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// readMap reads a map that a daemon streams.
func readMap(body io.Reader, to mapSink) error {
	var head *mapHead
	at := int64(0)
	for decoder := json.NewDecoder(body); ; {
		var e mapEvent
		if err := decoder.Decode(&e); err == io.EOF {
			return errors.New("the daemon ended before the map was done")
		} else if err != nil {
			return fmt.Errorf("read the daemon's map: %w", err)
		}
		if e.Error != "" {
			return remoteError{e.report}
		}
		if head == nil && e.Head != nil {
			head = e.Head
			if err := to.begin(*head); err != nil {
				return err
			}
		}
		for _, r := range e.Ranges {
			if head == nil || r.Offset != at || r.Length <= 0 || r.Length > head.Size-at {
				return fmt.Errorf("read the daemon's map: it goes on with %+v after %d bytes", r, at)
			}
			at += r.Length
			if err := to.add(r); err != nil {
				return err
			}
		}
		if e.Done {
			if head == nil || at != head.Size {
				return fmt.Errorf("read the daemon's map: it ends after %d bytes", at)
			}
			return nil
		}
	}
}

// printJSON prints one object, a range on each line, as they are found. If it fails
// the object is not finished.
func (d *mapDrawing) printJSON(ctx context.Context, w io.Writer) error {
	out := bufio.NewWriter(w)
	before := "\n"
	err := d.run(ctx, mapSink{
		begin: func(h mapHead) error {
			data, err := json.Marshal(h)
			if err == nil {
				_, err = fmt.Fprintf(out, "%s, \"ranges\": [", bytes.TrimSuffix(data, []byte("}")))
			}
			return err
		},
		add: func(r mapRange) error {
			data, err := json.Marshal(r)
			if err == nil {
				_, err = fmt.Fprintf(out, "%s%s", before, data)
			}
			before = ",\n"
			return err
		},
	})
	if err == nil {
		_, err = fmt.Fprint(out, "\n]}\n")
	}
	return errors.Join(err, out.Flush())
}

// grid draws the map into at most so many cells, with a bar for those who wait, and
// names the snapshots in it.
func (d *mapDrawing) grid(ctx context.Context, cells int64) (*mapGrid, error) {
	const tries = 3 // each failed one means that a snapshot of the volume was made meanwhile
	bar := d.newProgress(d.target, unknownTotal)
	defer bar.end()
	for try := 1; ; try++ {
		var g *mapGrid
		err := d.run(ctx, mapSink{
			begin: func(h mapHead) error {
				g = newMapGrid(h, cells)
				return nil
			},
			add: func(r mapRange) error {
				g.add(r)
				bar.setOf(r.Offset+r.Length, g.Size)
				return nil
			},
		})
		if err == nil {
			g.name(func(named []mapOwner) { d.nameOwners(ctx, named) })
			bar.finish()
			return g, nil
		}
		if exitCode(err) != exitRefused || try == tries {
			return nil, err
		}
	}
}

// namePatience bounds how long a map waits for the store to tell what snapshots are
// called: that of a volume can be drawn without.
const namePatience = 10 * time.Second

// nameOwners fills in what the store tells of snapshots. What it cannot tell is no reason
// to show no map.
func (d *mapDrawing) nameOwners(ctx context.Context, named []mapOwner) {
	ctx, cancel := context.WithTimeout(ctx, namePatience)
	defer cancel()
	errs := make([]error, len(named))
	var asking sync.WaitGroup
	for i := range named {
		asking.Go(func() { errs[i] = d.nameOwner(ctx, &named[i]) })
	}
	asking.Wait()
	if err := errors.Join(errs...); err != nil {
		d.log().Warn("dates and names of snapshots are not known", "error", err)
	}
}

func (d *mapDrawing) nameOwner(ctx context.Context, o *mapOwner) error {
	id, err := manifest.ParseSnapshotID(o.id)
	if err != nil {
		return err
	}
	found, err := d.store.Describe(ctx, id)
	switch {
	case errors.Is(err, snapshot.ErrNotFound):
		o.deleted = true
		return nil
	case err != nil:
		return err
	}
	o.start, o.text = found.Start, cmp.Or(found.Tags["Name"], found.Description)
	return nil
}
