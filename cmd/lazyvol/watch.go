package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/volume"
)

const (
	defaultInterval = time.Second
	leastInterval   = 100 * time.Millisecond

	// framePatience is for how long a frame waits for answers that are missing, at most:
	// the first one longer, so that it is not empty.
	framePatience = 500 * time.Millisecond
)

// watchJSON is a line of 'status --watch --json'.
type watchJSON struct {
	Time    time.Time
	Volumes []statusJSON
}

// watch shows the status of target, or of all if it is "", anew each interval, until
// ctx ends or its user types q: neither is a failure.
func (a *app) watch(ctx context.Context, target string, interval time.Duration, asJSON bool) error {
	subjects := a.subjects
	if target != "" {
		one, err := a.findSubject(ctx, target)
		if err != nil {
			return err
		}
		subjects = func() ([]subject, []error, error) { return []subject{one}, nil, nil }
	}
	ctx, cancel := context.WithCancel(ctx)
	sampler := a.newSampler(subjects)
	defer sampler.close()
	defer cancel()
	terminal := terminalOf(a.stdout)
	if asJSON || terminal == nil || isDumb() {
		return a.watchLines(ctx, sampler, interval, asJSON)
	}
	if c, ok := a.stderr.(*console); ok && terminalOf(a.stderr) != nil {
		c.hold() // what is told meanwhile
		defer c.release()
	}
	views := make(chan sample)
	sampled := make(chan error, 1)
	go func() {
		defer close(views)
		sampled <- eachSample(ctx, sampler, interval, func(s sample) error {
			select {
			case views <- s:
			case <-ctx.Done():
			}
			return nil
		})
	}()
	note := fmt.Sprintf("every %s, q ends", interval)
	coloured := os.Getenv("NO_COLOR") == ""
	err := show(ctx, &screen{out: terminal, in: keyboard(a.stdin)}, views, func(s sample, width, height int) string {
		return renderWatch(s, note, width, height, coloured)
	})
	cancel()
	return errors.Join(err, <-sampled)
}

// watchLines prints each sample: as a line of JSON, or a line of text for each row.
func (a *app) watchLines(ctx context.Context, sampler *sampler, interval time.Duration, asJSON bool) error {
	return eachSample(ctx, sampler, interval, func(s sample) error {
		if !asJSON {
			_, err := fmt.Fprint(a.stdout, renderLines(s))
			return err
		}
		line := watchJSON{Time: s.at.UTC(), Volumes: []statusJSON{}}
		for _, r := range s.rows {
			line.Volumes = append(line.Volumes, r.statusJSON)
		}
		e := json.NewEncoder(a.stdout)
		e.SetEscapeHTML(false)
		return e.Encode(line)
	})
}

// eachSample takes a sample each interval, the first at once, until ctx ends or do fails.
func eachSample(ctx context.Context, sampler *sampler, interval time.Duration, do func(sample) error) error {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for patience := answerPatience; ; patience = min(interval, framePatience) {
		s, err := sampler.sample(ctx, patience)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			err = do(s)
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// findSubject returns the volume that a command line names, or what is mounted on the
// directory.
func (a *app) findSubject(ctx context.Context, target string) (subject, error) {
	if strings.HasPrefix(target, "vol-") {
		id, err := manifest.ParseVolumeID(target)
		if err != nil {
			return subject{}, usageError{err}
		}
		if _, err := volume.ReadRecord(vfs.OS(), a.state, id); err != nil {
			return subject{}, err
		}
		return subject{id: target, dir: volume.Dir(a.state, id), volume: true}, nil
	}
	s, err := statusOfMount(ctx, target)
	if err != nil {
		return subject{}, err
	}
	dir, err := a.folderOf(s)
	if err != nil {
		return subject{}, err
	}
	return subject{id: s.ID, dir: dir, volume: strings.HasPrefix(s.ID, "vol-"), mountpoint: s.Mountpoint}, nil
}
