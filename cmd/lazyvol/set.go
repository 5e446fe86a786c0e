package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/snapshot"
	"github.com/lazyvol/lazyvol/volume"
)

// createSet makes snapshots of several volumes of this host at one moment, all or
// none.
func (a *app) createSet(ctx context.Context, targets []string, f *createFlags, tags map[string]string, ready *readiness) (err error) {
	records, err := a.setRecords(targets, f)
	if err != nil {
		return err
	}
	store, err := a.openRemote(ctx, records[0].StoreURL, commandPatience)
	if err != nil {
		return err
	}
	id, err := store.ID(ctx)
	if err != nil {
		return err
	}
	if id != records[0].StoreID {
		return fmt.Errorf("%s belongs to the store %s, and not to %s: %w", records[0].ID, records[0].StoreURL, store.Store, volume.ErrOtherStore)
	}
	start := time.Now()
	c := newCoordinator(a, store, setRequest{Set: manifest.NewSetID(), Description: f.description, Tags: tags})
	defer func() { err = errors.Join(err, c.close()) }()
	err = c.make(ctx, records, f, ready)
	if members, begun := c.members(); begun || err != nil && failedJob(err) {
		a.event(store.Store, store.SnapshotsCreated(members, start, err))
	}
	if err != nil {
		return err
	}
	if !f.noWait {
		fmt.Fprintln(a.stdout, c.ids())
	}
	return nil
}

// setRecords returns the records of the volumes that are to make a set, if they
// can.
func (a *app) setRecords(targets []string, f *createFlags) ([]volume.Record, error) {
	if f.parent != "" {
		return nil, usageError{errors.New("--parent is for images: a volume's snapshot always follows its last one")}
	}
	if len(targets) > manifest.MaxSetMembers {
		return nil, usageError{fmt.Errorf("%d volumes are more than %d at once", len(targets), manifest.MaxSetMembers)}
	}
	var records []volume.Record
	for i, target := range targets {
		id, _, err := a.volumeFolder(target)
		if err != nil {
			return nil, fmt.Errorf("%w (of several sources each must be a volume)", err)
		}
		if slices.Contains(targets[:i], target) {
			return nil, usageError{fmt.Errorf("%s is named twice", target)}
		}
		r, err := volume.ReadRecord(vfs.OS(), a.state, id)
		if err != nil {
			return nil, err
		}
		if first := append(records, r)[0]; r.StoreID != first.StoreID {
			return nil, fmt.Errorf("%s belongs to the store %s, and %s to %s: %w", first.ID, first.StoreURL, r.ID, r.StoreURL, volume.ErrOtherStore)
		}
		records = append(records, r)
	}
	return records, nil
}

// A coordinator makes a set. It talks to its members alike, be they daemons or, of
// volumes that are not mounted, parts of this process.
type coordinator struct {
	app     *app
	store   remote
	request setRequest
	seats   []*seat
	replies chan seatReply
	turns   chan struct{} // of uploads in this process, which take one each
	closed  chan struct{}
	parts   sync.WaitGroup // readers of lines, and members in this process
	host    *volume.Host   // of those; nil: there is none yet
}

// A seat is the coordinator's end of a member.
type seat struct {
	volume   manifest.VolumeID
	line     *line
	gone     bool // it has finished, or hung up
	snapshot manifest.SnapshotID
	done     int64 // bytes of it that are uploaded
	total    int64
	outcome  *manifest.Outcome // once it is uploaded
}

// A seatReply is what came from a member; err: nothing will any more.
type seatReply struct {
	*seat
	setReply
	err error
}

func newCoordinator(a *app, store remote, request setRequest) *coordinator {
	return &coordinator{
		app: a, store: store, request: request,
		replies: make(chan seatReply, manifest.MaxSetMembers), turns: make(chan struct{}, 1), closed: make(chan struct{}),
	}
}

// make makes the set.
func (c *coordinator) make(ctx context.Context, records []volume.Record, f *createFlags, ready *readiness) error {
	err := c.gather(ctx, records)
	if err == nil {
		err = c.cut(ctx, f)
	}
	if err != nil {
		return errors.Join(err, c.finish(ctx)) // the store has heard nothing yet
	}
	bar := c.app.newProgress(string(c.request.Set), unknownTotal)
	defer bar.end()
	err = c.upload(ctx, ready, bar)
	if err == nil {
		err = c.commit(ctx)
	}
	if err == nil {
		bar.finish()
		if err := errors.Join(c.store.RecordMembers(ctx, c.outcomes()), c.finish(ctx)); err != nil {
			c.app.log().Warn("the snapshots are made, and not all volumes could move on to theirs yet", "set", c.request.Set, "error", err)
		}
		return nil
	}
	aborting, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandPatience)
	defer cancel()
	committed, abortErr := c.store.AbortSet(aborting, c.request.Set, firstLine(err))
	err = errors.Join(err, abortErr, c.finish(ctx))
	if committed {
		c.app.log().Warn("the snapshots are made all the same", "set", c.request.Set, "error", err)
		return nil
	}
	return err
}

