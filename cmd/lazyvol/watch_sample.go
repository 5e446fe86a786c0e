package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/hydrate"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/volume"
)

const (
	// silentState is the state of what does not answer: status says what it said last.
	silentState = "not-answering"

	// answerPatience is how long a daemon may take to tell its status before it counts
	// as silent: it takes a moment, on a busy host some hundred milliseconds.
	answerPatience = 2 * time.Second

	// unmountedPause is how long what was found in a volume that is not mounted is
	// taken for true: a look into it locks it for a moment.
	unmountedPause = 10 * time.Second

	// trendSpan is over which time a sample tells how fast counts grow.
	trendSpan = 10 * time.Second
)

// A subject is what has a status: a volume, or a snapshot that is mounted.
type subject struct {
	id         string
	dir        string // of its daemon
	volume     bool
	mountpoint string // on record; of a snapshot
}

// subjects returns all volumes, then all sessions, and why others cannot be looked at.
func (a *app) subjects() (found []subject, failed []error, err error) {
	records, failed, err := volume.List(vfs.OS(), a.state)
	if err != nil {
		return nil, nil, err
	}
	for _, r := range records {
		found = append(found, subject{id: string(r.ID), dir: volume.Dir(a.state, r.ID), volume: true})
	}
	sessions, err := a.sessions()
	if err != nil {
		return nil, nil, err
	}
	for _, s := range sessions {
		found = append(found, subject{id: s.shows(), dir: s.dir, mountpoint: s.Mountpoint})
	}
	return found, failed, nil
}

// A reading is what a subject said when it was asked.
type reading struct {
	statusJSON
	gone   bool // there is no such mount any more
	silent bool // its daemon does not answer; the status is from before
}

// mounted reports whether a daemon serves the subject.
func (r *reading) mounted() bool { return r.PID != 0 || r.silent }

// ask asks a subject for its status. known, if not nil, is what was found not long ago
// in a volume that was not mounted, and is not looked for again.
func (a *app) ask(ctx context.Context, s subject, known *statusJSON) reading {
	status, err := askStatus(ctx, s.dir)
	switch {
	case err == nil:
		return reading{statusJSON: a.withFilesystems(status)}
	case !errors.Is(err, errNoDaemon):
		status = statusJSON{ID: s.id, State: silentState, Mountpoint: s.mountpoint, Errors: []string{err.Error()}}
		return reading{statusJSON: status, silent: true}
	case !s.volume:
		return reading{gone: true} // it is dead, or no mount
	case known != nil:
		return reading{statusJSON: *known}
	}
	status, err = a.statusOf(ctx, s.id)
	if err != nil { // in use by a command, or damaged: the others are still of interest
		status = statusJSON{ID: s.id, State: hydrate.Paused.String(), Errors: []string{err.Error()}}
		if r, err := volume.ReadRecord(vfs.OS(), a.state, manifest.VolumeID(s.id)); err == nil {
			status.Size, status.BlockSize = r.Size, r.BlockSize
		}
	}
	return reading{statusJSON: status}
}

// A sampler asks subjects again and again. One that does not answer holds up none of
// the others: it is asked again when it has.
type sampler struct {
	subjects func() (found []subject, failed []error, err error)
	ask      func(ctx context.Context, s subject, known *statusJSON) reading

	slots    chan struct{} // of those that are being asked
	asking   sync.WaitGroup
	mu       sync.Mutex           // guards what follows, and what it points to
	followed map[string]*followed // by folder
}

// followed is a subject that is asked again and again.
type followed struct {
	subject
	last     reading
	answered time.Time     // zero: never
	looked   time.Time     // when somebody looked into the volume, which was not mounted; zero: it was since
	since    time.Time     // when it was asked what it has not answered yet; zero: it is to be
	done     chan struct{} // closed when it has; nil: it is not being asked

	dirty, waits, waited trend
}

// mostAsked bounds how many subjects are asked at once.
const mostAsked = 64

func (a *app) newSampler(subjects func() ([]subject, []error, error)) *sampler {
	return &sampler{subjects: subjects, ask: a.ask, slots: make(chan struct{}, mostAsked), followed: make(map[string]*followed)}
}

