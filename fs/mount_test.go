package fs_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/lazyvol/lazyvol/fs"
	"golang.org/x/sys/unix"
)

// nobody is a user other than root.
const nobody = 65534

// credential makes a command run as a user.
func credential(uid int) *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
}

// as runs a program as a user and returns what it prints.
func as(uid int, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = credential(uid)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// mounted returns the line of /proc/mounts about dir.
func mounted(t *testing.T, dir string) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, " "+dir+" ") {
			return line
		}
	}
	return ""
}

func TestMountTable(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20})
	if line := mounted(t, d.dir); !strings.HasPrefix(line, "lazyvol:vol-test "+d.dir+" fuse.lazyvol rw,nosuid,nodev,") {
		t.Errorf("writable: %s", line)
	}
	d = start(t, daemonConfig{Size: 1 << 20, ReadOnly: true})
	if line := mounted(t, d.dir); !strings.HasPrefix(line, "lazyvol:vol-test "+d.dir+" fuse.lazyvol ro,nosuid,nodev,") {
		t.Errorf("read-only: %s", line)
	}
}

func TestReadAheadIsRaised(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20})
	var st unix.Stat_t
	if err := unix.Stat(d.dir, &st); err != nil {
		t.Fatal(err)
	}
	file := fmt.Sprintf("/sys/class/bdi/%d:%d/read_ahead_kb", unix.Major(st.Dev), unix.Minor(st.Dev))
	if got, err := os.ReadFile(file); err != nil || string(got) != "4096\n" {
		t.Errorf("read_ahead_kb is %q, %v", got, err)
	}
}

func TestMountIsPrivateUnlessShared(t *testing.T) {
	for _, c := range []struct {
		name     string
		readOnly bool
		options  mountOptions
		read     bool // by nobody
		write    bool
	}{
		{name: "private"},
		{name: "private to its mounter, whoever owns it", options: mountOptions{UID: nobody, GID: nobody}},
		{name: "shared, writable by its owner", options: mountOptions{AllowOther: true}},
		{name: "shared, owned by nobody", options: mountOptions{AllowOther: true, UID: nobody}, read: true, write: true},
		{name: "shared, of nobody's group", options: mountOptions{AllowOther: true, GID: nobody}, read: true, write: true},
		{name: "shared, read-only", readOnly: true, options: mountOptions{AllowOther: true}, read: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := mountDir(t, nobody)
			d := start(t, daemonConfig{Size: 1 << 20, Seed: 9, ReadOnly: c.readOnly, Options: c.options, Status: "{}", dir: dir})
			out, err := as(nobody, "head", "-c", "100", d.image)
			if got := err == nil && out == string(content(1<<20, 9)[:100]); got != c.read {
				t.Errorf("nobody could read: %t, %v, %.100q", got, err, out)
			}
			out, err = as(nobody, "dd", "if=/dev/zero", "of="+d.image, "bs=4096", "count=1", "conv=notrunc")
			if got := err == nil; got != c.write {
				t.Errorf("nobody could write: %t, %v, %s", got, err, out)
			}
			out, err = as(nobody, "cat", d.status)
			if got := err == nil && out == "{}"; got != c.options.AllowOther {
				t.Errorf("nobody could see the status: %t, %v, %s", got, err, out)
			}
		})
	}
}

func TestMountWithoutBeingRoot(t *testing.T) {
	d := start(t, daemonConfig{Size: oddSize, Seed: 10, Status: "{}", uid: nobody})
	if line := mounted(t, d.dir); !strings.HasPrefix(line, "lazyvol:vol-test "+d.dir+" fuse.lazyvol rw,nosuid,nodev,") {
		t.Errorf("mount table: %s", line)
	}
	out, err := as(nobody, "dd", "if="+d.image, "bs=1M", "status=none")
	if err != nil || out != string(content(oddSize, 10)) {
		t.Errorf("its user reads %d other bytes, %v", len(out), err)
	}
	if out, err := as(nobody, "dd", "if=/dev/zero", "of="+d.image, "bs=64K", "count=4", "conv=notrunc,fsync", "oflag=direct"); err != nil {
		t.Errorf("its user cannot write: %v, %s", err, out)
	}
	if n := d.operation("sync").Calls; n != 1 {
		t.Errorf("%d syncs", n)
	}
	if out, err := as(nobody, "cat", d.status); err != nil || out != "{}" {
		t.Errorf("status: %v, %s", err, out)
	}
	busy := exec.Command("sleep", "1000")
	busy.Dir = d.dir
	busy.SysProcAttr = credential(nobody)
	if err := busy.Start(); err != nil {
		t.Fatal(err)
	}
	if u := d.unmount(false); !u.Busy {
		t.Errorf("unmounting while used: %+v", u)
	}
	if err := busy.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := busy.Wait(); err == nil {
		t.Error("killed process ended well")
	}
	if u := d.unmount(false); u.Err != "" {
		t.Errorf("unmounting: %s", u.Err)
	}
	d.call("Wait", struct{}{}, new(struct{}))
	if line := mounted(t, d.dir); line != "" {
		t.Errorf("still mounted: %s", line)
	}
}

