package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/lazyvol/lazyvol/volume"
)

// stateFacts are what is known of the state directory.
type stateFacts struct {
	dir     string
	missing bool
	parent  error // of making it, as far as that can be told; only if it is missing
	stat    error
	isDir   bool
	mode    uint32 // permissions
	owner   uint32
	user    uint32 // who asks
	write   error  // of making a file in it
}

func (a *app) examineState(context.Context) finding {
	f := stateFacts{dir: a.state, user: uint32(os.Geteuid())}
	var st unix.Stat_t
	err := unix.Stat(a.state, &st)
	switch {
	case errors.Is(err, unix.ENOENT):
		f.missing = true
		f.parent = unix.Access(existing(filepath.Dir(a.state)), unix.W_OK|unix.X_OK)
	case err != nil:
		f.stat = err
	default:
		f.isDir, f.mode, f.owner = st.Mode&unix.S_IFMT == unix.S_IFDIR, st.Mode&0o777, st.Uid
		if f.isDir {
			f.write = tryWrite(a.state)
		}
	}
	return judgeState(f)
}

// existing returns the nearest directory above path, or path, that is there.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) || path == filepath.Dir(path) {
			return path
		}
		path = filepath.Dir(path)
	}
}

// tryWrite makes a file in a directory, and removes it.
func tryWrite(dir string) (err error) {
	f, err := os.CreateTemp(dir, probePattern)
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// probePattern names the files of a doctor that was killed.
const probePattern = "doctor-*.tmp"

func judgeState(f stateFacts) finding {
	switch {
	case f.missing && f.parent != nil:
		return fail(fmt.Sprintf("make it as root ('install -d -m 700 -o %d %s'), or give another with --state", f.user, f.dir), "%s is not there and cannot be made: %v", f.dir, f.parent)
	case f.missing:
		return fine("%s is not there yet; the first command that needs it makes it", f.dir)
	case f.stat != nil:
		return fail("mend the path, or give another with --state", "%s: %v", f.dir, f.stat)
	case !f.isDir:
		return fail("remove it, or give another with --state", "%s is no directory", f.dir)
	case f.owner != f.user && f.user == 0:
		return warn(fmt.Sprintf("run lazyvol as user %d always, or 'chown -R root %s'", f.owner, f.dir), "%s belongs to user %d, who cannot use what root leaves there", f.dir, f.owner)
	case f.owner != f.user:
		return fail("give a directory of your own with --state, or run it as that user", "%s belongs to user %d, and you are user %d", f.dir, f.owner, f.user)
	case errors.Is(f.write, unix.EROFS):
		return fail("mount it writable, or give another with --state", "%s: the filesystem is read-only", f.dir)
	case f.write != nil:
		return fail(fmt.Sprintf("'chmod 700 %s'; see whether its filesystem is full", f.dir), "%s cannot be written to: %v", f.dir, f.write)
	case f.mode&0o077 != 0:
		return warn("'chmod 700 "+f.dir+"'", "%s has the mode %04o: other users can see what is in it", f.dir, f.mode)
	case f.mode != 0o700:
		return warn("'chmod 700 "+f.dir+"'", "%s has the mode %04o: its owner lacks rights", f.dir, f.mode)
	}
	return fine("%s is yours alone and writable", f.dir)
}

// fsFacts are what is known of the filesystem of the state directory.
type fsFacts struct {
	dir    string
	typ    int64
	unmade bool  // it is not there; dir is above it, and nothing was probed
	failed error // of a probe
	sparse bool  // a hole takes no space
	punch  error // of making one
	gives  bool  // space back when one is made
	most   int64 // bytes that a file may have: of largestFiles
}

// largestFiles are the sizes of files that are tried, in bytes: EBS's largest volume,
// what ext4 can, and what is worth no word.
var largestFiles = []int64{64 << 40, 16<<40 - 4<<10, enoughFile, 16 * probeData}

const (
	enoughFile = 1 << 40
	probeData  = 1 << 20
)

func (a *app) examineFilesystem(context.Context) finding {
	f := fsFacts{dir: existing(a.state)}
	var st unix.Statfs_t
	if err := unix.Statfs(f.dir, &st); err != nil {
		f.failed = err
		return judgeFilesystem(f)
	}
	f.typ = int64(st.Type)
	if f.unmade = f.dir != a.state; !f.unmade {
		f.failed = f.probe()
	}
	return judgeFilesystem(f)
}

// probe tries what layers need on a file, and removes it.
func (f *fsFacts) probe() (err error) {
	file, err := os.CreateTemp(f.dir, probePattern)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close(), os.Remove(file.Name())) }()
	allocated := func() int64 {
		var st unix.Stat_t
		if err == nil {
			err = file.Sync() // some allocate late
		}
		if err == nil {
			err = unix.Fstat(int(file.Fd()), &st)
		}
		return st.Blocks * 512
	}
	for _, f.most = range largestFiles {
		if err = file.Truncate(f.most); err == nil {
			break
		}
	}
	if err != nil {
		return err
	}
	data := make([]byte, probeData)
	for i := range data {
		data[i] = byte(i) | 1
	}
	if _, err := file.WriteAt(data, 8*probeData); err != nil {
		return err
	}
	before := allocated()
	f.sparse = before < 8*probeData
	f.punch = unix.Fallocate(int(file.Fd()), unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, 8*probeData, probeData/2)
	f.gives = allocated() < before
	if f.punch != nil || err != nil {
		return err
	}
	if _, err := file.ReadAt(data[:4], 8*probeData); err != nil {
		return err
	}
	if data[0] != 0 {
		f.punch = errors.New("a hole that was made does not read as zeros")
	}
	return err
}