// A sample is all subjects at one moment.
type sample struct {
	at     time.Time
	rows   []row
	failed []error // why others cannot be looked at
}

// A row is a subject in a sample: what it said, and how fast that changes.
type row struct {
	reading
	dirtyRate float64 // bytes a second that are written
	waitRate  float64 // reads a second that had to wait for the store
	waitShare float64 // of the time at least one did; from 0 to 1
}

// sample asks all subjects, and returns what they said within patience: of those that
// did not what they said before, and that they are silent if that is long ago.
func (s *sampler) sample(ctx context.Context, patience time.Duration) (sample, error) {
	subjects, failed, err := s.subjects()
	if err != nil {
		return sample{}, err
	}
	waiting := s.begin(ctx, subjects)
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
wait:
	for _, done := range waiting {
		select {
		case <-done:
		case <-ctx.Done():
			return sample{}, context.Cause(ctx)
		case <-timeout.C:
			break wait
		}
	}
	return s.rows(subjects, failed), nil
}

// begin asks those that are not being asked already, and forgets those that are no more.
func (s *sampler) begin(ctx context.Context, subjects []subject) (waiting []chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	there := make(map[string]bool, len(subjects))
	for _, subject := range subjects {
		there[subject.dir] = true
		f := s.followed[subject.dir]
		if f == nil {
			f = &followed{subject: subject, dirty: trend{span: trendSpan}, waits: trend{span: trendSpan}, waited: trend{span: trendSpan}}
			s.followed[subject.dir] = f
		}
		if f.done == nil {
			f.since, f.done = time.Time{}, make(chan struct{})
			s.asking.Go(func() { s.answer(ctx, f) })
		}
		waiting = append(waiting, f.done)
	}
	for dir, f := range s.followed {
		if !there[dir] && f.done == nil {
			delete(s.followed, dir)
		}
	}
	return waiting
}

// answer asks one subject.
func (s *sampler) answer(ctx context.Context, f *followed) {
	s.slots <- struct{}{}
	defer func() { <-s.slots }()
	var known *statusJSON
	s.mu.Lock()
	f.since = time.Now()
	if f.since.Sub(f.looked) < unmountedPause {
		known = &f.last.statusJSON
	}
	s.mu.Unlock()
	r := s.ask(ctx, f.subject, known)
	s.mu.Lock()
	defer s.mu.Unlock()
	close(f.done)
	f.done = nil
	if r.silent && !f.answered.IsZero() {
		last := f.last.statusJSON
		last.State, last.Errors = silentState, r.Errors
		r.statusJSON = last
	}
	f.last, f.answered = r, time.Now()
	switch {
	case r.mounted():
		f.looked = time.Time{}
	case known == nil:
		f.looked = f.answered
	}
	if !r.silent {
		f.dirty.add(f.answered, float64(r.DirtyBytes))
		f.waits.add(f.answered, float64(r.DemandWaits))
		f.waited.add(f.answered, r.DemandWaitSeconds)
	}
}

// rows returns what subjects said last.
func (s *sampler) rows(subjects []subject, failed []error) sample {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	result := sample{at: now, failed: failed}
	for _, subject := range subjects {
		f := s.followed[subject.dir]
		r := f.last
		late := f.done != nil && !f.since.IsZero() && now.Sub(f.since) >= answerPatience
		switch {
		case r.gone, f.answered.IsZero() && !late:
			continue
		case f.answered.IsZero():
			r.ID, r.Mountpoint = subject.id, subject.mountpoint
		}
		if late && !r.silent {
			r.silent = true
			r.Errors = append(slices.Clone(r.Errors), fmt.Sprintf("no answer for %s", shortTime(now.Sub(f.since))))
		}
		if r.silent {
			r.State = silentState
			result.rows = append(result.rows, row{reading: r})
			continue
		}
		result.rows = append(result.rows, row{
			reading: r, dirtyRate: f.dirty.perSecond(), waitRate: f.waits.perSecond(), waitShare: min(f.waited.perSecond(), 1),
		})
	}
	return result
}

// close waits for those that are being asked: their context has ended.
func (s *sampler) close() { s.asking.Wait() }
