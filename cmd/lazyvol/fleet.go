package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/volume"
)

const (
	// askedAtOnce bounds how many daemons are asked at the same time.
	askedAtOnce = 64

	// metricsPatience is for how long a daemon may take to tell its metrics, and
	// healthPatience its health: it may have to ask the store. Prometheus waits ten
	// seconds for an answer.
	metricsPatience = 3 * time.Second
	healthPatience  = probeTimeout + 2*time.Second

	// maxAnswer bounds what a daemon may answer, in bytes.
	maxAnswer = 4 << 20
)

// A served is a volume or a snapshot that a daemon of this host serves, or should.
type served struct {
	id         string
	mountpoint string
	dir        string // of its daemon's control socket
	inSight    bool   // something of this id is mounted there
}

// fleet lists what is served of this state directory. It asks neither daemons nor
// mounts, so it waits for none, and reads no volume's record: one that is damaged may be
// served all the same. Volumes that nobody mounted are in it too.
func (a *app) fleet() ([]served, error) {
	mounts, err := fs.MountedIDs()
	if err != nil {
		return nil, err
	}
	folders, err := os.ReadDir(volume.VolumesDir(a.state))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	var all []served
	for _, f := range folders {
		id, err := manifest.ParseVolumeID(f.Name())
		if err != nil {
			continue
		}
		s := served{id: f.Name(), dir: volume.Dir(a.state, id)}
		if dirs := mounts[s.id]; len(dirs) > 0 {
			s.mountpoint, s.inSight = dirs[0], true
		}
		all = append(all, s)
	}
	sessions, err := a.sessions()
	if err != nil {
		return nil, err
	}
	return append(all, servedSessions(sessions, mounts)...), nil
}

// servedSessions lists the sessions that have a mount, or had one. Of several of one
// snapshot on one directory the last one is in sight: the others were killed, and their
// folders stay for a while, or serve who has them open.
func servedSessions(sessions []*session, mounts map[string][]string) (all []served) {
	slices.SortStableFunc(sessions, func(a, b *session) int { return b.began.Compare(a.began) })
	for _, session := range sessions {
		if session.Mountpoint == "" { // an export
			continue
		}
		s := served{id: session.shows(), mountpoint: session.Mountpoint, dir: session.dir}
		s.inSight = slices.Contains(mounts[s.id], s.mountpoint) && !slices.ContainsFunc(all, s.isBehind)
		all = append(all, s)
	}
	return all
}

// isBehind reports whether other is mounted where s is, or was, with what s shows.
func (s served) isBehind(other served) bool {
	return other.inSight && other.id == s.id && other.mountpoint == s.mountpoint
}

// each calls ask for all that is served, several at once, and returns what came of it,
// in order.
func each[T any](all []served, ask func(served) T) []T {
	answers := make([]T, len(all))
	slots := make(chan struct{}, askedAtOnce)
	var asking sync.WaitGroup
	for i, s := range all {
		slots <- struct{}{}
		asking.Go(func() {
			defer func() { <-slots }()
			answers[i] = ask(s)
		})
	}
	asking.Wait()
	return answers
}

// get asks a daemon, which may answer with a status that is no success. errNoDaemon:
// nobody is there.
func (s served) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://daemon"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := dialControl(s.dir).http.Do(req)
	if err != nil {
		return nil, controlError(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusServiceUnavailable {
		return nil, fmt.Errorf("ask the daemon: %s", resp.Status)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err == nil && len(data) > maxAnswer {
		err = fmt.Errorf("it is more than %s", size(maxAnswer))
	}
	if err != nil {
		return nil, fmt.Errorf("read the daemon's answer: %w", err)
	}
	return data, nil
}

// health asks for the health of one that is served, with its mount. ok is false if it
// is not served any more, which is nothing bad.
func (s served) health(ctx context.Context, p *prober) (h healthJSON, ok bool) {
	ctx, cancel := context.WithTimeoutCause(ctx, healthPatience, fmt.Errorf("no answer within %s", healthPatience))
	defer cancel()
	h = healthJSON{ID: s.id, Mountpoint: s.mountpoint, Status: healthy, Reasons: []reason{}}
	var mount error
	var probing sync.WaitGroup
	if s.inSight {
		probing.Go(func() { mount = p.probe(s.mountpoint) })
	}
	data, err := s.get(ctx, "/health")
	if err == nil {
		err = json.Unmarshal(data, &h)
	}
	probing.Wait()
	switch {
	case errors.Is(err, errNoDaemon) && !s.inSight:
		return h, false
	case errors.Is(err, errNoDaemon):
		again := "mount"
		if s.id == browseID {
			again = "browse"
		}
		h.add("daemon", broken, "it has died: 'lazyvol %s' on the same directory recovers it", again)
		return h, true
	case err != nil && ctx.Err() != nil:
		err = context.Cause(ctx)
	}
	if err != nil {
		h.add("daemon", broken, "%v", err)
	}
	switch {
	case errors.Is(mount, errMountUnknown):
	case mount != nil:
		h.add("mount", broken, "%v", mount)
	case !s.inSight && err == nil:
		h.add("mount", degraded, "%s is out of sight: it was told to end while in use, or is in another mount namespace", h.Mountpoint)
	}
	return h, true
}

// fleetHealth is the health of everything that is served.
type fleetHealth struct {
	Status string       `json:"status"`
	Served []healthJSON `json:"served"`
}

func (a *app) fleetHealth(ctx context.Context, all []served, p *prober) fleetHealth {
	type answer struct {
		healthJSON
		ok bool
	}
	fleet := fleetHealth{Status: healthy, Served: []healthJSON{}}
	for _, h := range each(all, func(s served) answer {
		h, ok := s.health(ctx, p)
		return answer{h, ok}
	}) {
		if h.ok {
			fleet.Served = append(fleet.Served, h.healthJSON)
			fleet.Status = worse(fleet.Status, h.Status)
		}
	}
	return fleet
}

// find returns what of the fleet a word of the command line names: a volume, a
// snapshot, or a directory on which something is mounted.
func (a *app) find(all []served, word string) ([]served, error) {
	var found []served
	for _, s := range all {
		if s.id == word || s.mountpoint == word {
			found = append(found, s)
		}
	}
	if len(found) > 0 {
		return found, nil
	}
	if strings.HasPrefix(word, "vol-") || strings.HasPrefix(word, "snap-") {
		return nil, codedError{fmt.Sprintf("%s is neither a volume of this host nor a mounted snapshot", word), exitNotFound}
	}
	return nil, codedError{fmt.Sprintf("nothing of lazyvol with the state directory %s is mounted on %s", a.state, word), exitNotFound}
}