// Filesystems that keep no promise of what survives a power cut, or that several hosts
// may write to, or that are gone after it. Magic numbers of statfs(2).
var doubtful = map[int64]string{
	unix.NFS_SUPER_MAGIC:       "NFS, over the network: locks and caches of other hosts may interfere",
	unix.CIFS_SUPER_MAGIC:      "CIFS, over the network: locks and caches of other hosts may interfere",
	unix.SMB2_SUPER_MAGIC:      "SMB, over the network: locks and caches of other hosts may interfere",
	unix.SMB_SUPER_MAGIC:       "SMB, over the network: locks and caches of other hosts may interfere",
	unix.AFS_FS_MAGIC:          "AFS, over the network: locks and caches of other hosts may interfere",
	unix.CEPH_SUPER_MAGIC:      "CephFS, over the network: locks and caches of other hosts may interfere",
	unix.V9FS_MAGIC:            "9p, another machine's: what fsync promises depends on that",
	unix.FUSE_SUPER_MAGIC:      "a FUSE filesystem: what fsync promises depends on its daemon",
	unix.OVERLAYFS_SUPER_MAGIC: "overlayfs, as a container's root: gone with the container",
	unix.TMPFS_MAGIC:           "tmpfs, in memory: what was written to volumes is lost when the machine ends, and caches take memory",
	unix.RAMFS_MAGIC:           "ramfs, in memory: what was written to volumes is lost when the machine ends, and caches take memory",
}

func judgeFilesystem(f fsFacts) finding {
	const other = "put the state directory (--state, LAZYVOL_STATE) on a local disk with ext4, XFS or btrfs"
	switch {
	case f.failed != nil:
		return fail("mend what the error says, or "+other, "a probe in %s: %v", f.dir, f.failed)
	case f.unmade:
	case f.punch != nil:
		return fail(other, "files cannot give space back (punch hole): %v", f.punch)
	case !f.sparse:
		return fail(other, "files are not sparse: a hole takes space")
	}
	if what := doubtful[f.typ]; what != "" {
		return warn(other, "%s is on %s", f.dir, what)
	}
	switch {
	case f.unmade:
		return skip("the state directory is not there yet; %s is not of a doubtful kind", f.dir)
	case f.most < enoughFile:
		return warn(other+" if volumes shall be larger", "files cannot have 1 TiB, and so no volume can")
	case !f.gives: // as of compressed or copy-on-write ones, which count late
		return fine("files are sparse and may have %s; whether holes give space back at once could not be seen", size(f.most))
	}
	return fine("files are sparse, give space back, and may have %s", size(f.most))
}

// spaceFacts are in bytes.
type spaceFacts struct {
	dir                string
	failed             error
	total, free        int64
	inodes, inodesFree int64 // 0: the filesystem has no fixed number
	clean              int64 // what the store has too
}

const (
	// volume.Budget leaves a tenth of the filesystem free, without --cache-size.
	freeShare = 10

	leastFree   = 64 << 20 // a write layer's map and a pack under way
	leastInodes = 1000
)

func (a *app) examineSpace(context.Context) finding {
	f := spaceFacts{dir: existing(a.state)}
	var st unix.Statfs_t
	if f.failed = unix.Statfs(f.dir, &st); f.failed == nil {
		f.total, f.free = int64(st.Blocks)*st.Frsize, int64(st.Bavail)*st.Frsize
		f.inodes, f.inodesFree = int64(st.Files), int64(st.Ffree)
		f.clean = cleanBytes(a.state)
	}
	return judgeSpace(f)
}

// cleanBytes is how much the bases and clean layers of a state directory take. What
// cannot be looked at is left out.
func cleanBytes(state string) int64 {
	total := int64(0)
	for _, pattern := range []string{"bases/*/*/data", "volumes/*/clean/data"} {
		files, _ := globIn(state, pattern) // which is right
		for _, file := range files {
			total += allocatedBytes(file)
		}
	}
	return total
}

// allocatedBytes is the space that a file takes; 0 if it cannot be looked at.
func allocatedBytes(file string) int64 {
	var st unix.Stat_t
	if unix.Stat(file, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}

func judgeSpace(f spaceFacts) finding {
	const room = "make room on it: 'lazyvol snapshot create', which needs a megabyte itself, and 'lazyvol volume delete' free what volumes hold"
	switch {
	case f.failed != nil:
		return fail("mend the path", "%s: %v", f.dir, f.failed)
	case f.free < leastFree:
		return fail(room, "%s are free of %s: writes to volumes and snapshots fail", size(f.free), size(f.total))
	case f.inodes > 0 && f.inodesFree < leastInodes:
		return fail("remove files from it", "%d files more can be made: volumes and mounts fail", f.inodesFree)
	case f.free < f.total/freeShare:
		return warn(room+"; or say with --cache-size how much may be kept", "%s are free of %s, less than a tenth: hardly anything that is fetched is kept (%s are)", size(f.free), size(f.total), size(f.clean))
	}
	return fine("%s are free of %s; %s are kept of what the store has", size(f.free), size(f.total), size(f.clean))
}

// layersOf returns the data files of a volume's write layers.
func layersOf(state string, r volume.Record) []string {
	files := make([]string, len(r.Layers))
	for i, n := range r.Layers {
		files[i] = filepath.Join(volume.Dir(state, r.ID), "layers", fmt.Sprint(n), "data")
	}
	return files
}
