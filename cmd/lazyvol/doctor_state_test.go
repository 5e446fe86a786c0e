package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/internal/vfs"
	"github.com/lazyvol/lazyvol/manifest"
	"github.com/lazyvol/lazyvol/volume"
)

func TestDoctorJudgesAStateDirectory(t *testing.T) {
	const gib = 1 << 30
	state := stateFacts{dir: "/s", isDir: true, mode: 0o700, owner: 1000, user: 1000}
	stateWith := func(change func(*stateFacts)) finding { f := state; change(&f); return judgeState(f) }
	disk := fsFacts{dir: "/s", typ: unix.EXT4_SUPER_MAGIC, sparse: true, gives: true, most: 64 << 40}
	diskWith := func(change func(*fsFacts)) finding { f := disk; change(&f); return judgeFilesystem(f) }
	space := spaceFacts{dir: "/s", total: 100 * gib, free: 50 * gib, inodes: 1e6, inodesFree: 1e5}
	spaceWith := func(change func(*spaceFacts)) finding { f := space; change(&f); return judgeSpace(f) }
	checkJudged(t, map[string]judged{
		"state":               {judgeState(state), levelOK, "/s"},
		"no state":            {stateWith(func(f *stateFacts) { f.missing = true }), levelOK, "not there yet"},
		"no way to state":     {stateWith(func(f *stateFacts) { f.missing, f.parent = true, unix.EACCES }), levelFailed, "install -d -m 700 -o 1000 /s"},
		"state unseen":        {stateWith(func(f *stateFacts) { f.stat = unix.EACCES }), levelFailed, "--state"},
		"state is a file":     {stateWith(func(f *stateFacts) { f.isDir = false }), levelFailed, "no directory"},
		"another's":           {stateWith(func(f *stateFacts) { f.owner = 7 }), levelFailed, "user 7"},
		"another's, for root": {stateWith(func(f *stateFacts) { f.user = 0 }), levelWarning, "user 1000"},
		"read-only":           {stateWith(func(f *stateFacts) { f.write = unix.EROFS }), levelFailed, "read-only"},
		"unwritable":          {stateWith(func(f *stateFacts) { f.write = unix.EACCES }), levelFailed, "chmod 700"},
		"open to others":      {stateWith(func(f *stateFacts) { f.mode = 0o755 }), levelWarning, "0755"},
		"closed to itself":    {stateWith(func(f *stateFacts) { f.mode = 0o500 }), levelWarning, "0500"},

		"disk":             {judgeFilesystem(disk), levelOK, "64 TiB"},
		"no probe":         {diskWith(func(f *fsFacts) { f.failed = unix.ENOSPC }), levelFailed, "no space"},
		"nothing to probe": {diskWith(func(f *fsFacts) { f.unmade, f.sparse = true, false }), levelSkipped, "not there yet"},
		"doubtful already": {diskWith(func(f *fsFacts) { f.unmade, f.typ = true, unix.TMPFS_MAGIC }), levelWarning, "tmpfs"},
		"no holes":         {diskWith(func(f *fsFacts) { f.punch = unix.EOPNOTSUPP }), levelFailed, "punch hole"},
		"not sparse":       {diskWith(func(f *fsFacts) { f.sparse = false }), levelFailed, "sparse"},
		"small files":      {diskWith(func(f *fsFacts) { f.most = 16 << 20 }), levelWarning, "1 TiB"},
		"ext4":             {diskWith(func(f *fsFacts) { f.most = 16 << 40 }), levelOK, "may have 16 TiB"},
		"gives late":       {diskWith(func(f *fsFacts) { f.gives = false }), levelOK, "could not be seen"},
		"NFS":              {diskWith(func(f *fsFacts) { f.typ = unix.NFS_SUPER_MAGIC }), levelWarning, "NFS"},
		"tmpfs":            {diskWith(func(f *fsFacts) { f.typ = unix.TMPFS_MAGIC }), levelWarning, "lost"},
		"tmpfs, no holes":  {diskWith(func(f *fsFacts) { f.typ, f.sparse = unix.TMPFS_MAGIC, false }), levelFailed, "sparse"},

		"space":            {judgeSpace(space), levelOK, "50 GiB are free of 100 GiB"},
		"no fixed inodes":  {spaceWith(func(f *spaceFacts) { f.inodes, f.inodesFree = 0, 0 }), levelOK, ""},
		"little space":     {spaceWith(func(f *spaceFacts) { f.free, f.clean = 9*gib, 3*gib }), levelWarning, "3.0 GiB are"},
		"no space":         {spaceWith(func(f *spaceFacts) { f.free = 1 << 20 }), levelFailed, "fail"},
		"no inodes":        {spaceWith(func(f *spaceFacts) { f.inodesFree = 3 }), levelFailed, "3 files"},
		"space of nothing": {spaceWith(func(f *spaceFacts) { f.failed = unix.EIO }), levelFailed, "/s"},
	})
}

