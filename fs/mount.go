package fs

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// The names a mountpoint shows.
const (
	ImageName  = "volume.img"
	StatusName = "status.json"
)

// Defaults and limits of Options.
const (
	// DefaultMaxWrite is the largest request a kernel sends unless
	// fs.fuse.max_pages_limit was raised.
	DefaultMaxWrite = 1 << 20

	// DefaultMaxBackground is twice the queue depth of a loop device (128), as
	// the largest of its requests, 1,280 KiB, are split in two. So cold reads
	// filling that queue never keep a write of a full page waiting here.
	DefaultMaxBackground = 256

	// DefaultMaxInflight lets the 128 requests of a loop device all be writes,
	// each in a buffer of MaxWrite bytes, and leaves room for others.
	DefaultMaxInflight = 160 << 20

	// readAheadKB is how far the kernel reads ahead of a sequential buffered
	// reader. At 5 ms a request, 4 MiB in place of 128 KiB made 80 MB/s 771.
	readAheadKB = 4096
)

// Options says how a Device is mounted. The zero Options mounts it for the
// mounting user alone.
type Options struct {
	// ID is shown in /proc/mounts as "lazyvol:ID".
	ID string

	// AllowOther lets users other than the mounting one in, as far as owner and
	// mode let them: anyone may read what is read-only; what is writable belongs
	// to UID and GID. Users other than root need user_allow_other in
	// /etc/fuse.conf for it.
	AllowOther bool

	// UID and GID own the files. Both zero mean the mounting user.
	UID, GID uint32

	// ReadDeadline is how long a request may wait for the Device, except for
	// Sync, which may take forever. After that the caller gets EIO. Zero means
	// no limit.
	ReadDeadline time.Duration

	// Status returns the content of status.json. It is called by each open and
	// stat of the file, from many goroutines at once, and must not block. The
	// result is not changed. Without it there is no such file.
	Status func() []byte

	// Log receives failures of the Device, which callers see as a number only.
	// Nil discards them.
	Log *slog.Logger

	// MaxWrite is the largest READ and WRITE request in bytes, a multiple of the
	// page size; zero means DefaultMaxWrite. The kernel may lower it.
	MaxWrite int

	// MaxBackground is how many asynchronous requests (of loop devices, AIO,
	// io_uring, and readahead) the kernel sends before the answer to one;
	// at most 65,535, zero means DefaultMaxBackground. Blocking system calls are
	// not counted.
	MaxBackground int

	// MaxInflight bounds the bytes of memory for received requests; zero means
	// DefaultMaxInflight. Each WRITE takes MaxWrite bytes and a little, however
	// short it is; when they are used up nothing is received, reads neither. The
	// answers to reads come on top, each as long as the read.
	MaxInflight int

	// Debug logs every request at level Debug.
	Debug bool
}

