package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// A bench is one run: what is measured, and everything around it.
type bench struct {
	options
	dir     string // of this run, inside work
	image   *image
	server  *server
	stored  *stored // the image as a snapshot, in the server
	snap    string  // its id
	systems []system
	absent  []string // why which systems are not measured
	figures *figures
	failed  []string // what went wrong, for the report
	notes   []note
	begin   time.Time

	folders  []string // made by folder
	cleanups []func() // what is to be taken away, the last first
}

// later has fn called when the run ends, however it ends.
func (b *bench) later(fn func()) { b.cleanups = append(b.cleanups, fn) }

// cleanUp takes away what was made, in the opposite order.
func (b *bench) cleanUp() {
	for _, fn := range slices.Backward(b.cleanups) {
		fn()
	}
	b.cleanups = nil
}

// say tells whoever watches how far we are.
func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%7.1fs  %s\n", time.Since(b.begin).Seconds(), fmt.Sprintf(format, args...))
}

// prepare makes the image, starts the server, stores the image in it as each
// system wants it, and sees which systems there are.
func (b *bench) prepare(ctx context.Context) (err error) {
	b.begin = time.Now()
	if err := os.MkdirAll(b.work, 0o755); err != nil {
		return err
	}
	b.say("the host's memory")
	if err := touchMemory(ctx); err != nil {
		return err
	}
	b.say("the image")
	if b.image, err = makeImage(ctx, b.work, b.quick); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp(b.work, "run-"); err != nil {
		return err
	}
	b.later(func() { _ = removeAll(b.dir) }) // a mount that stays in it was told about
	b.say("the S3 server, %s away", b.latency)
	if b.server, err = b.startServer(ctx); err != nil {
		return err
	}
	if err := b.server.upload(ctx, rawBucket, rawKey, b.image.path); err != nil {
		return err
	}
	host, err := b.newHost(b.server.direct)
	if err != nil {
		return err
	}
	if _, err := host.run(ctx, "init"); err != nil {
		return err
	}
	if b.snap, err = host.run(ctx, "snapshot", "create", b.image.path); err != nil {
		return err
	}
	if b.stored, err = readStored(b.server.folder(storePrefix), b.snap); err != nil {
		return err
	}
	return b.findSystems(ctx)
}

// findSystems prepares the systems that are to be measured and installed.
func (b *bench) findSystems(ctx context.Context) error {
	for _, s := range allSystems(b) {
		if !b.options.systems.MatchString(s.name()) && s.name() != lazyvolName {
			continue
		}
		b.say("%s", s.name())
		err := s.prepare(ctx)
		var missing *missingError
		switch {
		case errors.As(err, &missing):
			b.absent = append(b.absent, fmt.Sprintf("%s: %v", s.name(), missing))
		case err != nil:
			return fmt.Errorf("prepare %s: %w", s.name(), err)
		default:
			b.systems = append(b.systems, s)
		}
	}
	return nil
}

// measure measures all rows that were asked for, round by round. It returns an
// error if any failed; the others are measured all the same.
func (b *bench) measure(ctx context.Context) error {
	for n := range b.rounds {
		for _, g := range groups() {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			b.measureGroup(ctx, g, n)
		}
	}
	if len(b.failed) > 0 {
		return fmt.Errorf("%d measurements failed", len(b.failed))
	}
	return nil
}

func (b *bench) measureGroup(ctx context.Context, g group, round int) {
	rows := slices.DeleteFunc(slices.Clone(g.rows), func(r row) bool { return !b.rows.MatchString(r.name) })
	if len(rows) == 0 {
		return
	}
	r := &turn{bench: b, number: round}
	defer b.removeFolders(len(b.folders))
	defer r.end()
	if g.setUp != nil {
		r.row = g.name
		b.say("round %d of %d: %s: set up", round+1, b.rounds, g.name)
		if err := g.setUp(ctx, r); err != nil {
			b.fail(g.name, err)
			return
		}
	}
	for _, row := range rows {
		if ctx.Err() != nil {
			return
		}
		b.say("round %d of %d: %s", round+1, b.rounds, row.name)
		r.row = row.name
		mark := len(r.ends)
		if err := row.measure(ctx, r); err != nil {
			b.fail(row.name, err)
		}
		r.endFrom(mark)
	}
}

// fail notes what went wrong with a row.
func (b *bench) fail(row string, err error) {
	text := fmt.Sprintf("%s: %v", row, err)
	b.failed = append(b.failed, text)
	b.say("FAILED %s", text)
}

// A turn is one round of one group, as its rows see it.
type turn struct {
	*bench
	number int
	row    string // that is being measured
	fleet  []member
	ends   []func()
}

// atEnd has fn called when the row, or in a group's set-up the group, ends.
func (r *turn) atEnd(fn func()) { r.ends = append(r.ends, fn) }

func (r *turn) end() { r.endFrom(0) }

func (r *turn) endFrom(mark int) {
	for _, fn := range slices.Backward(r.ends[mark:]) {
		fn()
	}
	r.ends = r.ends[:mark]
}

// record adds a sample to a figure of the row.
func (r *turn) record(system, metric string, value float64) {
	r.figures.add(key{r.row, system, metric}, value)
}

// A note is something for the report that is no figure.
type note struct {
	Row  string `json:"row"`
	Text string `json:"text"`
}

func (r *turn) note(text string) { r.notes = append(r.notes, note{r.row, text}) }

// recordFailure notes that a system could not be measured; the others go on.
func (r *turn) recordFailure(s system, err error) {
	if err != nil {
		r.fail(r.row, fmt.Errorf("%s: %w", s.name(), err))
	}
}

// folder makes a new folder inside the run's, until the group has been measured.
func (b *bench) folder(name string) (string, error) {
	dir, err := os.MkdirTemp(b.dir, name+"-")
	if err == nil {
		b.folders = append(b.folders, dir)
	}
	return dir, err
}

// removeFolders removes the folders made since there were n.
func (b *bench) removeFolders(n int) {
	for _, dir := range b.folders[n:] {
		if err := removeAll(dir); err != nil {
			b.say("%v", err)
		}
	}
	b.folders = b.folders[:n]
}

// removeAll removes a folder unless something is still mounted in it.
func removeAll(dir string) error {
	mounts, err := mountsIn(dir)
	if err != nil {
		return err
	}
	if len(mounts) > 0 { // what is mounted must not be emptied
		return fmt.Errorf("%s is left: %s is still mounted", dir, strings.Join(mounts, ", "))
	}
	return os.RemoveAll(dir)
}