// only returns the only finding.
func only(t *testing.T, found []finding) finding {
	t.Helper()
	if len(found) != 1 {
		t.Fatalf("found %+v", found)
	}
	return found[0]
}

func TestDoctorJudgesWhatIsLeft(t *testing.T) {
	const day = 24 * time.Hour
	mounts := func(err error) finding {
		return only(t, judgeMounts(map[string]error{"/mnt/good": nil, "/mnt/a": err}))
	}
	loops := func(backing string, err error) finding {
		return only(t, judgeLoops([]loopFile{{"/dev/loop1", "/x/volume.img", nil}, {"/dev/loop7", backing, err}}))
	}
	record := volume.Record{ID: "vol-0123456789abcdef0", Layers: []int64{1}}
	volumes := func(change func(*volumeFacts)) finding {
		f := volumeFacts{Record: record, dirty: 1 << 20, since: 8 * day}
		change(&f)
		return only(t, judgeVolumes([]volumeFacts{f}, nil, 7*day))
	}
	session := func(alive, given bool) finding {
		return only(t, judgeSessions([]sessionFacts{{&session{ID: "mount-1"}, alive, given}}))
	}
	checkJudged(t, map[string]judged{
		"mount":           {mounts(nil), levelOK, "2"},
		"another's mount": {mounts(unix.EACCES), levelOK, ""},
		"dead mount":      {mounts(unix.ENOTCONN), levelFailed, "lazyvol unmount /mnt/a"},
		"stuck mount":     {mounts(errNoAnswer), levelFailed, "does not answer"},
		"loop":            {loops("/y/volume.img", nil), levelOK, "2"},
		"another's loop":  {loops("/y/volume.img", unix.EACCES), levelOK, ""},
		"dead loop":       {loops("/y/volume.img", unix.ENOTCONN), levelFailed, "losetup --detach /dev/loop7"},
		"deleted file":    {loops("/y/volume.img (deleted)", unix.ENOENT), levelWarning, "deleted, /y/volume.img"},
		"out of sight":    {loops("/volume.img", unix.ENOENT), levelWarning, "out of sight"},
		"stuck loop":      {loops("/y/volume.img", errNoAnswer), levelFailed, "does not answer"},

		"dirty":              {volumes(func(*volumeFacts) {}), levelWarning, "lazyvol snapshot create vol-0123456789abcdef0"},
		"dirty in use":       {volumes(func(f *volumeFacts) { f.alive = true }), levelWarning, "8 days"},
		"dirty of late":      {volumes(func(f *volumeFacts) { f.since = 6 * day }), levelOK, ""},
		"clean for long":     {volumes(func(f *volumeFacts) { f.dirty = 0 }), levelOK, "1,"},
		"interrupted":        {volumes(func(f *volumeFacts) { f.Layers = []int64{1, 2} }), levelWarning, "interrupted"},
		"snapshot under way": {volumes(func(f *volumeFacts) { f.Layers, f.alive, f.since = []int64{1, 2}, true, 0 }), levelOK, ""},
		"half made":          {volumes(func(f *volumeFacts) { f.Creating = true }), levelWarning, "volume delete"},
		"half deleted":       {volumes(func(f *volumeFacts) { f.Deleting = true }), levelWarning, "volume delete"},
		"being made":         {volumes(func(f *volumeFacts) { f.Creating, f.alive, f.since = true, true, 0 }), levelOK, ""},
		"unreadable":         {only(t, judgeVolumes(nil, []error{errors.New("checksum")}, day)), levelFailed, "checksum"},
		"of a newer lazyvol": {only(t, judgeVolumes(nil, []error{fmt.Errorf("read: %w", manifest.ErrVersion)}, day)), levelFailed, "docs/upgrade.md"},

		"session":           {session(true, false), levelOK, "1 "},
		"dead session":      {session(false, false), levelWarning, "gc"},
		"native loop's one": {session(false, true), levelOK, ""},
		"copy":              {only(t, judgeCopies(map[string]bool{"/s/copies/snap-1a2b3c4d567890abc-01ff": true})), levelOK, "1 "},
		"dead copy":         {only(t, judgeCopies(map[string]bool{"/s/copies/snap-1a2b3c4d567890abc-01ff": false})), levelWarning, "copy of snap-1a2b3c4d567890abc was"},
	})
}