// withDefaults returns o with all zeros replaced, or an error that names what
// cannot be.
func (o Options) withDefaults() (Options, error) {
	for _, v := range []struct {
		name         string
		value        *int
		fallback     int
		lower, upper int
	}{
		{"MaxWrite", &o.MaxWrite, DefaultMaxWrite, os.Getpagesize(), 1 << 30},
		{"MaxBackground", &o.MaxBackground, DefaultMaxBackground, 1, 1<<16 - 1},
		{"MaxInflight", &o.MaxInflight, DefaultMaxInflight, 1, math.MaxInt},
	} {
		if *v.value == 0 {
			*v.value = v.fallback
		}
		if *v.value < v.lower || *v.value > v.upper {
			return o, fmt.Errorf("%s of %d is not between %d and %d", v.name, *v.value, v.lower, v.upper)
		}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.UID == 0 && o.GID == 0 {
		o.UID, o.GID = uint32(os.Geteuid()), uint32(os.Getegid())
	}
	return o, nil
}

// Mount shows d on the directory dir. When it returns the files are there. The
// Server runs until the mount is gone; d must work until Server.Wait has
// returned.
//
// A mountpoint of this package cannot be mounted over (ErrBusy); one left dead
// by another daemon needs Recover first.
func Mount(dir string, d Device, o Options) (*Server, error) {
	return mount(dir, d.ReadOnly(), o, func(m *mounting, o Options) content { return m.oneImage(d, o) })
}

// mount shows what fill returns on the directory dir.
func mount(dir string, readOnly bool, o Options, fill func(*mounting, Options) content) (*Server, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	below, path, err := mountAt(dir)
	if err != nil {
		return nil, err
	}
	if below.fsType == fsType && below.path == path {
		return nil, fmt.Errorf("mount %s: %w: %s is there already", path, ErrBusy, below.source)
	}
	conn, err := connect(path, mountOptions{
		source:     subtype + ":" + o.ID,
		readOnly:   readOnly,
		allowOther: o.AllowOther,
		maxRead:    o.MaxWrite,
	})
	if err != nil {
		return nil, err
	}
	s, err := serve(conn, path, o, fill)
	if err != nil {
		// Without its connection the mount is dead, and should go as well.
		return nil, errors.Join(fmt.Errorf("mount %s: %w", path, err), conn.Close(), unmount(path, true))
	}
	return s, nil
}

// serve starts answering a connection that was mounted on path.
func serve(conn *os.File, path string, o Options, fill func(*mounting, Options) content) (*Server, error) {
	point, _, err := mountAt(path)
	if err == nil && point.path != path {
		err = fmt.Errorf("mount %s: somebody took the mount away", path)
	}
	if err != nil {
		return nil, err
	}
	s := &Server{mount: point, conn: conn, done: make(chan struct{})}
	m := newMounting(o, func() bool { return alive(conn) })
	files := fill(m, o)
	s.resized = files.resized

	// go-fuse closes the descriptor it is given, when it likes.
	fd, err := unix.FcntlInt(conn.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		files.close()
		return nil, os.NewSyscallError("fcntl", err)
	}
	level := slog.LevelWarn
	if o.Debug {
		level = slog.LevelDebug
	}
	entryTimeout := attrTimeout
	options := &fusefs.Options{EntryTimeout: &entryTimeout}
	options.MountOptions = fuse.MountOptions{
		MaxWrite:                 o.MaxWrite,
		MaxBackground:            o.MaxBackground,
		MaxInflightRequestBytes:  o.MaxInflight,
		ExtraCapabilities:        fuse.CAP_ASYNC_DIO,
		DisabledCapabilities:     fuse.CAP_PASSTHROUGH,
		ExplicitDataCacheControl: true,
		DisableXAttrs:            true,
		DisableReadDirPlus:       !files.many,
		DisableSplice:            true,
		PanicHandler:             m.failures.panicked,
		Logger:                   slog.NewLogLogger(o.Log.Handler(), level),
		Debug:                    o.Debug,
	}
	// This path means a connection that is mounted already.
	server, err := fuse.NewServer(fusefs.NewNodeFS(files.root, options), fmt.Sprintf("/dev/fd/%d", fd), &options.MountOptions)
	if err != nil {
		files.close()
		return nil, err
	}
	go func() {
		defer close(s.done)
		server.Serve()
		files.close()
		conn.Close() // the kernel has closed its side
	}()
	raiseReadAhead(point.dev, o.Log)
	return s, nil
}

// raiseReadAhead sets the readahead of a filesystem to readAheadKB, if the
// process may: a FUSE server itself cannot ask for more than 128 KiB.
func raiseReadAhead(dev string, log *slog.Logger) {
	file := "/sys/class/bdi/" + dev + "/read_ahead_kb"
	if err := os.WriteFile(file, fmt.Appendln(nil, readAheadKB), 0); err != nil {
		log.Debug("readahead stays as it is", "err", err)
	}
}