// gather lets all volumes join, which changes nothing, and then get ready.
func (c *coordinator) gather(ctx context.Context, records []volume.Record) error {
	for _, r := range records {
		l, err := dialControl(volume.Dir(c.app.state, r.ID)).join(ctx, c.request)
		if errors.Is(err, errNoDaemon) {
			l, err = c.joinHere(ctx, r)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", r.ID, err)
		}
		s := &seat{volume: r.ID, line: l}
		c.seats = append(c.seats, s)
		c.parts.Go(func() { c.read(s) })
	}
	return c.order(ctx, doReady)
}

// joinHere lets a volume that is not mounted join, in this process.
func (c *coordinator) joinHere(ctx context.Context, r volume.Record) (*line, error) {
	if c.host == nil {
		host, err := c.app.host(c.store, commandPatience, c.app.log())
		if err != nil {
			return nil, err
		}
		c.host = host
	}
	v, err := c.app.openFree(ctx, c.host, r.ID)
	if err != nil {
		return nil, err
	}
	member, err := v.Join(c.request.Set)
	if err != nil {
		return nil, errors.Join(err, v.Close())
	}
	ours, its := net.Pipe()
	p := part{
		line: newLine(its, its), member: member, turns: c.turns,
		options: volume.SnapshotOptions{Description: c.request.Description, Tags: c.request.Tags},
	}
	c.parts.Go(func() {
		// What it could not settle is settled when the volume is opened again.
		if err := errors.Join(p.serve(context.WithoutCancel(ctx)), v.Close()); err != nil {
			c.app.log().Warn("a volume could not be left in order", "volume", r.ID, "error", err)
		}
	})
	return newLine(ours, ours), nil
}

// read reads what a member says until it hangs up.
func (c *coordinator) read(s *seat) {
	for {
		r := seatReply{seat: s}
		if r.err = s.line.in.Decode(&r.setReply); r.err != nil {
			r.err = fmt.Errorf("%s broke off; its changes are kept: %w", s.volume, r.err)
		}
		select {
		case c.replies <- r:
		case <-c.closed:
			return
		}
		if r.err != nil || r.Did == doFinish {
			return // nothing follows
		}
	}
}

// next returns the next reply. After an error of the seat nothing comes from it.
func (c *coordinator) next(ctx context.Context) (seatReply, error) {
	select {
	case <-ctx.Done():
		return seatReply{}, context.Cause(ctx)
	case r := <-c.replies:
		r.gone = r.gone || r.err != nil
		return r, nil
	}
}

// answer is next for steps that fail with their first member.
func (c *coordinator) answer(ctx context.Context) (seatReply, error) {
	r, err := c.next(ctx)
	switch {
	case err != nil:
		return r, err
	case r.err != nil:
		return r, r.err
	case r.Error != "":
		return r, fmt.Errorf("%s: %w", r.volume, remoteError{r.report})
	}
	return r, nil
}

// send sends an order to all members.
func (c *coordinator) send(do string) error {
	for _, s := range c.seats {
		if err := s.line.send(setOrder{do}); err != nil {
			return fmt.Errorf("%s: %w", s.volume, err)
		}
	}
	return nil
}

// order orders all members to do something, and returns when they have, or when
// one cannot.
func (c *coordinator) order(ctx context.Context, do string) error {
	if err := c.send(do); err != nil {
		return err
	}
	for range c.seats {
		if _, err := c.answer(ctx); err != nil {
			return err
		}
	}
	return nil
}

// holdPatience bounds each step while writers are held. They are for a second, but
// one that is written in may take that long to stop.
const holdPatience = 5 * time.Second

// cut cuts all volumes at one moment, with filesystems frozen.
func (c *coordinator) cut(ctx context.Context, f *createFlags) (err error) {
	thaw, err := c.app.freezeAll(f)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, thaw()) }()
	begin := time.Now()
	// Rule: each step ends for all before the next begins for any.
	for _, step := range []string{doHold, doCut, doRelease} {
		stepping, cancel := context.WithTimeoutCause(ctx, holdPatience, fmt.Errorf("not all volumes did %s within %v", step, holdPatience))
		err := c.order(stepping, step)
		cancel()
		if err != nil {
			return err
		}
	}
	fmt.Fprintf(c.app.stderr, "cut %d volumes at one moment; their writers were held for %.1f ms\n",
		len(c.seats), float64(time.Since(begin))/float64(time.Millisecond))
	return nil
}

