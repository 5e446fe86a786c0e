package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/internal/loopdev"
	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/volume"
)

func examineMounts(context.Context) []finding {
	dirs, err := fs.Mounted()
	if err != nil {
		return []finding{fail("see whether /proc is mounted", "%v", err)}
	}
	state := make(map[string]error, len(dirs))
	for _, dir := range dirs {
		state[dir] = guardedStat(dir)
	}
	return judgeMounts(state)
}

// judgeMounts judges mounts of lazyvol by what stat said of them.
func judgeMounts(stats map[string]error) (found []finding) {
	for _, dir := range sortedKeys(stats) {
		switch err := stats[dir]; {
		case err == nil, errors.Is(err, unix.EACCES): // the latter: another user's
		case errors.Is(err, unix.ENOENT): // unmounted just now, or hidden below another mount
		case errors.Is(err, unix.ENOTCONN):
			found = append(found, fail("run 'lazyvol unmount "+dir+"', or mount the same there again", "the daemon of %s was killed: whoever reads there gets errors", dir))
		default:
			found = append(found, fail("see 'lazyvol status "+dir+"' and the daemon's log, daemon.log in the state directory", "%s: %v", dir, err))
		}
	}
	if len(found) == 0 {
		found = append(found, fine("%d, and no daemon was killed", len(stats)))
	}
	return found
}

// loopFile is a loop device on a file of lazyvol.
type loopFile struct {
	device, backing string
	stat            error // of the backing file
}

const deletedSuffix = " (deleted)" // of sysfs, behind a backing file's path

func (a *app) examineLoops(context.Context) []finding {
	attached, err := loopdev.Attached()
	if err != nil {
		return []finding{fail("see whether /sys is mounted", "%v", err)}
	}
	var files []loopFile
	for _, device := range attached {
		backing, err := loopdev.Backing(device)
		if err != nil || !a.isOurs(backing) { // detached meanwhile, or somebody else's
			continue
		}
		files = append(files, loopFile{device, backing, guardedStat(backing)})
	}
	return judgeLoops(files)
}

// isOurs reports whether a loop device's backing file is an image that lazyvol showed.
func (a *app) isOurs(backing string) bool {
	path := strings.TrimSuffix(backing, deletedSuffix)
	return filepath.Base(path) == fs.ImageName || strings.HasPrefix(path, a.state+"/")
}

func judgeLoops(files []loopFile) (found []finding) {
	for _, f := range files {
		detach := fmt.Sprintf("unmount what is on it, then 'losetup --detach %s'", f.device)
		switch {
		case errors.Is(f.stat, unix.ENOTCONN):
			found = append(found, fail(detach+", then 'lazyvol unmount "+filepath.Dir(f.backing)+"'", "%s is on %s, whose daemon was killed", f.device, f.backing))
		case strings.HasSuffix(f.backing, deletedSuffix):
			found = append(found, warn(detach, "%s is on a file that was deleted, %s", f.device, strings.TrimSuffix(f.backing, deletedSuffix)))
		case errors.Is(f.stat, unix.ENOENT):
			found = append(found, warn(detach, "%s is on a mount that is out of sight: its daemon, if it lives, serves it until it is detached", f.device))
		case f.stat != nil && !errors.Is(f.stat, unix.EACCES):
			found = append(found, fail(detach, "%s is on %s: %v", f.device, f.backing, f.stat))
		}
	}
	if len(found) == 0 {
		found = append(found, fine("%d on volumes and snapshots, all of them served", len(files)))
	}
	return found
}

// volumeFacts are what is known of a volume without opening it.
type volumeFacts struct {
	volume.Record
	dirty int64         // bytes, about
	since time.Duration // its oldest write layer was made
	alive bool          // a process has it open
}

func (a *app) examineVolumes(_ context.Context, dirtyAge time.Duration) []finding {
	records, failed, err := volume.List(vfs.OS(), a.state)
	if err != nil {
		return []finding{fail("mend the state directory", "%v", err)}
	}
	var volumes []volumeFacts
	for _, r := range records {
		f := volumeFacts{Record: r, alive: held(filepath.Join(volume.Dir(a.state, r.ID), lockName))}
		for _, file := range layersOf(a.state, r) {
			f.dirty += allocatedBytes(file)
			f.since = max(f.since, age(file))
		}
		volumes = append(volumes, f)
	}
	return judgeVolumes(volumes, append(failed, a.recordless()...), dirtyAge)
}

