package integration

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A mount is a snapshot or volume that is mounted, and its daemon.
type mount struct {
	h     *host
	dir   string
	image string     // the file
	pid   int        // of the daemon
	files []*os.File // opened by open
}

// status is what status.json and 'status --json' say.
type status struct {
	ID            string   `json:"id"`
	Root          string   `json:"root"`
	Size          int64    `json:"size"`
	BlockSize     int64    `json:"blockSize"`
	State         string   `json:"state"`
	HydratedBytes int64    `json:"hydratedBytes"`
	TotalBytes    int64    `json:"totalBytes"`
	DirtyBytes    int64    `json:"dirtyBytes"`
	DemandFetches int64    `json:"demandFetches"`
	FetchedBytes  int64    `json:"fetchedBytes"`
	DemandWaits   int64    `json:"demandWaits"`
	DemandWait    float64  `json:"demandWaitSeconds"`
	ETASeconds    *int64   `json:"etaSeconds"`
	Errors        []string `json:"errors"`
	Mountpoint    string   `json:"mountpoint"`
	PID           int      `json:"pid"`
}

// mount mounts a snapshot or volume on a new directory, until the test ends.
func (h *host) mount(target string, flags ...string) *mount {
	h.t.Helper()
	dir, err := os.MkdirTemp(h.dir, "mnt-")
	if err != nil {
		h.t.Fatal(err)
	}
	if h.user != nil {
		if err := os.Chown(dir, int(h.user.Uid), int(h.user.Gid)); err != nil {
			h.t.Fatal(err)
		}
	}
	return h.mountOn(dir, target, flags...)
}

// mountOn mounts a snapshot or volume on a directory, until the test ends.
func (h *host) mountOn(dir, target string, flags ...string) *mount {
	h.t.Helper()
	args := append([]string{"mount"}, flags...)
	r := h.run(append(args, target, dir)...)
	if r.code != 0 || r.stdout != "" {
		h.t.Fatalf("%s\nwant exit 0 and nothing on stdout", r)
	}
	return h.mounted(dir)
}

// mounted returns the mount on a directory, and takes it away when the test
// ends.
func (h *host) mounted(dir string) *mount {
	h.t.Helper()
	m := &mount{h: h, dir: dir, image: filepath.Join(dir, "volume.img")}
	s, err := m.readStatus()
	if err != nil {
		h.t.Fatal(err)
	}
	m.pid = s.PID
	h.t.Cleanup(m.cleanup)
	return m
}

// cleanup takes the mount away at the end of a test, by force if need be.
func (m *mount) cleanup() {
	m.closeFiles()
	if !isMountpoint(m.h.t, m.dir) {
		return
	}
	if m.h.t.Failed() {
		m.showLog()
	}
	if r := m.tryUnmount(); r.code == 0 {
		m.waitEnd()
		return
	} else if !m.h.t.Failed() {
		m.h.t.Errorf("at the end of the test: %s", r)
	}
	_ = syscall.Kill(m.pid, syscall.SIGKILL)
	_ = unix.Unmount(m.dir, unix.MNT_DETACH)
	if devices, err := loopDevicesUnder(m.dir); err == nil {
		for device := range devices {
			_ = detachLoop(device)
		}
	}
}

// tryUnmount runs lazyvol unmount, again for a while if the mount is in use: a
// process that a parallel test has forked and not yet executed holds our files
// open too, on a busy machine for long enough to be seen.
func (m *mount) tryUnmount() result {
	const patience, inUse = 10 * time.Second, 4
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		if r := m.h.run("unmount", m.dir); r.code != inUse || time.Now().After(end) {
			return r
		}
	}
}

// showLog logs the last of what the daemons of the host logged.
func (m *mount) showLog() {
	const last = 4 << 10
	for _, pattern := range []string{"volumes/*/daemon.log", "mounts/*/daemon.log"} {
		files, err := filepath.Glob(filepath.Join(m.h.state, pattern))
		if err != nil {
			m.h.t.Error(err)
		}
		for _, file := range files {
			log, err := os.ReadFile(file)
			m.h.t.Logf("%s: %v\n%s", file, err, log[max(0, len(log)-last):])
		}
	}
}

// unmount closes the files and takes the mount away; the daemon has ended when
// it returns.
func (m *mount) unmount() {
	m.h.t.Helper()
	m.closeFiles()
	if r := m.tryUnmount(); r.code != 0 {
		m.h.t.Fatal(r)
	}
	m.waitEnd()
}

// terminate tells the daemon to end, and waits until the mount is out of sight: who
// has it open is served to the end.
func (m *mount) terminate() {
	m.h.t.Helper()
	if err := syscall.Kill(m.pid, syscall.SIGTERM); err != nil {
		m.h.t.Fatalf("terminate the daemon %d: %v", m.pid, err)
	}
	waitFor(m.h.t, m.dir+" is out of sight", 20*time.Second, func() bool { return !isMountpoint(m.h.t, m.dir) })
}

