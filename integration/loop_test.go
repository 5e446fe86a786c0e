package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// openDirect opens a device without its page cache, until the test ends.
func openDirect(t testing.TB, device string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(device, flags|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // again: the test did it
	return f
}

// One slow fetch must not keep the others of a loop device waiting: without
// ASYNC_DIO, or with too short a queue in the daemon, they would go one by one.
func TestColdReadsOfALoopDeviceAreFetchedAtOnce(t *testing.T) {
	t.Parallel()
	const depth = 48 // of 64 that the daemon allows itself
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	disk := randomBytes(1, depth*blockSize)
	device := h.attach(h.ok("snapshot", "create", h.image(disk)), "--no-hydrate", "--read-ahead=0", "--read-deadline=10m")
	f := openDirect(t, device, os.O_RDONLY)
	gate.close(requests, gets("packs"))
	defer gate.open() // those who wait, should the test fail
	var readers sync.WaitGroup
	cold := 0
	for block := 4; block < depth-4; block++ { // the ends may have been looked at
		cold++
		readers.Go(func() {
			p, off := aligned(pageSize), block*blockSize+pageSize
			if _, err := f.ReadAt(p, int64(off)); err != nil || string(p) != string(disk[off:off+pageSize]) {
				t.Errorf("block %d: wrong bytes or %v", block, err)
			}
		})
	}
	waitFor(t, fmt.Sprintf("%d fetches are under way at once", cold), 2*time.Minute, func() bool { return gate.holding() >= cold })
	gate.open()
	readers.Wait()
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// What a loop device and those who look at it take from the file below.
func TestLoopDeviceHasTheLimitsOfItsFile(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.ok("volume", "create", "--size", "8MiB")
	device := h.attach(vol)
	name := filepath.Base(device)
	for file, want := range map[string]string{
		"loop/dio":                  "1",
		"queue/discard_granularity": "4096",
		"queue/read_ahead_kb":       "4096",
		"size":                      strconv.Itoa(8 * mib / 512),
	} {
		if got := sysfs(t, name, file); got != want {
			t.Errorf("%s of %s is %s, want %s", file, device, got, want)
		}
	}
	if got := sysfs(t, name, "queue/discard_max_bytes"); got == "0" {
		t.Error("the device takes no discards")
	}
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Join(h.state, "attached", vol, "volume.img"), &st); err != nil || st.Bsize != pageSize {
		t.Errorf("statfs of the file: blocks of %d, %v", st.Bsize, err)
	}
}

// mkfs discards the whole device first. What was there before is neither
// fetched nor stored again.
func TestMakingAFilesystemForgetsWhatWasThere(t *testing.T) {
	t.Parallel()
	for name, f := range filesystems {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, newDirStore(t))
			disk := make([]byte, 320*mib)
			const old = 48 * mib
			fill(newRand(1), disk[100*mib:100*mib+old])
			snap := h.ok("snapshot", "create", h.image(disk))
			vol := h.ok("volume", "create", "--snapshot", snap)
			device := h.attach(vol, "--no-hydrate")
			tool(t, f.mkfs[0], append(f.mkfs[1:], device)...)
			tool(t, "blockdev", "--flushbufs", device)
			status := parse[status](t, h.ok("status", "--json", vol))
			if status.FetchedBytes > old/4 {
				t.Errorf("%d bytes of what was discarded were fetched", status.FetchedBytes)
			}
			made := h.ok("snapshot", "create", vol)
			if info := h.show(made); info.FullSnapshotSizeInBytes > 24*mib || info.StoredBytes > 2*mib {
				t.Errorf("the snapshot of an empty filesystem: %+v", info)
			}
			if got := readAt(t, device, 100*mib+old/2, mib); string(got) == string(disk[100*mib+old/2:][:mib]) {
				t.Error("discarded, and there")
			}
			other := newHost(t, h.store)
			restored := other.attach(made)
			tool(t, f.check[0], append(f.check[1:], restored)...)
			other.ok("detach", restored)

			tool(t, "blkdiscard", "-f", device)
			empty := h.ok("snapshot", "create", vol)
			if info := h.show(empty); info.FullSnapshotSizeInBytes != 0 {
				t.Errorf("the snapshot of a discarded device: %+v", info)
			}
			sameBytes(t, "the export", other.exported(empty), make([]byte, len(disk)))
		})
	}
}

// maxDaemonMemory bounds a daemon's resident memory while the queues of its
// mount are full: 160 MiB of requests, the blocks that 128 reads of 1 MiB wait
// for, their answers, and the runtime.
const maxDaemonMemory = (160 + 128 + 128 + 96) * mib

// Requests that fill the queue of a loop device do not make the daemon grow
// without bounds.
func TestFullQueuesTakeBoundedMemory(t *testing.T) {
	t.Parallel()
	const depth, size = 128, 192 * mib
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	disk := randomBytes(1, size)
	vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
	device := h.attach(vol, "--no-hydrate", "--read-ahead=0", "--read-deadline=10m")
	daemon := parse[status](t, h.ok("status", "--json", vol)).PID
	f := openDirect(t, device, os.O_RDWR)
	gate.close(requests, gets("packs"))
	defer gate.open() // those who wait, should the test fail
	var all sync.WaitGroup
	for i := range depth {
		all.Go(func() {
			p := aligned(mib)
			if _, err := f.ReadAt(p, int64(i)*mib); err != nil || string(p) != string(disk[i*mib:][:mib]) {
				t.Errorf("read %d: wrong bytes or %v", i, err)
			}
		})
	}
	waitFor(t, "the daemon's requests are all under way", 2*time.Minute, func() bool { return gate.holding() >= 64 })
	gate.open()
	all.Wait()
	page := aligned(mib)
	fill(newRand(2), page)
	for round := range 3 {
		for i := range depth {
			all.Go(func() {
				if _, err := f.WriteAt(page, int64((i+round*37)%(size/mib))*mib); err != nil {
					t.Errorf("write %d: %v", i, err)
				}
			})
		}
		all.Wait()
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	peak := peakMemory(t, daemon)
	t.Logf("the daemon took %d MiB", peak/mib)
	if peak > maxDaemonMemory && os.Getenv("LAZYVOL_RACE") == "" { // the detector takes more than that itself
		t.Errorf("the daemon took %d MiB of memory", peak/mib)
	}
}

// peakMemory returns the most memory that a process has had resident.
func peakMemory(t testing.TB, pid int) int64 {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kb * kib
		}
	}
	t.Fatalf("no peak in:\n%s", data)
	return 0
}
