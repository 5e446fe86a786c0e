package integration

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"
)

// kills is how often the daemon of each kind of volume is killed under load.
func kills() int {
	if stressed() {
		return 60
	}
	return 2
}

// What fio was told is written is there after the daemon was killed, whether it
// asked for fsync or not, and in the next snapshot. fio notes how far it came, and
// reads back just that.
func TestKilledDaemonUnderFioKeepsWhatWasAcknowledged(t *testing.T) {
	t.Parallel()
	for _, through := range []string{"volume.img", "volume.img, direct", "loop device"} {
		for _, fsync := range []int{0, 5} {
			t.Run(fmt.Sprintf("%s, fsync %d", through, fsync), func(t *testing.T) {
				t.Parallel()
				r := newRand(modelSeed(t, uint64(fsync)))
				h := newHost(t, newDirStore(t))
				vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(diskBytes(1, 24*mib))))
				under := 0
				for range kills() {
					file, m := h.serve(vol, through == "loop device")
					load := []string{
						"--name=load", "--filename=" + file, "--rw=randwrite", "--size=24M", "--bs=16k", "--verify=crc32c", "--verify_fatal=1", "--minimal",
						"--ioengine=psync", "--direct=" + map[bool]string{true: "0", false: "1"}[through == "volume.img"],
						"--fsync=" + strconv.Itoa(fsync), "--randseed=" + strconv.Itoa(r.IntN(1<<30)), "--rate_iops=2000", "--allow_file_create=0", "--aux-path=" + h.dir,
					}
					if killUnderFio(t, m, r, vol, load) {
						under++
					}
					again, m := h.serve(vol, through == "loop device")
					load[1] = "--filename=" + again
					timed(t, "fio", append(load, "--verify_only=1", "--verify_state_load=1", "--verify_state_save=0")...)

					h.waitSettled()
					want := m.read(0, 24*mib)
					sameBytes(t, "the next snapshot", h.exported(h.ok("snapshot", "create", vol)), want)
					h.settleStore(t)
				}
				t.Logf("survived %d kills, %d of them while fio wrote", kills(), under)
			})
		}
	}
}

// serve mounts or attaches a volume, or takes it as it is served. It returns the
// file or device, and the mount.
func (h *host) serve(vol string, loop bool) (file string, m *mount) {
	h.t.Helper()
	if loop {
		file = h.ok("attach", vol)
		m = h.attached(vol)
		h.t.Cleanup(func() { h.run("detach", vol) }) // before the mount is taken away
		return file, m
	}
	dir := filepath.Join(h.dir, "mnt")
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) { // it may be a dead mountpoint
		h.t.Fatal(err)
	}
	if r := h.run("mount", vol, dir); r.code != 0 && r.code != 4 { // 4: it is served
		h.t.Fatal(r)
	}
	m = h.mounted(dir)
	return m.image, m
}

// settleStore deletes all snapshots but the last, so that the store stays
// small.
func (h *host) settleStore(t testing.TB) {
	t.Helper()
	listed := h.list()
	for _, info := range listed[:len(listed)-1] {
		h.ok("snapshot", "delete", info.SnapshotId)
	}
}

// killUnderFio runs fio and kills the daemon at some moment, now and then in the
// middle of a snapshot. It reports whether fio was still at it.
func killUnderFio(t *testing.T, m *mount, r *rand.Rand, vol string, options []string) bool {
	t.Helper()
	state := filepath.Join(m.h.dir, "local-load-0-verify.state")
	if err := os.Remove(state); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	load := exec.Command("fio", append(options, "--do_verify=0", "--verify_state_save=1")...)
	var said bytes.Buffer
	load.Stdout, load.Stderr = &said, &said
	if err := load.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "fio writes", time.Minute, func() bool { return m.status().DirtyBytes > 0 })
	time.Sleep(time.Duration(r.IntN(300)) * time.Millisecond)
	var create *running
	if r.IntN(2) == 0 {
		create = m.h.begin("snapshot", "create", vol)
		time.Sleep(time.Duration(r.IntN(150)) * time.Millisecond)
	}
	m.kill()
	err := load.Wait() // its errors are those of a file whose daemon is gone
	if create != nil {
		create.wait()
	}
	if _, statErr := os.Stat(state); statErr != nil {
		t.Fatalf("fio did not note how far it came: %v, %v\n%s", statErr, err, &said)
	}
	return err != nil
}

