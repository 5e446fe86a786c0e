package integration

import (
	"bytes"
	"path/filepath"
	"testing"
	"time"
)

func TestMountsOfOneSnapshotShareItsBase(t *testing.T) {
	t.Parallel()
	s, gate := newGatedStore(t)
	h := newHost(t, s)
	disk := randomBytes(1, 48*mib)
	snap := h.ok("snapshot", "create", h.image(disk))

	gate.count("GET data")
	first := h.mount(snap)
	second := h.mount(snap)
	first.equals(disk)
	second.equals(disk)
	first.waitState("hydrated", time.Minute)
	second.waitState("hydrated", time.Minute)
	first.equals(disk)
	second.equals(disk)
	// A reader does not wait for what the background fetches meanwhile, so that it
	// may come twice; but one of the two mounts fetches for both.
	a, b := first.status().FetchedBytes, second.status().FetchedBytes
	if n := gate.count("GET data"); n == 0 || max(a, b) > 48*mib*7/4 || min(a, b) > 48*mib/3 {
		t.Errorf("two mounts fetched %d and %d bytes of 48 MiB in %d requests", a, b, n)
	}
	if bases := glob(t, filepath.Join(h.state, "bases", "*", snap, "data")); len(bases) != 1 || allocated(t, bases[0]) > 50*mib {
		t.Errorf("bases: %v", bases)
	}

	gate.count("GET data")
	third := h.mount(snap) // finds all of it
	third.equals(disk)
	if n := gate.count("GET data"); n > 1 {
		t.Errorf("the third mount of a complete base fetched %d times", n)
	}
	first.kill()
	second.equals(disk)
	third.unmount()
	second.equals(disk)
	first = first.again(snap)
	first.equals(disk)
}

func glob(t testing.TB, pattern string) []string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestAnotherMountTakesOverTheHydration(t *testing.T) {
	t.Parallel()
	h := newHost(t, newDirStore(t))
	disk := randomBytes(1, 64*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	first := h.mount(snap, "--hydrate-rate", "8MiB")
	waitFor(t, "the first hydrates", 10*time.Second, func() bool { return first.status().FetchedBytes > 0 })
	second := h.mount(snap)
	first.kill()
	second.waitState("hydrated", 30*time.Second)
	second.equals(disk)
}

func TestVolumesOfOneSnapshotDoNotSeeEachOther(t *testing.T) {
	t.Parallel()
	h := newHost(t, newS3Store(t))
	disk := diskBytes(1, 24*mib)
	snap := h.ok("snapshot", "create", h.image(disk))
	image := h.mount(snap)
	contents := [][]byte{bytes.Clone(disk), bytes.Clone(disk)}
	volumes := []string{h.ok("volume", "create", "--snapshot", snap), h.ok("volume", "create", "--snapshot", snap)}
	var mounts []*mount
	for _, vol := range volumes {
		mounts = append(mounts, h.mount(vol))
	}
	r := newRand(7)
	for round := range 3 {
		for i, m := range mounts {
			for range 20 {
				off := r.IntN(len(disk) - 64*kib)
				p := contents[i][off : off+r.IntN(64*kib)]
				fill(r, p)
				m.write(p, int64(off))
			}
		}
		if round == 1 {
			sameBytes(t, "the first's snapshot", h.exported(h.ok("snapshot", "create", volumes[0])), contents[0])
		}
	}
	for i, m := range mounts {
		m.equals(contents[i])
	}
	image.equals(disk)
}

func TestAVolumeIsMountedOnce(t *testing.T) {
	t.Parallel()
	h := newHost(t, nil)
	vol := h.ok("volume", "create", "--size", "4MiB")
	m := h.mount(vol)
	h.fails(4, []string{"in use"}, "mount", vol, t.TempDir())
	h.fails(4, []string{"already"}, "mount", vol, m.dir)
	m.write([]byte("still mounted"), 0)
}
