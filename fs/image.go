package fs

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"sync/atomic"
	"syscall"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	// statBlock is the block size shown by stat and statfs. The loop driver
	// takes it for the granularity of discards (drivers/block/loop.c), so it is
	// the page in which devices are zeroed without reading.
	statBlock = 4096

	// attrTimeout is for how long the kernel may believe names and the image's
	// attributes. Nothing but requests through this very mount changes them, and
	// after those, as after Server.Resized, the kernel asks again.
	attrTimeout = time.Hour
)

// image is volume.img. Each method that calls the Device follows one pattern:
// begin a patience, call, translate the error.
type image struct {
	fusefs.Inode
	*mounting
	dev       Device
	coherence *coherence // nil if the Device is read-only

	accessed atomic.Int64 // Unix nanoseconds, as set by utimes
	modified atomic.Int64 // Unix nanoseconds of the last write, or as set by utimes
}

// imageHandle is what an open of the image yields.
type imageHandle struct {
	caching      caching
	directWriter bool // opened with O_DIRECT, for writing
	sync         bool // opened with O_SYNC or O_DSYNC
}

var (
	_ fusefs.NodeGetattrer = (*image)(nil)
	_ fusefs.NodeSetattrer = (*image)(nil)
	_ fusefs.NodeStatfser  = (*image)(nil)
	_ fusefs.NodeOpener    = (*image)(nil)
	_ fusefs.NodeReleaser  = (*image)(nil)
	_ fusefs.NodeReader    = (*image)(nil)
	_ fusefs.NodeWriter    = (*image)(nil)
	_ fusefs.NodeFlusher   = (*image)(nil)
	_ fusefs.NodeFsyncer   = (*image)(nil)
	_ fusefs.NodeAllocater = (*image)(nil)
	_ fusefs.NodeLseeker   = (*image)(nil)
	_ fusefs.NodeIoctler   = (*image)(nil)
)

// begin returns the patience of the request that ctx belongs to, for at most
// limit if that is not 0. The caller ends it.
func (m *mounting) begin(ctx context.Context, limit time.Duration) *patience {
	p := &patience{interrupted: ctx.Done(), connected: m.connected}
	if caller, ok := fuse.FromContext(ctx); ok {
		p.tid = caller.Pid
	}
	if limit > 0 {
		p.deadline = time.Now().Add(limit)
	}
	return p
}

func (m *image) Getattr(_ context.Context, _ fusefs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = m.owner.imageMode(m.dev.ReadOnly())
	out.Nlink = 1
	out.Uid, out.Gid = m.owner.uid, m.owner.gid
	out.Size = uint64(m.dev.Size())
	out.Blksize = statBlock
	used := out.Size
	if a, ok := m.dev.(allocated); ok {
		used = uint64(a.Allocated())
	}
	out.Blocks = (used + 511) / 512 // st_blocks counts in 512 bytes, whatever st_blksize says
	atime, mtime := time.Unix(0, m.accessed.Load()), time.Unix(0, m.modified.Load())
	ctime := mtime
	if ctime.Before(m.since) {
		ctime = m.since
	}
	out.SetTimes(&atime, &mtime, &ctime)
	out.SetTimeout(attrTimeout)
	return 0
}

// Setattr lets the times be set, which copying tools insist on, and forgets
// them with the mount. All else may only be set to what it is.
func (m *image) Setattr(ctx context.Context, f fusefs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok && size != uint64(m.dev.Size()) {
		return unix.EPERM
	}
	if mode, ok := in.GetMode(); ok && mode&0o7777 != m.owner.imageMode(m.dev.ReadOnly()) {
		return unix.EPERM
	}
	if uid, ok := in.GetUID(); ok && uid != m.owner.uid {
		return unix.EPERM
	}
	if gid, ok := in.GetGID(); ok && gid != m.owner.gid {
		return unix.EPERM
	}
	if t, ok := in.GetATime(); ok {
		m.accessed.Store(t.UnixNano())
	}
	if t, ok := in.GetMTime(); ok {
		m.modified.Store(t.UnixNano())
	}
	return m.Getattr(ctx, f, out)
}

// Statfs describes the device as a full filesystem. It is on this node too, as
// the loop driver asks about its file, not about the root.
func (m *image) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	out.Bsize, out.Frsize, out.NameLen = statBlock, statBlock, 255
	out.Blocks = (uint64(m.dev.Size()) + statBlock - 1) / statBlock
	return 0
}

func (m *image) Open(ctx context.Context, flags uint32) (fusefs.FileHandle, uint32, syscall.Errno) {
	if m.dev.ReadOnly() && flags&unix.O_ACCMODE != unix.O_RDONLY {
		return nil, 0, unix.EROFS
	}
	if d, ok := m.dev.(opened); ok {
		p := m.begin(ctx, m.limit)
		defer p.end()
		if err := d.Open(p); err != nil {
			return nil, 0, m.failures.errno("open", 0, m.dev.Size(), err)
		}
	}
	h := &imageHandle{caching: bypass, sync: flags&unix.O_DSYNC != 0} // a bit of O_SYNC too
	switch {
	case flags&unix.O_DIRECT == 0:
		h.caching = m.coherence.openBuffered()
	case flags&unix.O_ACCMODE != unix.O_RDONLY:
		h.directWriter = true
		m.coherence.openDirect()
	}
	switch h.caching {
	case keep:
		return h, fuse.FOPEN_KEEP_CACHE, 0
	case renew:
		return h, 0, 0
	}
	return h, fuse.FOPEN_DIRECT_IO | fuse.FOPEN_PARALLEL_DIRECT_WRITES, 0
}

