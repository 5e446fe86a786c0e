package fs

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"strings"
	"syscall"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A Tree is folders of images, all read-only, that may come and go.
type Tree interface {
	// Root returns what there is, as a Folder that is not changed any more. If fresh
	// is set somebody is listing a folder, or asks for a name that was not there:
	// then it may take the time to find out what is new. Else it must not block.
	// It is called from many goroutines at once.
	Root(ctx context.Context, fresh bool) *Folder
}

// A Folder is a directory of a Tree at one moment. What is in it has names as a file
// may have: of 1 to 255 bytes, without / and NUL, and neither "." nor "..".
type Folder struct {
	Modified time.Time // zero: when it was mounted
	Folders  map[string]*Folder
	Images   map[string]Image
	Links    map[string]Link
}

// An Image is a Device in a Folder. The same name in the same folder always means the
// same bytes, as the kernel keeps them.
type Image struct {
	Device
	Modified time.Time
}

// A Link is a symbolic link in a Folder.
type Link struct {
	To       string
	Modified time.Time
}

// nameTimeout is for how long the kernel may believe that a name of a Tree is there.
const nameTimeout = time.Second

// MountTree shows a tree on the directory dir, with the status beside what is in its
// root. Devices in it are opened by the open(2) of their image if they have the
// methods Open and Close; until then only their size is asked for. All else is as for
// Mount.
func MountTree(dir string, t Tree, o Options) (*Server, error) {
	return mount(dir, true, o, func(m *mounting, o Options) content {
		root := &folder{mounting: m, tree: t, status: m.newStatus(o.Status)}
		return content{root: root, many: true, resized: func() {}, close: func() {}}
	})
}

// folder is the node of a Folder. Which one that is is looked up by its names at each
// request, as the next one may be of another Tree's Root.
type folder struct {
	fusefs.Inode
	*mounting
	tree   Tree
	names  []string // from the root; none: the root itself
	status *status  // in the root; nil: none
}

var (
	_ fusefs.NodeOnAdder   = (*folder)(nil)
	_ fusefs.NodeGetattrer = (*folder)(nil)
	_ fusefs.NodeLookuper  = (*folder)(nil)
	_ fusefs.NodeReaddirer = (*folder)(nil)
	_ fusefs.NodeFsyncer   = (*folder)(nil)
	_ fusefs.NodeStatfser  = (*folder)(nil)
	_ fusefs.NodeUnlinker  = (*folder)(nil)
	_ fusefs.NodeRmdirer   = (*folder)(nil)
)

// OnAdd adds the status, which stays, to the root.
func (f *folder) OnAdd(ctx context.Context) {
	if f.status != nil {
		f.AddChild(StatusName, f.NewPersistentInode(ctx, f.status, f.identity(StatusName, unix.S_IFREG)), false)
	}
}

// now returns the folder as it is; nil if it is there no more.
func (f *folder) now(ctx context.Context, fresh bool) *Folder {
	p := f.begin(ctx, f.limit)
	defer p.end()
	found := f.tree.Root(p, fresh)
	for _, name := range f.names {
		if found == nil {
			return nil
		}
		found = found.Folders[name]
	}
	return found
}

func (f *folder) Getattr(ctx context.Context, _ fusefs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	found := f.now(ctx, false)
	if found == nil {
		return unix.ENOENT
	}
	f.describe(found, &out.Attr)
	return 0 // and no timeout, as for the root of a single image
}

func (f *folder) describe(is *Folder, out *fuse.Attr) {
	out.Mode = f.owner.folderMode()
	out.Nlink = uint32(2 + len(is.Folders))
	out.Uid, out.Gid = f.owner.uid, f.owner.gid
	at := is.Modified
	if at.IsZero() {
		at = f.since
	}
	out.SetTimes(&at, &at, &at)
}