// recordless tells of folders of volumes with layers and no record, which no process is
// making or removing: volume.List passes them over, with what was written to them.
func (a *app) recordless() (found []error) {
	layers, _ := globIn(volume.VolumesDir(a.state), "vol-*/layers") // the pattern is right
	for _, l := range layers {
		dir := filepath.Dir(l)
		id, err := manifest.ParseVolumeID(filepath.Base(dir))
		if err != nil || held(filepath.Join(dir, lockName)) {
			continue
		}
		if _, err := volume.ReadRecord(vfs.OS(), a.state, id); errors.Is(err, volume.ErrNotFound) {
			found = append(found, fmt.Errorf("%s has layers and no volume.json", dir))
		}
	}
	return found
}

// held reports whether a process has a lock, or may have it: one that cannot be looked at
// is no reason to call its process dead. Unlike vfs.FS.Lock it makes no file. A free lock
// is ours for a moment.
func held(lock string) bool {
	f, err := os.Open(lock)
	if err != nil {
		return !errors.Is(err, os.ErrNotExist)
	}
	defer f.Close() // nothing was written
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil
}

// age is for how long a file is there; 0 if that cannot be told.
func age(file string) time.Duration {
	made := born(file)
	if made.IsZero() {
		return 0
	}
	return time.Since(made)
}

func judgeVolumes(volumes []volumeFacts, failed []error, dirtyAge time.Duration) (found []finding) {
	for _, err := range failed {
		mend := "bring volume.json back from a backup of the state directory; what the volume's last snapshot has can be restored from the store"
		if errors.Is(err, manifest.ErrVersion) {
			mend = "a newer lazyvol wrote it: upgrade this one (docs/upgrade.md)"
		}
		found = append(found, fail(mend, "%v", err))
	}
	for _, v := range volumes {
		save := fmt.Sprintf("run 'lazyvol snapshot create %s'", v.ID)
		switch {
		case (v.Creating || v.Deleting) && !v.alive:
			found = append(found, warn(fmt.Sprintf("run 'lazyvol volume delete %s'", v.ID), "making or deleting %s was interrupted", v.ID))
		case len(v.Layers) > 1 && !v.alive:
			found = append(found, warn(save+", or mount it: either settles what is left", "a snapshot of %s was interrupted", v.ID))
		case v.dirty > 0 && v.since > dirtyAge:
			found = append(found, warn(save, "about %s written to %s are on this host only, the first of them perhaps since %s ago", size(v.dirty), v.ID, days(v.since)))
		}
	}
	if len(found) == 0 {
		found = append(found, fine("%d, and none has been without a snapshot of what was written for %s", len(volumes), days(dirtyAge)))
	}
	return found
}

// days prints a duration as people say it.
func days(d time.Duration) string {
	if d < 48*time.Hour {
		return d.Round(time.Minute).String()
	}
	return fmt.Sprintf("%d days", d/(24*time.Hour))
}

// sessionFacts are what is known of a session without asking the store.
type sessionFacts struct {
	*session
	alive bool
	given bool // a loop device may read the local file through it, which needs no process
}

func (a *app) examineSessions(context.Context) []finding {
	sessions, err := a.sessions()
	if err != nil {
		return []finding{fail("mend the state directory", "%v", err)}
	}
	var all []sessionFacts
	for _, s := range sessions {
		_, err := os.Lstat(filepath.Join(s.dir, fs.ImageName))
		all = append(all, sessionFacts{s, held(filepath.Join(s.dir, lockName)), err == nil})
	}
	return judgeSessions(all)
}

func judgeSessions(sessions []sessionFacts) (found []finding) {
	for _, s := range sessions {
		if !s.alive && !s.given {
			found = append(found, warn("'lazyvol gc', or the next mount, removes what is left of it; its folder goes a quarter of an hour later", "%s of %s was killed, and perhaps its pin keeps what it read", s.ID, s.Snapshot))
		}
	}
	if len(found) == 0 {
		found = append(found, fine("%d mounts and exports of snapshots, and none was killed", len(sessions)))
	}
	return found
}

func (a *app) examineCopies(context.Context) []finding {
	records, _ := globIn(filepath.Join(a.state, "copies"), "*/"+copyRecordName) // the pattern is right
	alive := make(map[string]bool)
	for _, record := range records {
		dir := filepath.Dir(record)
		alive[dir] = held(filepath.Join(dir, lockName))
	}
	return judgeCopies(alive)
}

// judgeCopies judges copies, by folder, by whether their processes live.
func judgeCopies(alive map[string]bool) (found []finding) {
	for _, dir := range sortedKeys(alive) {
		if alive[dir] {
			continue
		}
		name := filepath.Base(dir) // the snapshot, and which copy it is
		snap := name[:max(0, strings.LastIndex(name, "-"))]
		found = append(found, warn("run the same 'lazyvol snapshot copy' again: it goes on; or remove "+dir+", and 'lazyvol gc' of the other store gives the copy up", "a copy of %s was interrupted", snap))
	}
	if len(found) == 0 {
		found = append(found, fine("%d under way, and none was interrupted", len(alive)))
	}
	return found
}
