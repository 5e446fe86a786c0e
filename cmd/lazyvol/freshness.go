package main

import (
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/volume"
)

// freshnessName is the file in a volume's folder that tells how old what is in no
// snapshot is.
const freshnessName = "freshness.json"

// freshnessEvery is how often a daemon looks whether its volume was written to: so
// exact is what it tells.
const freshnessEvery = 15 * time.Second

// A freshness knows since when a volume has had writes that are in no snapshot, and
// when its last snapshot was taken, also across restarts of the daemon.
type freshness struct {
	dir string // the volume's folder
	log *slog.Logger

	mu    sync.Mutex // guards what follows
	known bool       // told has been compared with the volume
	told  freshTimes
}

// freshTimes are what freshnessName holds. They are of a root: another one means
// that there was another snapshot.
type freshTimes struct {
	Root       string    `json:"root"`
	Snapshot   time.Time `json:"snapshot,omitzero"`   // the moment of the last one
	DirtySince time.Time `json:"dirtySince,omitzero"` // zero: nothing is dirty
}

func newFreshness(dir string, log *slog.Logger) *freshness {
	f := &freshness{dir: dir, log: log}
	data, err := vfs.ReadFile(vfs.OS(), filepath.Join(dir, freshnessName), 1<<16)
	if err == nil {
		err = json.Unmarshal(data, &f.told)
	}
	if err != nil {
		f.told = freshTimes{Root: "unknown"}
		if !errors.Is(err, fs.ErrNotExist) {
			log.Debug("when the volume was written to first is not known", "error", err)
		}
	}
	return f
}

// look compares with the volume as it is now, and returns what is known.
func (f *freshness) look(r volume.Record, dirty int64, now time.Time) freshTimes {
	root := ""
	if r.Root != nil {
		root = r.Root.String()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	was := f.told
	switch {
	case root != f.told.Root:
		// The oldest write layer was made for the snapshot that the root is.
		cut := born(filepath.Join(f.dir, "layers", strconv.FormatInt(r.Layers[0], 10)))
		f.told = freshTimes{Root: root}
		if r.Root != nil && (r.Base == nil || *r.Base != *r.Root) {
			f.told.Snapshot = cut
		}
		if dirty > 0 {
			f.told.DirtySince = earliest(cut, now)
		}
	case dirty == 0:
		f.told.DirtySince = time.Time{}
	case f.told.DirtySince.IsZero() && f.known:
		f.told.DirtySince = now
	case f.told.DirtySince.IsZero(): // by a daemon that was killed before it looked
		f.told.DirtySince = earliest(born(filepath.Join(f.dir, "layers", strconv.FormatInt(r.Layers[0], 10))), now)
	}
	f.known = true
	if f.told != was {
		f.save()
	}
	return f.told
}

// save writes what is known. What cannot be kept is told more pessimistically by the
// next daemon.
func (f *freshness) save() {
	data, err := json.Marshal(f.told)
	if err == nil {
		err = vfs.WriteFileAtomic(vfs.OS(), filepath.Join(f.dir, freshnessName), append(data, '\n'))
	}
	if err != nil {
		f.log.Debug("could not keep when the volume was written to first", "error", err)
	}
}

// earliest is known, or now if that is zero or later.
func earliest(known, now time.Time) time.Time {
	if known.IsZero() || known.After(now) {
		return now
	}
	return known
}

// born returns when a file was made; zero if the filesystem does not know.
func born(name string) time.Time {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, name, 0, unix.STATX_BTIME, &st); err != nil || st.Mask&unix.STATX_BTIME == 0 {
		return time.Time{}
	}
	return time.Unix(st.Btime.Sec, int64(st.Btime.Nsec)).UTC()
}