func TestMountErrorsSayWhy(t *testing.T) {
	_, err := tryStart(t, daemonConfig{Size: 1 << 20, dir: filepath.Join(t.TempDir(), "missing")})
	if err == nil || !strings.Contains(err.Error(), "no such file or directory") {
		t.Errorf("no directory: %v", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = tryStart(t, daemonConfig{Size: 1 << 20, dir: file})
	if err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("a file: %v", err)
	}
	_, err = tryStart(t, daemonConfig{Size: 1 << 20, Options: mountOptions{MaxBackground: 1 << 20}})
	if err == nil || !strings.Contains(err.Error(), "MaxBackground of 1048576") {
		t.Errorf("option out of bounds: %v", err)
	}
	// The helper's own words.
	dir := mountDir(t, nobody)
	if err := os.Chown(dir, 0, 0); err != nil {
		t.Fatal(err)
	}
	_, err = tryStart(t, daemonConfig{Size: 1 << 20, uid: nobody, dir: dir})
	if err == nil || !strings.Contains(err.Error(), "user has no write access to mountpoint") {
		t.Errorf("somebody else's directory: %v", err)
	}
}

func TestMountpointIsNotMountedOverOurs(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20})
	_, err := tryStart(t, daemonConfig{Size: 1 << 20, dir: d.dir})
	if err == nil || !strings.Contains(err.Error(), "lazyvol:vol-test is there already") {
		t.Errorf("a second mount: %v", err)
	}
}

// A mountpoint is found by what it is, not by how it was spelled.
func TestMountThroughSymlink(t *testing.T) {
	dir := mountDir(t, 0)
	link := filepath.Join(t.TempDir(), "a link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	d := start(t, daemonConfig{Size: 1 << 20, dir: link})
	if line := mounted(t, dir); line == "" {
		t.Error("not in the mount table")
	}
	if u := d.unmount(false); u.Err != "" {
		t.Errorf("unmounting: %s", u.Err)
	}
	d = start(t, daemonConfig{Size: 1 << 20, dir: link})
	d.kill()
	if err := fs.Recover(link); err != nil {
		t.Error(err)
	}
	if line := mounted(t, dir); line != "" {
		t.Errorf("still mounted: %s", line)
	}
}

func TestUnmount(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20, Seed: 11})
	f := d.open(unix.O_RDONLY)
	if u := d.unmount(false); !u.Busy {
		t.Errorf("unmounting while a file is open: %+v", u)
	}
	readAt(t, f, 4096, 0) // nothing has changed
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second has nothing to do
		if u := d.unmount(false); u.Err != "" {
			t.Errorf("unmounting: %s", u.Err)
		}
	}
	d.call("Wait", struct{}{}, new(struct{}))
	if line := mounted(t, d.dir); line != "" {
		t.Errorf("still mounted: %s", line)
	}
}

func TestUnmountOfAMountThatIsGone(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20})
	if err := unix.Unmount(d.dir, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(d.dir); err != nil {
		t.Fatal(err)
	}
	for _, lazy := range []bool{false, true} {
		if u := d.unmount(lazy); u.Err != "" {
			t.Errorf("lazily %t: %s", lazy, u.Err)
		}
	}
}

func TestUnmountByAnotherProcess(t *testing.T) {
	for _, uid := range []int{0, nobody} {
		d := start(t, daemonConfig{Size: 1 << 20, Options: mountOptions{AllowOther: uid == 0}, uid: uid, dir: mountDir(t, nobody)})
		if uid == 0 {
			f := d.open(unix.O_RDONLY)
			if err := fs.Unmount(d.dir); !errors.Is(err, fs.ErrBusy) {
				t.Errorf("in use: %v", err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}
		stranger := nobody - 1
		if err := inRole("unmount", stranger, d.dir); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("user %d mounted it", uid)) {
			t.Errorf("unmounted by a stranger: %v", err)
		}
		if err := inRole("unmount", uid, d.dir); err != nil {
			t.Errorf("by user %d: %v", uid, err)
		}
		d.call("Wait", struct{}{}, new(struct{}))
		if err := fs.Unmount(d.dir); !errors.Is(err, fs.ErrNotMount) {
			t.Errorf("twice: %v", err)
		}
	}
}

func TestUnmountRemovesADeadMountThatNobodyUses(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20})
	f := d.open(unix.O_RDONLY)
	d.kill()
	if err := fs.Unmount(d.dir); !errors.Is(err, fs.ErrBusy) {
		t.Errorf("in use: %v", err)
	}
	f.Close() // on a dead mount
	if err := fs.Unmount(d.dir); err != nil {
		t.Error(err)
	}
}

