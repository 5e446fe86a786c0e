package integration

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestDaemonNamesItselfAndLogsInItsFolder(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	vol := h.ok("volume", "create", "--snapshot", snap)
	for target, log := range map[string]string{snap: "mounts/*/daemon.log", vol: "volumes/" + vol + "/daemon.log"} {
		m := h.mount(target)
		cmdline, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(m.pid), "cmdline"))
		if err != nil {
			t.Fatal(err)
		}
		if args := strings.Split(string(cmdline), "\x00"); !strings.Contains(string(cmdline), target) || !strings.Contains(string(cmdline), m.dir) {
			t.Errorf("the daemon's arguments are %q", args)
		}
		logs := glob(t, filepath.Join(h.state, log))
		if len(logs) != 1 {
			t.Fatalf("logs: %v", logs)
		}
		waitFor(t, "the daemon logs its mount", 20*time.Second, func() bool {
			content, err := os.ReadFile(logs[0])
			return err == nil && strings.Contains(string(content), target)
		})
	}
}

func TestDaemonKeepsNoFileOfWhoStartedIt(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	for _, args := range [][]string{{"mount", snap}, {"browse"}} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		dir := t.TempDir()
		cmd := h.command(t.Context(), append(args, dir)...)
		cmd.ExtraFiles = []*os.File{w, w} // as a script's lock, or its other end of a pipe; the first number may get another use
		out, err := cmd.CombinedOutput()
		if err := errors.Join(err, w.Close()); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
		m := h.mounted(dir)
		if err := r.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if n, err := r.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("%v: the pipe is still open in its daemon (pid %d): %d, %v", args, m.pid, n, err)
		}
	}
}

func TestSignalledDaemonUnmountsAndExitsWithSuccess(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, 4*mib)))
	for _, target := range []string{snap, h.ok("volume", "create", "--snapshot", snap)} {
		dir := t.TempDir()
		daemon := h.begin("mount", "--foreground", target, dir)
		waitFor(t, "the mount is ready", 20*time.Second, func() bool { return isMountpoint(t, dir) })
		m := h.mounted(dir)
		if strings.HasPrefix(target, "vol-") {
			m.write([]byte("kept"), 0)
		} else {
			m.read(0, 4)
		}
		if m.pid != daemon.cmd.Process.Pid {
			t.Errorf("the daemon is %d, not the command %d", m.pid, daemon.cmd.Process.Pid)
		}
		m.closeFiles()
		daemon.signal(syscall.SIGTERM)
		r := daemon.wait()
		if r.code != 0 || !strings.Contains(r.stderr, "unmounted") {
			t.Errorf("%s\nwant exit 0 and the log on stderr", r)
		}
		if isMountpoint(t, dir) {
			t.Errorf("%s is still a mountpoint", dir)
		}
	}
	if pins := h.store.objects(t, "pins"); len(pins) != 1 {
		t.Errorf("pins: %v, want the volume's", pins)
	}
}

// As ssh's, which takes the programs in it along: the shell sends a signal, and the
// kernel another.
func TestTerminalThatIsClosedLeavesNoDeadMount(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, mib)))
	for _, args := range [][]string{{"mount", "--foreground", snap}, {"browse", "--foreground"}} {
		dir := t.TempDir()
		daemon := h.begin(append(args, dir)...)
		waitFor(t, "the mount is ready", 20*time.Second, func() bool { return isMountpoint(t, dir) })
		h.mounted(dir)
		daemon.signal(syscall.SIGHUP)
		daemon.signal(syscall.SIGHUP)
		r := daemon.wait()
		if r.code != 0 || !strings.Contains(r.stderr, "unmounted") || isMountpoint(t, dir) {
			t.Errorf("%s\nwant exit 0, the log on stderr and no mount", r)
		}
	}
	if pins := h.store.objects(t, "pins"); len(pins) != 0 {
		t.Errorf("pins: %v", pins)
	}
}

