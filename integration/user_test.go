package integration

import (
	"os"
	"path/filepath"
	"runtime"
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

func TestOrdinaryUserMountsThroughFusermount(t *testing.T) {
	t.Parallel()
	const user = 61111 // nobody else's on any system
	// Not t.TempDir, which is below a folder that is root's alone.
	dir, err := os.MkdirTemp("", "user-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chown(dir, user, user); err != nil {
		t.Fatal(err)
	}
	h := newHost(t, nil)
	h.dir, h.state = dir, filepath.Join(dir, "state")
	h.user = &syscall.Credential{Uid: user, Gid: user}

	disk := diskBytes(1, 9*mib)
	snap := h.ok("snapshot", "create", writeImage(t, filepath.Join(dir, "disk.img"), disk))
	image := h.mount(snap)
	image.equals(disk)
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
	out := filepath.Join(dir, "out.img")
	h.ok("snapshot", "export", second, out)
	sameBytes(t, "the export", readAt(t, out, 0, len(disk)), disk)
}
