package fs_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/rpc"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/lazyvol/lazyvol/fs"
	"github.com/lazyvol/lazyvol/internal/loopdev/loopdevtest"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// A process must not use its own mount, so the tests run their own binary once
// more, in a role: a daemon that mounts a memory and is steered by RPC over its
// standard input and output, or a reader of the file it shows.
const roleEnv = "LAZYVOL_FS_TEST_ROLE"

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case "daemon":
		runDaemon()
	case "reader":
		runReader()
	case "recover":
		end(fs.Recover(os.Args[1]))
	case "unmount":
		end(fs.Unmount(os.Args[1]))
	default:
		loopdevtest.Lock()
		goleak.VerifyTestMain(m)
	}
}

// inRole runs this binary in a role that does one thing to a directory, as a
// user. The error is what it says.
func inRole(role string, uid int, dir string) error {
	cmd := reexec(role)
	cmd.Args = []string{"fs.test", dir}
	cmd.SysProcAttr = credential(uid)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// reexec returns the command that runs this binary in a role. It works for any
// uid, whoever may search the directory the binary is in.
func reexec(role string, env ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+role,
		"GORACE=atexit_sleep_ms=0") // else each process ends a second later with -race
	cmd.Env = append(cmd.Env, env...)
	return cmd
}

// daemonConfig is what a daemon is started with.
type daemonConfig struct {
	Size     int64
	Seed     byte // of the content
	ReadOnly bool
	Status   string // of status.json; empty: none
	Options  mountOptions
	Child    bool     // leave a child process behind
	Tree     []branch // if not nil, it is a tree that is mounted

	dir string // "": a new one
	uid int    // to run as
}

// mountOptions are those of fs.Options that JSON can carry.
type mountOptions struct {
	AllowOther                           bool
	UID, GID                             uint32
	ReadDeadline                         time.Duration
	MaxWrite, MaxBackground, MaxInflight int
}

const configEnv = "LAZYVOL_FS_TEST_CONFIG"

// runDaemon is the main function of a daemon: its argument is the directory.
func runDaemon() {
	var config daemonConfig
	if err := json.Unmarshal([]byte(os.Getenv(configEnv)), &config); err != nil {
		fatal(err)
	}
	control := &Control{memory: newMemory(content(config.Size, config.Seed), config.ReadOnly), status: config.Status}
	options := fs.Options{
		ID:            "vol-test",
		AllowOther:    config.Options.AllowOther,
		UID:           config.Options.UID,
		GID:           config.Options.GID,
		ReadDeadline:  config.Options.ReadDeadline,
		Log:           slog.New(slog.NewTextHandler(&control.log, nil)),
		MaxWrite:      config.Options.MaxWrite,
		MaxBackground: config.Options.MaxBackground,
		MaxInflight:   config.Options.MaxInflight,
	}
	if config.Status != "" {
		options.Status = control.currentStatus
	}
	var server *fs.Server
	var err error
	if config.Tree != nil {
		control.tree = newFakeTree(config.Tree)
		server, err = fs.MountTree(os.Args[1], control.tree, options)
	} else {
		server, err = fs.Mount(os.Args[1], control.memory, options)
	}
	if err != nil {
		fatal(err)
	}
	control.server = server
	if config.Child {
		child := exec.Command("sleep", "1000")
		if err := child.Start(); err != nil {
			fatal(err)
		}
		control.child = child.Process.Pid
	}
	commands := rpc.NewServer()
	if err := commands.Register(control); err != nil {
		fatal(err)
	}
	commands.ServeConn(struct {
		io.Reader
		io.WriteCloser
	}{os.Stdin, os.Stdout})
	// The test is over, or dead.
	if err := server.UnmountLazy(); err != nil {
		fatal(err)
	}
	os.Exit(0)
}

// end ends a role that does one thing.
func end(err error) {
	if err != nil {
		fatal(err)
	}
	os.Exit(0)
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// Control is what a test can ask of its daemon.
type Control struct {
	memory *memory
	tree   *fakeTree
	server *fs.Server
	child  int

	log lockedBuffer

	statusMu sync.Mutex // guards status
	status   string
}

// lockedBuffer is a buffer to log into.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (c *Control) currentStatus() []byte {
	c.statusMu.Lock()
	defer c.statusMu.Unlock()
	return []byte(c.status)
}

// Change says what operations of a kind do from now on.
type Change struct {
	Op      string
	Hold    bool // wait; operations waiting now go on if it is false
	Delay   time.Duration
	Failing string
}

func (c *Control) Set(change Change, _ *struct{}) error {
	c.memory.mu.Lock()
	defer c.memory.mu.Unlock()
	op := c.memory.ops[change.Op]
	op.delay, op.failing = change.Delay, change.Failing
	switch {
	case change.Hold && op.held == nil:
		op.held = make(chan struct{})
	case !change.Hold && op.held != nil:
		close(op.held)
		op.held = nil
	}
	return nil
}

func (c *Control) Operation(name string, op *Operation) error {
	c.memory.mu.Lock()
	defer c.memory.mu.Unlock()
	*op = *c.memory.ops[name]
	return nil
}

func (c *Control) SetStatus(status string, _ *struct{}) error {
	c.statusMu.Lock()
	defer c.statusMu.Unlock()
	c.status = status
	return nil
}

func (c *Control) Log(_ struct{}, log *string) error { *log = c.log.String(); return nil }

func (c *Control) Child(_ struct{}, pid *int) error { *pid = c.child; return nil }

// Unmounted is how an attempt to unmount went.
type Unmounted struct {
	Busy bool
	Err  string
}

