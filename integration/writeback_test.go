package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// unprivileged returns a lazyvol without CAP_SYS_RESOURCE, whoever runs it.
func (h *host) unprivileged() {
	h.t.Helper()
	script := fmt.Sprintf("#!/bin/sh\nexec setpriv --bounding-set=-sys_resource -- %s \"$@\"\n", h.binary)
	h.binary = filepath.Join(h.dir, "lazyvol")
	if err := os.WriteFile(h.binary, []byte(script), 0o700); err != nil {
		h.t.Fatal(err)
	}
}

// mayFlush reports whether this process may be an I/O flusher.
func mayFlush(t testing.TB) bool {
	t.Helper()
	_, _, errno := syscall.Syscall6(syscall.SYS_PRCTL, unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0, 0)
	if errno != 0 && errno != syscall.EPERM {
		t.Fatalf("PR_GET_IO_FLUSHER: %v", errno)
	}
	return errno == 0
}

// The flags of a thread that is an I/O flusher: PF_MEMALLOC_NOIO and
// PF_LOCAL_THROTTLE of linux/sched.h.
const flusherFlags = 0x0008_0000 | 0x0010_0000

// Every thread of a daemon is an I/O flusher where that is permitted, and a
// daemon works where it is not.
func TestDaemonIsAnIOFlusher(t *testing.T) {
	t.Parallel()
	for name, drop := range map[string]bool{"as permitted": false, "without the permission": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, nil)
			want := mayFlush(t) && !drop
			if drop {
				h.unprivileged()
			}
			vol := h.ok("volume", "create", "--size", "4MiB")
			m := h.mount(vol)
			m.write([]byte("works"), 0)
			threads := glob(t, fmt.Sprintf("/proc/%d/task/*/stat", m.pid))
			for _, file := range threads {
				stat, err := os.ReadFile(file)
				if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
					continue // it has ended
				}
				if err != nil {
					t.Fatal(err)
				}
				// After the name, in brackets: state, five numbers, the flags.
				fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
				flags, err := strconv.ParseUint(fields[6], 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				if is := flags&flusherFlags == flusherFlags; is != want {
					t.Errorf("a thread has the flags %#x; an I/O flusher: %t, want %t", flags, is, want)
				}
			}
			t.Logf("%d threads, I/O flushers: %t", len(threads), want)
			env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", m.pid))
			if err != nil {
				t.Fatal(err)
			}
			if again := strings.Contains(string(env), "LAZYVOL_IO_FLUSHER="); again != want {
				t.Errorf("executed again: %t, want %t", again, want)
			}
			m.unmount()
		})
	}
}

// A writer that dirties far more of a loop device's page cache than the host may
// have comes to its end: what the kernel lets it wait for is what the daemon
// writes, which must not wait for it in turn. It runs alone: the limit is one of
// the whole host, and everybody's dirty pages count.
func TestDirtyLoopDeviceIsWrittenBack(t *testing.T) {
	limit, size := int64(16*mib), int64(96*mib)
	if stressed() {
		limit, size = 64*mib, 2*gib
	}
	data := filepath.Join(t.TempDir(), "data")
	tool(t, "dd", "if=/dev/urandom", "of="+data, "bs=1M", fmt.Sprintf("count=%d", size/mib), "status=none")
	limitDirty(t, limit)
	runs := map[string]bool{"without the permission": true}
	if mayFlush(t) {
		runs["with it"] = false
	}
	for name, drop := range runs {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, newDirStore(t))
			if drop {
				h.unprivileged()
			}
			device := h.attach(h.ok("volume", "create", "--size", strconv.FormatInt(size, 10)))
			const patience = "600" // seconds: it ends, or never would
			tool(t, "timeout", patience, "dd", "if="+data, "of="+device, "bs=1M", "conv=fsync", "status=none")
			tool(t, "blockdev", "--flushbufs", device)
			tool(t, "cmp", data, device)
		})
	}
}

// limitDirty sets how many bytes of the page cache may be dirty, on the whole
// host, until the test ends.
func limitDirty(t testing.TB, n int64) {
	t.Helper()
	restore, err := dirtyLimits()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := restore(); err != nil {
			t.Error(err)
		}
	})
	if err := os.WriteFile("/proc/sys/vm/dirty_bytes", []byte(strconv.FormatInt(n, 10)), 0); err != nil {
		t.Fatal(err)
	}
}

// dirtyLimits returns a function that makes the host's limits what they are now.
// Of each pair one is in force, and the other 0.
func dirtyLimits() (restore func() error, err error) {
	values := make(map[string][]byte)
	for _, name := range []string{"dirty_bytes", "dirty_ratio", "dirty_background_bytes", "dirty_background_ratio"} {
		file := filepath.Join("/proc/sys/vm", name)
		value, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		if strings.TrimSpace(string(value)) != "0" {
			values[file] = value
		}
	}
	return func() (err error) {
		for file, value := range values {
			now, readErr := os.ReadFile(file)
			if err = errors.Join(err, readErr); string(now) != string(value) {
				err = errors.Join(err, os.WriteFile(file, value, 0))
			}
		}
		return err
	}, nil
}
