package integration

import (
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestKilledDaemonLosesNoAcknowledgedWrite(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := diskBytes(1, 16*mib)
	vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
	m := h.mount(vol)
	r := newRand(3)
	for range 5 {
		f := m.open(os.O_RDWR)
		for range 40 {
			off := r.IntN(len(disk) - 128*kib)
			p := disk[off : off+1+r.IntN(128*kib)]
			fill(r, p)
			if _, err := f.WriteAt(p, int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		m.kill()
		m = m.again(vol) // on the dead mountpoint
		m.equals(disk)
	}
	snap := h.ok("snapshot", "create", vol)
	sameBytes(t, "the snapshot", newHost(t, h.store).exported(snap), disk)
}

// Readers that wait for the store, and writers beside them, are let go, and
// keep nothing of the daemon alive.
func TestKilledDaemonLetsGoOfThoseThatWait(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	disk := randomBytes(1, 16*mib)
	vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
	m := h.mount(vol, "--no-hydrate")
	writer := m.open(os.O_RDWR | unix.O_DIRECT)
	reader := m.open(os.O_RDWR)
	gate.close(requests, gets("packs"))
	failed := make(chan error, 2)
	go func() {
		_, err := reader.ReadAt(make([]byte, mib), 4*mib)
		failed <- err
	}()
	gate.waitHolding(t)
	go func() {
		_, err := reader.WriteAt([]byte("part of a page"), 9*mib) // which is fetched first
		failed <- err
	}()
	page := aligned(pageSize)
	for off := 4 * mib; off < 5*mib; off += 16 * pageSize {
		fill(newRand(uint64(off)), page)
		if _, err := writer.WriteAt(page, int64(off)); err != nil {
			t.Fatal(err)
		}
		copy(disk[off:], page)
	}
	m.kill()
	for range 2 {
		select {
		case err := <-failed:
			if err == nil {
				t.Error("a read of what could not be fetched succeeded")
			}
		case <-time.After(10 * time.Second):
			t.Fatal("a reader or writer waits for a daemon that was killed")
		}
	}
	gate.open()
	m = m.again(vol)
	m.equals(disk)
}

// A daemon that is killed in the middle of a snapshot leaves it committed, or
// not there; the volume and its next snapshot have every change.
func TestDaemonKilledInTheMiddleOfASnapshotSettlesIt(t *testing.T) {
	t.Parallel()
	for name, at := range map[string]side{"before": requests, "after": replies} {
		for _, kind := range []string{"intents", "packs", "leaves", "pins", "outcomes"} {
			committed := at == replies && kind == "outcomes"
			t.Run(name+" "+kind+" arrive", func(t *testing.T) {
				t.Parallel()
				s, gate := newGatedStore(t)
				h := newHost(t, s)
				disk := diskBytes(1, 12*mib)
				first := h.ok("snapshot", "create", h.image(disk))
				vol := h.ok("volume", "create", "--snapshot", first)
				m := h.mount(vol)
				fill(newRand(2), disk[2*mib:7*mib+100])
				m.write(disk[2*mib:7*mib+100], 2*mib)
				cut := string(disk)

				gate.close(at, puts(kind))
				create := h.begin("snapshot", "create", vol)
				gate.waitHolding(t)
				if kind != "intents" { // after it, writes are those of the next snapshot
					copy(disk[5*mib:], "written after the cut")
					m.write(disk[5*mib:5*mib+100], 5*mib)
				}
				m.kill()
				create.wait().failed(t, 1)
				gate.open()

				m = m.again(vol)
				m.equals(disk)
				h.waitSettled()
				listed := h.list()
				if want := map[bool]int{false: 1, true: 2}[committed]; len(listed) != want {
					t.Fatalf("list shows %+v, want %d snapshots", listed, want)
				}
				if committed {
					sameBytes(t, "the snapshot", h.exported(listed[1].SnapshotId), []byte(cut))
					if root := m.status().Root; root != listed[1].SnapshotId {
						t.Errorf("the volume's root is %s", root)
					}
				}
				m.equals(disk)
				next := h.ok("snapshot", "create", vol)
				sameBytes(t, "the next snapshot", h.exported(next), disk)
				m.equals(disk)
				m.unmount()
				m = m.again(vol)
				m.equals(disk)

				h.takeAllAway(m, vol)
			})
		}
	}
}

func TestKilledSnapshotOfAnUnmountedVolumeIsSettledByTheNext(t *testing.T) {
	t.Parallel()
	for kind, snapshots := range map[string]int{"packs": 1, "outcomes": 2} { // the last one's reply was lost
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			s, gate := newGatedStore(t)
			h := newHost(t, s)
			vol := h.ok("volume", "create", "--size", "8MiB")
			disk := randomBytes(1, 8*mib)
			m := h.mount(vol)
			m.write(disk, 0)
			m.unmount()
			gate.close(replies, puts(kind))
			create := h.begin("snapshot", "create", vol)
			gate.waitHolding(t)
			create.signal(syscall.SIGKILL)
			create.wait()
			gate.open()
			h.ok("snapshot", "create", vol)
			listed := h.list()
			if len(listed) != snapshots {
				t.Errorf("list: %+v, want %d", listed, snapshots)
			}
			for _, info := range listed {
				sameBytes(t, info.SnapshotId, h.exported(info.SnapshotId), disk)
			}
		})
	}
}