func (c *Control) Unmount(lazy bool, u *Unmounted) error {
	var err error
	if lazy {
		err = c.server.UnmountLazy()
	} else {
		err = c.server.Unmount()
	}
	if err != nil {
		*u = Unmounted{Busy: errors.Is(err, fs.ErrBusy), Err: err.Error()}
	}
	return nil
}

func (c *Control) Wait(struct{}, *struct{}) error { c.server.Wait(); return nil }

// daemon is a test's side of a daemon.
type daemon struct {
	t      *testing.T
	dir    string
	image  string // path
	status string // path
	cmd    *exec.Cmd
	rpc    *rpc.Client
}

// start starts a daemon and waits for its mount. It and the mount are gone when
// the test is over.
func start(t *testing.T, config daemonConfig) *daemon {
	t.Helper()
	d, err := tryStart(t, config)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// tryStart is start for mounts that may fail. The error is what the daemon says.
func tryStart(t *testing.T, config daemonConfig) (*daemon, error) {
	t.Helper()
	if config.dir == "" {
		config.dir = mountDir(t, config.uid)
	}
	encoded, err := json.Marshal(config)
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{
		t:      t,
		dir:    config.dir,
		image:  filepath.Join(config.dir, fs.ImageName),
		status: filepath.Join(config.dir, fs.StatusName),
		cmd:    reexec("daemon", configEnv+"="+string(encoded)),
	}
	d.cmd.Args = []string{"fs.test", d.dir}
	if config.uid != 0 {
		d.cmd.SysProcAttr = credential(config.uid)
	}
	var stderr bytes.Buffer
	d.cmd.Stderr = &stderr
	stdin, err := d.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := d.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d.rpc = rpc.NewClient(struct {
		io.Reader
		io.WriteCloser
	}{stdout, stdin})
	// The first answer comes when it is mounted, or the connection ends.
	if err := d.rpc.Call("Control.Child", struct{}{}, new(int)); err != nil {
		if err := d.cmd.Wait(); err == nil {
			t.Fatal("daemon ended without an error")
		}
		return nil, errors.New(strings.TrimSpace(stderr.String()))
	}
	t.Cleanup(func() {
		if d.cmd.ProcessState != nil {
			return // killed by the test
		}
		if err := d.rpc.Close(); err != nil {
			t.Errorf("end of control connection: %v", err)
		}
		if err := d.cmd.Wait(); err != nil {
			t.Errorf("daemon: %v: %s", err, stderr.String())
		}
	})
	return d, nil
}

// mountDir returns a directory that uid may mount on. Whatever is mounted there
// in the end is unmounted.
func mountDir(t *testing.T, uid int) string {
	t.Helper()
	dir := t.TempDir()
	if uid != 0 {
		letAllMount(t)
		if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dir, uid, uid); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for unix.Unmount(dir, unix.MNT_DETACH) == nil { // left by daemons that were killed
		}
	})
	return dir
}

// letAllMount lets any user open /dev/fuse until the test is over, as
// distributions do for good; minimal systems leave it to root. Of several test
// runs at once, none may take that away from another: each holds a lock.
func letAllMount(t *testing.T) {
	t.Helper()
	fuse, err := os.Open("/dev/fuse")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { fuse.Close() }) // and with it the lock
	if err := unix.Flock(int(fuse.Fd()), unix.LOCK_SH); err != nil {
		t.Fatal(err)
	}
	st, err := fuse.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode().Perm() == 0o666 {
		return
	}
	if err := fuse.Chmod(0o666); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if unix.Flock(int(fuse.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
			return // others need it
		}
		if err := fuse.Chmod(st.Mode().Perm()); err != nil {
			t.Error(err)
		}
	})
}

func (d *daemon) call(method string, arg, reply any) {
	d.t.Helper()
	if err := d.rpc.Call("Control."+method, arg, reply); err != nil {
		d.t.Fatalf("%s: %v", method, err)
	}
}

func (d *daemon) set(c Change) {
	d.t.Helper()
	d.call("Set", c, new(struct{}))
}

func (d *daemon) operation(name string) (op Operation) {
	d.t.Helper()
	d.call("Operation", name, &op)
	return op
}

// waitRunning waits until n operations of a kind are in the device.
func (d *daemon) waitRunning(name string, n int) {
	d.t.Helper()
	d.eventually(fmt.Sprintf("%d times %s in the device", n, name), func() bool {
		return d.operation(name).Running == n
	})
}

func (d *daemon) unmount(lazy bool) (u Unmounted) {
	d.t.Helper()
	d.call("Unmount", lazy, &u)
	return u
}

func (d *daemon) log() (log string) {
	d.t.Helper()
	d.call("Log", struct{}{}, &log)
	return log
}

// kill kills the daemon in the rudest way.
func (d *daemon) kill() {
	d.t.Helper()
	if err := d.cmd.Process.Kill(); err != nil {
		d.t.Fatal(err)
	}
	if err := d.cmd.Wait(); err == nil {
		d.t.Fatal("killed daemon ended well")
	}
	d.rpc.Close() // its other end is gone already
}

// eventually waits until cond is met.
func (d *daemon) eventually(what string, cond func() bool) {
	d.t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			d.t.Fatalf("still not: %s", what)
		}
	}
}

// open opens the image, and closes it when the test is over at the latest.
func (d *daemon) open(flags int) *os.File {
	d.t.Helper()
	fd, err := unix.Open(d.image, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		d.t.Fatalf("open: %v", err)
	}
	f := os.NewFile(uintptr(fd), d.image)
	d.t.Cleanup(func() { f.Close() }) // closed twice at worst
	return f
}
