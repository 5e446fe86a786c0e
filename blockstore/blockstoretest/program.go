package blockstoretest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// buildTimeout bounds the build of a program: versitygw takes 3.5 minutes on
// one core.
const buildTimeout = 9 * time.Minute

// A program is a server that tests run and that comes from the Go module proxy.
type program struct {
	pkg      string   // package and version, as go install takes them
	variable string   // names the binary, if it is set
	names    []string // of the binary elsewhere, in $PATH or absolute
}

// find returns the path of the binary, which is built once if it is nowhere,
// into the user's cache directory. A program that cannot be had fails the test:
// there is no skipping.
func (p program) find(t testing.TB) string {
	t.Helper()
	binary, err := p.binary(t.Context())
	if err != nil {
		t.Fatalf("find %s: %v", p.pkg, err)
	}
	return binary
}

func (p program) binary(ctx context.Context) (string, error) {
	if path := os.Getenv(p.variable); path != "" {
		return path, nil
	}
	for _, name := range p.names {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "lazyvol-test", strings.NewReplacer("/", "_").Replace(p.pkg))
	return p.build(ctx, dir)
}

// build builds the program into dir unless it is there. Test processes that want
// it at the same time wait for the one that builds.
func (p program) build(ctx context.Context, dir string) (_ string, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", err
	}
	name, _, _ := strings.Cut(path.Base(p.pkg), "@")
	binary := filepath.Join(dir, name)
	if _, err := os.Stat(binary); err == nil {
		return binary, nil
	}
	ctx, cancel := context.WithTimeout(ctx, buildTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "install", p.pkg)
	cmd.Env = append(os.Environ(), "GOBIN="+dir, "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go install %s: %w\n%s", p.pkg, err, out)
	}
	return binary, nil
}

// serverProcess is a child process that dies with this one.
type serverProcess struct {
	cmd   *exec.Cmd
	ended chan struct{} // closed after the process ended
	err   error         // how it ended
}

func startProcess(cmd *exec.Cmd) (*serverProcess, error) {
	// The kernel kills the child when the thread that started it ends, which
	// covers tests that time out or crash. So that thread must live as long.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p := &serverProcess{cmd: cmd, ended: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			p.err = cmd.Wait()
			close(p.ended)
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

func (p *serverProcess) kill() {
	p.cmd.Process.Kill() // fails only if it has ended
	<-p.ended
}

func freeEndpoint() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return "http://" + l.Addr().String(), l.Close()
}