func (f *folder) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fusefs.Inode, syscall.Errno) {
	out.SetEntryTimeout(nameTimeout)
	if f.status != nil && name == StatusName {
		fill(ctx, f.status, out)
		return f.status.EmbeddedInode(), 0
	}
	for _, fresh := range []bool{false, true} {
		is := f.now(ctx, fresh)
		if is == nil {
			return nil, unix.ENOENT
		}
		if below, ok := is.Folders[name]; ok {
			node := &folder{mounting: f.mounting, tree: f.tree, names: append(slices.Clip(f.names), name)}
			child := f.NewInode(ctx, node, f.identity(name, unix.S_IFDIR))
			f.describe(below, &out.Attr)
			return child, 0
		}
		if at, ok := is.Images[name]; ok {
			node := f.newImage(at.Device, at.Modified)
			fill(ctx, node, out)
			return f.NewInode(ctx, node, f.identity(name, unix.S_IFREG)), 0
		}
		if to, ok := is.Links[name]; ok {
			node := &link{mounting: f.mounting, is: to}
			fill(ctx, node, out)
			return f.NewInode(ctx, node, f.identity(name, unix.S_IFLNK)), 0
		}
	}
	return nil, unix.ENOENT
}

// fill says what a child looks like.
func fill(ctx context.Context, node fusefs.NodeGetattrer, out *fuse.EntryOut) {
	var attr fuse.AttrOut
	node.Getattr(ctx, nil, &attr)
	out.Attr = attr.Attr
	out.SetAttrTimeout(attr.Timeout())
}

// identity returns how go-fuse, and the user, tell a child from all other nodes: by
// its path, always the same.
func (f *folder) identity(name string, kind uint32) fusefs.StableAttr {
	sum := sha256.Sum256([]byte(strings.Join(f.names, "/") + "/" + name))
	// The first inodes are the root's, and the last is reserved.
	return fusefs.StableAttr{
		Mode: kind,
		Ino:  binary.BigEndian.Uint64(sum[:])>>1 | 1<<62,
		Gen:  binary.BigEndian.Uint64(sum[8:]),
	}
}

// Readdir lists the folder as it is now, in the order of the names.
func (f *folder) Readdir(ctx context.Context) (fusefs.DirStream, syscall.Errno) {
	is := f.now(ctx, true)
	if is == nil {
		return nil, unix.ENOENT
	}
	entries := make([]fuse.DirEntry, 0, 1+len(is.Folders)+len(is.Images)+len(is.Links))
	add := func(name string, kind uint32) {
		entries = append(entries, fuse.DirEntry{Name: name, Mode: kind, Ino: f.identity(name, kind).Ino})
	}
	if f.status != nil {
		add(StatusName, unix.S_IFREG)
	}
	for name := range is.Folders {
		add(name, unix.S_IFDIR)
	}
	for name := range is.Images {
		add(name, unix.S_IFREG)
	}
	for name := range is.Links {
		add(name, unix.S_IFLNK)
	}
	slices.SortFunc(entries, func(a, b fuse.DirEntry) int { return strings.Compare(a.Name, b.Name) })
	return fusefs.NewListDirStream(entries), 0
}

func (f *folder) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	out.Bsize, out.Frsize, out.NameLen = statBlock, statBlock, 255
	return 0
}

// Fsync of what nobody writes has nothing to do.
func (f *folder) Fsync(context.Context, fusefs.FileHandle, uint32) syscall.Errno { return 0 }

// Unlink and Rmdir refuse, as go-fuse would let a missing method succeed.
func (f *folder) Unlink(context.Context, string) syscall.Errno { return unix.EROFS }
func (f *folder) Rmdir(context.Context, string) syscall.Errno  { return unix.EROFS }

// link is the node of a symbolic link.
type link struct {
	fusefs.Inode
	*mounting
	is Link
}

var (
	_ fusefs.NodeGetattrer  = (*link)(nil)
	_ fusefs.NodeReadlinker = (*link)(nil)
)

func (l *link) Getattr(_ context.Context, _ fusefs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = 0o777
	out.Nlink = 1
	out.Uid, out.Gid = l.owner.uid, l.owner.gid
	out.Size = uint64(len(l.is.To))
	out.SetTimes(&l.is.Modified, &l.is.Modified, &l.is.Modified)
	out.SetTimeout(attrTimeout)
	return 0
}

func (l *link) Readlink(context.Context) ([]byte, syscall.Errno) { return []byte(l.is.To), 0 }
