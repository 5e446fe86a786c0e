package fs

import (
	"context"
	"syscall"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// mounting is what the nodes of one mount have in common.
type mounting struct {
	owner     owner
	limit     time.Duration // of a request's patience; 0: none
	failures  *failures
	connected func() bool
	since     time.Time
}

func newMounting(o Options, connected func() bool) *mounting {
	return &mounting{
		owner:     owner{uid: o.UID, gid: o.GID, shared: o.AllowOther},
		limit:     o.ReadDeadline,
		failures:  newFailures(o.Log),
		connected: connected,
		since:     time.Now(),
	}
}

// newImage returns the node of a Device that was last modified at a time.
func (m *mounting) newImage(d Device, modified time.Time) *image {
	i := &image{mounting: m, dev: d}
	i.accessed.Store(modified.UnixNano())
	i.modified.Store(modified.UnixNano())
	if !d.ReadOnly() {
		i.coherence = newCoherence(dropPages(&i.Inode))
	}
	return i
}

// newStatus returns the node of the status; nil without one.
func (m *mounting) newStatus(content func() []byte) *status {
	if content == nil {
		return nil
	}
	return &status{owner: m.owner, content: content}
}

// content is the filesystem of one mount.
type content struct {
	root    fusefs.InodeEmbedder
	many    bool   // files, so that the kernel asks for names and attributes at once
	resized func() // the size of its image has changed
	close   func() // ends what it started; the mount is gone by then
}

// oneImage is a directory with the image and the status.
func (m *mounting) oneImage(d Device, o Options) content {
	image := m.newImage(d, m.since)
	return content{
		root:    &root{mounting: m, image: image, status: m.newStatus(o.Status)},
		resized: image.forgetAttributes,
		close:   image.coherence.close,
	}
}

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

// folderMode returns the permissions of a directory, which nobody may write.
func (o owner) folderMode() uint32 {
	if o.shared {
		return 0o555
	}
	return 0o500
}

// root is the directory of a mount. Its two children are there from the start
// and stay.
type root struct {
	fusefs.Inode
	*mounting
	image  *image
	status *status // nil: none
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
	out.Mode = r.owner.folderMode()
	out.Nlink = 2
	out.Uid, out.Gid = r.owner.uid, r.owner.gid
	out.SetTimes(&r.since, &r.since, &r.since)
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