// A volume whose record is gone is listed nowhere; the doctor tells of what is left of it.
func TestDoctorFindsVolumesWithoutARecord(t *testing.T) {
	a := &app{state: filepath.Join(t.TempDir(), "[a]")} // a name, and no pattern
	dir := volume.Dir(a.state, "vol-0123456789abcdef0")
	if err := os.MkdirAll(filepath.Join(dir, "layers", "1"), 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := vfs.OS().Lock(filepath.Join(dir, lockName), true)
	if err != nil {
		t.Fatal(err)
	}
	if f := only(t, a.examineVolumes(t.Context(), time.Hour)); f.Result != levelOK {
		t.Errorf("one that is just being made: %+v", f)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	if f := only(t, a.examineVolumes(t.Context(), time.Hour)); f.Result != levelFailed || !strings.Contains(f.Message, dir+" has layers and no volume.json") {
		t.Errorf("%+v", f)
	}
}

func TestHeldTellsWhetherAProcessHasALock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	if held(path) {
		t.Error("a lock that is not there is held")
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("looking made it")
	}
	lock, err := vfs.OS().Lock(path, true)
	if err != nil {
		t.Fatal(err)
	}
	if !held(path) {
		t.Error("it is not held")
	}
	if err := lock.Close(); err != nil || held(path) {
		t.Errorf("it is held when nobody has it (%v)", err)
	}
}

func TestProbesOfTheFilesystemLeaveNothing(t *testing.T) {
	f := fsFacts{dir: t.TempDir()}
	if err := f.probe(); err != nil || !f.sparse || f.punch != nil || f.most < enoughFile {
		t.Errorf("%v, %+v", err, f)
	}
	if err := tryWrite(f.dir); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(f.dir); err != nil || len(left) > 0 {
		t.Errorf("left %v (%v)", left, err)
	}
	if err := tryWrite(filepath.Join(f.dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if got := existing(filepath.Join(f.dir, "a", "b")); got != f.dir {
		t.Errorf("the nearest directory is %s", got)
	}
	if d := days(49 * time.Hour); d != "2 days" || !strings.HasPrefix(days(time.Hour), "1h") {
		t.Error(d)
	}
}

// A lock that cannot be looked at is not one that nobody has.
func TestALockThatCannotBeReadMayBeHeld(t *testing.T) {
	lock := filepath.Join(t.TempDir(), lockName)
	if held(lock) {
		t.Error("one that is not there is held")
	}
	if err := os.Symlink(lock, lock); err != nil { // to itself
		t.Fatal(err)
	}
	if !held(lock) {
		t.Error("one that cannot be opened is free")
	}
	if err := errors.Join(os.Remove(lock), os.WriteFile(lock, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if held(lock) {
		t.Error("one that nobody has is held")
	}
}