// kill kills the daemon, which leaves the mountpoint dead.
func (m *mount) kill() {
	m.h.t.Helper()
	if err := syscall.Kill(m.pid, syscall.SIGKILL); err != nil {
		m.h.t.Fatalf("kill the daemon %d: %v", m.pid, err)
	}
	m.waitEnd()
}

// waitEnd waits until the daemon has ended.
func (m *mount) waitEnd() {
	m.h.t.Helper()
	waitFor(m.h.t, fmt.Sprintf("the daemon %d ends", m.pid), 20*time.Second, func() bool {
		return errors.Is(syscall.Kill(m.pid, 0), syscall.ESRCH)
	})
}

// again mounts the same on the same directory after the daemon ended.
func (m *mount) again(target string, flags ...string) *mount {
	m.h.t.Helper()
	m.closeFiles()
	return m.h.mountOn(m.dir, target, flags...)
}

func (m *mount) readStatus() (s status, err error) {
	data, err := m.readFile("status.json")
	if err != nil {
		return s, err
	}
	return parse[status](m.h.t, string(data)), nil
}

// readFile reads a file of the mount, as the user that mounted it: others,
// root included, are kept out.
func (m *mount) readFile(name string) (data []byte, err error) {
	err = m.h.asUser(func() (err error) {
		data, err = os.ReadFile(filepath.Join(m.dir, name))
		return err
	})
	return data, err
}

// asUser calls fn as the host's user.
func (h *host) asUser(fn func() error) error {
	if h.user == nil {
		return fn()
	}
	return asUser(h.user.Uid, fn)
}

// status returns what status.json says.
func (m *mount) status() status {
	m.h.t.Helper()
	s, err := m.readStatus()
	if err != nil {
		m.h.t.Fatal(err)
	}
	return s
}

// waitState waits until the mount is in a state, as "hydrated".
func (m *mount) waitState(state string, within time.Duration) {
	m.h.t.Helper()
	waitFor(m.h.t, m.dir+" is "+state, within, func() bool { return m.status().State == state })
}

// open opens the file; flags as O_RDWR|O_DIRECT. It is closed with the mount, at
// the latest.
func (m *mount) open(flags int) *os.File {
	m.h.t.Helper()
	var f *os.File
	err := m.h.asUser(func() (err error) {
		f, err = os.OpenFile(m.image, flags, 0)
		return err
	})
	if err != nil {
		m.h.t.Fatal(err)
	}
	m.files = append(m.files, f)
	return f
}

// closeFiles closes what open opened, unless the test did.
func (m *mount) closeFiles() {
	for _, f := range m.files {
		_ = f.Close()
	}
	m.files = nil
}

// read reads n bytes at off, or to the end of the file.
func (m *mount) read(off int64, n int) []byte {
	m.h.t.Helper()
	f := m.open(os.O_RDONLY)
	defer f.Close()
	p := make([]byte, n)
	if _, err := f.ReadAt(p, off); err != nil {
		m.h.t.Fatalf("read %s at %d: %v", m.image, off, err)
	}
	return p
}

// write writes p at off.
func (m *mount) write(p []byte, off int64) {
	m.h.t.Helper()
	f := m.open(os.O_RDWR)
	if _, err := f.WriteAt(p, off); err != nil {
		m.h.t.Fatalf("write %s at %d: %v", m.image, off, err)
	}
	if err := f.Close(); err != nil {
		m.h.t.Fatal(err)
	}
}

// equals checks that the whole file has the given content.
func (m *mount) equals(want []byte) {
	m.h.t.Helper()
	got, err := m.readFile("volume.img")
	if err != nil {
		m.h.t.Fatal(err)
	}
	sameBytes(m.h.t, m.image, got, want)
}

// sameBytes checks that two contents are equal, and says where they are not.
func sameBytes(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	if len(got) != len(want) {
		t.Fatalf("%s has %d bytes, want %d", what, len(got), len(want))
	}
	const page = 4096
	var wrong []string
	for off := 0; off < len(got); off += page {
		end := min(off+page, len(got))
		if !bytes.Equal(got[off:end], want[off:end]) {
			wrong = append(wrong, fmt.Sprintf("%d (block %d, page %d): got %x… want %x…", off, off>>19, off>>12&127, got[off:min(off+8, end)], want[off:min(off+8, end)]))
		}
	}
	t.Fatalf("%s differs in %d pages:\n%s", what, len(wrong), strings.Join(wrong[:min(len(wrong), 16)], "\n"))
}