func (m *image) Release(_ context.Context, f fusefs.FileHandle) syscall.Errno {
	h, ok := f.(*imageHandle)
	switch {
	case !ok:
	case h.caching != bypass:
		m.coherence.releaseBuffered()
	case h.directWriter:
		m.coherence.releaseDirect()
	}
	if d, ok := m.dev.(opened); ok {
		d.Close()
	}
	return 0
}

// errShort is a Device that read less than it was asked for. The kernel would
// fill the rest of the page with zeros.
var errShort = errors.New("device read fewer bytes than asked")

func (m *image) Read(ctx context.Context, _ fusefs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	left := m.dev.Size() - off
	if left <= 0 || len(dest) == 0 {
		return fuse.ReadResultData(nil), 0
	}
	dest = dest[:min(int64(len(dest)), left)]
	p := m.begin(ctx, m.limit)
	defer p.end()
	n, err := m.dev.ReadAt(p, dest, off)
	switch {
	case n == len(dest) && err == io.EOF:
		err = nil
	case n < len(dest) && (err == nil || err == io.EOF):
		err = errShort
	}
	if err != nil {
		return nil, m.failures.errno("read", off, int64(len(dest)), err)
	}
	return fuse.ReadResultData(dest), 0
}

// Write ends at the end of the device, as on a disk: what reaches beyond is cut
// off, and what lies beyond gets ENOSPC.
func (m *image) Write(ctx context.Context, f fusefs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	if m.dev.ReadOnly() {
		return 0, unix.EROFS
	}
	if len(data) == 0 {
		return 0, 0
	}
	left := m.dev.Size() - off
	if left <= 0 {
		return 0, unix.ENOSPC
	}
	data = data[:min(int64(len(data)), left)]
	p := m.begin(ctx, m.limit)
	defer p.end()
	n, err := m.dev.WriteAt(p, data, off)
	if err == nil && n < len(data) {
		err = io.ErrShortWrite
	}
	m.modified.Store(time.Now().UnixNano())
	if h, ok := f.(*imageHandle); ok && h.caching == bypass {
		m.coherence.wroteDirect(off, int64(len(data))) // failed as well: some of it may be there
		if err == nil && h.sync {
			err = m.syncWrite(ctx)
		}
	}
	if err != nil {
		return 0, m.failures.errno("write", off, int64(len(data)), err)
	}
	return uint32(n), 0
}

// syncWrite makes a write of a handle with O_SYNC or O_DSYNC durable. After a
// write that went through its cache the kernel asks for it with an FSYNC; after
// one that bypassed it it does not.
func (m *image) syncWrite(ctx context.Context) error {
	p := m.begin(ctx, 0)
	defer p.end()
	return m.dev.Sync(p)
}

// Flush is close(2), which promises nothing.
func (m *image) Flush(context.Context, fusefs.FileHandle) syscall.Errno { return 0 }

// Fsync never returns ENOSYS, whatever the Device says: the kernel would take
// it for "no need to ask again" and report success ever after.
func (m *image) Fsync(ctx context.Context, _ fusefs.FileHandle, _ uint32) syscall.Errno {
	if m.dev.ReadOnly() {
		return 0
	}
	p := m.begin(ctx, 0)
	defer p.end()
	return m.failures.errno("sync", 0, m.dev.Size(), m.dev.Sync(p))
}

// Allocate is fallocate(2). Punching and zeroing stop at the end of the device.
// Preallocation inside of it succeeds without doing anything: a device's space
// is promised by its size.
func (m *image) Allocate(ctx context.Context, _ fusefs.FileHandle, off, size uint64, mode uint32) syscall.Errno {
	if m.dev.ReadOnly() {
		return unix.EROFS
	}
	end := uint64(m.dev.Size())
	within := off <= end && size <= end-off
	switch mode {
	case 0, unix.FALLOC_FL_KEEP_SIZE:
		if !within {
			return unix.ENOSPC
		}
		return 0
	case unix.FALLOC_FL_ZERO_RANGE:
		if !within {
			return unix.ENOSPC // it would have to grow
		}
	case unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE:
		if off >= end {
			return 0
		}
		size = min(size, end-off)
	default:
		return unix.EOPNOTSUPP
	}
	if size == 0 {
		return 0
	}
	p := m.begin(ctx, m.limit)
	defer p.end()
	err := m.dev.Zero(p, int64(off), int64(size))
	m.modified.Store(time.Now().UnixNano())
	return m.failures.errno("zero", int64(off), int64(size), err)
}

// Lseek is SEEK_DATA and SEEK_HOLE; the kernel does the others itself.
func (m *image) Lseek(ctx context.Context, _ fusefs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	size := m.dev.Size()
	if off >= uint64(size) {
		return 0, unix.ENXIO
	}
	p := m.begin(ctx, m.limit)
	defer p.end()
	var found int64
	var err error
	switch whence {
	case unix.SEEK_DATA:
		found, err = m.dev.NextData(p, int64(off))
		if errors.Is(err, io.EOF) {
			return 0, unix.ENXIO
		}
	case unix.SEEK_HOLE:
		found, err = m.dev.NextHole(p, int64(off))
	default:
		return 0, unix.EINVAL
	}
	if err != nil {
		return 0, m.failures.errno("seek", int64(off), size-int64(off), err)
	}
	return uint64(found), 0
}

// Ioctl answers BLKGETSIZE64, with which tools that expect a block device ask
// for its size. The kernel passes on only ioctls that say how long their result
// is, which rules out BLKSSZGET.
func (m *image) Ioctl(_ context.Context, _ fusefs.FileHandle, cmd uint32, _ uint64, _, output []byte) (int32, syscall.Errno) {
	if cmd != unix.BLKGETSIZE64 || len(output) < 8 {
		return 0, unix.ENOTTY
	}
	binary.NativeEndian.PutUint64(output, uint64(m.dev.Size()))
	return 0, 0
}