// timed runs a program that must succeed within a minute.
func timed(t testing.TB, name string, args ...string) {
	t.Helper()
	tool(t, "timeout", append([]string{"60", name}, args...)...)
}

// endLoad ends a fio, and what it started, whose disk is gone. xfs tries to write
// metadata again for as long as it is mounted, and may keep it waiting for good.
func endLoad(load *exec.Cmd) {
	group := -load.Process.Pid
	_ = syscall.Kill(group, syscall.SIGTERM) // fails only if it has ended
	patience := time.AfterFunc(10*time.Second, func() { _ = syscall.Kill(group, syscall.SIGKILL) })
	defer patience.Stop()
	_ = load.Wait() // it fails
}

// A filesystem on a volume whose daemon is killed is, after its journal was
// replayed, whole, and holds what was synced.
func TestKilledDaemonUnderAFilesystemKeepsWhatWasSynced(t *testing.T) {
	t.Parallel()
	for name, f := range filesystems {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRand(modelSeed(t, 3))
			h := newHost(t, newDirStore(t))
			vol := h.ok("volume", "create", "--size", f.size)
			device := h.attach(vol)
			timed(t, f.mkfs[0], append(f.mkfs[1:], device)...)
			logged := uint64(0)
			for range kills() {
				dir := mountFS(t, device, "rw")
				journal := startJournal(t, filepath.Join(dir, "journal"), logged)
				load := exec.Command("fio", "--name=load", "--directory="+dir, "--size=16M", "--rw=randwrite", "--bs=16k", "--fsync=16", "--runtime=20", "--time_based", "--minimal")
				load.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
				if err := load.Start(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Duration(200+r.IntN(600)) * time.Millisecond)
				var create *running
				if r.IntN(2) == 0 {
					create = h.begin("snapshot", "create", vol)
					time.Sleep(time.Duration(r.IntN(200)) * time.Millisecond)
				}
				h.attached(vol).kill()
				logged = journal.end()
				endLoad(load)
				if create != nil {
					create.wait()
				}
				timed(t, "umount", "-l", dir)

				device = h.attach(vol)
				dir = mountFS(t, device, "rw")
				if got := lastOf(t, filepath.Join(dir, "journal")); got < logged {
					t.Errorf("the journal ends at %d, and %d was synced", got, logged)
				}
				umount(t, dir)
				timed(t, f.check[0], append(f.check[1:], device)...)
			}
			// What the device holds is what a snapshot restores.
			snap := h.ok("snapshot", "create", vol)
			copied := newHost(t, h.store).attachCopy(snap)
			timed(t, f.check[0], append(f.check[1:], copied)...)
			timed(t, "cmp", device, copied)
			t.Logf("survived %d kills; %d records synced", kills(), logged)
		})
	}
}

// A journal is a file to which numbers are appended, each synced before the
// next.
type journal struct {
	writer sync.WaitGroup
	synced uint64 // to be read after the writer has ended
}

// startJournal appends the numbers after from until that fails.
func startJournal(t testing.TB, path string, from uint64) *journal {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	j := &journal{synced: from}
	j.writer.Go(func() {
		defer f.Close()
		for {
			n := j.synced + 1
			if _, err := f.Write(binary.BigEndian.AppendUint64(nil, n)); err != nil {
				return
			}
			if f.Sync() != nil {
				return
			}
			j.synced = n
		}
	})
	return j
}

// end waits until the journal can be written no more, and returns the last
// number that was synced.
func (j *journal) end() uint64 {
	j.writer.Wait()
	return j.synced
}

// lastOf returns the last number of a journal, in which none may be missing. One
// that was not synced may be there or not, and more than once.
func lastOf(t testing.TB, path string) uint64 {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	last := uint64(0)
	for ; len(data) >= 8; data = data[8:] {
		n := binary.BigEndian.Uint64(data)
		if n > last+1 {
			t.Fatalf("in the journal %d follows %d", n, last)
		}
		last = n
	}
	return last
}
