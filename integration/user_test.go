package integration

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// asUser calls fn on a thread that is another user's.
func asUser(id uint32, fn func() error) error {
	failed := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		// Raw, they concern this thread only, unlike syscall.Setuid and its like.
		for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} {
			if _, _, errno := syscall.RawSyscall(call, uintptr(id), uintptr(id), uintptr(id)); errno != 0 {
				failed <- errno
				return
			}
		}
		failed <- fn()
	}()
	return <-failed
}

// nobody is an ordinary user: fusermount3 wants one with a name.
const nobody = 65534

// newUserHost returns a host on which nobody runs lazyvol, in a directory of theirs.
func newUserHost(t testing.TB) *host {
	t.Helper()
	h := newHost(t, nil)
	h.dir = publicDir(t)
	if err := os.Chown(h.dir, nobody, nobody); err != nil {
		t.Fatal(err)
	}
	h.state = filepath.Join(h.dir, "state")
	h.user = &syscall.Credential{Uid: nobody, Gid: nobody}
	return h
}

// publicDir returns a new directory that any user may enter. What t.TempDir
// returns lies below one that is root's alone.
func publicDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "public-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestOrdinaryUserMountsThroughFusermount(t *testing.T) {
	t.Parallel()
	h := newUserHost(t)

	disk := diskBytes(1, 9*mib)
	snap := h.ok("snapshot", "create", writeImage(t, filepath.Join(h.dir, "disk.img"), disk))
	image := h.mount(snap)
	image.equals(disk)
	h.wantHealth("", "healthy")
	h.fails(1, []string{"root"}, "attach", snap)

	vol := h.ok("volume", "create", "--snapshot", snap)
	m := h.mount(vol)
	copy(disk[5*mib:], "written by an ordinary user")
	m.write(disk[5*mib:5*mib+100], 5*mib)
	second := h.ok("snapshot", "create", vol)
	image.unmount()
	m.unmount()
	m = m.again(vol)
	m.kill()
	m = m.again(vol) // on the dead mountpoint
	m.equals(disk)
	out := filepath.Join(h.dir, "out.img")
	h.ok("snapshot", "export", second, out)
	sameBytes(t, "the export", readAt(t, out, 0, len(disk)), disk)
}

// Containers and jobs run users that have no home. What needs no state directory works, and
// what does says so.
func TestAUserWithoutAHomeIsServed(t *testing.T) {
	t.Parallel()
	h := newUserHost(t)
	homeless := func(args ...string) ([]byte, error) {
		cmd := h.command(t.Context(), args...)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
		return cmd.CombinedOutput()
	}
	for _, args := range [][]string{{"version"}, {"help"}, {"completion", "bash"}, {"man", "pages"}, {"__complete", "vers"}} {
		if out, err := homeless(args...); err != nil {
			t.Errorf("%v: %v: %s", args, err, out)
		}
	}
	if out, err := homeless("status"); err == nil || !strings.Contains(string(out), "--state") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestOtherUsersAreLetInOnRequestOnly(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.ok("volume", "create", "--size", "1MiB")
	const other = 61234
	dir := publicDir(t)
	open := func() error {
		return asUser(other, func() error {
			f, err := os.OpenFile(filepath.Join(dir, "volume.img"), os.O_RDWR, 0)
			if err != nil {
				return err
			}
			return f.Close()
		})
	}
	m := h.mountOn(dir, vol)
	if err := open(); !errors.Is(err, syscall.EACCES) {
		t.Errorf("another user: %v, want EACCES", err)
	}
	m.unmount()
	m = m.again(vol, "--allow-other", "--uid", strconv.Itoa(other), "--gid", strconv.Itoa(other))
	if err := open(); err != nil {
		t.Errorf("the user named: %v", err)
	}
	m.unmount()
	m.again(vol, "--allow-other")
	if err := open(); !errors.Is(err, syscall.EACCES) {
		t.Errorf("another user than the one named: %v, want EACCES", err)
	}
}