// upload returns when all is in the store but the outcome.
func (c *coordinator) upload(ctx context.Context, ready *readiness, bar *progress) error {
	if err := c.send(doUpload); err != nil {
		return err
	}
	for begun, done := 0, 0; done < len(c.seats); {
		r, err := c.answer(ctx)
		switch {
		case err != nil:
			return err
		case r.Snapshot != "":
			if r.snapshot, err = manifest.ParseSnapshotID(r.Snapshot); err != nil {
				return err
			}
			if begun++; begun == len(c.seats) {
				if err := c.begun(ready); err != nil {
					return err
				}
			}
		case r.Did == doUpload && r.Outcome != nil:
			r.outcome = r.Outcome
			done++
		}
		if r.TotalBytes > 0 {
			r.done, r.total = r.DoneBytes, r.TotalBytes
		}
		bar.setOf(c.uploaded())
	}
	return nil
}

// uploaded returns how many bytes are uploaded, and of how many: unknownTotal until all
// members have told.
func (c *coordinator) uploaded() (done, total int64) {
	for _, s := range c.seats {
		done += s.done
		if s.total == 0 && s.outcome == nil || total == unknownTotal {
			total = unknownTotal
			continue
		}
		total += s.total
	}
	return done, total
}

// begun tells whoever waits the ids, as begun does for one snapshot.
func (c *coordinator) begun(ready *readiness) error {
	if ready.background() {
		if err := logToFile(c.app.state); err != nil {
			return err
		}
	}
	return ready.ready(c.ids())
}

// commit commits what was uploaded.
func (c *coordinator) commit(ctx context.Context) error {
	for _, s := range c.seats {
		if s.outcome.Snapshot != s.snapshot || s.outcome.Volume != s.volume || s.outcome.Set != c.request.Set {
			return fmt.Errorf("%s uploaded %s, which is not what it began", s.volume, s.outcome.Snapshot)
		}
	}
	return c.store.CommitSet(ctx, c.request.Set, c.outcomes())
}

// finish lets the members ask the store what became of the set, and returns what
// they could not settle.
func (c *coordinator) finish(ctx context.Context) error {
	const patience = 40 * time.Second // twice what a member takes at most
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), patience, fmt.Errorf("a volume was not left in order within %v", patience))
	defer cancel()
	var failures []error
	waiting := 0
	for _, s := range c.seats {
		if s.gone {
			continue
		}
		if err := s.line.send(setOrder{doFinish}); err != nil {
			failures = append(failures, fmt.Errorf("%s: %w", s.volume, err))
			s.gone = true
			continue
		}
		waiting++
	}
	for waiting > 0 {
		r, err := c.next(ctx)
		switch {
		case err != nil:
			return errors.Join(append(failures, err)...)
		case r.err != nil:
			failures = append(failures, r.err)
		case r.Did != doFinish:
			continue // to what was ordered before
		case r.Error != "":
			failures = append(failures, remoteError{r.report})
		}
		r.gone = true
		waiting--
	}
	return errors.Join(failures...)
}

// close hangs up, and waits for the members in this process.
func (c *coordinator) close() error {
	close(c.closed)
	var err error
	for _, s := range c.seats {
		err = errors.Join(err, s.line.conn.Close())
	}
	c.parts.Wait()
	if c.host != nil {
		c.host.Leaves.Close()
	}
	return err
}

// outcomes returns those of the members, in the order in which they were named.
func (c *coordinator) outcomes() []manifest.Outcome {
	outcomes := make([]manifest.Outcome, len(c.seats))
	for i, s := range c.seats {
		outcomes[i] = *s.outcome
	}
	return outcomes
}

// ids returns those of the snapshots, one a line, in the order in which the volumes
// were named.
func (c *coordinator) ids() string {
	ids := make([]string, len(c.seats))
	for i, s := range c.seats {
		ids[i] = s.snapshot.String()
	}
	return strings.Join(ids, "\n")
}

// members returns the volumes and their snapshots, and whether one was begun.
func (c *coordinator) members() (members []snapshot.SetMember, begun bool) {
	for _, s := range c.seats {
		members = append(members, snapshot.SetMember{Snapshot: s.snapshot, Volume: s.volume})
		begun = begun || !s.snapshot.IsZero()
	}
	return members, begun
}