func TestPlainUmountEndsTheDaemon(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.ok("volume", "create", "--size", "4MiB")
	m := h.mount(vol)
	m.write([]byte("kept"), 100)
	m.closeFiles()
	umount(t, m.dir)
	m.waitEnd()
	sameBytes(t, "what was written", m.again(vol).read(100, 4), []byte("kept"))
}

func TestUnmountOfAMountInUseIsRefused(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.ok("volume", "create", "--size", "4MiB")
	m := h.mount(vol)
	f := m.open(os.O_RDWR)
	h.fails(4, []string{"in use"}, "unmount", m.dir)
	h.fails(4, []string{"in use"}, "unmount", vol)
	if _, err := f.WriteAt([]byte("still there"), 0); err != nil {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	h.ok("unmount", vol)
	m.waitEnd()
}

func TestSignalledDaemonServesItsUsersToTheEnd(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.ok("volume", "create", "--size", "4MiB")
	m := h.mount(vol)
	f := m.open(os.O_RDWR)
	m.terminate()
	if _, err := f.WriteAt([]byte("the last words"), 0); err != nil {
		t.Errorf("a file that is open: %v", err)
	}
	m.closeFiles()
	m.waitEnd()
	sameBytes(t, "what was written last", m.again(vol).read(0, 14), []byte("the last words"))
}

func TestStateDirectoriesMayHaveLongAndOddNames(t *testing.T) {
	t.Parallel()
	for name, folder := range map[string]string{
		"long": strings.Repeat("a-rather-long-name/", 10), // a socket's path may have 108 bytes
		"odd":  "a space, 50%41, #1 and a ?",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, nil)
			h.state = filepath.Join(h.dir, folder, "state")
			disk := randomBytes(1, 4*mib)
			snap := h.ok("snapshot", "create", h.image(disk))
			vol := h.ok("volume", "create", "--snapshot", snap)
			m := h.mount(vol)
			h.ok("hydrate", "--wait", vol)
			copy(disk, "changed")
			m.write(disk[:7], 0)
			if s := parse[status](t, h.ok("status", "--json", vol)); s.PID != m.pid || s.DirtyBytes != pageSize {
				t.Errorf("status: %+v", s)
			}
			sameBytes(t, "the snapshot", h.exported(h.ok("snapshot", "create", vol)), disk)
			device := h.attach(vol)
			sameBytes(t, "the device", readAt(t, device, 0, len(disk)), disk)
			h.ok("detach", vol)
			image := h.mount(snap)
			h.ok("hydrate", "--wait", image.dir)
			h.ok("unmount", vol)
		})
	}
}

func TestMountpointsMayHaveOddNames(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.ok("volume", "create", "--size", "4MiB")
	dir := filepath.Join(h.dir, "a space\tand, a comma\\")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	m := h.mountOn(dir, vol)
	m.write([]byte("x"), 0)
	h.ok("status", dir)
	m.closeFiles()
	h.ok("unmount", dir)
	m.waitEnd()
}

func TestRelativePathsAreTheCallers(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	disk := randomBytes(1, mib)
	writeImage(t, filepath.Join(h.dir, "disk.img"), disk)
	if err := os.Mkdir(filepath.Join(h.dir, "mnt"), 0o700); err != nil {
		t.Fatal(err)
	}
	snap := h.ok("--state", "elsewhere", "snapshot", "create", "disk.img") // commands run in h.dir
	h.state = filepath.Join(h.dir, "elsewhere")
	h.ok("mount", snap, "mnt")
	m := h.mounted(filepath.Join(h.dir, "mnt"))
	m.equals(disk)
	h.ok("status", "mnt")
	h.ok("unmount", "mnt")
	h.ok("snapshot", "export", snap, "out.img")
	sameBytes(t, "the export", readAt(t, filepath.Join(h.dir, "out.img"), 0, mib), disk)
}
