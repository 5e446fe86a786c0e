package integration

import (
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestStoreOutageStopsOnlyWhatNeedsTheStore(t *testing.T) {
	t.Parallel()
	for name, outage := range map[string]func(*testing.T, *store) (over func()){
		"connections are refused": func(t *testing.T, s *store) func() {
			s.server.Stop()
			return func() { s.server.Start(t) }
		},
		"nothing answers": func(t *testing.T, s *store) func() {
			s.server.Freeze(t)
			return func() { s.server.Thaw(t) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newS3Store(t)
			h := newHost(t, s)
			disk := randomBytes(1, 32*mib)
			vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
			const deadline = 3 * time.Second
			m := h.mount(vol, "--no-hydrate", "--read-ahead=0", "--read-deadline", deadline.String())
			m.read(0, 4*mib)

			over := outage(t, s)
			sameBytes(t, "what is cached", m.read(0, 4*mib), disk[:4*mib])
			pages := disk[20*mib : 20*mib+8*kib] // were never fetched
			fill(newRand(2), pages)
			start := time.Now()
			m.write(pages, 20*mib)
			if took := time.Since(start); took > deadline/2 {
				t.Errorf("a write of whole pages took %s", took)
			}
			sameBytes(t, "what was written", m.read(20*mib, 8*kib), pages)

			f := m.open(os.O_RDWR | unix.O_DIRECT) // else the kernel asks once more
			start = time.Now()
			_, err := f.ReadAt(aligned(512), 12*mib)
			if took := time.Since(start); !errors.Is(err, syscall.EIO) || took < deadline/2 || took > deadline+2*time.Second {
				t.Errorf("a cold read: %v after %s, want EIO after %s", err, took, deadline)
			}
			if err := f.Sync(); err != nil {
				t.Errorf("sync: %v", err)
			}
			if st := m.status(); len(st.Errors) == 0 {
				t.Errorf("status.json tells nothing of it: %+v", st)
			}
			r := h.run("snapshot", "create", vol)
			if r.code != 1 || r.stdout != "" {
				t.Errorf("a snapshot during the outage: %s", r)
			}
			m.write(pages, 24*mib)
			copy(disk[24*mib:], pages)

			over()
			m.equals(disk)
			if st := m.status(); len(st.Errors) != 0 {
				t.Errorf("after the outage: %+v", st.Errors)
			}
			h.waitSettled()
			sameBytes(t, "the snapshot", h.exported(h.ok("snapshot", "create", vol)), disk)
		})
	}
}

func TestHydratorWaitsForTheStore(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	h := newHost(t, s)
	disk := randomBytes(1, 64*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	m := h.mount(snap, "--hydrate-rate", "8MiB", "--read-deadline", "3s")
	waitFor(t, "some of it is hydrated", 10*time.Second, func() bool { return m.status().HydratedBytes > 0 })
	s.server.Stop()
	m.waitState("waiting-for-store", 40*time.Second)
	s.server.Start(t)
	m.waitState("hydrated", 60*time.Second)
	m.equals(disk)
}

func TestVolumeMountsWithoutItsStore(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	h := newHost(t, s)
	disk := randomBytes(1, 8*mib)
	vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
	h.ok("hydrate", "--wait", vol)
	s.server.Stop()
	dir := t.TempDir()
	r := h.run("mount", vol, dir)
	if r.code != 0 || !strings.Contains(r.stderr, "warning") {
		t.Fatalf("%s\nwant exit 0 and a warning", r)
	}
	m := h.mounted(dir)
	m.equals(disk)
	copy(disk, "written while the store is down")
	m.write(disk[:31], 0)
	m.equals(disk)
	m.unmount() // pins and settling wait for the next time
	s.server.Start(t)
	m = m.again(vol)
	m.equals(disk)
	sameBytes(t, "the snapshot", h.exported(h.ok("snapshot", "create", vol)), disk)
}
