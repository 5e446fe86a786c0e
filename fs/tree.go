package fs

import (
	"context"
	"syscall"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// tree is the filesystem of one mount: a directory with two files.
type tree struct {
	root     *root
	failures *failures
}

func newTree(d Device, o Options, connected func() bool) *tree {
	now := time.Now()
	owner := owner{uid: o.UID, gid: o.GID, shared: o.AllowOther}
	failures := newFailures(o.Log)
	image := &image{
		dev:       d,
		owner:     owner,
		limit:     o.ReadDeadline,
		failures:  failures,
		connected: connected,
		mounted:   now,
	}
	image.accessed.Store(now.UnixNano())
	image.modified.Store(now.UnixNano())
	image.coherence = newCoherence(dropPages(&image.Inode))
	root := &root{owner: owner, mounted: now, image: image}
	if o.Status != nil {
		root.status = &status{owner: owner, content: o.Status}
	}
	return &tree{root: root, failures: failures}
}

// close ends what newTree started. The mount is gone by then.
func (t *tree) close() { t.root.image.coherence.close() }

// owner is how the files of a mount look from outside.
type owner struct {
	uid, gid uint32
	shared   bool // with other users (allow_other)
}

// imageMode returns the permissions of the image: its owner's alone, or like
// those of a block device its group's too; what cannot be written anyone may
// read.
func (o owner) imageMode(readOnly bool) uint32 {
	switch {
	case readOnly && o.shared:
		return 0o444
	case readOnly:
		return 0o400
	case o.shared:
		return 0o660
	default:
		return 0o600
	}
}

// root is the directory of a mount. Its two children are there from the start
// and stay.
type root struct {
	fusefs.Inode
	owner   owner
	mounted time.Time
	image   *image
	status  *status // nil: none
}

var (
	_ fusefs.NodeOnAdder   = (*root)(nil)
	_ fusefs.NodeGetattrer = (*root)(nil)
	_ fusefs.NodeFsyncer   = (*root)(nil)
	_ fusefs.NodeStatfser  = (*root)(nil)
	_ fusefs.NodeUnlinker  = (*root)(nil)
	_ fusefs.NodeRmdirer   = (*root)(nil)
)

func (r *root) OnAdd(ctx context.Context) {
	r.AddChild(ImageName, r.NewPersistentInode(ctx, r.image, fusefs.StableAttr{Ino: 2}), false)
	if r.status != nil {
		r.AddChild(StatusName, r.NewPersistentInode(ctx, r.status, fusefs.StableAttr{Ino: 3}), false)
	}
}

func (r *root) Getattr(_ context.Context, _ fusefs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = 0o500
	if r.owner.shared {
		out.Mode = 0o555
	}
	out.Nlink = 2
	out.Uid, out.Gid = r.owner.uid, r.owner.gid
	out.SetTimes(&r.mounted, &r.mounted, &r.mounted)
	return 0 // and no timeout: whoever comes this way learns whether the daemon lives
}

func (r *root) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	out.Bsize, out.Frsize, out.NameLen = statBlock, statBlock, 255
	return 0
}

// Fsync of a directory that never changes has nothing to do.
func (r *root) Fsync(context.Context, fusefs.FileHandle, uint32) syscall.Errno { return 0 }

// Unlink and Rmdir refuse, as go-fuse would let a missing method succeed.
func (r *root) Unlink(context.Context, string) syscall.Errno { return unix.EPERM }
func (r *root) Rmdir(context.Context, string) syscall.Errno  { return unix.EPERM }
