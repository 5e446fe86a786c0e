package fs

import (
	"context"
	"syscall"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// status is status.json.
type status struct {
	fusefs.Inode
	owner   owner
	content func() []byte
}

// statusHandle holds the status as it was when it was opened, so that a reader
// never gets the beginning of one and the end of another.
type statusHandle struct {
	content []byte
}

var (
	_ fusefs.NodeGetattrer = (*status)(nil)
	_ fusefs.NodeSetattrer = (*status)(nil)
	_ fusefs.NodeOpener    = (*status)(nil)
	_ fusefs.FileReader    = (*statusHandle)(nil)
)

// Getattr shows the size a reader would get now. It may differ by a few bytes
// from that of a handle; readers that go on until the end do not mind, as the
// handle is read past the page cache.
func (s *status) Getattr(_ context.Context, _ fusefs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = s.owner.imageMode(true)
	out.Nlink = 1
	out.Uid, out.Gid = s.owner.uid, s.owner.gid
	out.Size = uint64(len(s.content()))
	out.Blksize = statBlock
	out.Blocks = (out.Size + 511) / 512
	now := time.Now()
	out.SetTimes(&now, &now, &now)
	return 0 // and no timeout: it changes by itself
}

func (s *status) Setattr(context.Context, fusefs.FileHandle, *fuse.SetAttrIn, *fuse.AttrOut) syscall.Errno {
	return unix.EPERM
}

func (s *status) Open(_ context.Context, flags uint32) (fusefs.FileHandle, uint32, syscall.Errno) {
	if flags&unix.O_ACCMODE != unix.O_RDONLY {
		return nil, 0, unix.EPERM
	}
	return &statusHandle{content: s.content()}, fuse.FOPEN_DIRECT_IO, 0
}

func (h *statusHandle) Read(_ context.Context, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	if off >= int64(len(h.content)) {
		return fuse.ReadResultData(nil), 0
	}
	return fuse.ReadResultData(dest[:copy(dest, h.content[off:])]), 0
}
