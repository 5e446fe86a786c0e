package integration

import (
	"os"
	"testing"
	"time"
)

func TestHydrationPausesResumesAndFinishes(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	const size = 160 * mib // ten packs, more than are fetched at once
	disk := randomBytes(1, size)
	vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
	m := h.mount(vol, "--no-hydrate")
	if st := m.status(); st.State != "paused" || st.HydratedBytes != 0 || st.TotalBytes != size {
		t.Errorf("--no-hydrate: %+v", st)
	}
	gate.count("GET data")
	time.Sleep(300 * time.Millisecond)
	if n := gate.count("GET data"); n != 0 {
		t.Errorf("--no-hydrate fetched %d times", n)
	}

	gate.close(requests, gets("packs"))
	h.ok("hydrate", "--resume", vol)
	gate.waitHolding(t)
	if st := m.status(); st.State != "hydrating" {
		t.Errorf("resumed: %+v", st)
	}
	h.ok("hydrate", "--pause", vol)
	gate.open()
	waitFor(t, "what was under way lands", 20*time.Second, func() bool {
		before := m.status().HydratedBytes
		time.Sleep(500 * time.Millisecond)
		return before > 0 && m.status().HydratedBytes == before
	})
	if st := m.status(); st.State != "paused" || st.HydratedBytes >= size {
		t.Errorf("paused: %+v", st)
	}
	h.ok("hydrate", "--wait", vol)
	if st := m.status(); st.State != "hydrated" || st.HydratedBytes != size || st.DemandFetches != 0 {
		t.Errorf("after --wait: %+v", st)
	}
	gate.close(requests, gets("packs"))
	m.equals(disk) // asks the store for nothing
}

func TestHydrateRateIsALimit(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	snap := h.ok("snapshot", "create", h.image(randomBytes(1, 96*mib)))
	m := h.mount(snap, "--hydrate-rate", "8MiB")
	first := m.status().FetchedBytes
	start := time.Now()
	waitFor(t, "the hydrator has begun", 10*time.Second, func() bool { return m.status().HydratedBytes > 0 })
	time.Sleep(2 * time.Second)
	got := m.status().FetchedBytes - first
	// A pack may be under way, and one may have been allowed at once.
	if most := int64(time.Since(start).Seconds()*8*mib) + 33*mib; got > most {
		t.Errorf("%d bytes were fetched in %s, want at most %d", got, time.Since(start), most)
	}
	if s := m.status(); s.State != "hydrating" || s.ETASeconds == nil {
		t.Errorf("status: %+v", s)
	}
}

func TestHydrationGoesOnWhereItStopped(t *testing.T) {
	t.Parallel()
	s := newS3Store(t)
	const size = 96 * mib
	disk := randomBytes(1, size)
	maker := newHost(t, s)
	snap := maker.ok("snapshot", "create", maker.image(disk))
	for name, end := range map[string]func(*mount){"unmounted": (*mount).unmount, "killed": (*mount).kill} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := newHost(t, s)
			vol := h.ok("volume", "create", "--snapshot", snap)
			m := h.mount(vol, "--hydrate-rate", "8MiB")
			waitFor(t, "some of it is hydrated", 20*time.Second, func() bool { return m.status().HydratedBytes >= 16*mib })
			end(m)
			before := parse[status](t, h.ok("status", "--json", vol)).HydratedBytes
			if before < 16*mib || before == size {
				t.Fatalf("%d bytes were hydrated before the restart", before)
			}
			m = m.again(vol)
			h.ok("hydrate", "--wait", vol)
			// Besides the missing blocks: the slack of ranges, and a leaf.
			if st := m.status(); st.HydratedBytes != size || st.FetchedBytes > size-before+2*mib {
				t.Errorf("%d bytes were missing: %+v", size-before, st)
			}
			m.equals(disk)
		})
	}
}

func TestUnmountedVolumeIsHydratedByTheCommand(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	disk := randomBytes(1, 20*mib)
	vol := h.ok("volume", "create", "--snapshot", h.ok("snapshot", "create", h.image(disk)))
	h.ok("hydrate", "--wait", vol)
	if st := parse[status](t, h.ok("status", "--json", vol)); st.State != "hydrated" || st.HydratedBytes != 20*mib {
		t.Errorf("status: %+v", st)
	}
	m := h.mount(vol)
	gate.close(requests, gets("packs"))
	m.equals(disk)
	h.fails(4, []string{"not mounted"}, "hydrate", "--pause", h.ok("volume", "create", "--size", "1MiB"))
}

func TestManyReadersOfABlockFetchItOnce(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	disk := randomBytes(1, 8*mib)
	m := h.mount(h.ok("snapshot", "create", h.image(disk)), "--no-hydrate")
	m.read(7*mib, 1) // so that the leaf is there
	gate.count("GET data")
	gate.close(requests, gets("packs"))
	const readers = 16
	done := make(chan []byte, readers)
	for i := range readers {
		f := m.open(os.O_RDONLY)
		go func() {
			p := make([]byte, 100)
			if _, err := f.ReadAt(p, int64(2*mib+i*20*kib)); err != nil {
				t.Error(err)
			}
			done <- p
		}()
	}
	gate.waitHolding(t)
	time.Sleep(200 * time.Millisecond)
	gate.open()
	for range readers {
		<-done
	}
	// Readahead may have asked for what follows.
	if n := gate.count("GET data"); n > 3 {
		t.Errorf("%d readers of one block fetched %d times", readers, n)
	}
	m.equals(disk)
}
