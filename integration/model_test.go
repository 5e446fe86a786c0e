package integration

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// modelTime is how long each run of the model takes, besides the last check.
func modelTime() time.Duration {
	if stressed() {
		return 10 * time.Minute
	}
	return 12 * time.Second
}

// modelSeed is where the randomness of a run comes from. A run repeats only as
// far as time allows: kills hit where they hit.
func modelSeed(t testing.TB, n uint64) uint64 {
	seed := n
	if stressed() {
		seed = rand.Uint64()
	}
	if s := os.Getenv("LAZYVOL_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("LAZYVOL_SEED=%d", seed)
	return seed
}

func TestVolumeBehavesAsAByteArray(t *testing.T) {
	t.Parallel()
	for i, newStore := range []func(testing.TB) *store{newDirStore, newS3Store} {
		t.Run([]string{"folder", "S3"}[i], func(t *testing.T) {
			t.Parallel()
			s := newStore(t)
			h := newHost(t, s)
			h.binary = lazyvol(t, true)
			m := newModel(t, h, modelSeed(t, uint64(i)))
			for end := time.Now().Add(modelTime()); time.Now().Before(end); {
				m.step()
			}
			m.finish()
		})
	}
}

// A model is a twin that snapshots are made of, one after the other.
type model struct {
	*twin
	snaps map[string][]byte // contents of snapshots that were not checked yet
	other *host             // checks them
}

func newModel(t testing.TB, h *host, seed uint64) *model {
	disk := diskBytes(seed, 11*mib+3*512)
	snap := h.ok("snapshot", "create", h.image(disk))
	disk = append(disk, make([]byte, 2*mib+512)...)
	vol := h.ok("volume", "create", "--snapshot", snap, "--size", strconv.Itoa(len(disk)))
	m := &model{
		twin:  &twin{t: t, h: h, r: newRand(seed), vol: vol, bytes: disk},
		snaps: make(map[string][]byte), other: newHost(t, h.store),
	}
	m.attach()
	return m
}

func (m *model) step() {
	m.steps++
	switch n := m.r.IntN(1000); {
	case n < 400:
		m.read()
	case n < 800:
		m.write()
	case n < 930:
		m.zero()
	case n < 980:
		if err := m.buffered.Sync(); err != nil {
			m.t.Fatal(err)
		}
	case n < 986:
		m.snapshot()
	case n < 990:
		m.remount((*mount).unmount)
		m.checkAll()
	case n < 994:
		m.kill()
		m.checkAll()
	case n < 998:
		m.killWhileWriting()
	default:
		m.killWhileSnapshotting()
	}
}

func (m *model) snapshot() {
	m.snaps[m.h.ok("snapshot", "create", m.vol)] = bytes.Clone(m.bytes)
	if len(m.snaps) >= 4 {
		m.checkSnapshots()
	}
}

// checkSnapshots compares all snapshots with what the device held, and deletes
// some.
func (m *model) checkSnapshots() {
	for snap, want := range m.snaps {
		sameBytes(m.t, fmt.Sprintf("step %d: %s", m.steps, snap), m.other.exported(snap), want)
		if m.r.IntN(2) == 0 {
			m.other.ok("snapshot", "delete", snap)
		}
	}
	clear(m.snaps)
}

// killWhileSnapshotting kills the daemon at some moment of a snapshot, which
// is then whole or not there.
func (m *model) killWhileSnapshotting() {
	before := make(map[string]bool)
	for _, info := range m.h.list() {
		before[info.SnapshotId] = true
	}
	create := m.h.begin("snapshot", "create", m.vol)
	time.Sleep(time.Duration(m.r.IntN(60)) * time.Millisecond)
	m.kill()
	m.checkAll()
	r := create.wait()
	m.h.waitSettled()
	m.checkAll()
	made := ""
	for _, info := range m.h.list() {
		if !before[info.SnapshotId] {
			made = info.SnapshotId
			m.snaps[made] = bytes.Clone(m.bytes)
		}
	}
	if printed := strings.TrimSpace(r.stdout); printed != "" && printed != made {
		m.t.Fatalf("step %d: %s\nbut the store has %q", m.steps, r, made)
	}
}

// waitSettled waits until no snapshot of the store is pending.
func (h *host) waitSettled() {
	h.t.Helper()
	waitFor(h.t, "interrupted snapshots are settled", 20*time.Second, func() bool {
		for _, info := range h.list() {
			if info.State == "pending" {
				return false
			}
		}
		return true
	})
}

// finish checks everything one last time.
func (m *model) finish() {
	m.checkAll()
	m.snapshot()
	m.checkSnapshots()
	m.remount((*mount).unmount)
	m.checkAll()
	m.t.Logf("%d steps, survived %d kills", m.steps, m.kills)
}