func TestUnmountLeavesWhatIsMountedOverItAlone(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20})
	if err := unix.Mount("over", d.dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	for _, lazy := range []bool{false, true} {
		if u := d.unmount(lazy); !u.Busy {
			t.Errorf("unmounting, lazily %t: %+v", lazy, u)
		}
	}
	if err := unix.Unmount(d.dir, 0); err != nil {
		t.Fatal(err)
	}
	if line := mounted(t, d.dir); line == "" {
		t.Error("not mounted any more")
	}
}

func TestLazyUnmountKeepsServingOpenFiles(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20, Seed: 12})
	f := d.open(unix.O_RDWR | unix.O_DIRECT)
	if u := d.unmount(true); u.Err != "" {
		t.Fatal(u.Err)
	}
	if line := mounted(t, d.dir); line != "" {
		t.Errorf("still mounted: %s", line)
	}
	if got := readAt(t, f, 4096, 4096); !bytes.Equal(got, content(1<<20, 12)[4096:8192]) {
		t.Error("other bytes")
	}
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		d.call("Wait", struct{}{}, new(struct{}))
	}()
	select {
	case <-waited:
		t.Error("the server ended while a file was open")
	default:
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	<-waited
}

// A child that inherited the connection would keep a dead daemon's mount alive:
// its users would wait for ever, in place of getting an error.
func TestChildrenDoNotInheritTheConnection(t *testing.T) {
	for _, uid := range []int{0, nobody} {
		d := start(t, daemonConfig{Size: 1 << 20, Child: true, uid: uid})
		var child int
		d.call("Child", struct{}{}, &child)
		defer unix.Kill(child, unix.SIGKILL)
		files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", child))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			target, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", child, f.Name()))
			if target == "/dev/fuse" || err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Fatalf("child's file %s is %s, %v", f.Name(), target, err)
			}
		}
		d.kill()
		if out, err := as(uid, "stat", d.dir); !strings.Contains(out, "Transport endpoint is not connected") {
			t.Errorf("stat of a dead mount: %v, %s", err, out)
		}
	}
}

func TestRecoverMendsADeadMountpoint(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20, Seed: 13})
	f := d.open(unix.O_RDONLY)
	d.kill()
	wantErrno(t, "stat of a dead mount", unix.Stat(d.dir, new(unix.Stat_t)), unix.ENOTCONN)
	_, err := f.ReadAt(make([]byte, 4096), 0)
	wantErrno(t, "read from a dead mount", err, unix.ENOTCONN)
	_, err = tryStart(t, daemonConfig{Size: 1 << 20, dir: d.dir})
	if err == nil || !strings.Contains(err.Error(), "is there already") {
		t.Errorf("mounting over a dead mount: %v", err)
	}
	for range 2 { // the second has nothing to do
		if err := fs.Recover(d.dir); err != nil {
			t.Fatal(err)
		}
	}
	again := start(t, daemonConfig{Size: 1 << 20, Seed: 13, dir: d.dir})
	if got := readAt(t, again.open(unix.O_RDONLY), 4096, 0); !bytes.Equal(got, content(1<<20, 13)[:4096]) {
		t.Error("other bytes")
	}
	if err := fs.Recover(d.dir); err != nil {
		t.Errorf("recovering a live mount: %v", err)
	}
	if line := mounted(t, d.dir); line == "" {
		t.Error("Recover unmounted a live mount")
	}
}

// A mount that is private to another user tells root nothing.
func TestRecoverAsTheMountingUser(t *testing.T) {
	d := start(t, daemonConfig{Size: 1 << 20, uid: nobody})
	d.kill()
	if err := inRole("recover", nobody, d.dir); err != nil {
		t.Error(err)
	}
	if line := mounted(t, d.dir); line != "" {
		t.Errorf("still mounted: %s", line)
	}
}

func TestRecoverRefusesWhatIsNotOurs(t *testing.T) {
	dir := t.TempDir()
	if err := fs.Recover(dir); err != nil {
		t.Errorf("a plain directory: %v", err)
	}
	wantErrno(t, "a missing directory", fs.Recover(filepath.Join(dir, "missing")), unix.ENOENT)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wantErrno(t, "a file", fs.Recover(file), unix.ENOTDIR)

	// The dead mount of somebody else's filesystem.
	foreign := mountDir(t, 0)
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("theirs", foreign, "fuse.other", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fd)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	wantErrno(t, "a dead mount of another type", fs.Recover(foreign), unix.ENOTCONN)
	if line := mounted(t, foreign); line == "" {
		t.Error("it was unmounted")
	}
}
