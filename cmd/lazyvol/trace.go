package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/spf13/pflag"

	"github.com/lazyvol/lazyvol/blockstore"
	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// replayRequests is how many runs of a trace are fetched at once: of 4 MiB each,
// they keep 600 MB/s flowing over 50 ms.
const replayRequests = 8

// traceFlags name the traces of a mount; "" is none.
type traceFlags struct {
	record string
	replay string
}

func (f *traceFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&f.record, "record-trace", "", "store the order in which blocks are first read under this `name`, with the snapshot, when the mount ends")
	flags.StringVar(&f.replay, "trace", "", "fetch what the trace of this `name` has, in its order and before all else; the snapshot's own, else the last one of its lineage")
}

func (f *traceFlags) args() (args []string) {
	if f.record != "" {
		args = append(args, "--record-trace="+f.record)
	}
	if f.replay != "" {
		args = append(args, "--trace="+f.replay)
	}
	return args
}

func (f *traceFlags) check() error {
	for _, name := range []string{f.record, f.replay} {
		if name == "" {
			continue
		}
		if err := snapshot.CheckTraceName(name); err != nil {
			return usageError{err}
		}
	}
	return nil
}

// tracing is what a mount does with traces.
type tracing struct {
	traceFlags
	store  *snapshot.Store
	device *volume.Device
	of     []manifest.SnapshotID // whose traces: the root, and what the volume was made from
	log    *slog.Logger
}

// tracesOf returns with which snapshots a volume's traces may be.
func tracesOf(r volume.Record) (ids []manifest.SnapshotID) {
	for _, id := range []*manifest.SnapshotID{r.Root, r.Base} {
		if id != nil {
			ids = append(ids, *id)
		}
	}
	return ids
}

// begin starts recording and returns what replays, nil if nothing is to be. A
// trace that cannot be had because the store does not answer is no reason not
// to mount.
func (t *tracing) begin(ctx context.Context) (*hydrate.Hydrator, error) {
	if t.record == "" && t.replay == "" {
		return nil, nil
	}
	if len(t.of) == 0 {
		return nil, refusal{errors.New("a blank volume has no snapshot with which to keep a trace")}
	}
	if t.record != "" {
		t.device.RecordTrace()
	}
	if t.replay == "" {
		return nil, nil
	}
	trace, err := t.find(ctx)
	if errors.Is(err, blockstore.ErrUnavailable) {
		t.log.Warn("mounted without its trace", "error", err)
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return hydrate.New(source{t.device}, hydrate.Options{Workers: replayRequests, Blocks: trace, Log: t.log}), nil
}

// find loads the trace to replay: the root's rather than that of the snapshot from
// which the volume was made, and that rather than another one's of its lineage.
func (t *tracing) find(ctx context.Context) (manifest.Trace, error) {
	var missing error
	for _, id := range t.of {
		trace, err := t.store.Trace(ctx, id, t.replay)
		if !errors.Is(err, snapshot.ErrNotFound) {
			return trace, err
		}
		missing = cmp.Or(missing, err)
	}
	switch id, err := t.store.LastTraced(ctx, t.of[0].Lineage, t.replay); {
	case errors.Is(err, snapshot.ErrNotFound), errors.Is(err, blockstore.ErrDenied): // the latter of a snapshot that others share
		return nil, missing
	case err != nil:
		return nil, err
	default:
		return t.store.Trace(ctx, id, t.replay)
	}
}

// end stores what was recorded.
func (t *tracing) end(ctx context.Context) error {
	if t.record == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandPatience)
	defer cancel()
	trace := t.device.Trace()
	if err := t.store.SaveTrace(ctx, t.of[0], t.record, trace); err != nil {
		return err
	}
	t.log.Info("trace stored", "name", t.record, "snapshot", t.of[0], "blocks", fmt.Sprint(len(trace)))
	return nil
}
